"""Rollouts as tensors: every layout of rows equals one forward pass per response, in values and gradients."""

import doctest
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from drivers.engines import protocol
from drivers.training import batch, micro_batches, shortcuts
from drivers.training.batch import PreparedBatch, WeightedBatch, make_rollout_batch
from drivers.training.forward import flat_token_index, forward, forward_all
from drivers.training.memory import plan_memory
from drivers.training.micro_batches import MASKED_ATTENTION_COST, Row, plan_micro_batches, plan_rows
from drivers.training.shortcuts import find_head, shares_rows
from tests.drivers.helpers.letters import clone_policy, make_batch, make_completion, make_tiny_config
from tests.tiny import make_tiny_policy

TOKENS = st.lists(st.integers(2, 60), min_size=1, max_size=5)
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
LONG_PROMPT, SHORT_PROMPT = list(range(5, 17)), [7, 8]


def forward_one_by_one(policy, rollouts, temperature):
    """Return log-probs and entropies of each response from its own forward pass, by log_softmax over the whole row."""
    log_probs, entropies = [], []
    for item in rollouts.completions:
        ids = torch.tensor([[*item.prompt_token_ids, *item.token_ids]])
        distribution = torch.log_softmax(policy(ids).logits[0] / temperature, dim=-1)
        begin = len(item.prompt_token_ids) - 1
        rows = distribution[begin : begin + len(item.token_ids)]
        log_probs.append(rows[range(len(item.token_ids)), list(item.token_ids)])
        entropies.append(-(rows.exp() * rows).sum(dim=-1))
    return log_probs, entropies


@pytest.mark.medium
@settings(max_examples=25)
@given(
    prompt=st.sampled_from([LONG_PROMPT, SHORT_PROMPT]),
    responses=st.lists(TOKENS, min_size=1, max_size=4),
    other=TOKENS,
    temperature=st.sampled_from([0.7, 1.0]),
)
def test_forward_any_layout_equals_one_forward_per_response(prompt, responses, other, temperature):
    """LONG_PROMPT gives a group row and SHORT_PROMPT padded rows; `other` has a third prompt."""
    policy = make_tiny_policy(1).double()
    twin = clone_policy(policy)
    rollouts = make_batch(*[(prompt, response) for response in responses], ([9, 9, 9], other))
    token_values = forward(policy, rollouts, temperature, with_entropy=True)
    assert not token_values["token_entropy"].requires_grad
    expected, entropies = forward_one_by_one(twin, rollouts, temperature)
    for row, (values, entropy) in enumerate(zip(expected, entropies, strict=True)):
        assert_close(token_values["log_probs"][row, : len(values)], values, rtol=0, atol=1e-12)
        assert_close(token_values["token_entropy"][row, : len(values)], entropy, rtol=0, atol=1e-12)
    assert (token_values["log_probs"][~rollouts.response_mask] == 0).all()
    weight = torch.arange(1.0, token_values["log_probs"].numel() + 1).view_as(token_values["log_probs"]).double()
    (token_values["log_probs"] * weight).sum().backward()
    sum((values * weight[row, : len(values)]).sum() for row, values in enumerate(expected)).backward()
    for ours, theirs in zip(policy.parameters(), twin.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)  # Llama norms are always float32


def test_forward_empty_response_is_a_row_of_zeros():
    rollouts = make_batch((SHORT_PROMPT, []), (SHORT_PROMPT, [5]), (LONG_PROMPT, []), (LONG_PROMPT, [6]))
    token_values = forward(make_tiny_policy(), rollouts, 1.0)["log_probs"]
    assert rollouts.response_mask.tolist() == [[False], [True], [False], [True]]
    assert (token_values[[0, 2]] == 0).all()
    assert (token_values[[1, 3]] < 0).all()


def test_forward_group_of_empty_responses_has_no_tokens():
    token_values = forward(make_tiny_policy(), make_batch((LONG_PROMPT, []), (LONG_PROMPT, [])), 1.0)
    assert token_values["log_probs"].tolist() == [[0], [0]]


def test_rollout_batch_holds_sampled_tokens_and_log_probs():
    rollouts = make_rollout_batch(
        [make_completion([1], [4, 5], [-0.5, -0.25]), make_completion([1], [6], [-2.0])],
        torch.tensor([1.0, 0.0]),
    )
    assert rollouts.response_mask.tolist() == [[True, True], [True, False]]
    assert rollouts.sampler_log_probs.tolist() == [[-0.5, -0.25], [-2.0, 0.0]]
    assert rollouts.rewards.tolist() == [[1.0], [0.0]]
    assert rollouts.n_response_tokens == 3


