"""From the tensors of a step to the numbers of its log line. Every key is defined in docs/metrics.md."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from drivers.common import distributed
from drivers.engines.protocol import Completion
from drivers.training.batch import RolloutBatch
from drivers.training.objective import describe_correction
from grpo_core import compute_gradient_share, masked_mean


class UpdateMetrics:
    """What the updates of one step were like. Everything stays on the device until `summary`."""

    def __init__(self, shown: Sequence[Completion] = (), *, has_sampler: bool = True) -> None:
        """`shown`: responses of which the values of each token are kept.

        `has_sampler`: demonstrations were not sampled; there is no other policy to be compared with.
        """
        self._has_sampler, self._shown = has_sampler, tuple(shown)
        self.skipped_responses = 0
        self.skipped_updates = 0
        self.trained_tokens = 0
        self._begun = 0
        self._micro_batches: list[dict[str, Tensor]] = []
        self._ratios: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._grad_norms: list[Tensor] = []
        self._facts: list[Mapping[str, float]] = []
        self._watched: list[Mapping[str, Tensor]] = []
        self._pulls: list[Tensor] = []
        self._is_positive: list[Tensor] = []
        self._lengths: list[Tensor] = []
        self._of_shown: list[tuple[int, int, dict[str, Tensor]]] = []

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
        log_probs, name = scored["log_probs"].detach(), "sampler_log_prob_diff"
        watching = (log_probs - micro.sampler_log_probs).abs()
        if not self._has_sampler:
            name, watching = "nll", -log_probs
        else:
            self._ratios.append(watching.masked_fill(~micro.response_mask, 0.0).max())
        self._micro_batches.append(
            {
                **metadata,
                "entropy": masked_mean(scored["token_entropy"].detach(), micro.response_mask),
                name: masked_mean(watching, micro.response_mask),
            }
        )
        self._of_shown += [
            (len(self._losses), place, {"log_probs": log_probs[row], "entropy": scored["token_entropy"][row].detach()})
            for row, completion in enumerate(micro.completions)
            for place, one in enumerate(self._shown)
            if one is completion
        ]
        gradients = scored["log_probs"].grad
        if gradients is not None and micro.advantages is not None:
            self._pulls.append(gradients.abs().sum(dim=1, keepdim=True))
            self._is_positive.append(micro.advantages[:, 0] > 0)
            self._lengths.append(micro.response_mask.sum(dim=1))

    def drift(self) -> dict[str, float]:
        """How far the policy is from the one that sampled, over the micro-batches since the last `add_update`."""
        means = {}
        for name in ("sampler_log_prob_diff", "approx_kl"):
            parts = [part for part in self._micro_batches[self._begun :] if name in part]
            sums = torch.zeros(2, dtype=torch.float64)
            if parts:
                tokens = torch.stack([part["response_tokens"] for part in parts]).double()
                values = torch.where(tokens > 0, torch.stack([part[name] for part in parts]).double() * tokens, 0.0)
                sums = torch.stack([values.sum(), tokens.sum()]).cpu()
            summed, count = distributed.all_reduce_sum_(sums).tolist()
            if count:
                means[name] = summed / count
        largest: list[float] = torch.stack(self._ratios).tolist() if self._ratios else []  # the host waits once
        self._ratios = []
        of_ranks = [value for values in distributed.gather(largest) for value in values]
        if of_ranks:
            means["max_log_ratio"] = math.nan if any(map(math.isnan, of_ranks)) else max(of_ranks)
        return means

    def add_update(self, loss: Tensor, grad_norm: Tensor, facts: Mapping[str, float], *, made: bool = True) -> None:
        """An optimizer step; or one that was not made."""
        self._begun = len(self._micro_batches)
        self.skipped_updates += not made
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)
        self._facts.append(facts)

    def summary(self) -> dict[str, float]:
        """Host numbers: of optimizer steps their mean, of micro-batches the mean over all their response tokens.

        Micro-batches are those of all ranks.
        """
        if self._losses:
            self._gather()
        counts = {
            "trained_tokens": float(self.trained_tokens),
            "micro_batches": float(len(self._micro_batches)),
            "skipped_responses": float(self.skipped_responses),
            "skipped_updates": float(self.skipped_updates),
        }
        if not self._losses:
            return counts
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
        return dict(sorted((facts | dict(zip(numbers, host, strict=True))).items())) | counts

    def logged_token_values(self) -> list[dict[str, list[float]]]:
        """After `summary`: each token's values in the first pass over a response; none where there was no pass."""
        first: dict[int, dict[str, Tensor]] = {}
        for _, place, values in sorted(self._of_shown, key=lambda one: one[:2]):
            first.setdefault(place, values)
        return [
            {name: values[: len(one.token_ids)].tolist() for name, values in first.get(place, {}).items()}
            for place, one in enumerate(self._shown)
        ]

    def _gather(self) -> None:
        """What each rank has seen of its own micro-batches, on all of them."""
        if distributed.size() == 1:
            return
        names = ("_micro_batches", "_watched", "_pulls", "_is_positive", "_lengths", "_of_shown")
        parts = distributed.gather({name: tree_map_only(Tensor, Tensor.cpu, getattr(self, name)) for name in names})
        device = self._losses[0].device
        for name in names:
            whole = [value for part in parts for value in part[name]]
            setattr(self, name, tree_map_only(Tensor, lambda value: value.to(device), whole))
