"""Inputs of the fused head."""

import torch
from hypothesis import strategies as st
from torch import nn

from grpo_core import compute_entropy, fused_linear_log_probs, select_log_probs
from tests.strategies import floats, masks, tensors


class Case:
    """One call's worth of everything, float64."""

    def __init__(self, draw) -> None:
        rows, seq, width, vocab = draw(st.tuples(*[st.integers(1, high) for high in (3, 4, 3, 7)]))
        self.shape, self.vocab = (rows, seq), vocab
        self.hidden = draw(tensors((rows, seq, width), floats(-2, 2)))
        self.weight = draw(tensors((vocab, width), floats(-2, 2)))
        self.bias = draw(st.one_of(st.none(), tensors((vocab,), floats(-2, 2))))
        self.labels = torch.tensor(draw(st.lists(st.integers(0, vocab - 1), min_size=rows * seq, max_size=rows * seq)))
        self.labels = self.labels.view(self.shape)
        self.mask = draw(masks(self.shape))
        self.g, self.g_entropy = (draw(tensors(self.shape, floats(-2, 2))) for _ in range(2))
        self.options = {
            "temperature": draw(st.sampled_from([0.5, 1.0, 2.0])),
            "logit_softcap": draw(st.sampled_from([None, None, 1.5, 30.0])),
            # All logits at once, or blocks of one, two or three rows.
            "max_logits_bytes": draw(st.sampled_from([1 << 20, 8 * vocab, 16 * vocab, 24 * vocab])),
        }

    def leaves(self) -> dict[str, torch.Tensor]:
        tensors = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {k: v.detach().clone().requires_grad_() for k, v in tensors.items() if v is not None}

    def slow(self, leaves, labels=None, members=None) -> dict[str, torch.Tensor]:
        """Through all logits, those outside of `members` -inf, with the functions that are proven by themselves."""
        logits = nn.functional.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
        cap, temperature = self.options["logit_softcap"], self.options["temperature"]
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        if members is not None:
            logits = logits.masked_fill(~members, -float("inf"))
        return {
            "log_probs": select_log_probs(logits, self.labels if labels is None else labels, temperature=temperature),
            "token_entropy": compute_entropy(logits, temperature=temperature),
        }

    def fused(self, leaves, **options) -> dict[str, torch.Tensor]:
        return fused_linear_log_probs(
            leaves["hidden"],
            leaves["weight"],
            self.labels,
            **({"response_mask": self.mask, "bias": leaves.get("bias")} | self.options | options),
        )


@st.composite
def cases(draw) -> Case:
    return Case(draw)
