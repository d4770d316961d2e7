"""Each function against the scalar reference: values, and gradients by their closed forms."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import (
    aggregate_token_losses,
    compute_entropy,
    compute_group_normalized_rewards,
    compute_grpo_clip_loss,
    compute_policy_gradient_loss,
    get_response_log_probs,
    masked_mean,
    masked_normalize,
    masked_sum,
    normalize_group_rewards,
    select_log_probs,
    sft_microbatch_loss,
    sft_microbatch_train_step,
    tokenize_prompt_and_output,
)
from tests.oracle import reference
from tests.strategies import (
    CLIPRANGES,
    Batch,
    batches,
    floats,
    grouped_rewards,
    logits_and_labels,
    masked_tensors,
    token_sets,
)
from tests.tiny import CHARACTERS, make_tiny_policy, make_tiny_tokenizer

LOSS_TYPES = st.sampled_from(["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"])
AGGREGATIONS = st.sampled_from(["sequence_mean", "token_mean", "prompt_mean", "sequence_sum", "constant"])
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0])
WORDS = st.text(CHARACTERS, max_size=6)


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, **tolerance) -> None:
    assert_close(actual, expected, rtol=1e-10, atol=1e-12, equal_nan=True, **tolerance)


def slices(tensor: torch.Tensor, dim: int | None) -> list[list]:
    return [tensor.flatten().tolist()] if dim is None else (tensor if dim == 1 else tensor.T).tolist()


@given(masked_tensors(), st.sampled_from([None, 0, 1]), st.sampled_from([0.5, 3.0, -2.0]))
def test_masked_reductions_match_oracle(inputs, dim, constant):
    tensor, mask = inputs
    rows = list(zip(slices(tensor, dim), slices(mask, dim), strict=True))
    sums = float64([reference.masked_sum(*row) for row in rows])
    means = float64([reference.masked_mean(*row) for row in rows])
    close(masked_sum(tensor, mask, dim).reshape(-1), sums)
    close(masked_mean(tensor, mask, dim).reshape(-1), means)
    close(masked_normalize(tensor, mask, constant, dim).reshape(-1), sums / constant)


@given(logits_and_labels(unreachable=True), TEMPERATURES)
def test_entropy_and_gradient_match_oracle(inputs, temperature):
    logits = inputs[0].requires_grad_()
    scaled = (inputs[0] / temperature).tolist()
    entropy = compute_entropy(logits, temperature=temperature)
    entropy.sum().backward()
    close(entropy, float64([reference.entropy(row) for row in scaled]))
    close(logits.grad, float64([reference.entropy_gradient(row) for row in scaled]) / temperature)


@given(logits_and_labels(unreachable=True), TEMPERATURES)
def test_log_probs_and_gradient_match_oracle(inputs, temperature):
    logits, labels = inputs[0].requires_grad_(), inputs[1].tolist()
    rows = list(zip((inputs[0] / temperature).tolist(), labels, strict=True))
    log_probs = select_log_probs(logits, inputs[1], temperature=temperature)
    log_probs.sum().backward()
    close(log_probs, float64([reference.log_prob(*row) for row in rows]))
    close(logits.grad, float64([reference.log_prob_gradient(*row) for row in rows]) / temperature)


@given(st.data(), TEMPERATURES)
def test_values_over_token_sets_match_oracle(data, temperature):
    leaf, labels = data.draw(logits_and_labels())
    kept, excluded, members = data.draw(token_sets(labels, leaf.shape[-1]))
    sets = {"temperature": temperature, "kept_ids": kept, "excluded_ids": excluded}
    scaled, leaf = (leaf / temperature).tolist(), leaf.requires_grad_()
    left = [row.nonzero()[:, 0].tolist() for row in members]
    expected = [reference.log_prob_over(*row) for row in zip(scaled, labels.tolist(), left, strict=True)]
    spread = [reference.entropy_over(*row) for row in zip(scaled, left, strict=True)]
    for values, oracle in (
        (select_log_probs(leaf, labels, **sets), expected),
        (compute_entropy(leaf, **sets), spread),
    ):
        close(values, float64([value for value, _ in oracle]))
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        close(gradient, float64([row for _, row in oracle]) / temperature)


@given(grouped_rewards(), st.sampled_from([0.0, 1e-6, 0.25]), st.booleans())
def test_group_normalization_matches_oracle(inputs, eps, by_std):
    rewards, size = inputs
    groups = [rewards.tolist()[start : start + size] for start in range(0, len(rewards), size)]
    expected = [advantage for group in groups for advantage in reference.group_advantages(group, eps, by_std)]
    actual = normalize_group_rewards(rewards, size, advantage_eps=eps, normalize_by_std=by_std)
    close(actual, float64(expected))


@given(grouped_rewards(), st.sampled_from([1e-6, 0.25]), st.booleans())
def test_group_normalized_rewards_and_metadata_match_oracle(inputs, eps, by_std):
    rewards, size = inputs[0].tolist(), inputs[1]

    def reward_fn(response, truth):
        value = rewards[int(response)] if truth == f"truth {response}" else math.nan
        return {"reward": value, "format_reward": 2 * value, "answer_reward": -value}

    names = [str(index) for index in range(len(rewards))]
    advantages, raw, metadata = compute_group_normalized_rewards(
        reward_fn, names, [f"truth {name}" for name in names], size, eps, by_std
    )
    assert advantages.dtype == raw.dtype == torch.float32
    assert raw.tolist() == rewards
    assert torch.equal(advantages, normalize_group_rewards(raw, size, advantage_eps=eps, normalize_by_std=by_std))
    groups = [rewards[start : start + size] for start in range(0, len(rewards), size)]
    mean = math.fsum(rewards) / len(rewards)
    expected = {
        "reward": mean,
        "reward_std": math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)),
        "reward_min": min(rewards),
        "reward_max": max(rewards),
        "format_reward": 2 * mean,
        "answer_reward": -mean,
        "zero_std_groups": sum(min(group) == max(group) for group in groups) / len(groups),
        "unscored": 0.0,
    }
    assert set(metadata) == set(expected)
    assert_close(metadata, expected, rtol=1e-5, atol=1e-6)


@given(batches(), LOSS_TYPES)
def test_token_losses_and_gradient_match_oracle(batch: Batch, loss_type):
    policy = batch.policy_log_probs.requires_grad_()
    losses, _ = compute_policy_gradient_loss(
        policy, loss_type, batch.raw_rewards, batch.advantages, batch.old_log_probs, batch.cliprange
    )
    losses.sum().backward()
    for row, column in torch.cartesian_prod(*map(torch.arange, policy.shape)).tolist():
        loss, slope = reference.token_loss(
            loss_type,
            batch.raw_rewards[row, 0].item(),
            batch.advantages[row, 0].item(),
            policy[row, column].item(),
            batch.old_log_probs[row, column].item(),
            batch.cliprange,
        )
        close(losses[row, column].item(), loss)
        close(policy.grad[row, column].item(), slope)


@given(batches(), CLIPRANGES)
def test_is_clipped_matches_oracle(batch: Batch, cliprange):
    _, metadata = compute_grpo_clip_loss(batch.advantages, batch.policy_log_probs, batch.old_log_probs, cliprange)
    assert set(metadata) == {"is_clipped", "is_clipped_low", "is_clipped_high"}
    for row, column in torch.cartesian_prod(*map(torch.arange, batch.policy_log_probs.shape)).tolist():
        binds = reference.clip_binds(
            batch.advantages[row, 0].item(),
            batch.policy_log_probs[row, column].item(),
            batch.old_log_probs[row, column].item(),
            cliprange,
        )
        assert metadata["is_clipped"][row, column].item() is binds


@given(batches(), AGGREGATIONS, floats(0.5, 9))
def test_aggregation_and_weights_match_oracle(batch: Batch, aggregation, constant):
    losses, mask = batch.policy_log_probs.requires_grad_(), batch.response_mask
    total = aggregate_token_losses(losses, mask, aggregation, normalize_constant=constant, group_sizes=1)
    total.backward()
    close(total.item(), reference.aggregate(losses.tolist(), mask.tolist(), aggregation, constant))
    weights = [reference.token_weight(aggregation, row, mask.tolist(), constant) for row in range(len(mask))]
    close(losses.grad, float64(weights)[:, None] * mask)


@given(batches(), st.integers(1, 4), floats(0.5, 9))
def test_sft_loss_matches_oracle(batch: Batch, steps, constant):
    policy, mask = batch.policy_log_probs.requires_grad_(), batch.response_mask
    loss, metadata = sft_microbatch_loss(policy, mask, steps, constant)
    loss.backward()
    close(loss.item(), -reference.aggregate(policy.tolist(), mask.tolist(), "constant", constant) / steps)
    close(policy.grad, -mask.double() / (constant * len(mask) * steps))
    assert set(metadata) == {"response_tokens", "nll"}
    assert metadata["response_tokens"].item() == mask.sum().item()
    mean = reference.masked_mean(policy.flatten().tolist(), mask.flatten().tolist())
    close(metadata["nll"].item(), -mean if mask.any() else 0.0)
    trained = policy.detach().clone().requires_grad_()
    value, described = sft_microbatch_train_step(trained, mask, steps, constant)
    assert not value.requires_grad
    close((value, trained.grad, described), (loss.detach(), policy.grad, metadata))


@given(st.lists(st.tuples(st.text(CHARACTERS, min_size=1, max_size=6), WORDS), min_size=1, max_size=4))
def test_tokenization_matches_oracle(pairs):
    tokenizer = make_tiny_tokenizer()
    prompts, outputs = [prompt for prompt, _ in pairs], [output for _, output in pairs]
    tensors = tokenize_prompt_and_output(prompts, outputs, tokenizer)
    width = max(len(prompt) + len(output) for prompt, output in pairs)
    for row, pair in enumerate(pairs):
        ids = [[CHARACTERS.index(letter) + 2 for letter in text] for text in pair]
        actual = [tensors[name][row].tolist() for name in ("input_ids", "labels", "response_mask")]
        assert list(zip(*actual, strict=True)) == reference.tokenized_row(*ids, width, pad=0)


def test_scores_of_a_model_match_oracle():
    """Log-probability and entropy of each label, from logits computed one prefix at a time."""
    policy = make_tiny_policy(seed=1).double()
    tensors = tokenize_prompt_and_output(["2+3=", "7-"], ["5.", "1=6 "], make_tiny_tokenizer())
    scores = get_response_log_probs(
        policy, tensors["input_ids"], tensors["labels"], return_token_entropy=True, temperature=0.7
    )
    for row, (ids, labels) in enumerate(zip(tensors["input_ids"], tensors["labels"].tolist(), strict=True)):
        for place, label in enumerate(labels):
            logits = (policy(ids[None, : place + 1]).logits[0, -1] / 0.7).tolist()
            assert_close(scores["log_probs"][row, place].item(), reference.log_prob(logits, label), rtol=1e-6, atol=0)
            assert_close(scores["token_entropy"][row, place].item(), reference.entropy(logits), rtol=1e-6, atol=0)
