"""Whole training steps on the quickstart's task: `drivers/train.py` and TRL's GRPOTrainer.

`python -m tests.benchmarks training`, in .venv-parity for TRL. Each run is its own process, and runs take turns.
Both sides have the same model, questions, prompt template, stop string, reward function, sizes, learning rate and
objective (the clip loss, averaged over tokens). A step is all that is between two updates of the weights: rollout,
reward, update, and for ours the push to the engine. Loading, evaluation, checkpoints and each run's first step are
left out.

TRL runs with its own defaults (float32 weights under bfloat16 autocast) but for gradient checkpointing, which is off,
since memory does not ask for it here; `trl_bfloat16` is the same with weights in bfloat16. Ours computes in bfloat16
and keeps float32 masters.
"""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import argparse
import functools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from drivers.policy.loading import load_tokenizer, resolve_model
from drivers.settings.recipes import EMBEDDED_MODEL, QUICKSTART
from drivers.settings.sampling import stop_strings
from drivers.tasks.questions import load_examples, load_prompt_template
from grpo_core import r1_zero_reward_fn
from tests.benchmarks._harness import ROOT, Result, describe, digits, make_table

BASELINE = "ours"
PHASES = ("rollout", "reward", "update", "push")
CLIPRANGE, ADVANTAGE_EPS = 0.2, 1e-4  # TRL's defaults
WARMUP = 1  # steps at the start of a run that do not count
REPORT = "steps.jsonl"

StepFacts = dict[str, float]  # seconds, and what shows that both sides do the same


def run_ours(engine: str, sizes: argparse.Namespace, model: str, folder: Path) -> list[StepFacts]:
    settings = {
        "recipe": "quickstart",
        "model-path": model,
        "engine": engine,
        "dtype": "bfloat16",
        "loss-type": "grpo_clip",
        "cliprange": CLIPRANGE,
        "advantage-eps": ADVANTAGE_EPS,
        "aggregation": "token_mean",
        "learning-rate": sizes.learning_rate,
        "n-grpo-steps": WARMUP + sizes.steps,
        "rollout-batch-size": sizes.questions * sizes.group_size,
        "train-batch-size": sizes.questions * sizes.group_size,
        "group-size": sizes.group_size,
        "sampling-max-tokens": sizes.max_tokens,
        "eval-steps": WARMUP + sizes.steps,
        "n-val-examples": 8,
        "checkpoint-steps": WARMUP + sizes.steps + 1,
        "wandb-project": "None",
        "save-dir": folder / "run",
    }
    _run(["drivers/train.py", *(f"--{name}={value}" for name, value in settings.items())])
    rows = _read_lines(folder / "run" / "metrics.jsonl")
    return [
        {phase: row[f"time_{phase}_s"] for phase in PHASES}
        | {
            "seconds": sum(row[f"time_{phase}_s"] for phase in PHASES),
            "response_tokens": row["response_tokens"],
            "mean_reward": row["reward"],
        }
        for row in rows
        if row["phase"] == "train"
    ]


def run_trl(dtype: str, sizes: argparse.Namespace, model: str, folder: Path) -> list[StepFacts]:
    options = {"model": model, "folder": str(folder), "dtype": dtype, "sizes": vars(sizes)}
    _run(["-m", "tests.benchmarks.bench_training", json.dumps(options)])
    return _read_lines(folder / REPORT)


WAYS = {
    "trl": functools.partial(run_trl, "float32"),
    "trl_bfloat16": functools.partial(run_trl, "bfloat16"),
    "ours_vllm": functools.partial(run_ours, "vllm"),
    BASELINE: functools.partial(run_ours, "hf"),
}


