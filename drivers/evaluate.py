"""Grade a model on held-out questions: `python drivers/evaluate.py --model-path RUN/final_model --data-path FILE`."""

# isort: off
from drivers import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from drivers.config import EvaluateConfig, GrpoConfig, exit_with, parse
from drivers.data import Example, Prompt, Question, load_examples, load_prompt, make_questions, read_jsonl
from drivers.display import one_line
from drivers.errors import UnsoundRunError, UsageError
from drivers.files import write_json, write_jsonl
from drivers.grading import BUILT_IN, Graded, Grader, GradingPool, check_file, grade_all
from drivers.metrics import STANDARD, describe_completions, describe_grades
from drivers.models import (
    choose_device,
    choose_dtype,
    context_length,
    default_policy_device,
    load_policy,
    load_tokenizer,
    resolve_model,
)
from drivers.outcomes import CATEGORIES, Row, category_of, compare, describe
from drivers.rollout import RolloutEngine, Sampling, make_engine
from drivers.run_folder import abandon_run_folder, create_run_folder
from drivers.run_log import describe_environment
from drivers.samples import describe_sample, describe_tokens


def evaluate_policy(
    engine: RolloutEngine,
    questions: Sequence[Question],
    sampling: Sampling,
    grade: Grader,
    *,
    seed: int,
    n_shown: int = 0,
    tokenizer: Any = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Rates over all responses that could be scored, and a row per response. The standard error is over questions.

    The first `n_shown` rows have the tokens too.
    """
    completions = engine.generate([question.prompt_token_ids for question in questions], sampling, seed=seed)
    asked = [question for question in questions for _ in range(sampling.n)]
    graded = grade_all(
        grade,
        [completion.text for completion in completions],
        [question.answer for question in asked],
        [question.example.question for question in asked],
    )
    rows = [describe_sample(*one) for one in zip(asked, completions, graded, strict=True)]
    for row, completion in zip(rows[:n_shown], completions, strict=False):
        row |= describe_tokens(completion, tokenizer)
    # By question. A reward function that tells no answer reward is taken at its reward.
    parts = [graded[start : start + sampling.n] for start in range(0, len(graded), sampling.n)]
    answered = [found for part in parts if (found := _values(part, "answer_reward", "reward"))]
    values = {
        **_accuracy([fmean(of_question) for of_question in answered]),
        **{name: fmean(found) for name in STANDARD if (found := _values(graded, name))},
        **describe_grades(graded),
        **describe_completions(completions),
        "n_examples": float(len(questions)),
    }
    return values, rows


def _values(graded: Sequence[Graded], *names: str) -> list[float]:
    """Of the responses that could be scored: what stands under the first of these names that there is."""
    scored = [verdict.scores for verdict in graded if verdict.is_scored]
    values = [next((scores[name] for name in names if name in scores), None) for scores in scored]
    return [value for value in values if value is not None]


def _accuracy(of_questions: Sequence[float]) -> dict[str, float]:
    """And its standard error; nothing where no response could be scored."""
    if not of_questions:
        return {}
    accuracy = fmean(of_questions)
    variance = sum((value - accuracy) ** 2 for value in of_questions) / max(1, len(of_questions) - 1)
    return {"accuracy": accuracy, "accuracy_stderr": math.sqrt(variance / len(of_questions))}


def evaluate(config: EvaluateConfig) -> Path:
    """Everything from the flags to the files on disk. Returns the folder that holds them."""
    sets = load_sets(config)
    check_file(config.reward)
    prompt = load_prompt(config.prompt_path, config.chat_template, config.system_prompt_path)
    device = choose_device("--device", config.device, default_policy_device())
    earlier = None if config.compare_to is None else read_earlier(config, sets)
    with start_grading(config, lambda text: print(f"warning: {text}", file=sys.stderr)) as grade:
        models = [config.model_path] + ([] if config.compare_to is None or earlier else [config.compare_to])
        asked = [ask(config, sets, prompt, model) for model in models]
        folder = create_run_folder("--output-dir", config.output_dir, "evaluate", marker="results.json")
        try:
            values, rows = sample_and_grade(config, asked[0], device, grade)
            write_jsonl(folder / "completions.jsonl", of_all(rows))
            compared, others = earlier or ({}, None)
            if len(asked) > 1:
                compared, others = sample_and_grade(config, asked[1], device, grade)
                write_jsonl(folder / "completions_compared.jsonl", of_all(others))
        except BaseException:
            abandon_run_folder(folder, "results.json")
            raise
    results = {name: values[name] | describe(rows[name], config.reward) for name in sets}
    written: dict[str, Any] = {"results": results, "comparison": {}, "compared": {}}
    if others is not None:
        written["comparison"] = {name: compare(rows[name], others[name]) for name in sets}
        written["compared"] = {name: compared[name] | describe(others[name], config.reward) for name in sets}
    written |= {"config": asdict(config), "environment": describe_environment()}
    write_json(folder / "results.json", written)
    for name in sets:
        tell(name, config, results[name], rows[name], written["comparison"].get(name), written["compared"].get(name))
    print(f"Written to {folder}/: results.json, completions.jsonl")
    return folder


def load_sets(config: EvaluateConfig) -> dict[str, list[Example]]:
    """The questions of each file, by a name that is short: that of the file, if no other has it."""
    stems = [Path(path).stem for path in config.data_path]
    names = [stem if stems.count(stem) == 1 else path for stem, path in zip(stems, config.data_path, strict=True)]
    if len(set(names)) < len(names):
        raise UsageError(f"--data-path {' '.join(config.data_path)}: the same file twice; name each once")
    sets = zip(names, config.data_path, strict=True)
    return {name: load_examples("--data-path", path)[: config.n_examples] for name, path in sets}


class Asked(NamedTuple):
    """A model, and the questions in its tokens."""

    model_path: str
    tokenizer: Any
    questions: dict[str, list[Question]]


def ask(config: EvaluateConfig, sets: Mapping[str, Sequence[Example]], prompt: Prompt, model: str) -> Asked:
    model_path = resolve_model(model)
    tokenizer = load_tokenizer(model_path, for_chat=config.chat_template)
    context = context_length(model_path)
    make = partial(make_questions, max_new_tokens=config.sampling_max_tokens, context=context)
    return Asked(model_path, tokenizer, {name: make(some, prompt, tokenizer) for name, some in sets.items()})


Values = dict[str, dict[str, float]]
Rows = dict[str, list[Row]]


def read_earlier(config: EvaluateConfig, sets: Mapping[str, Sequence[Example]]) -> tuple[Values, Rows] | None:
    """Numbers and responses of an earlier evaluation, by data set: the same questions, each asked and graded alike.

    None if `compare_to` is no folder of one: then it is a model.
    """
    where = Path(config.compare_to or "")
    if not (where / "results.json").exists():
        if (where / "metrics.jsonl").exists():
            raise UsageError(
                f"--compare-to {where}: is the folder of a run; a model, as {where / 'final_model'}, or the folder of "
                "an evaluation is required"
            )
        return None
    try:
        written = json.loads((where / "results.json").read_text(encoding="utf-8"))
        before, values = written["config"], dict(written["results"])
        asked = {name: before[name] for name in ("reward", "reward_mix", *_ASKED_ALIKE)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--compare-to {where}: results.json cannot be read ({type(error).__name__}: {error})"
        ) from error
    now: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    for name in ("reward", "reward_mix"):
        if asked[name] != now[name]:
            raise UsageError(
                f"--compare-to {where}: was graded with {name}={asked[name]}, and this is {now[name]}; grade both "
                "alike"
            )
    others = [f"{name}={asked[name]} (here {now[name]})" for name in _ASKED_ALIKE if asked[name] != now[name]]
    if others:
        print(f"warning: --compare-to {where}: was asked with {', '.join(others)}", file=sys.stderr)
    rows = [row for _, row in read_jsonl(where / "completions.jsonl")]
    found: Rows = {}
    for name, examples in sets.items():
        expected = [(one.question, one.answer) for one in examples for _ in range(config.n_samples)]
        found[name] = [row for row in rows if row.get("dataset") == name]
        if name not in values or [(row.get("question"), row.get("answer")) for row in found[name]] != expected:
            raise UsageError(
                f"--compare-to {where}: its responses are not {config.n_samples} to each of the {len(examples)} "
                f"questions of {name}; evaluate both with the same --data-path, --n-examples and --n-samples"
            )
    return values, found


_ASKED_ALIKE = (
    "prompt_path",
    "chat_template",
    "system_prompt_path",
    "sampling_temperature",
    "sampling_top_p",
    "sampling_min_tokens",
    "sampling_max_tokens",
    "sampling_stop",
)
"""Settings whose difference may be what is to be measured; it is told."""


def of_all(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    return [row for of_set in rows.values() for row in of_set]


def tell(
    name: str,
    config: EvaluateConfig,
    values: Mapping[str, float],
    rows: Sequence[Row],
    difference: Mapping[str, float] | None,
    compared: Mapping[str, float] | None,
) -> None:
    """What the terminal shows of a data set: numbers with their intervals, examples of each category, and who won."""
    print(f"\n{name}: {int(values['n_examples'])} questions, {config.n_samples} responses to each")
    for key, value in values.items():
        if key.endswith(("_low", "_high")) or key == "n_examples":
            continue
        interval = f"   {values[f'{key}_low']:.4g} to {values[f'{key}_high']:.4g}" if f"{key}_low" in values else ""
        print(f"  {key:22} {value:.4g}{interval}")
    for category in CATEGORIES:
        of_it = [row for row in rows if row["category"] == category]
        for row in of_it[: config.n_shown]:
            print(f"  {category}: {one_line(row['question'])}")
            print(f"    {one_line(row['response'])}  (answer: {row['answer']})")
    if difference is not None and compared is not None and difference["n_compared"]:
        low, high = difference["difference_low"], difference["difference_high"]
        p_value = f", p = {difference['p_value']:.2g}" if "p_value" in difference else ""
        better, worse, n = (round(difference[key]) for key in ("better_on", "worse_on", "n_compared"))
        print(
            f"  against {config.compare_to}, accuracy {compared['accuracy']:.4g}: {difference['difference']:+.4f} "
            f"({low:+.4f} to {high:+.4f}{p_value}); better on {better} questions, worse on {worse}, of {n}"
        )


def start_grading(config: EvaluateConfig | GrpoConfig, warn: Callable[[str], None]) -> GradingPool:
    """The pool that the settings name. A reward of the user's own is known to load: no model need be loaded before."""
    pool = GradingPool(
        config.reward,
        config.reward_mix,
        n_workers=config.grader_workers,
        deadline_s=config.grader_deadline_s,
        warn=warn,
    )
    if config.reward not in BUILT_IN:
        try:
            pool.load()
        except BaseException:
            pool.close()
            raise
    return pool


def sample_and_grade(config: EvaluateConfig, asked: Asked, device: torch.device, grade: Grader) -> tuple[Values, Rows]:
    """`evaluate_policy` of each data set, with the model and the engine that the settings name."""
    dtype = choose_dtype(config.dtype, device)
    policy = load_policy(asked.model_path, device, dtype)
    engine = make_engine(
        config.engine,
        model_path=asked.model_path,
        policy=policy,
        tokenizer=asked.tokenizer,
        device=device,
        dtype=dtype,
        max_model_len=max(q.n_tokens(config.sampling_max_tokens) for some in asked.questions.values() for q in some),
        gpu_memory_utilization=config.gpu_memory_utilization,
        reserved_bytes=sum(p.numel() * p.element_size() for p in policy.parameters()),
        seed=config.seed,
    )
    values: Values = {}
    rows: Rows = {}
    try:
        engine.load_weights(0)
        for name, questions in asked.questions.items():
            values[name], found = evaluate_policy(engine, questions, config.sampling, grade, seed=config.seed)
            rows[name] = [
                {"dataset": name, "question_number": number // config.n_samples, "category": category_of(row), **row}
                for number, row in enumerate(found)
            ]
    finally:
        engine.close()
    return values, rows


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
