"""Evaluations: drivers/evaluation/."""

from tests.mutants.table import breaks

EVALUATE, LOOP, FLAGS = "tests/drivers/test_evaluate.py", "tests/drivers/test_loop.py", "tests/drivers/test_flags.py"
GRADING, RUN_FILES = "tests/drivers/test_grading.py", "tests/drivers/test_run_files.py"
POLICY, OUTCOMES = "drivers/evaluation/policy.py", "drivers/evaluation/outcomes.py"

MUTANTS = [
    *breaks(
        "evaluate",
        "drivers/evaluation/standalone.py",
        "tests/drivers/test_one_line.py -k 'second_model or compare'",
        ("the wrong flag", '.replace("--model-path", flag, 1)', ".strip()"),
        ("the first results are lost", "                    write_results(folder, config, evaluation, None)\n", ""),
        (
            "no results at all",
            '            if not (folder / "results.json").stat().st_size:\n',
            "            if True:\n",
        ),
    ),
    *breaks(
        "evaluate_policy",
        POLICY,
        f"{RUN_FILES} {GRADING} {LOOP} -k 'evaluate_policy or evaluation or logged'",
        (
            "graded with the questions in turn",
            "[question for question in questions for _ in range(sampling.n)]",
            "[question for _ in range(sampling.n) for question in questions]",
        ),
        (
            "unscored responses are wrong",
            "scored = [verdict.scores for verdict in graded if verdict.is_scored]",
            'scored = [verdict.scores if verdict.is_scored else {"reward": 0.0} for verdict in graded]',
        ),
        (
            "a mean over responses",
            "means = [fmean(values) for values in scores if values]",
            "means = [value for values in scores for value in values]",
        ),
        ("the reward is the accuracy", '_scores(group, "answer_reward", "reward")', '_scores(group, "reward")'),
    ),
    *breaks(
        "summarize",
        OUTCOMES,
        f"{EVALUATE} -k 'summarize or majority or vote'",
        (
            "correct is more than nothing",
            "sum(value == 1 for value in correct) for correct in enough",
            "sum(value >= 0 for value in correct) for correct in enough",
        ),
        (
            "pass@k over all questions",
            "enough = [correct for correct in scored if len(correct) >= k]",
            "enough = [correct for correct in scored if len(correct) >= 1]",
        ),
        ("shares of all responses", "categories.count(name) / len(categories)", "categories.count(name) / len(rows)"),
        (
            "shares of the number of categories",
            "categories.count(name) / len(categories)",
            "categories.count(name) / len(CATEGORIES)",
        ),
    ),
    *breaks(
        "compare",
        OUTCOMES,
        f"{EVALUATE} -k compare",
        (
            "theirs minus ours",
            "differences = [(sum(ours) - sum(theirs)) / len(ours)",
            "differences = [(sum(theirs) - sum(ours)) / len(ours)",
        ),
        (
            "sums, not means",
            "differences = [(sum(ours) - sum(theirs)) / len(ours)",
            "differences = [sum(ours) - sum(theirs)",
        ),
        (
            "questions with unscored responses too",
            "if len(ours) == len(theirs) == len(asked[0]) == len(asked[1])",
            "if ours and theirs",
        ),
        (
            "the wins of theirs",
            "sum(difference > 0 for difference in differences)",
            "sum(difference < 0 for difference in differences)",
        ),
    ),
    *breaks(
        "evaluate",
        "drivers/evaluation/standalone.py",
        f"{EVALUATE} {FLAGS} -k 'sample_and_grade or with_the_other or test_evaluate_flag'",
        ("another seed", "config.sampling, grade, seed=config.seed)", "config.sampling, grade, seed=0)"),
        (
            "all examples",
            'load_examples("--data-path", path)[: config.n_examples]',
            'load_examples("--data-path", path)[:]',
        ),
        (
            "the first file only",
            "for name, questions in inputs.questions.items():\n            values",
            "for name, questions in list(inputs.questions.items())[:1]:\n            values",
        ),
        ("responses are numbered, not questions", "number // config.n_samples", "number"),
        ("the engine is not checked", "check(config, engine, policy, prompts[:N_CHECKED_PROMPTS])", "pass"),
    ),
    *breaks(
        "read_earlier",
        "drivers/evaluation/comparison.py",
        f"{EVALUATE} -k read_earlier",
        ("another reward is compared", 'for name in ("reward", "reward_mix"):', "for name in ():"),
        (
            "other sampling is not named",
            "for name in _SAMPLING_SETTINGS if before[name] != now[name]]",
            "for name in () if before[name] != now[name]]",
        ),
        ("other questions are compared", "for row in rows[name]] != expected:", "for row in rows[name]] is expected:"),
        ("rows of all data sets", 'if row.get("dataset") == name]', "]"),
    ),
]
