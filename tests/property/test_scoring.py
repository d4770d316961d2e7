"""Laws of scoring: padding, the mask, the columns left out, and gradients, on a tiny Llama."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from grpo_core import get_response_log_probs, tokenize_prompt_and_output
from tests.strategies import fewer, response_masks
from tests.tiny import CHARACTERS, make_tiny_policy, make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
POLICY = make_tiny_policy(seed=0).double()
TEXTS = st.text(CHARACTERS, min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)
TEMPERATURES = st.sampled_from([0.5, 1.0])


class Bare(nn.Module):
    """A model whose forward takes ids and nothing else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.inner(input_ids).logits)


def tokenize(pairs):
    return tokenize_prompt_and_output([prompt for prompt, _ in pairs], [output for _, output in pairs], TOKENIZER)


@fewer
@given(PAIRS, TEMPERATURES)
def test_right_padding_changes_no_score(pairs, temperature):
    batch = tokenize(pairs)
    together = get_response_log_probs(
        POLICY, batch["input_ids"], batch["labels"], return_token_entropy=True, temperature=temperature
    )
    assert set(together) == {"log_probs", "token_entropy"}
    for row, pair in enumerate(pairs):
        one = tokenize([pair])
        alone = get_response_log_probs(
            POLICY, one["input_ids"], one["labels"], return_token_entropy=True, temperature=temperature
        )
        for name, values in alone.items():
            assert_close(together[name][row, : values.shape[1]], values[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model", [POLICY, Bare(POLICY)], ids=["logits_to_keep", "all_logits"])
@fewer
@given(pairs=PAIRS, temperature=TEMPERATURES, data=st.data())
def test_scores_with_mask_are_equal_and_zero_elsewhere(model, pairs, temperature, data):
    batch = tokenize(pairs)
    mask = data.draw(response_masks(tuple(batch["labels"].shape)))
    # -100 where nobody asks: a common "ignore" label, and no token.
    labels = torch.where(mask, batch["labels"], -100)
    masked = get_response_log_probs(
        model, batch["input_ids"], labels, True, temperature=temperature, response_mask=mask
    )
    full = get_response_log_probs(POLICY, batch["input_ids"], batch["labels"], True, temperature=temperature)
    assert set(masked) == set(full)
    for name, values in masked.items():
        assert_close(values, torch.where(mask, full[name], 0.0), rtol=1e-6, atol=1e-6)
        assert (values[~mask] == 0.0).all()


@fewer
@given(PAIRS, st.booleans())
def test_score_gradients_are_equal_with_and_without_mask(pairs, entropy):
    batch = tokenize(pairs)
    name = "token_entropy" if entropy else "log_probs"
    gradients = []
    for mask in (None, batch["response_mask"]):
        scores = get_response_log_probs(POLICY, batch["input_ids"], batch["labels"], entropy, response_mask=mask)
        loss = torch.where(batch["response_mask"], scores[name], 0.0).sum()
        gradients.append(torch.autograd.grad(loss, POLICY.lm_head.weight)[0])
    assert gradients[0].abs().max() > 0
    assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-8)


def test_scoring_computes_logits_only_for_columns_of_mask():
    """The output layer is the memory of the step: it must not see a prompt."""
    batch = tokenize([("a long prompt", "xy"), ("b" * 13, "z")])
    seen = []
    hook = POLICY.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    get_response_log_probs(POLICY, batch["input_ids"], batch["labels"], response_mask=batch["response_mask"])
    hook.remove()
    assert seen == [2]


def test_scoring_with_empty_mask_is_zero_and_differentiable():
    batch = tokenize([("ab", "c")])
    scores = get_response_log_probs(
        POLICY, batch["input_ids"], batch["labels"], response_mask=torch.zeros_like(batch["response_mask"])
    )
    (gradient,) = torch.autograd.grad(scores["log_probs"].sum(), POLICY.lm_head.weight)
    assert not scores["log_probs"].any()
    assert not gradient.any()


@pytest.mark.parametrize("detach", [True, False])
def test_scoring_entropy_has_gradient_unless_detached(detach):
    batch = tokenize([("ab", "cd")])
    scored = get_response_log_probs(
        POLICY, batch["input_ids"], batch["labels"], return_token_entropy=True, detach_entropy=detach
    )
    assert scored["token_entropy"].requires_grad is not detach
    assert scored["log_probs"].requires_grad
