"""The first run on a GPU, in one command: `make bench-gpu`, or `python -m tests.benchmarks.gpu [--toy]`.

Under 9 minutes on one H100 or H200, without a network and without a model from a hub: the model has the shape of
Qwen2.5-Math-1.5B and random weights. In .venv-parity the heads of other libraries run too. Each section is a process
with a time limit; what it has found by then is kept. Writes gpu.json and gpu.md into a folder, and with `--write` the
tables into docs/performance.md. `--toy` rehearses it on the CPU.
"""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from drivers.common.atomic_files import write_json, write_text
from tests.benchmarks.__main__ import PAGE, write_table
from tests.benchmarks._harness import ROOT, describe, digits, make_table

QWEN2_5_MATH_1_5B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
ANCHORS = (
    ("ten steps of 64 responses, the runs that this project grew from, two H100", "30 minutes"),
    ("a step of 256 responses of up to 512 tokens, 1B, two B200: the budget of CS336 2026", "4.5 s"),
)
"""Published times, printed below the section `training`."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured shapes and runs."""

    device: str = "cuda"
    engine: str = "vllm"
    shape: dict[str, Any] = field(default_factory=lambda: QWEN2_5_MATH_1_5B)
    tests: tuple[str, ...] = ("tests/drivers/test_cuda.py", "tests/property/test_kernels.py")
    head: tuple[int, int] = (32, 512)
    """Responses and tokens of each."""
    matmul: int = 8192
    """Rows and columns of the square product that gives the peak."""
    groups: tuple[int, int] = (8, 8)
    """Questions of a step and responses to each: the 64 rollouts of a test run."""
    prompt: tuple[int, int] = (100, 300)
    cap: int = 512
    """Longest response, in tokens. Random weights sample no end, so that all responses are as long."""
    micro_batch_tokens: int = 8192
    steps: int = 10


FULL = Sizes()
TOY = Sizes(
    device="cpu",
    engine="hf",
    shape=TINY,
    tests=("tests/drivers/test_cuda.py::test_core_functions_on_cuda_equal_cpu",),
    head=(2, 8),
    matmul=64,
    groups=(2, 2),
    prompt=(4, 8),
    cap=4,
    micro_batch_tokens=64,
    steps=2,
)
LIMITS = {"tests": 90, "head": 120, "step": 70, "vllm": 100, "training": 150}
"""Seconds of each section: 530 together."""


def run_section(name: str, sizes: Sizes, limit_s: float) -> dict[str, Any]:
    """Return what a section has found, with its seconds, and why it ended early if it did."""
    with tempfile.TemporaryDirectory() as folder:
        found, said = Path(folder, "found.json"), Path(folder, "said.txt")
        command = [sys.executable, "-m", "tests.benchmarks.gpu_sections", name, json.dumps(asdict(sizes)), str(found)]
        environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        begin = time.perf_counter()
        with said.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        problem = None
        try:
            if process.wait(limit_s):
                last = (said.read_text().strip().splitlines() or ["no message"])[-1]
                problem = f"ended with {process.returncode}: {last[:200]}"
        except subprocess.TimeoutExpired:
            problem = f"cut off after {limit_s:g} s"
        finally:  # what it has started too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        results = json.loads(found.read_text()) if found.exists() else {}
        return {"results": results, "seconds": time.perf_counter() - begin, "problem": problem}


def format_seconds(result: dict[str, Any]) -> str:
    return result["left_out"] if "left_out" in result else digits(1000 * result["seconds"])


def format_peak(result: dict[str, Any]) -> str:
    return "-" if result.get("peak_gib") is None else f"{result['peak_gib']:.2f}"


def make_head_table(results: dict[str, Any]) -> str:
    rows = []
    for key, result in results.items():
        dtype, _, way = key.partition(" ")
        three = results[f"{dtype} 3 products"]["seconds"]
        ratio = f"{result['seconds'] / three:.2f}" if "seconds" in result else "-"
        error = f"{result['error']:.1e}" if "error" in result else "-"
        rows.append([f"`{way}`" if "products" not in way else way, dtype, format_seconds(result), ratio])
        rows[-1] += [format_peak(result), error]
    return make_table(["way", "type", "ms", "x 3 products", "peak, GiB", "log-prob error"], rows)