def _run(arguments: list) -> None:
    run = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        last = (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"its process ended with {run.returncode}: {last}")


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_with_trl(model: str, folder: str, dtype: str, sizes: dict) -> None:
    """One run, in this process; leaves a line for each step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        """The trainer samples inside the step."""

        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *_, **__):
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.begin)

    def reward(completions, answer, **_):
        return [r1_zero_reward_fn(text, truth)["reward"] for text, truth in zip(completions, answer, strict=True)]

    template = load_prompt_template(QUICKSTART["prompt_path"])
    rows = [
        {"prompt": template.replace("{question}", example.question), "answer": example.answer}
        for example in load_examples("--data-path", QUICKSTART["data_path"])
    ]
    clock, tokenizer = Clock(), load_tokenizer(model)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[reward],
        args=GRPOConfig(
            output_dir=folder,
            model_init_kwargs={"dtype": dtype},
            use_cpu=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=sizes["group_size"],
            gradient_accumulation_steps=sizes["questions"],
            num_generations=sizes["group_size"],
            max_completion_length=sizes["max_tokens"],
            generation_kwargs={"stop_strings": list(stop_strings("r1_zero"))},
            learning_rate=sizes["learning_rate"],
            max_steps=WARMUP + sizes["steps"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    # Stop strings need the tokenizer, which the trainer hands to no `generate`.
    trainer.model.generate = functools.partial(trainer.model.generate, tokenizer=tokenizer)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    with Path(folder, REPORT).open("w") as report:
        for seconds, row in zip(clock.seconds, logged, strict=True):
            facts = {"response_tokens": row["completions/mean_length"], "mean_reward": row["reward"]}
            report.write(json.dumps({"seconds": seconds, **facts}) + "\n")


def main(arguments: list[str]) -> dict[str, str]:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks training", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="a folder in Hugging Face format")
    parser.add_argument("--steps", type=int, default=3, help=f"of a run, after {WARMUP} that does not count")
    parser.add_argument("--questions", type=int, default=8, help="of a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help=f"beside {BASELINE}")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(arguments)
    model = resolve_model(chosen.model)
    steps: dict[str, list[StepFacts]] = {name: [] for name in WAYS if name in (BASELINE, *chosen.ways)}
    draw = random.Random(0)
    for _ in range(chosen.rounds):
        for name in draw.sample(list(steps), len(steps)):
            try:
                with tempfile.TemporaryDirectory() as folder:
                    steps[name] += WAYS[name](chosen, model, Path(folder))[WARMUP:]
            except RuntimeError as error:
                if name == BASELINE:
                    raise
                del steps[name]
                print(f"left out: {name} ({error})", file=sys.stderr, flush=True)
    facts = (
        "cpu, bfloat16",
        f"{Path(model).name}, {chosen.questions} questions x {chosen.group_size} responses of at most"
        f" {chosen.max_tokens} tokens per step, stop string `</answer>`, learning rate {chosen.learning_rate:g}",
        f"{chosen.rounds} runs of {chosen.steps} steps after {WARMUP} warm-up step; phases are medians, tokens per"
        " response and rewards are means",
    )
    header = ["way", "s", "", f"x {BASELINE}", *PHASES, "tokens", "mean reward"]
    rows = []
    baseline = statistics.median(step["seconds"] for step in steps[BASELINE])
    for name, taken in steps.items():
        result = Result(first=taken[0]["seconds"], seconds=[step["seconds"] for step in taken])
        phases = [
            digits(statistics.median(step[phase] for step in taken)) if phase in taken[0] else "-" for phase in PHASES
        ]
        means = [statistics.fmean(step[fact] for step in taken) for fact in ("response_tokens", "mean_reward")]
        cells = [
            digits(result.median),
            f"({'..'.join(map(digits, result.quartiles))})",
            f"{result.median / baseline:.2f}",
            *phases,
            *map(digits, means),
        ]
        rows.append([f"`{name}`", *cells])
    table = f"{describe('cpu', *facts)}\n\n{make_table(header, rows)}"
    print(f"\n{table}")
    return {"training": table}


if __name__ == "__main__":
    train_with_trl(**json.loads(sys.argv[1]))
