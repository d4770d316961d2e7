"""What samples completions: one Protocol, the Hugging Face reference engine, and the choice between engines."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from drivers import ranks
from drivers.errors import EngineDiedError, UsageError
from drivers.weights import Checksum, PolicyWeights, checksums


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    n: int = 1
    temperature: float = 1.0
    min_tokens: int = 0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ("</answer>",)
    top_p: float = 1.0
    """Below 1 the log-probs are of another distribution than the policy's: renormalized over what was kept."""

    def alone(self) -> "Sampling":
        """The same, one completion for each prompt."""
        return replace(self, n=1)

    def greedy(self) -> "Sampling":
        """The likeliest token each time, once for each prompt."""
        return replace(self, n=1, temperature=0.0, top_p=1.0)


@dataclass(frozen=True)
class Completion:
    """One sampled response, as the engine sampled it."""

    text: str
    """Ends with the stop string, if that ended it."""
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """As sampled, the end token included: what training uses."""
    log_probs: tuple[float, ...]
    """Of each sampled token under the distribution it was drawn from, in nats."""
    finish_reason: Literal["stop", "length"]
    """`length`: cut off at the token limit."""
    weight_version: int | None = None
    """The push that the sampling weights came from; None where the engine cannot tell."""


def of_push(version: int | None, engine: str, completions: list[Completion]) -> list[Completion]:
    """`completions`, if all are from the weights that this engine was pushed last: samples of others are not taken."""
    for other in {completion.weight_version for completion in completions} - {version}:
        raise EngineDiedError(
            f"{engine} samples from the weights of push {other}, {version} was the last one: it has been started "
            "again, or somebody else pushes"
        )
    return completions


class RolloutEngine(Protocol):
    """Samples from the policy as of the last `load_weights`."""

    def load_weights(self, version: int) -> None:
        """Take over the policy's weights as they are now, and call them `version`."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """`sampling.n` completions of each prompt, in the order of the prompts, those of one prompt together."""
        ...

    def sleep(self) -> None:
        """Hand shared device memory to the trainer until the next `load_weights`."""
        ...

    def received(self) -> list[dict[str, Checksum]]:
        """Checksums of the last push, taken where it arrived, once for each worker; none where nothing travels."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it is not used again. Waits for a `generate` that runs in another thread."""
        ...


class FollowingEngine:
    """What the other ranks have for an engine: while the first one leads, they help to gather what it pushes."""

    def __init__(self, weights: PolicyWeights) -> None:
        ranks.follow(weights)

    def load_weights(self, version: int) -> None:
        raise NotImplementedError("the first rank pushes")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        raise NotImplementedError("the first rank samples")

    def sleep(self) -> None:
        pass

    def received(self) -> list[dict[str, Checksum]]:
        return []

    def close(self) -> None:
        pass


class HFEngine:
    """`policy.generate`: slow, runs wherever the policy does, and shares its weights, so it is never stale."""

    def __init__(self, policy: Any, tokenizer: Any, *, batch_size: int = 64) -> None:
        self._policy, self._tokenizer, self._batch_size = policy, tokenizer, batch_size
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
        """See `RolloutEngine`. Left pads; greedy when the temperature is 0."""
        repeated = [tuple(prompt) for prompt in prompts for _ in range(sampling.n)]
        devices = [self._policy.device] if self._policy.device.type == "cuda" else []
        completions: list[Completion] = []
        training = self._policy.training  # as gradient checkpointing has it
        self._policy.eval()
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                torch.manual_seed(seed)
                for start in range(0, len(repeated), self._batch_size):
                    completions += self._generate_batch(repeated[start : start + self._batch_size], sampling)
        finally:
            self._policy.train(training)
        return completions

    def _generate_batch(self, prompts: list[tuple[int, ...]], sampling: Sampling) -> list[Completion]:
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        pad = self._end_ids[0]
        input_ids = torch.tensor([(pad,) * (width - len(p)) + p for p in prompts], device=self._policy.device)
        attended = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._policy.device)
        greedy = sampling.temperature == 0
        # A configuration of our own: the model's may carry top-p, top-k or a repetition penalty.
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
            output_logits=greedy,  # one of the two: each holds every step's values for the whole vocabulary
            output_scores=not greedy,
        )
        out = self._policy.generate(
            input_ids, attention_mask=attended, generation_config=config, tokenizer=self._tokenizer
        )
        sampled = out.sequences[:, width:].cpu()
        log_probs = _log_probs_of(sampled, out.logits if greedy else out.scores)
        return [
            self._cut(p, ids, lp, sampling)
            for p, ids, lp in zip(prompts, sampled.tolist(), log_probs.tolist(), strict=True)
        ]

    def _cut(self, prompt: tuple[int, ...], ids: list[int], log_probs: list[float], sampling: Sampling) -> Completion:
        """End a row of the padded batch where its own end token or stop string stands."""
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
    """What ends a response: any of those that the model's configuration names, and the tokenizer's."""
    configured = policy.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


