"""The adapters for both editions of CS336 assignment 5, against arithmetic of their own."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from tests import adapters, adapters_2026
from tests.tiny import make_tiny_policy, make_tiny_tokenizer

LOGS = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -4.0, -1.5]])
OLD = torch.tensor([[-1.1, -1.0, -3.0], [-1.0, -4.0, -9.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])
ADVANTAGES = torch.tensor([[2.0], [-1.0]])
PROMPTS, RESPONSES = ["2+2=", "2+2=", "1+4=", "1+4="], ["4", "four", "10", "5!"]
REWARDS = dict(zip(RESPONSES, (1.0, 0.0, 0.5, 0.0), strict=True))
EDITIONS = pytest.mark.parametrize("edition", [adapters, adapters_2026], ids=["2025", "2026"])


def grade(response, ground_truth):
    return {"reward": REWARDS[response], "format_reward": 1.0, "answer_reward": REWARDS[response]}


def clipped_losses(cliprange):
    """Return the clipped loss of each token, from plain floats."""
    rows = zip(LOGS.tolist(), OLD.tolist(), ADVANTAGES[:, 0].tolist(), strict=True)
    return [
        [clipped_loss(math.exp(p - q), a, cliprange) for p, q in zip(new, old, strict=True)] for new, old, a in rows
    ]


def clipped_loss(ratio, advantage, cliprange):
    return -min(ratio * advantage, min(max(ratio, 1 - cliprange), 1 + cliprange) * advantage)


def leaf():
    return LOGS.clone().requires_grad_()


def test_2025_has_the_ten_functions_and_the_sft_step():
    names = {name.removeprefix("run_") for name in vars(adapters) if name.startswith("run_")}
    assert names == {
        "tokenize_prompt_and_output", "compute_group_normalized_rewards", "compute_entropy", "get_response_log_probs",
        "compute_naive_policy_gradient_loss", "compute_grpo_clip_loss", "compute_policy_gradient_loss", "masked_mean",
        "masked_normalize", "grpo_microbatch_train_step", "sft_microbatch_train_step",
    }  # fmt: skip


@EDITIONS
def test_tokenize_prompt_and_output(edition):
    tokenizer = make_tiny_tokenizer()
    result = edition.run_tokenize_prompt_and_output(
        prompt_strs=["ab", "c"], output_strs=["c", "d"], tokenizer=tokenizer
    )
    a, b, c, d = (tokenizer.encode(letter)[0] for letter in "abcd")
    assert result["input_ids"].tolist() == [[a, b], [c, d]]
    assert result["labels"].tolist() == [[b, c], [d, tokenizer.pad_token_id]]
    assert result["response_mask"].tolist() == [[False, True], [True, False]]


@EDITIONS
def test_get_response_log_probs(edition):
    """A model whose next token is uniform over the first 1, 2 or 3 ids, by its last token."""
    table = torch.full((3, 3), -math.inf).masked_fill(torch.ones(3, 3).tril().bool(), 0.0)

    class Model(torch.nn.Module):
        def forward(self, input_ids, **_):
            return SimpleNamespace(logits=table[input_ids])

    found = edition.run_get_response_log_probs(
        model=Model(),
        input_ids=torch.tensor([[0, 1, 2]]),
        labels=torch.tensor([[0, 1, 2]]),
        return_token_entropy=True,
    )
    expected = torch.tensor([[1.0, 2.0, 3.0]]).log()
    assert_close(found["log_probs"], -expected)
    assert_close(found["token_entropy"], expected)


def test_2025_compute_group_normalized_rewards():
    values = {"normalize_by_std": True, "advantage_eps": 1e-6, "group_size": 2, "repeated_ground_truths": ["?"] * 4}
    arguments = {"reward_fn": grade, "rollout_responses": RESPONSES} | values
    advantages, raw, metadata = adapters.run_compute_group_normalized_rewards(**arguments)
    root = math.sqrt(2)  # a pair that is d apart has the deviation d / sqrt(2)
    first, second = 0.5 / (1 / root + 1e-6), 0.25 / (0.5 / root + 1e-6)
    assert_close(advantages, torch.tensor([first, -first, second, -second]))
    assert raw.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert metadata["reward"] == 0.375
    advantages, _, _ = adapters.run_compute_group_normalized_rewards(**arguments | {"normalize_by_std": False})
    assert advantages.tolist() == [0.5, -0.5, 0.25, -0.25]


def test_2025_compute_entropy():
    assert_close(adapters.run_compute_entropy(torch.tensor([[0.0, 0.0, -math.inf]])), torch.tensor([math.log(2)]))


def test_2025_policy_gradient_losses():
    naive = adapters.run_compute_naive_policy_gradient_loss(
        raw_rewards_or_advantages=ADVANTAGES, policy_log_probs=LOGS
    )
    assert naive.tolist() == [[2.0, 4.0, 6.0], [-0.5, -4.0, -1.5]]
    clip = {"old_log_probs": OLD, "cliprange": 0.2}
    losses, flags = adapters.run_compute_grpo_clip_loss(advantages=ADVANTAGES, policy_log_probs=LOGS, **clip)
    assert_close(losses, torch.tensor(clipped_losses(0.2)))
    assert flags["is_clipped"].tolist() == [[False, False, False], [False, False, False]]
    rewards = 10 * ADVANTAGES
    for loss_type, expected in (
        ("no_baseline", 10 * naive),
        ("reinforce_with_baseline", naive),
        ("grpo_clip", losses),
    ):
        arguments = {"loss_type": loss_type, "raw_rewards": rewards, "advantages": ADVANTAGES, **clip}
        found, _ = adapters.run_compute_policy_gradient_loss(policy_log_probs=LOGS, **arguments)
        assert_close(found, expected)


def test_2025_masked_reductions():
    values = torch.tensor([[1.0, 2.0, 90.0], [4.0, 50.0, 60.0]])
    assert adapters.run_masked_mean(tensor=values, mask=MASK, dim=1).tolist() == [1.5, 4.0]
    assert_close(adapters.run_masked_mean(tensor=values, mask=MASK).item(), 7 / 3)
    assert adapters.run_masked_normalize(tensor=values, mask=MASK, dim=0, normalize_constant=2.0).tolist() == [
        2.5,
        1,
        0,
    ]


def test_2025_microbatch_steps_call_backward():
    log_probs = leaf()
    loss, _ = adapters.run_sft_microbatch_train_step(
        policy_log_probs=log_probs, response_mask=MASK, gradient_accumulation_steps=2, normalize_constant=5.0
    )
    assert_close(loss.item(), (1.0 + 2.0 + 0.5) / 5 / 2 / 2)
    assert_close(log_probs.grad, -MASK.float() / 20)
    log_probs = leaf()
    loss, _ = adapters.run_grpo_microbatch_train_step(
        policy_log_probs=log_probs,
        response_mask=MASK,
        gradient_accumulation_steps=2,
        loss_type="grpo_clip",
        advantages=ADVANTAGES,
        old_log_probs=OLD,
        cliprange=0.2,
    )
    (one, two, _), (three, _, _) = clipped_losses(0.2)
    assert_close(loss.item(), ((one + two) / 2 + three) / 2 / 2)
    slopes = [[-2 * math.exp(0.1) / 8, -2 * math.exp(-1.0) / 8, 0.0], [math.exp(0.5) / 4, 0.0, 0.0]]
    assert_close(log_probs.grad, torch.tensor(slopes))


def test_2026_compute_rollout_rewards():
    raw, metadata = adapters_2026.run_compute_rollout_rewards(grade, RESPONSES, ["?"] * 4)
    assert raw.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert (metadata["reward"], metadata["format_reward"]) == (0.375, 1.0)


@pytest.mark.parametrize(
    ("baseline", "normalizer", "expected"),
    [
        ("mean", "std", [math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(0.5), -math.sqrt(0.5)]),
        ("mean", "none", [0.5, -0.5, 0.25, -0.25]),
        ("mean", "mean", [1.0, -1.0, 1.0, -1.0]),
        ("none", "none", [1.0, 0.0, 0.5, 0.0]),
    ],
)
def test_2026_compute_group_normalized_rewards(baseline, normalizer, expected):
    raw = torch.tensor([1.0, 0.0, 0.5, 0.0])
    found, _ = adapters_2026.run_compute_group_normalized_rewards(
        raw_rewards=raw, group_size=2, baseline=baseline, advantage_eps=1e-8, advantage_normalizer=normalizer
    )
    assert_close(found, torch.tensor(expected))
    halved, _ = adapters_2026.run_compute_group_normalized_rewards(raw, 4, baseline, 1e-8, normalizer)
    assert not torch.equal(found, halved) or baseline == "none"


@pytest.mark.parametrize("method", ["none", "noclip", "grpo", "gspo"])
def test_2026_compute_policy_gradient_loss(method):
    losses, _ = adapters_2026.run_compute_policy_gradient_loss(
        raw_rewards_or_advantages=ADVANTAGES[:, 0],
        policy_log_probs=LOGS,
        importance_reweighting_method=method,
        old_log_probs=OLD,
        cliprange=0.2,
        response_mask=MASK,
    )
    of_responses = [clipped_loss(math.exp((0.1 - 1.0) / 2), 2.0, 0.2), clipped_loss(math.exp(0.5), -1.0, 0.2)]
    expected = {
        "none": -ADVANTAGES * LOGS,
        "noclip": -ADVANTAGES * (LOGS - OLD).exp(),
        "grpo": torch.tensor(clipped_losses(0.2)),
        "gspo": torch.tensor(of_responses)[:, None].expand(2, 3),
    }[method]
    assert_close(losses, expected)


def test_2026_aggregate_loss_across_microbatch():
    """The constant divides the sum of the batch, not that of each response."""
    losses = torch.tensor([[1.0, 3.0, 90.0], [8.0, 50.0, 60.0]])
    aggregate = adapters_2026.run_aggregate_loss_across_microbatch
    assert aggregate(per_token_policy_gradient_loss=losses, mask=MASK, loss_normalization="sequence").item() == 5.0
    assert aggregate(losses, MASK, "constant", normalization_constant=24).item() == 0.5
    with pytest.raises(ValueError, match="normalization_constant=None"):
        aggregate(losses, MASK, "constant")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: adapters_2026.run_compute_group_normalized_rewards(torch.ones(2), 2, "none"), "baseline='none'"),
        (lambda: adapters_2026.run_compute_policy_gradient_loss(ADVANTAGES, LOGS, "cispo"), "'cispo'"),
        (lambda: adapters_2026.run_aggregate_loss_across_microbatch(LOGS, MASK, "token"), "'token'"),
    ],
)
def test_2026_unknown_names_are_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


VARIANTS = {
    "grpo": {},
    "grpo-constant": {"loss_normalization": "constant", "normalization_constant": 32},
    "dr-grpo": {"advantage_normalizer": "none", "loss_normalization": "constant", "normalization_constant": 32},
    "rft": {"baseline": "none", "advantage_normalizer": "none"},
    "maxrl": {"advantage_normalizer": "mean", "max_grad_norm": None},
    "noclip": {"importance_reweighting_method": "noclip"},
    "clip": {"importance_reweighting_method": "grpo", "cliprange": 0.1},
    "gspo": {"importance_reweighting_method": "gspo", "cliprange": 0.1},
}


def loss_by_hand(policy, tokenizer, old, settings):
    """Return the loss of the whole batch, one forward pass per response."""
    rewards, total = [REWARDS[response] for response in RESPONSES], 0.0
    method, constant = settings.get("importance_reweighting_method", "none"), settings.get("normalization_constant")
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        pair = rewards[row // 2 * 2 : row // 2 * 2 + 2]
        mean = sum(pair) / 2
        scale = {"std": abs(pair[0] - pair[1]) / math.sqrt(2) + 1e-6, "none": 1.0, "mean": mean}
        baseline = 0.0 if settings.get("baseline") == "none" else mean
        advantage = (rewards[row] - baseline) / scale[settings.get("advantage_normalizer", "std")]
        start, ids = len(prompt), torch.tensor(tokenizer.encode(prompt + response))
        rows = policy(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        log_probs = rows.gather(-1, ids[start:, None])[:, 0]
        log_ratio = log_probs - old[row, start - 1 : start - 1 + len(log_probs)]
        if method == "none":
            losses = -advantage * log_probs
        elif method == "noclip":
            losses = -advantage * log_ratio.exp()
        else:
            ratio = log_ratio.exp() if method == "grpo" else log_ratio.mean().exp().expand(len(log_ratio))
            losses = -torch.minimum(advantage * ratio, advantage * ratio.clamp(0.9, 1.1))
        total = total + (losses.mean() / 4 if constant is None else losses.sum() / constant)
    return total


@pytest.mark.medium
@pytest.mark.parametrize("n_parts", [1, 2, 3], ids=["one", "equal", "unequal"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_2026_grpo_train_step(variant, n_parts):
    """The step moves the weights by -lr times the clipped gradient, however the batch is cut, and frees it."""
    settings, tokenizer = {"max_grad_norm": 1.0} | VARIANTS[variant], make_tiny_tokenizer()
    policy = make_tiny_policy().double()
    width = max(map(len, map(str.__add__, PROMPTS, RESPONSES))) - 1
    old = torch.linspace(-5.0, -4.0, 4 * width, dtype=torch.float64).reshape(4, width)
    by_hand = copy.deepcopy(policy)
    expected = loss_by_hand(by_hand, tokenizer, old, settings)
    expected.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in by_hand.parameters()))
    factor = 1.0 if settings["max_grad_norm"] is None else min(1.0, settings["max_grad_norm"] / (norm + 1e-6))
    loss, metadata = adapters_2026.run_grpo_train_step(
        model=policy,
        tokenizer=tokenizer,
        optimizer=torch.optim.SGD(policy.parameters(), lr=0.1),
        gradient_accumulation_steps=n_parts,
        reward_fn=grade,
        repeated_prompts=PROMPTS,
        rollout_responses=RESPONSES,
        repeated_ground_truths=["?"] * 4,
        group_size=2,
        **({"old_log_probs": old} if "importance_reweighting_method" in settings else {}) | settings,
    )
    assert_close(loss.item(), expected.item(), rtol=1e-5, atol=1e-7)
    assert_close(metadata["grad_norm"].item(), norm, rtol=1e-5, atol=1e-7)
    for moved, start in zip(policy.parameters(), by_hand.parameters(), strict=True):
        assert moved.grad is None
        assert_close(moved, start - 0.1 * factor * start.grad, rtol=1e-6, atol=1e-9)
