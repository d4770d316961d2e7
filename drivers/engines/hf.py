"""Sample with Hugging Face `generate`."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from drivers.engines.kept_tokens import KeptTokens
from drivers.engines.protocol import Completion, end_token_ids, exclude_end
from drivers.policy.checksums import Checksum
from drivers.policy.weights import PolicyWeights
from drivers.settings.sampling import Sampling

BATCH_SIZE = 64


class HFEngine:
    """Samples with `policy.generate`: slow, but it shares the policy's device and weights, so it is never stale."""

    def __init__(self, policy: Any, tokenizer: Any) -> None:
        self._policy, self._tokenizer = policy, tokenizer
        self._version: int | None = None
        self._end_ids = end_token_ids(policy, tokenizer.eos_token_id)

    def load_weights(self, version: int) -> None:
        self._version = version

    def sleep(self) -> None:
        pass

    def received(self) -> list[dict[str, Checksum]]:
        return []

    def close(self) -> None:
        pass

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """Sample `sampling.n` completions of each prompt, padded on the left; greedy at temperature 0."""
        repeated = [tuple(prompt) for prompt in prompts for _ in range(sampling.n)]
        limits = [sampling.for_prompt(index).max_tokens for index in range(len(prompts)) for _ in range(sampling.n)]
        devices = [self._policy.device] if self._policy.device.type == "cuda" else []
        completions: list[Completion] = []
        training = self._policy.training  # on while gradient checkpointing is
        own = self._policy.generation_config
        self._policy.eval()
        # `generate` fills what a request leaves open from the model's config, such as a repetition penalty.
        self._policy.generation_config = type(own)()
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                torch.manual_seed(seed)
                for start in range(0, len(repeated), BATCH_SIZE):
                    part = slice(start, start + BATCH_SIZE)
                    completions += self._generate_batch(repeated[part], limits[part], sampling)
        finally:
            self._policy.generation_config = own
            self._policy.train(training)
        return completions

    def _generate_batch(
        self, prompts: list[tuple[int, ...]], limits: list[int], sampling: Sampling
    ) -> list[Completion]:
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        pad = self._end_ids[0]
        input_ids = torch.tensor([(pad,) * (width - len(p)) + p for p in prompts], device=self._policy.device)
        attended = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._policy.device)
        greedy = sampling.temperature == 0
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_k=None if greedy else sampling.top_k,
            top_p=1.0 if greedy else sampling.top_p,
            min_p=None if greedy else sampling.min_p or None,
            min_new_tokens=sampling.min_tokens or None,
            max_new_tokens=max(limits),
            stop_strings=list(sampling.stop) or None,
            eos_token_id=self._end_ids,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_logits=greedy,  # logits or scores: each has the values of all steps for the whole vocabulary
            output_scores=not greedy,
        )
        out = self._policy.generate(
            input_ids, attention_mask=attended, generation_config=config, tokenizer=self._tokenizer
        )
        sampled = out.sequences[:, width:].cpu()
        log_probs = _log_probs_of(sampled, out.logits if greedy else out.scores)
        replays = sampling.replays and sampling.truncates and not greedy
        sets = _find_kept(out.scores) if replays else [None] * len(prompts)
        return [
            self._truncate(p, ids[:limit], lp, sets_of_row, sampling)
            for p, limit, ids, lp, sets_of_row in zip(
                prompts, limits, sampled.tolist(), log_probs.tolist(), sets, strict=True
            )
        ]

    def _truncate(
        self,
        prompt: tuple[int, ...],
        ids: list[int],
        log_probs: list[float],
        sets: list[list[int]] | None,
        sampling: Sampling,
    ) -> Completion:
        """Return a row of the padded batch up to its first end token or stop string."""
        length = len(ids)
        finish_reason: Literal["stop", "length"] = "length"
        for position, token in enumerate(ids):
            text = self._tokenizer.decode(ids[: position + 1], skip_special_tokens=True)
            if token in self._end_ids or any(stop in text for stop in sampling.stop):
                length, finish_reason = position + 1, "stop"
                break
        text = self._tokenizer.decode(ids[:length], skip_special_tokens=True)
        for stop in sampling.stop:
            if stop in text:
                text = text[: text.index(stop) + len(stop)]
        kept = tuple(ids[:length])
        return Completion(
            text,
            prompt,
            kept,
            tuple(log_probs[:length]),
            finish_reason,
            self._version,
            None if sets is None else KeptTokens.pack(sets[:length]),
            exclude_end(sampling, self._end_ids, length),
        )


class HFReplica(HFEngine):
    """Samples with an unsharded copy of a policy whose weights are sharded over ranks.

    `weights` have the names of the module's parameters.
    """

    def __init__(self, copy: Any, tokenizer: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__(copy, tokenizer)
        self._weights = weights

    @torch.no_grad()
    def load_weights(self, version: int) -> None:
        own = dict(self._policy.named_parameters())
        for name, weight in self._weights:
            own[name].copy_(weight)
        super().load_weights(version)

    def received(self) -> list[dict[str, Checksum]]:
        return [PolicyWeights(self._policy, self._policy.dtype).checksums()]


def _find_kept(scores: Sequence[Tensor]) -> list[list[list[int]]]:
    """Return for each row the tokens that each step could draw: their scores are finite."""
    steps = [[row.nonzero()[:, 0].tolist() for row in (score > -torch.inf).cpu()] for score in scores]
    return [list(row) for row in zip(*steps, strict=True)]


def _log_probs_of(sampled: Tensor, scores: Sequence[Tensor]) -> Tensor:
    """Return the log-prob of each sampled token from the scores of each step."""
    columns = [
        torch.log_softmax(score.float(), dim=-1).gather(1, sampled[:, [step]].to(score.device))
        for step, score in enumerate(scores)
    ]
    return torch.cat(columns, dim=1).cpu()
