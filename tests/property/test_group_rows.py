"""One row per group: who sees whom, and log-probs that are those of a row per response."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import get_group_log_probs, pack_group_row
from tests.tiny import make_tiny_policy

IDS = st.integers(0, 97)
PROMPT = st.lists(IDS, min_size=1, max_size=5)
RESPONSES = st.lists(st.lists(IDS, max_size=4), min_size=1, max_size=4)


@given(PROMPT, RESPONSES)
def test_the_row_is_the_rows_it_stands_for(prompt, responses):
    """Follow each response back: what it sees, in order, is the row (prompt, response) with its plain positions."""
    row = pack_group_row(prompt, responses)
    ids, positions = row["input_ids"][0].tolist(), row["position_ids"][0].tolist()
    assert len(ids) == len(prompt) + sum(map(len, responses))
    begin, token = len(prompt), 0
    for response in responses:
        alone = prompt + response
        for t, label in enumerate(response):
            place = begin + t
            seen = row["visible"][place].nonzero()[:, 0].tolist()
            assert [ids[k] for k in seen] == alone[: len(prompt) + t + 1]
            assert [positions[k] for k in seen] == list(range(len(prompt) + t + 1))
            source = row["sources"][token].item()
            assert row["labels"][token].item() == label
            assert source == (place - 1 if t else len(prompt) - 1)
            token += 1
        begin += len(response)
    assert token == len(row["labels"]) == len(row["sources"])
    for place in range(len(prompt)):
        assert row["visible"][place].tolist() == [k <= place for k in range(len(ids))]


@settings(max_examples=30)
@given(PROMPT, RESPONSES.filter(lambda responses: any(responses)), st.sampled_from([0.5, 1.0]))
def test_values_are_those_of_a_row_per_response(prompt, responses, temperature):
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


def test_gradients_are_the_sum_over_rows_of_their_own():
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
def test_both_attention_implementations_and_precisions_obey_the_mask(attention, dtype):
    """A token of another response changes nothing, in any of them."""
    policy = make_tiny_policy(6).to(dtype)
    policy.set_attn_implementation(attention)
    first = get_group_log_probs(policy, [3, 4], [[5, 6, 7], [8, 9]])["log_probs"]
    other = get_group_log_probs(policy, [3, 4], [[50, 60, 70], [8, 9]])["log_probs"]
    assert_close(first[1], other[1], rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="prompt_token_ids is empty"):
        pack_group_row([], [[1]])
    with pytest.raises(ValueError, match="holds no token"):
        get_group_log_probs(make_tiny_policy(), [1], [[], []])
