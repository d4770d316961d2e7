"""Evaluate a model on question sets."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from drivers.common.atomic_files import write_json, write_jsonl
from drivers.common.display import Display
from drivers.common.own_functions import check_file
from drivers.engines.conversations import load_rollout
from drivers.engines.factory import blame_engine, describe_start, make_engine
from drivers.engines.options import EngineOptions
from drivers.engines.protocol import RolloutEngine
from drivers.evaluation.comparison import Evaluation, Rows, Values, count_asked, print_results, read_earlier
from drivers.evaluation.outcomes import compare, number_questions, summarize
from drivers.evaluation.policy import EVALUATION_SEED, evaluate_policy
from drivers.grading.pool import start_grading
from drivers.grading.verdicts import Grader
from drivers.policy.devices import choose_device, choose_dtype, default_policy_device
from drivers.policy.loading import (
    check_token_ids,
    context_length,
    load_policy,
    load_tokenizer,
    name_flag,
    resolve_model,
)
from drivers.policy.weights import WeightGatherer
from drivers.runs.folder import abandon_run_folder, create_run_folder
from drivers.runs.log import describe_environment
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.evaluation import name_sets
from drivers.tasks.questions import (
    Example,
    Prompt,
    Question,
    distinct,
    fit_context,
    load_examples,
    load_prompt,
    make_questions,
)

EngineCheck = Callable[[EvaluateConfig, RolloutEngine, nn.Module, Sequence[Sequence[int]]], None]
"""Raises an error unless the engine samples from the model; it gets some prompts."""
N_CHECKED_PROMPTS = 4


def evaluate(config: EvaluateConfig, check: EngineCheck) -> Path:
    """Evaluate the model, write the files and print the results. Return the folder of the files."""
    sets = load_sets(config)
    check_file("--reward", config.reward)
    chat = (config.chat_template, config.system_prompt_path, config.chat_date, config.chat_options)
    prompt = load_prompt(config.prompt_path, *chat)
    device = choose_device("--device", config.device, default_policy_device)
    earlier = None if config.compare_to is None else read_earlier(config, sets)
    models = {"--model-path": config.model_path}
    if config.compare_to is not None and earlier is None:
        models["--compare-to"] = config.compare_to
    warn = partial(print, "warning:", file=sys.stderr)
    with Display(title="Evaluation") as display, start_grading(config, warn) as grade:
        inputs = []
        for flag, model in models.items():
            with name_flag(flag):
                inputs.append(tokenize_questions(config, sets, prompt, model))
        folder = create_run_folder("--output-dir", config.output_dir, "evaluate", marker="results.json")
        try:
            evaluation = sample_and_grade(config, inputs[0], device, grade, check, display)
            write_jsonl(folder / "completions.jsonl", chain(*evaluation.rows.values()))
            compared = earlier
            if len(inputs) > 1:
                try:
                    with name_flag("--compare-to"):
                        compared = sample_and_grade(config, inputs[1], device, grade, check, display)
                except BaseException:  # the first model's results are kept
                    write_results(folder, config, evaluation, None)
                    raise
                write_jsonl(folder / "completions_compared.jsonl", chain(*compared.rows.values()))
        except BaseException:
            if not (folder / "results.json").stat().st_size:
                abandon_run_folder(folder, "results.json")
            raise
    write_results(folder, config, evaluation, compared)
    print(f"Written to {folder}/: results.json, completions.jsonl")
    return folder


def write_results(folder: Path, config: EvaluateConfig, evaluation: Evaluation, compared: Evaluation | None) -> None:
    """Write results.json and print the results of each data set."""
    results = summarize_sets(evaluation, config.reward)
    compared_results = {} if compared is None else summarize_sets(compared, config.reward)
    others = {} if compared is None else compared.rows
    comparison = {name: compare(evaluation.rows[name], rows) for name, rows in others.items()}
    written = {"results": results, "comparison": comparison, "compared": compared_results}
    written |= {"config": asdict(config), "environment": describe_environment()}
    write_json(folder / "results.json", written)
    for name, values in results.items():
        print_results(name, config, values, evaluation.rows[name], comparison.get(name), compared_results.get(name))


def summarize_sets(evaluation: Evaluation, reward: str) -> Values:
    """Return all metrics of each data set."""
    return {name: evaluation.values[name] | summarize(rows, reward) for name, rows in evaluation.rows.items()}


def load_sets(config: EvaluateConfig) -> dict[str, list[Example]]:
    """Load the questions of each file by the name of the set."""
    sets = name_sets("--data-path", config.data_path)
    return {name: load_examples("--data-path", path)[: config.n_examples] for name, path in sets.items()}


class ModelInputs(NamedTuple):
    """A model and the questions as its tokens."""

    model_path: str
    tokenizer: Any
    questions: dict[str, list[Question]]


def tokenize_questions(
    config: EvaluateConfig, sets: Mapping[str, Sequence[Example]], prompt: Prompt, model: str
) -> ModelInputs:
    """Tokenize the questions of all data sets with the model's tokenizer."""
    model_path = resolve_model(model)
    tokenizer = load_tokenizer(model_path, for_chat=config.chat_template)
    fit = partial(
        fit_context,
        max_new_tokens=config.sampling_max_tokens,
        context=context_length(model_path),
        long_prompts=config.long_prompts,
    )
    questions = {name: fit(make_questions(examples, prompt, tokenizer)) for name, examples in sets.items()}
    check_token_ids(model_path, tokenizer, distinct(chain(*questions.values())))
    return ModelInputs(model_path, tokenizer, questions)


def sample_and_grade(
    config: EvaluateConfig,
    inputs: ModelInputs,
    device: torch.device,
    grade: Grader,
    check: EngineCheck,
    display: Display,
) -> Evaluation:
    """Load a model, check its engine, and sample and grade its responses to each data set."""
    rollout = load_rollout(config, inputs.tokenizer)
    dtype = choose_dtype(config.dtype, device)
    with display.stage(f"Loading {inputs.model_path}"):
        policy = load_policy(inputs.model_path, device, dtype, attention=config.attention)
    options = EngineOptions(
        model_path=inputs.model_path,
        device=device,
        dtype=dtype,
        max_model_len=max(
            q.n_tokens(config.sampling_max_tokens) for questions in inputs.questions.values() for q in questions
        ),
        seed=config.seed,
        gpu_memory_utilization=config.gpu_memory_utilization,
        reserved_bytes=sum(p.numel() * p.element_size() for p in policy.parameters()),
    )
    with display.stage(describe_start(config.engine, device)):
        engine = make_engine(config.engine, options, WeightGatherer(policy, dtype), inputs.tokenizer, display.say)
    values: Values = {}
    rows: Rows = {}
    try:
        checked = islice(chain(*inputs.questions.values()), N_CHECKED_PROMPTS)
        with blame_engine(config.engine, inputs.model_path):
            engine.load_weights(0)
            check(config, engine, policy, [question.prompt_token_ids for question in checked])
        for name, questions in inputs.questions.items():
            with display.stage(f"Asking {name}: {count_asked(len(questions), config.n_samples)}"):
                seed = EVALUATION_SEED + config.seed
                values[name], responses = evaluate_policy(
                    engine, questions, config.sampling, grade, seed=seed, rollout=rollout
                )
            rows[name] = [{"dataset": name, **row} for row in number_questions(responses, config.n_samples)]
    finally:
        engine.close()
    return Evaluation(values, rows)
