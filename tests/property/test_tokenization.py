"""Round trip of strings, and what the mask means."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_core import tokenize_prompt_and_output
from tests.tiny import CHARACTERS, make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
PROMPTS = st.text(CHARACTERS, min_size=1, max_size=8)
OUTPUTS = st.text(CHARACTERS, max_size=8)
PAIRS = st.lists(st.tuples(PROMPTS, OUTPUTS), min_size=1, max_size=4)


def tokenize(pairs, tokenizer=TOKENIZER):
    return tokenize_prompt_and_output([prompt for prompt, _ in pairs], [output for _, output in pairs], tokenizer)


@given(PAIRS)
def test_response_mask_selects_output_tokens(pairs):
    tensors = tokenize(pairs)
    for labels, mask, (_, output) in zip(tensors["labels"], tensors["response_mask"], pairs, strict=True):
        assert TOKENIZER.decode(labels[mask].tolist()) == output


@given(PAIRS)
def test_labels_are_shifted_inputs_after_prompt(pairs):
    tensors = tokenize(pairs)
    assert torch.equal(tensors["input_ids"][:, 1:], tensors["labels"][:, :-1])
    for ids, labels, (prompt, output) in zip(tensors["input_ids"], tensors["labels"], pairs, strict=True):
        text = [int(ids[0]), *labels[: len(prompt + output) - 1].tolist()] if len(ids) else []
        assert TOKENIZER.decode(text) == (prompt + output if len(ids) else "")
        assert (labels[len(prompt + output) - 1 :] == TOKENIZER.pad_token_id).all()


@given(PAIRS, st.integers(0, 3))
def test_tokenized_row_ignores_other_rows(pairs, pick):
    """Each row alone is its row of the batch, without the padding."""
    row = pick % len(pairs)
    alone, together = tokenize([pairs[row]]), tokenize(pairs)
    for name, tensor in alone.items():
        assert torch.equal(together[name][row, : tensor.shape[1]], tensor[0])
    assert not together["response_mask"][row, alone["labels"].shape[1] :].any()


@given(st.lists(st.tuples(PROMPTS, st.lists(st.sampled_from(["a", "<eos>"]), max_size=4)), min_size=1, max_size=4))
def test_padding_with_end_token_keeps_end_of_response_in_mask(pairs):
    tokenizer = make_tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tensors = tokenize([(prompt, "".join(output)) for prompt, output in pairs], tokenizer)
    assert tensors["response_mask"].sum(dim=1).tolist() == [len(output) for _, output in pairs]


@pytest.mark.parametrize("name", ["input_ids", "labels", "response_mask"])
def test_tokenized_tensors_share_no_memory(name):
    tensors = tokenize([("ab", "cd")])
    before = {other: tensor.clone() for other, tensor in tensors.items() if other != name}
    tensors[name].zero_()
    assert all(torch.equal(tensors[other], tensor) for other, tensor in before.items())
