"""Registers and memory of the compiled kernels, by GPU: `python -m tests.benchmarks kernels`. No GPU is needed.

Registers say how many programs a multiprocessor runs at once; stack and local memory above 0 would be spills. Another
Triton is compiled with if it stands first on PYTHONPATH.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.benchmarks._harness import make_table

ARCHITECTURES = {80: "A100", 86: "RTX 3090", 89: "L4, RTX 4090", 90: "H100, H200", 100: "B200", 120: "RTX 5090"}
VOCABULARIES = (151936, 151937)  # Qwen2.5's, and one whose rows are not aligned


@contextlib.contextmanager
def pretended_gpu(architecture: int) -> Iterator[list]:
    """Compile each kernel that is called for this GPU, and append it to the list, instead of running it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", architecture, 32))
        get_current_device = staticmethod(lambda: architecture)  # Triton keeps one target per device
        get_current_stream = staticmethod(lambda _: 0)

    run, device, compiled = JITFunction.run, torch.cuda.device, []

    def compile_only(self, *arguments, warmup=False, **options):
        compiled.append((self.fn.__name__, run(self, *arguments, warmup=True, **options)))

    driver.set_active(Absent())
    JITFunction.run, torch.cuda.device = compile_only, lambda _: contextlib.nullcontext()
    try:
        yield compiled
    finally:
        JITFunction.run, torch.cuda.device = run, device
        with contextlib.suppress(RuntimeError):  # there is no GPU
            driver.reset_active()


def call_kernels(vocab: int, dtype: torch.dtype, softcap: float | None) -> None:
    """Call both kernels, the gradient with log-prob alone and with both outputs."""
    from grpo_core.scoring import _triton

    logits, labels, column = torch.empty(4, vocab, dtype=dtype), torch.zeros(4, dtype=torch.long), torch.zeros(4, 1)
    _triton.compute_softmax_stats(logits, labels, 1.0, softcap)
    gradient = torch.empty(4, vocab, dtype=torch.bfloat16)
    for of_entropy in (None, column):
        _triton.write_gradient(logits, gradient, labels, 1.0, softcap, column, column, column, column, of_entropy)


def read_resources(kernel) -> dict[str, int]:
    """Return registers per thread, and bytes of stack, local and shared memory, as NVIDIA's own tool counts them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text.stdout))
    return {name: int(value) for name, value in found.items()} | {"SHARED": kernel.metadata.shared}


def compile_for(architecture: int) -> dict[str, list[dict[str, int]]]:
    """Return what each kernel takes in its variants, by the name of the kernel."""
    with pretended_gpu(architecture) as compiled:
        for vocab in VOCABULARIES:
            for dtype in (torch.float32, torch.bfloat16):
                for softcap in (None, 30.0):
                    call_kernels(vocab, dtype, softcap)
    resources: dict[str, list[dict[str, int]]] = {}
    for name, kernel in compiled:
        resources.setdefault(name, []).append(read_resources(kernel))
    return resources


def format_range(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def main(_: list[str] | None = None) -> dict[str, str]:
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    rows = []
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        for architecture, cards in ARCHITECTURES.items():
            for name, variants in compile_for(architecture).items():
                columns = [
                    format_range([variant[key] for variant in variants]) for key in ("REG", "STACK", "LOCAL", "SHARED")
                ]
                rows.append([f"sm_{architecture} ({cards})", f"`{name}`", str(len(variants)), *columns])
    header = ["GPU", "kernel", "variants", "registers", "stack, bytes", "local, bytes", "shared, bytes"]
    facts = "8 warps; float32 and bfloat16 logits, with and without a soft cap, aligned and unaligned vocabularies."
    table = f"Triton {triton.__version__}; {facts}\n\n{make_table(header, rows)}"
    print(f"\n{table}", flush=True)
    return {"kernels": table}
