"""Turn the tensors of a step's updates into the numbers of its log line. docs/metrics.md defines every key."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from drivers.common import distributed
from drivers.engines.protocol import Completion
from drivers.training.batch import WeightedBatch
from drivers.training.objective import describe_correction
from grpo_core import compute_gradient_share, masked_mean


class UpdateMetrics:
    """Accumulates the updates of one step. Tensors stay on the device until `summary`."""

    def __init__(self, logged: Sequence[Completion] = (), *, has_sampler: bool = True) -> None:
        """Keep the token values of the completions `logged`.

        Without a sampler (demonstrations), the policy is not compared with one.
        """
        self._has_sampler, self._logged = has_sampler, tuple(logged)
        self.skipped_responses = 0
        self.skipped_updates = 0
        self.trained_tokens = 0
        self._n_earlier_micro_batches = 0
        self._micro_batches: list[dict[str, Tensor]] = []
        self._max_log_ratios: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._grad_norms: list[Tensor] = []
        self._batch_metrics: list[Mapping[str, float]] = []
        self._correction_parts: list[Mapping[str, Tensor]] = []
        self._gradients: list[tuple[Tensor, Tensor, Tensor]] = []
        self._logged_values: list[tuple[int, int, dict[str, Tensor]]] = []

    def add_micro_batch(
        self,
        micro: WeightedBatch,
        token_values: Mapping[str, Tensor],
        metadata: Mapping[str, Tensor],
        correction: Mapping[str, Tensor] | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        """Record a micro-batch after its backward pass, in which the loss was multiplied by `loss_scale`.

        `metadata` has means over its response tokens.
        """
        if correction:
            self._correction_parts.append(correction)
        log_probs, entropies = token_values["log_probs"].detach(), token_values["token_entropy"].detach()
        means = {**metadata, "entropy": masked_mean(entropies, micro.response_mask)}
        if self._has_sampler:
            difference = (log_probs - micro.sampler_log_probs).abs()
            self._max_log_ratios.append(difference.masked_fill(~micro.response_mask, 0.0).max())
            means["sampler_log_prob_diff"] = masked_mean(difference, micro.response_mask)
        else:
            means["nll"] = masked_mean(-log_probs, micro.response_mask)
        self._micro_batches.append(means)
        self._logged_values += [
            (len(self._losses), index, {"log_probs": log_probs[row], "entropy": entropies[row]})
            for row, completion in enumerate(micro.completions)
            for index, logged in enumerate(self._logged)
            if logged is completion
        ]
        gradients = token_values["log_probs"].grad
        if gradients is not None:
            sums, lengths = gradients.abs().sum(dim=1, keepdim=True) / loss_scale, micro.response_mask.sum(dim=1)
            self._gradients.append((sums, micro.advantages[:, 0] > 0, lengths))

    def drift(self) -> dict[str, float]:
        """Return distances between the policy and the sampler over the micro-batches since the last `add_update`."""
        means = {}
        for name in ("sampler_log_prob_diff", "approx_kl"):
            parts = [part for part in self._micro_batches[self._n_earlier_micro_batches :] if name in part]
            sums = torch.zeros(2, dtype=torch.float64)
            if parts:
                tokens = torch.stack([part["response_tokens"] for part in parts]).double()
                values = torch.where(tokens > 0, torch.stack([part[name] for part in parts]).double() * tokens, 0.0)
                sums = torch.stack([values.sum(), tokens.sum()]).cpu()
            summed, count = distributed.all_reduce_sum_(sums).tolist()
            if count:
                means[name] = summed / count
        largest = torch.stack(self._max_log_ratios).tolist() if self._max_log_ratios else []  # one wait for the device
        self._max_log_ratios = []
        all_ranks = [value for values in distributed.gather(largest) for value in values]
        if all_ranks:
            means["max_log_ratio"] = math.nan if any(map(math.isnan, all_ranks)) else max(all_ranks)
        return means

    def add_update(
        self, loss: Tensor, grad_norm: Tensor | None, batch_metrics: Mapping[str, float], *, made: bool = True
    ) -> None:
        """Record an optimizer step (`made=False` if it was skipped); `grad_norm` is None after an overflow."""
        self._n_earlier_micro_batches = len(self._micro_batches)
        self.skipped_updates += not made
        self._losses.append(loss)
        self._grad_norms += [] if grad_norm is None else [grad_norm]
        self._batch_metrics.append(batch_metrics)

    def summary(self) -> dict[str, float]:
        """Return means over optimizer steps, and over the response tokens of the micro-batches of all ranks."""
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
        known = {"loss": self._losses, "grad_norm": self._grad_norms}
        updates = {name: torch.stack(values).mean() for name, values in known.items() if values}
        means = updates | self._token_means() | self._gradient_shares()
        numbers = torch.stack([value.float() for value in means.values()]).tolist()  # one wait for the device
        correction = describe_correction(self._correction_parts) if self._correction_parts else {}
        n_updates = len(self._batch_metrics)
        batches = {k: sum(metrics[k] for metrics in self._batch_metrics) / n_updates for k in self._batch_metrics[0]}
        metrics = batches | correction | dict(zip(means, numbers, strict=True))
        return dict(sorted(metrics.items())) | counts

    def _token_means(self) -> dict[str, Tensor]:
        """Return means over the response tokens of all micro-batches."""
        if not self._micro_batches:
            return {}
        tokens = torch.stack([part["response_tokens"] for part in self._micro_batches])
        means = {}
        for name in self._micro_batches[0].keys() - {"response_tokens"}:
            values = torch.stack([part[name] for part in self._micro_batches])
            means[name] = torch.where(tokens > 0, values * tokens, 0.0).sum() / tokens.sum().clamp(min=1)
        return means

    def _gradient_shares(self) -> dict[str, Tensor]:
        """Return the shares of the gradient from positive advantages and from long responses."""
        if not self._gradients:
            return {}
        sums, is_positive, lengths = map(torch.cat, zip(*self._gradients, strict=True))
        return {
            "gradient_share_positive": compute_gradient_share(sums, is_positive),
            "gradient_share_long": compute_gradient_share(sums, lengths > lengths.float().median()),
        }

    def logged_token_values(self) -> list[dict[str, list[float]]]:
        """Return the token values of the first pass over each logged response, after `summary`; {} without a pass."""
        first_pass: dict[int, dict[str, Tensor]] = {}
        for _, index, values in sorted(self._logged_values, key=lambda entry: entry[:2]):
            first_pass.setdefault(index, values)
        return [
            {name: values[: len(completion.token_ids)].tolist() for name, values in first_pass.get(index, {}).items()}
            for index, completion in enumerate(self._logged)
        ]

    def _gather(self) -> None:
        """Gather the records of all ranks on each of them."""
        if distributed.size() == 1:
            return
        names = ("_micro_batches", "_correction_parts", "_gradients", "_logged_values")
        parts = distributed.gather({name: tree_map_only(Tensor, Tensor.cpu, getattr(self, name)) for name in names})
        device = self._losses[0].device
        for name in names:
            gathered = [value for part in parts for value in part[name]]
            setattr(self, name, tree_map_only(Tensor, lambda value: value.to(device), gathered))