class HFReplica(HFEngine):
    """`generate` of a whole copy, for a policy whose weights are spread over ranks."""

    def __init__(self, copy: Any, tokenizer: Any, weights: PolicyWeights) -> None:
        super().__init__(copy, tokenizer)
        self._weights = weights

    @torch.no_grad()
    def load_weights(self, version: int) -> None:
        own = dict(self._policy.named_parameters())
        for name, weight in self._weights:
            own[name].copy_(weight)
        super().load_weights(version)

    def received(self) -> list[dict[str, Checksum]]:
        return [checksums(self._policy.named_parameters())]


def _log_probs_of(sampled: Tensor, scores: Sequence[Tensor]) -> Tensor:
    """Log-prob of each sampled token, from the scores of each step."""
    columns = [
        torch.log_softmax(score.float(), dim=-1).gather(1, sampled[:, [step]].to(score.device))
        for step, score in enumerate(scores)
    ]
    return torch.cat(columns, dim=1).cpu()


def make_engine(
    kind: Literal["vllm", "hf"],
    *,
    model_path: str,
    policy: nn.Module,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    gpu_memory_utilization: float,
    reserved_bytes: int,
    seed: int,
    own_process: bool = False,
    deadline_s: float = 3600.0,
    urls: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> RolloutEngine:
    """The engine that was asked for: the servers at `urls`, if any. vLLM is imported here and nowhere earlier.

    A response ends with the tokenizer's end token, and with those that the model's own configuration names.
    `reserved_bytes` of a GPU that engine and policy share are not the engine's. In a process of its own (on the CPU
    with `own_process`, on a second GPU in any case) it is supervised, and `say` tells when it had to be started again.
    """
    if kind == "hf":
        return HFEngine(policy, tokenizer)
    try:
        from drivers.vllm_engine import VLLMEngine
    except ImportError as error:
        raise UsageError(
            f"--engine vllm: vLLM cannot be imported ({error}); install the extra 'cpu' or 'gpu', or pass --engine hf"
        ) from error
    try:
        from drivers.supervise import SupervisedEngine

        if urls:
            from drivers.vllm_server import ServerEngine

            settings: dict[str, Any] = {"dtype": dtype, "max_model_len": max_model_len, "deadline_s": deadline_s}
            settings["end_token_id"] = tokenizer.eos_token_id
            say(f"Waiting for {', '.join(urls)} ...")
            return SupervisedEngine(partial(ServerEngine, urls, policy, **settings), say)
        start = partial(
            VLLMEngine,
            model_path,
            policy,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            reserved_bytes=reserved_bytes,
            seed=seed,
            own_process=own_process,
            deadline_s=deadline_s,
            end_token_id=tokenizer.eos_token_id,
        )
        apart = own_process or (device.type == "cuda" and device != next(policy.parameters()).device)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # between vLLM and torch
            return SupervisedEngine(start, say) if apart else start()
    except UsageError:
        raise
    except (ValueError, RuntimeError, OSError) as error:  # an unknown architecture, too little memory, a full disk
        raise UsageError(f"--engine vllm: vLLM cannot start: {' '.join(str(error).split())[:600]}") from error