def make_step_table(results: dict[str, Any]) -> str:
    rows = [["fastest matrix product, TFLOP/s", digits(results["matmul"]["flops"] / 1e12)]]
    update = results.get("update", {"left_out": "not reached"})
    rows.append(["update, ms", format_seconds(update)])
    if "seconds" in update:
        rows += [
            ["tokens/s, prompts counted once per response", digits(update["tokens"] / update["seconds"])],
            ["slots per token", f"{update['slots'] / update['tokens']:.2f}"],
            ["micro-batches", str(update["micro_batches"])],
            ["share of the fastest product, attention not counted", f"{update['share_of_matmul']:.2f}"],
            ["peak beyond the states, GiB", format_peak(update)],
        ]
    return make_table(["micro-batch step", ""], rows)


def make_vllm_table(results: dict[str, Any]) -> str:
    rows = [[name, digits(result["seconds"])] for name, result in results.items()]
    if "sampling" in results:
        rate = results["sampling"]["tokens"] / results["sampling"]["seconds"]
        rows.append(["tokens/s of sampling", digits(rate)])
    return make_table(["vLLM", "s"], rows)


def make_training_table(results: dict[str, Any], sizes: Sizes) -> str:
    result = results["training"]
    if "left_out" in result:
        return f"Training: {result['left_out']}."
    rows = [[f"{sizes.steps} steps", digits(result["steps_seconds"])]]
    rows += [["start-up and first evaluation", digits(result["seconds"] - result["steps_seconds"])]]
    rows += [[f"`{name}`, median of a step", digits(seconds)] for name, seconds in result["phases"].items()]
    rows += [["response tokens, mean", digits(result["response_tokens"])]]
    rows += [[f"*{what}*", f"*{took}*"] for what, took in ANCHORS]
    return make_table([f"training, {sizes.groups[0] * sizes.groups[1]} responses of {sizes.cap} tokens", "s"], rows)


def make_tests_line(results: dict[str, Any]) -> str:
    tests = results["tests"]
    counts = ", ".join(f"{number} {word}" for word, number in tests["counts"].items()) or "none ran"
    return f"GPU tests: {counts}" + "".join(f"; {name}" for name in tests["failed"]) + "."


def make_report(found: dict[str, Any], sizes: Sizes) -> str:
    """Return the tables of all sections, and what was cut off."""
    tables = {
        "tests": make_tests_line,
        "head": make_head_table,
        "step": make_step_table,
        "vllm": make_vllm_table,
        "training": lambda results: make_training_table(results, sizes),
    }
    n_layers, tokens = sizes.shape["num_hidden_layers"], sizes.head[0] * sizes.head[1]
    facts = f"{n_layers} layers, vocabulary {sizes.shape['vocab_size']}, random weights; {tokens} tokens of the head"
    parts = [describe(sizes.device, facts)]
    for name, section in found.items():
        if section["results"]:
            parts.append(tables[name](section["results"]))
        if section["problem"]:
            parts.append(f"Section {name}: {section['problem']}.")
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="rehearse on the CPU at toy sizes")
    parser.add_argument("--sections", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench-gpu", help="folder of gpu.json and gpu.md")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.parent.name}/{PAGE.name}")
    chosen = parser.parse_args(arguments)
    if not chosen.toy and not torch.cuda.is_available():
        parser.error("no CUDA device is available; pass --toy to rehearse on the CPU")
    sizes, found = TOY if chosen.toy else FULL, {}
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.sections:
        print(f"{name}: up to {LIMITS[name]} s ...", flush=True)
        found[name] = run_section(name, sizes, LIMITS[name])
        write_json(chosen.out / "gpu.json", {"sizes": asdict(sizes), "torch": torch.__version__, "sections": found})
    report = make_report(found, sizes)
    write_text(chosen.out / "gpu.md", report + "\n")
    print(f"\n{report}")
    if chosen.write:
        write_text(PAGE, write_table(PAGE.read_text(), "gpu", report))


if __name__ == "__main__":
    main()
