"""From the tensors of a step to the numbers of its log line. Every key is defined in docs/metrics.md."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from drivers import ranks
from drivers.batch import RolloutBatch
from drivers.objective import describe_correction
from drivers.rollout import Completion
from grpo_core import compute_gradient_share, masked_mean


class UpdateMetrics:
    """What the updates of one step were like. Everything stays on the device until `summary`."""

    def __init__(self) -> None:
        self.skipped_responses = 0
        self.trained_tokens = 0
        self._micro_batches: list[dict[str, Tensor]] = []
        self._losses: list[Tensor] = []
        self._grad_norms: list[Tensor] = []
        self._facts: list[Mapping[str, float]] = []
        self._watched: list[Mapping[str, Tensor]] = []
        self._pulls: list[Tensor] = []
        self._is_positive: list[Tensor] = []
        self._lengths: list[Tensor] = []

    def add_micro_batch(
        self,
        micro: RolloutBatch,
        scored: Mapping[str, Tensor],
        metadata: Mapping[str, Tensor],
        watched: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A micro-batch that was trained on, with the means over its response tokens."""
        if watched is not None:
            self._watched.append(watched)
        difference = (scored["log_probs"].detach() - micro.sampler_log_probs).abs()
        self._micro_batches.append(
            {
                **metadata,
                "entropy": masked_mean(scored["token_entropy"].detach(), micro.response_mask),
                "sampler_log_prob_diff": masked_mean(difference, micro.response_mask),
            }
        )
        gradients = scored["log_probs"].grad
        if gradients is not None and micro.advantages is not None:
            self._pulls.append(gradients.abs().sum(dim=1, keepdim=True))
            self._is_positive.append(micro.advantages[:, 0] > 0)
            self._lengths.append(micro.response_mask.sum(dim=1))

    def add_update(self, loss: Tensor, grad_norm: Tensor, facts: Mapping[str, float]) -> None:
        """An optimizer step."""
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)
        self._facts.append(facts)

    def summary(self) -> dict[str, float]:
        """Host numbers: of optimizer steps their mean, of micro-batches the mean over all their response tokens.

        Micro-batches are those of all ranks.
        """
        self._gather()
        numbers = {"loss": torch.stack(self._losses).mean(), "grad_norm": torch.stack(self._grad_norms).mean()}
        if self._micro_batches:
            tokens = torch.stack([part["response_tokens"] for part in self._micro_batches])
            for key in self._micro_batches[0].keys() - {"response_tokens"}:
                values = torch.stack([part[key] for part in self._micro_batches])
                numbers[key] = torch.where(tokens > 0, values * tokens, 0.0).sum() / tokens.sum().clamp(min=1)
        if self._pulls:
            pulls, lengths = torch.cat(self._pulls), torch.cat(self._lengths)
            numbers["gradient_share_positive"] = compute_gradient_share(pulls, torch.cat(self._is_positive))
            numbers["gradient_share_long"] = compute_gradient_share(pulls, lengths > lengths.float().median())
        host = torch.stack([value.float() for value in numbers.values()]).tolist()
        facts = {name: sum(one[name] for one in self._facts) / len(self._facts) for name in self._facts[0]}
        if self._watched:
            facts |= describe_correction(self._watched)
        return dict(sorted((facts | dict(zip(numbers, host, strict=True))).items())) | {
            "trained_tokens": float(self.trained_tokens),
            "micro_batches": float(len(self._micro_batches)),
            "skipped_responses": float(self.skipped_responses),
        }

    def _gather(self) -> None:
        """What each rank has seen of its own micro-batches, on all of them."""
        if ranks.size() == 1:
            return
        names = ("_micro_batches", "_watched", "_pulls", "_is_positive", "_lengths")
        parts = ranks.gather({name: tree_map(torch.Tensor.cpu, getattr(self, name)) for name in names})
        device = self._losses[0].device
        for name in names:
            whole = [value for part in parts for value in part[name]]
            setattr(self, name, tree_map(lambda value: value.to(device), whole))


def describe_completions(completions: Sequence[Completion]) -> dict[str, float]:
    """Lengths, cut-offs, and the entropy estimate that the sampler's own log-probs give."""
    lengths = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.float64)
    log_probs = torch.tensor(
        [value for completion in completions for value in completion.log_probs], dtype=torch.float64
    )
    return {
        "response_tokens": lengths.mean().item(),
        "response_tokens_max": lengths.max().item(),
        "truncated": sum(completion.finish_reason == "length" for completion in completions) / len(completions),
        "rollout_entropy": -log_probs.mean().item(),
    }
