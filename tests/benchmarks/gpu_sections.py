"""The sections of `make bench-gpu`. Each is a process: `python -m tests.benchmarks.gpu_sections NAME SIZES FILE`.

A section yields its results one by one, and the file holds those that are there, so that a section which is cut off
keeps what it has. SIZES is JSON of `gpu.Sizes`.
"""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivers.common.atomic_files import write_json
from tests.benchmarks._harness import ROOT

Result = tuple[str, dict[str, Any]]
DTYPES = ("bfloat16", "float32")
HEAD_WAYS = (
    "ours_log_probs", "ours_grpo_loss", "trl_fused", "liger", "liger_sce", "cce", "verl_kernel", "textbook",
    "textbook_compiled",
)  # fmt: skip
GIB = 2**30


class Device:
    """The differences between CUDA and the CPU, on which this is rehearsed."""

    def __init__(self, name: str) -> None:
        self.name, self.is_cuda = name, name == "cuda"

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object], *, warmups: int = 1, repeats: int = 5) -> dict[str, Any]:
        """Return the median seconds of a call, and the most memory that it took beyond what was there before."""
        for _ in range(warmups):
            call()
        self.wait()
        before = 0
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            self.wait()
            seconds.append(time.perf_counter() - begin)
        peak = (torch.cuda.max_memory_allocated() - before) / GIB if self.is_cuda else None
        return {"seconds": statistics.median(seconds), "all_seconds": seconds, "peak_gib": peak}

    def forget(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()


def measure_or_explain(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a measurement, or why there is none: a package that is missing, too little memory, a failure."""
    try:
        return measure()
    except ImportError as error:
        return {"left_out": f"not installed ({error.name})"}
    except torch.OutOfMemoryError:
        return {"left_out": "out of memory"}
    except Exception as error:  # of another library
        return {"left_out": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def run_gpu_tests(sizes: dict[str, Any]) -> Iterator[Result]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sizes["tests"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last[0])}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    yield "tests", {"counts": counts, "failed": failed, "exit_status": done.returncode}


def run_head(sizes: dict[str, Any]) -> Iterator[Result]:
    """Time the head, forward and backward, beside bare products and other libraries."""
    device = Device(sizes["device"])
    shape, (batch, seq) = sizes["shape"], sizes["head"]
    for slow in (False, True):  # what compiles for long comes last
        for dtype in DTYPES:
            inputs = make_head_inputs(shape["vocab_size"], shape["hidden_size"], batch, seq, dtype, device.name)
            if not slow:
                for n in (3, 4):
                    yield f"{dtype} {n} products", device.time(partial(multiply, inputs, n))
            for name in HEAD_WAYS:
                if (name == "textbook_compiled") == slow:
                    yield f"{dtype} {name}", measure_or_explain(partial(time_head, name, inputs, device))
                    inputs.hidden.grad = inputs.weight.grad = None
                    device.forget()


def make_head_inputs(vocab: int, width: int, batch: int, seq: int, dtype: str, device: str) -> Any:
    """Return inputs of `bench_head`, all tokens counted. No ratio is close to the clip range."""
    from grpo_core import fused_linear_log_probs
    from tests.benchmarks.bench_head import Inputs

    random = torch.Generator(device).manual_seed(0)
    options = {"generator": random, "device": device, "dtype": getattr(torch, dtype)}
    hidden, weight = torch.randn(batch, seq, width, **options), torch.randn(vocab, width, **options) * 3 / width**0.5
    labels = torch.randint(vocab, (batch, seq), generator=random, device=device)
    old = fused_linear_log_probs(hidden, weight, labels)["log_probs"]
    nudge = torch.rand(batch, seq, generator=random, device=device) * 0.2 - 0.1
    return Inputs(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        labels=labels,
        mask=torch.ones(batch, seq, dtype=torch.bool, device=device),
        advantages=torch.randn(batch, 1, generator=random, device=device),
        old=old + nudge,
        entropy_coef=0.0,
    )


@torch.no_grad()
def multiply(inputs: Any, n_products: int) -> None:
    """Compute the bare products: logits, both gradients, and the logits once more as the fourth."""
    rows = inputs.hidden.flatten(0, 1)
    for _ in range(n_products - 2):
        logits = rows @ inputs.weight.T
    _ = logits @ inputs.weight, logits.T @ rows


def time_head(name: str, inputs: Any, device: Device) -> dict[str, Any]:
    """Return time and memory of a way of `bench_head`, and its largest error of log-probs against float64."""
    from tests.benchmarks.bench_head import WAYS, textbook_scores

    call = WAYS[name].make()
    found = {}

    def run() -> None:
        loss, found["log_probs"], _ = call(inputs)
        loss.backward()
        inputs.hidden.grad = inputs.weight.grad = None

    result = device.time(run)
    if found["log_probs"] is not None:
        n = min(256, inputs.labels.numel())
        hidden, labels = inputs.hidden.detach().flatten(0, 1)[:n], inputs.labels.flatten()[:n]
        exact, _ = textbook_scores(hidden.double(), inputs.weight.detach().double(), labels)
        result["error"] = float((found["log_probs"].detach()[:n] - exact).abs().max())
    return result


def run_step(sizes: dict[str, Any]) -> Iterator[Result]:
    """Time the update on rollouts of a step, and compare its operations with the fastest matrix product."""
    from drivers.policy.optimizer import PolicyOptimizer
    from drivers.settings.groups import OptimizerSettings
    from tests.benchmarks.bench_step import draw_rollouts, make_update

    device, n = Device(sizes["device"]), sizes["matmul"]
    peak = measure_matmul(device, n)
    yield "matmul", {"flops": peak, "size": n}
    policy = make_policy(sizes)
    optimizer = PolicyOptimizer(policy, OptimizerSettings())
    optimizer.step(1e-6)  # makes the moments
    rollouts = draw_rollouts(*sizes["groups"], tuple(sizes["prompt"]), sizes["cap"], 0.0, sizes["shape"]["vocab_size"])
    slots: list[int] = []
    counter = policy.base_model.register_forward_pre_hook(
        lambda _, __, inputs: slots.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    step = make_update(policy, rollouts, sizes["micro_batch_tokens"])
    step()
    counter.remove()
    head = policy.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in policy.parameters()) - head
    flops = 6 * (body * sum(slots) + head * rollouts.response_tokens)

    def run() -> None:
        step()
        optimizer.skip()

    result = measure_or_explain(lambda: device.time(run, repeats=3))
    facts = {"tokens": rollouts.tokens, "slots": sum(slots), "micro_batches": len(slots), "flops": flops}
    if "seconds" in result:
        facts["share_of_matmul"] = flops / result["seconds"] / peak
    yield "update", result | facts


def measure_matmul(device: Device, n: int) -> float:
    """Return the operations per second of a square product in bfloat16."""
    square = torch.randn(n, n, device=device.name, dtype=torch.bfloat16)
    return float(2 * n**3 / device.time(lambda: square @ square, warmups=3, repeats=10)["seconds"])


def make_policy(sizes: dict[str, Any]) -> nn.Module:
    """Return a policy with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**sizes["shape"], bos_token_id=None, eos_token_id=1, pad_token_id=0, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device(sizes["device"]):
        return Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def save_model(sizes: dict[str, Any], folder: Path) -> nn.Module:
    """Save a policy with random weights and a tokenizer of characters, filled up to its vocabulary."""
    from tests.tiny import make_tiny_tokenizer

    policy = make_policy(sizes)
    policy.save_pretrained(folder)
    make_tiny_tokenizer(sizes["shape"]["vocab_size"]).save_pretrained(folder)
    return policy


def run_vllm(sizes: dict[str, Any]) -> Iterator[Result]:
    """Time start-up, pushes, sampling, sleep and wake of vLLM on the policy's device."""
    from transformers import AutoTokenizer

    from drivers.engines.factory import make_engine
    from drivers.engines.options import EngineOptions
    from drivers.policy.optimizer import training_state_bytes
    from drivers.policy.weights import WeightGatherer
    from drivers.settings.sampling import Sampling

    device, dtype = Device(sizes["device"]), torch.bfloat16
    (n_groups, group_size), prompt = sizes["groups"], sizes["prompt"][1]
    with tempfile.TemporaryDirectory() as folder:
        policy = save_model(sizes, Path(folder))
        options = EngineOptions(
            model_path=folder,
            device=next(policy.parameters()).device,
            dtype=dtype,
            max_model_len=prompt + sizes["cap"],
            seed=0,
            gpu_memory_utilization=0.5,
            reserved_bytes=training_state_bytes(policy),
            may_sleep=True,
        )
        weights, tokenizer = WeightGatherer(policy, dtype, as_files=True), AutoTokenizer.from_pretrained(folder)
        engines: list[Any] = []
        once = {"warmups": 0, "repeats": 1}
        start = lambda: engines.append(make_engine("vllm", options, weights, tokenizer))  # noqa: E731
        yield "start-up", device.time(start, **once)
        (engine,) = engines
        try:
            yield "first push", device.time(lambda: engine.load_weights(0), **once)
            yield "push", device.time(lambda: engine.load_weights(1), repeats=3)
            prompts = torch.randint(3, 90, (n_groups, prompt), generator=torch.Generator().manual_seed(0)).tolist()
            sampling = Sampling(n=group_size, max_tokens=sizes["cap"], stop=())
            sampled: list[int] = []

            def sample() -> None:
                completions = engine.generate(prompts, sampling, seed=1)
                sampled.append(sum(len(completion.token_ids) for completion in completions))

            sampling_result = device.time(sample, repeats=2)
            yield "sampling", sampling_result | {"tokens": sampled[-1]}
            yield "sleep", device.time(engine.sleep, **once)
            yield "wake and push", device.time(lambda: engine.load_weights(2), **once)
        finally:
            engine.close()


def run_training(sizes: dict[str, Any]) -> Iterator[Result]:
    """Train for some steps with drivers/train.py, and report the time of each phase; the run ends there."""
    n_groups, group_size = sizes["groups"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(sizes, folder / "model")
        Device(sizes["device"]).forget()
        settings = {
            "model-path": folder / "model",
            "reward": f"{ROOT}/tests/benchmarks/spread_reward.py:spread_reward",
            "data-path": ROOT / "data/wordadd/train.jsonl",
            "val-data-path": ROOT / "data/wordadd/validation.jsonl",
            "prompt-path": ROOT / "data/prompts/question_only.prompt",
            "n-grpo-steps": 1000,  # the run is ended when enough of them are logged
            "rollout-batch-size": n_groups * group_size,
            "train-batch-size": n_groups * group_size,
            "group-size": group_size,
            "loss-type": "grpo_clip",
            "micro-batch-tokens": sizes["micro_batch_tokens"],
            "sampling-min-tokens": 0,
            "sampling-max-tokens": sizes["cap"],
            "learning-rate": 1e-6,
            "dtype": "bfloat16",
            "engine": sizes["engine"],
            "policy-device": sizes["device"],
            "n-val-examples": 8,
            "eval-steps": 1000,
            "checkpoint-steps": 1000,
            "wandb-project": "None",
            "save-dir": folder / "run",
        }
        command = [sys.executable, "drivers/train.py", *(f"--{name}={value}" for name, value in settings.items())]
        begin, said = time.perf_counter(), folder / "said.txt"
        with said.open("w") as output:
            program = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            rows: list[dict[str, Any]] = []
            while program.poll() is None and len(rows) < sizes["steps"]:
                time.sleep(0.2)
                rows = [row for row in read_rows(folder / "run/metrics.jsonl") if row["phase"] == "train"]
            seconds = time.perf_counter() - begin
        finally:  # an engine in its own process ends with it
            program.kill()
            program.wait()
        rows = rows[: sizes["steps"]]
        if len(rows) < sizes["steps"]:
            last = (said.read_text().strip().splitlines() or ["no message"])[-1]
            yield "training", {"left_out": f"train.py ended after {len(rows)} steps: {last}"}
            return
        times = {name for row in rows for name in row if name.startswith("time_")}
        phases = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in sorted(times)}
        steps = sum(row[name] for row in rows for name in times if name in row)
        means = {name: statistics.fmean(row[name] for row in rows) for name in ("response_tokens", "grad_norm")}
        peak = max((row.get("peak_memory_gib", 0.0) for row in rows), default=0.0)
        yield "training", {"seconds": seconds, "steps_seconds": steps, "phases": phases, "peak_gib": peak} | means


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows that are complete."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


SECTIONS = {"tests": run_gpu_tests, "head": run_head, "step": run_step, "vllm": run_vllm, "training": run_training}


def main() -> None:
    name, sizes, file = sys.argv[1:]
    found: dict[str, Any] = {}
    for key, result in SECTIONS[name](json.loads(sizes)):
        found[key] = result
        write_json(Path(file), found)


if __name__ == "__main__":
    main()
