"""One row per group: who sees whom, and log-probs that are those of a row per response."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import get_group_log_probs, mask_group_rows, pack_group_rows
from tests.tiny import make_tiny_policy

IDS = st.integers(0, 97)
PROMPT = st.lists(IDS, min_size=1, max_size=5)
RESPONSES = st.lists(st.lists(IDS, max_size=4), min_size=1, max_size=4)


@given(st.lists(st.tuples(PROMPT, RESPONSES), min_size=1, max_size=3))
def test_pack_group_rows_holds_every_separate_row(groups):
    """Follow each response back: what it sees, in order, is the row (prompt, response) with its plain positions."""
    rows = pack_group_rows([prompt for prompt, _ in groups], [responses for _, responses in groups])
    visible = mask_group_rows(rows["segments"])
    width = max(len(prompt) + sum(map(len, responses)) for prompt, responses in groups)
    assert rows["input_ids"].shape == rows["position_ids"].shape == rows["segments"].shape == (len(groups), width)
    token = 0
    for k, (prompt, responses) in enumerate(groups):
        ids, positions = rows["input_ids"][k].tolist(), rows["position_ids"][k].tolist()
        begin = len(prompt)
        for response in responses:
            alone = prompt + response
            for t, label in enumerate(response):
                place = begin + t
                seen = visible[k, place].nonzero()[:, 0].tolist()
                assert [ids[s] for s in seen] == alone[: len(prompt) + t + 1]
                assert [positions[s] for s in seen] == list(range(len(prompt) + t + 1))
                source = rows["sources"][token].item() - k * width
                assert rows["labels"][token].item() == label
                assert source == (place - 1 if t else len(prompt) - 1)
                token += 1
            begin += len(response)
        for place in range(len(prompt)):
            assert visible[k, place].tolist() == [s <= place for s in range(width)]
        for place in range(begin, width):  # padding looks at padding, and nobody at it
            assert rows["segments"][k, place] == -1
            assert visible[k, place, place]
            assert not visible[k, :begin, place].any()
    assert token == len(rows["labels"]) == len(rows["sources"])


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=6))
def test_mask_group_rows_matches_definition(segments):
    """One entry after the other, in plain Python."""
    visible = mask_group_rows(torch.tensor([segments]))[0].tolist()
    for s, own in enumerate(segments):
        for t, other in enumerate(segments):
            assert visible[s][t] == (t <= s and other in (0, own))


@settings(max_examples=30)
@given(PROMPT, RESPONSES.filter(lambda responses: any(responses)), st.sampled_from([0.5, 1.0]))
def test_get_group_log_probs_matches_one_row_per_response(prompt, responses, temperature):
    policy = make_tiny_policy(4)
    scored = get_group_log_probs(policy, prompt, responses, True, temperature=temperature)
    width = max(map(len, responses))
    assert scored["log_probs"].shape == scored["token_entropy"].shape == (len(responses), width)
    for i, response in enumerate(responses):
        logits = policy(torch.tensor([[*prompt, *response]])).logits[0].double() / temperature
        rows = torch.log_softmax(logits[len(prompt) - 1 : len(prompt) - 1 + len(response)], dim=-1)
        expected = rows[range(len(response)), response]
        entropy = -(rows.exp() * rows).sum(dim=-1)
        assert_close(scored["log_probs"][i, : len(response)].double(), expected, rtol=0, atol=2e-6)
        assert_close(scored["token_entropy"][i, : len(response)].double(), entropy, rtol=0, atol=2e-6)
        assert (scored["log_probs"][i, len(response) :] == 0).all()
        assert (scored["token_entropy"][i, len(response) :] == 0).all()


def test_get_group_log_probs_gradient_is_sum_over_separate_rows():
    prompt, responses = [5, 9, 2], [[7, 8], [7], [], [30, 31, 32]]
    packed, alone = make_tiny_policy(5), make_tiny_policy(5)
    weight = torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 1.5, -1.0]])
    (get_group_log_probs(packed, prompt, responses)["log_probs"] * weight).sum().backward()
    for i, response in enumerate(responses):
        for t, label in enumerate(response):
            logits = alone(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 + t]
            (weight[i, t] * torch.log_softmax(logits, dim=-1)[label]).backward()
    for ours, theirs in zip(packed.parameters(), alone.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_group_rows_is_obeyed_by_sdpa_and_eager_in_both_precisions(attention, dtype):
    """A token of another response changes nothing, in any of them."""
    policy = make_tiny_policy(6).to(dtype)
    policy.set_attn_implementation(attention)
    first = get_group_log_probs(policy, [3, 4], [[5, 6, 7], [8, 9]])["log_probs"]
    other = get_group_log_probs(policy, [3, 4], [[50, 60, 70], [8, 9]])["log_probs"]
    assert_close(first[1], other[1], rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pack_group_rows_scores_many_groups_in_one_pass(attention):
    """Padding included, the logits at the sources are those of a forward pass per response."""
    policy = make_tiny_policy(7).double()
    policy.set_attn_implementation(attention)
    prompts, responses = [[5, 9, 2], [4], [8, 8]], [[[7, 8], [7, 1, 3]], [[30]], [[], [6]]]
    rows = pack_group_rows(prompts, responses)
    visible = mask_group_rows(rows["segments"])[:, None]
    mask = torch.zeros_like(visible, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    logits = policy(rows["input_ids"], attention_mask=mask, position_ids=rows["position_ids"]).logits
    assert logits.isfinite().all()
    found = iter(logits.flatten(0, 1)[rows["sources"]])
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            alone = policy(torch.tensor([[*prompt, *response]])).logits[0]
            for t in range(len(response)):
                assert_close(next(found), alone[len(prompt) - 1 + t], rtol=1e-9, atol=1e-9)


def test_mask_group_rows_of_single_response_is_causal():
    rows = pack_group_rows([[5, 9], [4]], [[[7, 8]], [[30]]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    visible = mask_group_rows(rows["segments"])
    for k, length in enumerate((4, 2)):
        assert torch.equal(visible[k, :length], causal[:length])


def test_group_rows_that_cannot_be_scored_raise():
    with pytest.raises(ValueError, match="prompt_token_ids holds an empty prompt"):
        pack_group_rows([[]], [[[1]]])
    with pytest.raises(ValueError, match=r"prompt_token_ids=\[\] must be of at least one row"):
        pack_group_rows([], [])
    with pytest.raises(ValueError, match=r"response_token_ids=\[2 rows\] must be as many rows as prompt_token_ids: 1"):
        pack_group_rows([[1]], [[[1]], [[2]]])
    with pytest.raises(ValueError, match="holds no token"):
        get_group_log_probs(make_tiny_policy(), [1], [[], []])