@pytest.mark.parametrize("module", [batch, micro_batches, protocol], ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_flat_token_index_locates_sampled_tokens_row_after_row():
    rows = [Row((1, 2), (2, 0), (1, 3)), Row((9,), (1,), (2,))]
    completions = [make_completion([1], [5] * n) for n in (3, 2, 1)]
    assert flat_token_index(rows, completions, 4) == [8, 0, 1, 2, 4, 5]
    completions[0] = replace(completions[0], sampled=(True, False, True))
    assert flat_token_index(rows, completions, 4) == [8, 0, 2, 4, 5]


def test_rollout_batch_select_trims_to_longest_response():
    rollouts = make_batch(([1], [4, 5, 6]), ([1], [4]), ([2], [7, 8]), ([2], []))
    widths = [part.response_mask.shape for part in rollouts.split(2)]
    assert widths == [(2, 3), (2, 2)]
    assert [len(part) for part in rollouts.split(3)] == [3, 1]


def test_rollout_batch_shuffled_keeps_groups_and_rows():
    prompts = [[k, k] for k in range(2, 10)]
    completions = [make_completion(prompt, [10 * prompt[0] + k]) for prompt in prompts for k in range(3)]
    marks = torch.tensor([float(item.token_ids[0]) for item in completions])
    rollouts = PreparedBatch.from_rollouts(make_rollout_batch(completions, marks, 3), marks[:, None])
    shuffled = rollouts.shuffled(torch.Generator().manual_seed(0))
    order = [item.prompt_token_ids for item in shuffled.completions]
    assert order != [item.prompt_token_ids for item in completions]
    assert [order[k : k + 3] for k in range(0, 24, 3)] == [[order[k]] * 3 for k in range(0, 24, 3)]
    assert shuffled.advantages[:, 0].tolist() == [float(item.token_ids[0]) for item in shuffled.completions]


@pytest.mark.parametrize("has_head", [True, False])
def test_forward_divides_logits_by_the_temperature(has_head, monkeypatch):
    """This holds for log-probs and entropies, with the fused head and with the model's own logits."""
    policy = make_tiny_policy(1)
    if not has_head:
        monkeypatch.setattr("drivers.training.forward.find_head", lambda _: None)
    rollouts = make_batch((LONG_PROMPT, [4, 9, 5]), (LONG_PROMPT, [8]), (SHORT_PROMPT, [6, 6]))
    for attached in (True, False):
        token_values = forward(policy, rollouts, 0.5, with_entropy=True, detach_entropy=not attached)
        assert token_values["token_entropy"].requires_grad is attached
        for name, rows in zip(("log_probs", "token_entropy"), forward_one_by_one(policy, rollouts, 0.5), strict=True):
            assert_close(token_values[name][rollouts.response_mask], torch.cat(rows), rtol=1e-4, atol=1e-4)
        assert not token_values["log_probs"][~rollouts.response_mask].any()


@pytest.mark.parametrize("has_head", [True, False])
def test_forward_sums_the_squares_of_each_distribution(has_head, monkeypatch):
    policy = make_tiny_policy(1)
    if not has_head:
        monkeypatch.setattr("drivers.training.forward.find_head", lambda _: None)
    rollouts = make_batch((LONG_PROMPT, [4, 9, 5]), (LONG_PROMPT, [8]), (SHORT_PROMPT, [6, 6]))
    token_values = forward(policy, rollouts, 0.5, with_collisions=True)
    assert token_values.keys() == {"log_probs", "collision_probs"}
    expected = []
    for item in rollouts.completions:
        ids = torch.tensor([[*item.prompt_token_ids, *item.token_ids]])
        probabilities = (policy(ids).logits[0] / 0.5).softmax(dim=-1)
        expected.append(probabilities.square().sum(dim=-1)[-1 - len(item.token_ids) : -1])
    assert_close(token_values["collision_probs"][rollouts.response_mask], torch.cat(expected), rtol=1e-4, atol=1e-6)
    assert not token_values["collision_probs"].requires_grad


def test_forward_all_in_micro_batches_sorted_by_length_keeps_rows():
    """The order of the batch, the temperature of the sampler and the last token of each response are kept."""
    config = make_tiny_config(micro_batch_tokens=20, sampling_temperature=0.5)
    policy, lengths = make_tiny_policy(1), (1, 5, 2, 6, 3, 4)
    rollouts = make_batch(*[([7, 8 + k], [4 + k] * n) for k, n in enumerate(lengths)])
    members = [part.members for part in plan_micro_batches(config, policy, rollouts, range(6))]
    assert sorted(members[0]) != members[0]
    whole = forward_all(policy, rollouts, config, with_entropy=True)
    for name, rows in zip(("log_probs", "token_entropy"), forward_one_by_one(policy, rollouts, 0.5), strict=True):
        assert_close(whole[name][rollouts.response_mask], torch.cat(rows), rtol=1e-4, atol=1e-4)


def test_forward_all_equals_policy_without_gradient():
    config = make_tiny_config(rollout_batch_size=8, group_size=4, train_batch_size=8, gradient_accumulation_steps=4)
    policy = make_tiny_policy(2)
    rollouts = make_batch(*[(LONG_PROMPT, [3 + k] * (1 + k % 3)) for k in range(8)])
    old = forward_all(policy, rollouts, config)["log_probs"]
    assert not old.requires_grad
    assert_close(old, forward(policy, rollouts, 1.0)["log_probs"].detach(), rtol=0, atol=1e-6)


def test_rollout_batch_select_keeps_columns_and_trims_tokens():
    """The width alone separates values of a response from values of its tokens, for any number of rows."""
    rollouts = make_batch(([1], [4, 5, 6]), ([1], [4]), ([2], [7]), ([2], [8]))
    tokens = torch.arange(12.0).view(4, 3)
    rollouts = WeightedBatch.from_prepared(
        PreparedBatch.from_rollouts(rollouts, tokens[:, :1]),
        old_log_probs=None,
        objective_weights=tokens[:, :1],
        token_weights=tokens,
        importance_weights=None,
        penalized=rollouts.response_mask,
        imitation_weights=tokens,
    )
    part = rollouts.select([3, 1])
    assert part.advantages.tolist() == part.objective_weights.tolist() == [[9.0], [3.0]]
    assert part.token_weights.tolist() == [[9.0], [3.0]]
    assert rollouts.select([2, 0]).token_weights.tolist() == tokens[[2, 0]].tolist()
    assert rollouts.group_sizes == [1, 1, 1, 1]
    assert rollouts.lengths.tolist() == [3, 1, 1, 1]


def pack_rows(patch, packed):
    """Pack rows, or pad them, independently of the attention implementation."""
    for module in ("shortcuts", "micro_batches", "forward"):
        patch.setattr(f"drivers.training.{module}.packs_rows", lambda policy: packed)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forward_packed_rows_equals_padded_rows(attention, monkeypatch):
    """One sequence without padding, whose responses are separated only by positions, as with flash attention."""
    policy = make_tiny_policy(3).double()
    policy.set_attn_implementation(attention)
    rollouts = make_batch(
        (LONG_PROMPT, [3, 4, 5]), (LONG_PROMPT, [6]), (SHORT_PROMPT, [7, 8]), ([9], []), ([4], [2, 2])
    )
    expected = forward(policy, rollouts, 0.7, with_entropy=True)
    pack_rows(monkeypatch, True)
    assert all(len(row.members) == 1 for row in plan_rows(policy, rollouts, range(len(rollouts))))
    seen = []
    policy.model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    for name, values in forward(policy, rollouts, 0.7, with_entropy=True).items():
        assert_close(values, expected[name], rtol=0, atol=1e-9)
    assert seen[0]["input_ids"].shape == (1, 15 + 13 + 4 + 3)
    assert "attention_mask" not in seen[0]


ROLLOUTS = st.lists(
    st.tuples(st.sampled_from([tuple(LONG_PROMPT), tuple(SHORT_PROMPT), (9,)]), st.lists(st.just(5), max_size=9)),
    min_size=1,
    max_size=12,
)


@given(ROLLOUTS, st.integers(1, 60), st.booleans(), st.data())
def test_plan_micro_batches_covers_each_response_once_within_budget(pairs, budget, packed, data):
    rollouts, policy = make_batch(*pairs), make_tiny_policy()
    wanted = sorted(data.draw(st.sets(st.integers(0, len(pairs) - 1))))
    config = make_tiny_config(micro_batch_tokens=budget)
    with pytest.MonkeyPatch.context() as patched:
        pack_rows(patched, packed)
        parts = list(plan_micro_batches(config, policy, rollouts, wanted))
        assert sorted(i for part in parts for i in part.members) == [i for i in wanted if pairs[i][1]]
        for members, rows in parts:
            assert [i for row in rows for i in row.members] == list(range(len(members)))
            for row in rows:
                prompts = {rollouts.completions[members[i]].prompt_token_ids for i in row.members}
                assert prompts == {row.prompt}
            slots = sum(r.n_tokens for r in rows) if packed else len(rows) * max(r.n_tokens for r in rows)
            assert slots <= budget or len(members) == 1


def test_forward_uses_planned_rows():
    """A second plan could make longer rows for the responses of a micro-batch than the budget allows."""
    prompt = [5] * 12
    rollouts, policy = make_batch(*[(prompt, [6] * n) for n in (30, 9, 8, 20, 5, 3)]), make_tiny_policy(4).double()
    config, seen = make_tiny_config(micro_batch_tokens=100), []
    policy.model.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"].shape), with_kwargs=True)
    expected = forward(policy, rollouts, 1.0)["log_probs"].detach()
    shares_rows(policy)
    seen.clear()
    for members, rows in plan_micro_batches(config, policy, rollouts, range(6)):
        found = forward(policy, rollouts.select(members), 1.0, rows)["log_probs"]
        assert_close(found.detach(), expected[members, : found.shape[1]], rtol=0, atol=1e-9)
        assert seen.pop() == (len(rows), max(row.n_tokens for row in rows))
    assert not seen
    assert_close(forward_all(policy, rollouts, config)["log_probs"], expected.float())


def test_plan_rows_picks_cheaper_of_shared_and_separate(monkeypatch):
    """A long prompt is shared; with long responses, or slow masks, one row would cost more than sharing saves."""
    policy = make_tiny_policy()
    shared = make_batch(*[([5] * 100, [6] * 10)] * 4)
    assert [row.members for row in plan_rows(policy, shared, range(4))] == [(0, 1, 2, 3)]
    alone = make_batch(*[([5], [6] * 300)] * 4)
    assert [row.members for row in plan_rows(policy, alone, range(4))] == [(0,), (1,), (2,), (3,)]
    monkeypatch.setitem(MASKED_ATTENTION_COST, "cpu", 100.0)
    assert len(plan_rows(policy, shared, range(4))) == 4


def test_shares_rows_only_if_trial_gives_equal_log_probs():
    assert shares_rows(make_tiny_policy())
    windowed = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4))
    assert not shares_rows(windowed.eval())
    deaf = make_tiny_policy()
    forward = deaf.forward
    deaf.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)  # unmasked
    assert not shares_rows(deaf)
    broken = make_tiny_policy()
    broken.forward = lambda **_: 1 / 0
    assert not shares_rows(broken)
    assert find_head(broken) is None


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "opt", "qwen2"])
def test_forward_other_architectures_equals_one_forward_per_response(kind):
    """Learned positions, a sliding window, dropout and a bias need their own plans, rows and heads."""
    torch.manual_seed(0)
    policy = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                      word_embed_proj_dim=32, max_position_embeddings=64)
        ),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    }[kind]().eval().double()  # fmt: skip
    rollouts = make_batch((LONG_PROMPT, [3, 4, 5]), (LONG_PROMPT, [6, 7]), (SHORT_PROMPT, [7, 8]))
    expected, _ = forward_one_by_one(policy, rollouts, 1.0)
    found = forward(policy, rollouts, 1.0)["log_probs"]
    for row, values in enumerate(expected):
        assert_close(found[row, : len(values)], values, rtol=0, atol=1e-6)
    plan = plan_memory(make_tiny_config(), policy, 16)
    assert plan.activations > 0
    assert plan.logits > 0


