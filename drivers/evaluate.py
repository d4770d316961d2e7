"""Grade a model on held-out questions: `python drivers/evaluate.py --model-path RUN/final_model --data-path FILE`."""

# isort: off
from drivers import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from drivers.checkpoint import write_json, write_jsonl
from drivers.config import EvaluateConfig, exit_with, parse
from drivers.data import Question, load_examples, load_prompt_template, make_questions
from drivers.errors import UnsoundRunError, UsageError
from drivers.metrics import describe_completions
from drivers.models import (
    choose_device,
    choose_dtype,
    context_length,
    default_policy_device,
    load_policy,
    load_tokenizer,
    resolve_model,
)
from drivers.rollout import RolloutEngine, Sampling, make_engine
from drivers.run_log import abandon_run_folder, create_run_folder, describe_environment
from grpo_core import (
    RewardFn,
    estimate_mean_interval,
    estimate_pass_at_k,
    question_only_reward_fn,
    r1_zero_reward_fn,
)

REWARDS: dict[str, RewardFn] = {"r1_zero": r1_zero_reward_fn, "question_only": question_only_reward_fn}


def evaluate_policy(
    engine: RolloutEngine, questions: Sequence[Question], sampling: Sampling, reward_fn: RewardFn, *, seed: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Rates over all responses, and a row per response. The standard error is over questions."""
    completions = engine.generate([question.prompt_token_ids for question in questions], sampling, seed=seed)
    rows: list[dict[str, Any]] = []
    for index, completion in enumerate(completions):
        question = questions[index // sampling.n]
        graded = reward_fn(completion.text, question.answer)
        rows.append(
            {
                "question": question.example.question,
                "answer": question.answer,
                "response": completion.text,
                **graded,
                "finish_reason": completion.finish_reason,
                "response_tokens": len(completion.token_ids),
            }
        )
    per_question = [
        sum(row["answer_reward"] for row in rows[start : start + sampling.n]) / sampling.n
        for start in range(0, len(rows), sampling.n)
    ]
    accuracy = sum(per_question) / len(per_question)
    variance = sum((value - accuracy) ** 2 for value in per_question) / max(1, len(per_question) - 1)
    values = {
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(variance / len(per_question)),
        **{key: sum(row[key] for row in rows) / len(rows) for key in ("reward", "format_reward", "answer_reward")},
        **describe_completions(completions),
        "n_examples": float(len(questions)),
    }
    if sampling.n > 1:
        values |= _pass_at_powers_of_two(rows, sampling.n)
    return values, rows


def _pass_at_powers_of_two(rows: list[dict[str, Any]], n: int) -> dict[str, float]:
    """pass@k and its 95 % interval over questions, k = 1, 2, 4 ... up to the number of responses."""
    right = torch.tensor([row["answer_reward"] == 1 for row in rows]).view(-1, n).sum(dim=1)
    values = {}
    for k in (2**power for power in range(n.bit_length()) if 2**power <= n):
        values[f"pass_at_{k}"], low, high = estimate_mean_interval(estimate_pass_at_k(right, n, k))
        values |= {f"pass_at_{k}_low": low, f"pass_at_{k}_high": high}
    return values


def evaluate(config: EvaluateConfig) -> Path:
    """Everything from the flags to the files on disk. Returns the folder that holds them."""
    examples = load_examples("--data-path", config.data_path)[: config.n_examples]
    template = load_prompt_template(config.prompt_path)
    device = choose_device("--device", config.device, default_policy_device())
    model_path = resolve_model(config.model_path)
    tokenizer = load_tokenizer(model_path)
    questions = make_questions(
        examples, template, tokenizer, max_new_tokens=config.sampling_max_tokens, context=context_length(model_path)
    )
    folder = create_run_folder("--output-dir", config.output_dir, "evaluate", marker="results.json")
    try:
        values, rows = sample_and_grade(config, questions, model_path, tokenizer, device)
    except BaseException:
        abandon_run_folder(folder, "results.json")
        raise
    write_jsonl(folder / "completions.jsonl", rows)
    write_json(
        folder / "results.json",
        {"results": values, "config": asdict(config), "environment": describe_environment()},
    )
    for name, value in values.items():
        print(f"{name:22} {value:.4g}")
    print(f"Written to {folder}/: results.json, completions.jsonl")
    return folder


def sample_and_grade(
    config: EvaluateConfig, questions: Sequence[Question], model_path: str, tokenizer: Any, device: torch.device
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`evaluate_policy` with the model and the engine that the settings name."""
    dtype = choose_dtype(config.dtype, device)
    policy = load_policy(model_path, device, dtype)
    engine = make_engine(
        config.engine,
        model_path=model_path,
        policy=policy,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        max_model_len=max(len(q.prompt_token_ids) for q in questions) + config.sampling_max_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        reserved_bytes=sum(p.numel() * p.element_size() for p in policy.parameters()),
        seed=config.seed,
    )
    try:
        engine.load_weights(0)
        return evaluate_policy(engine, questions, config.sampling, REWARDS[config.reward], seed=config.seed)
    finally:
        engine.close()


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        evaluate(parse(EvaluateConfig, sys.argv[1:] if arguments is None else arguments, EvaluateConfig()))
    except UsageError as error:
        exit_with("evaluate.py", error, status=2)
    except UnsoundRunError as error:
        exit_with("evaluate.py", error, status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
