"""Sample with Hugging Face `generate`."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from drivers.engines.protocol import Completion
from drivers.policy.weights import Checksum, PolicyWeights
from drivers.settings.sampling import Sampling

BATCH_SIZE = 64


class HFEngine:
    """Samples with `policy.generate`: slow, but it shares the policy's device and weights, so it is never stale."""

    def __init__(self, policy: Any, tokenizer: Any) -> None:
        self._policy, self._tokenizer = policy, tokenizer
        self._version: int | None = None
        self._end_ids = end_token_ids(policy, tokenizer)

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
                    completions += self._generate_batch(repeated[start : start + BATCH_SIZE], sampling)
        finally:
            self._policy.generation_config = own
            self._policy.train(training)
        return completions

    def _generate_batch(self, prompts: list[tuple[int, ...]], sampling: Sampling) -> list[Completion]:
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        pad = self._end_ids[0]
        input_ids = torch.tensor([(pad,) * (width - len(p)) + p for p in prompts], device=self._policy.device)
        attended = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._policy.device)
        greedy = sampling.temperature == 0
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_k=None if greedy else 0,
            top_p=1.0 if greedy else sampling.top_p,
            min_new_tokens=sampling.min_tokens or None,
            max_new_tokens=sampling.max_tokens,
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
        return [
            self._truncate(p, ids, lp, sampling)
            for p, ids, lp in zip(prompts, sampled.tolist(), log_probs.tolist(), strict=True)
        ]

    def _truncate(
        self, prompt: tuple[int, ...], ids: list[int], log_probs: list[float], sampling: Sampling
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
        return Completion(text, prompt, kept, tuple(log_probs[:length]), finish_reason, self._version)


def end_token_ids(policy: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a response: those of the model's configuration, and the tokenizer's."""
    configured = policy.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


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


def _log_probs_of(sampled: Tensor, scores: Sequence[Tensor]) -> Tensor:
    """Return the log-prob of each sampled token from the scores of each step."""
    columns = [
        torch.log_softmax(score.float(), dim=-1).gather(1, sampled[:, [step]].to(score.device))
        for step, score in enumerate(scores)
    ]
    return torch.cat(columns, dim=1).cpu()