def test_forward_without_head_makes_response_logits_only():
    policy, seen = make_tiny_policy(2), []
    policy.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    rollouts = make_batch((LONG_PROMPT, [3, 4, 5]), (LONG_PROMPT, [6]))
    expected = forward(policy, rollouts, 1.0)["log_probs"]
    shortcuts._HEADS[policy] = None
    seen.clear()
    assert_close(forward(policy, rollouts, 1.0)["log_probs"], expected, rtol=0, atol=1e-6)
    assert seen == [
        3
    ]  # of a row of 16: the last prompt token, shared by both responses, and the tokens before 4 and 5


def test_find_head_scaled_logits_is_none():
    policy = make_tiny_policy(2).double()
    assert find_head(policy) is not None
    scaled = clone_policy(policy)
    undivided = scaled.forward

    def divided(*args, **kwargs):
        out = undivided(*args, **kwargs)
        out.logits = out.logits / 3
        return out

    scaled.forward = divided
    assert find_head(scaled) is None
    rollouts = make_batch((LONG_PROMPT, [3, 4, 5]), (LONG_PROMPT, [6]), (SHORT_PROMPT, [7]))
    expected = forward(policy, rollouts, 3.0, with_entropy=True)
    for name, values in forward(scaled, rollouts, 1.0, with_entropy=True).items():
        assert_close(values, expected[name], rtol=0, atol=1e-9)
