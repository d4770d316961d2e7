"""Evaluations: drivers/evaluation/."""

from tests.mutants.table import breaks

EVALUATE, LOOP, FLAGS = "tests/drivers/test_evaluate.py", "tests/drivers/test_loop.py", "tests/drivers/test_flags.py"
GRADING, RUN_FILES = "tests/drivers/test_grading.py", "tests/drivers/test_run_files.py"
OF_RUN = "tests/drivers/test_settings_of_run.py"
POLICY, OUTCOMES = "drivers/evaluation/policy.py", "drivers/evaluation/outcomes.py"

MUTANTS = [
    *breaks(
        "name_flag",
        "drivers/policy/loading.py",
        "tests/drivers/test_one_line.py -k 'second_model or compare'",
        ("the wrong flag", '.replace("--model-path", flag, 1)', ".strip()"),
    ),
    *breaks(
        "evaluate",
        "drivers/evaluation/standalone.py",
        "tests/drivers/test_one_line.py -k 'second_model or compare'",
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
        ("another seed", "seed = EVALUATION_SEED + config.seed", "seed = EVALUATION_SEED"),
        ("other samples than in the run", "seed = EVALUATION_SEED + config.seed", "seed = config.seed"),
        (
            "all examples",
            'load_examples("--data-path", path)[: config.n_examples]',
            'load_examples("--data-path", path)[:]',
        ),
        (
            "the first file only",
            "for name, questions in inputs.questions.items():\n            with display",
            "for name, questions in list(inputs.questions.items())[:1]:\n            with display",
        ),
        (
            "the engine is not checked",
            "check(config, engine, policy, [question.prompt_token_ids for question in checked])",
            "pass",
        ),
    ),
    *breaks(
        "number_questions",
        OUTCOMES,
        f"{EVALUATE} {LOOP} -k 'sample_and_grade or own_settings'",
        ("responses are numbered, not questions", "number // n_samples", "number"),
    ),
    *breaks(
        "parse_evaluate_config",
        "drivers/settings/of_run.py",
        f"{OF_RUN} {EVALUATE} -k 'of_run or of_compared_run or sample_and_grade'",
        ("a name is looked up as a folder", "    if not path.is_dir():  # the name of a model\n", "    if False:\n"),
        ("links are not followed", ", path.resolve().parent)", ",)"),
        (
            "the run's questions by their training name",
            '{"data_path": "val_data_path"',
            '{"data_path": "data_path"',
        ),
        ("all questions of the file", ', "n_examples": "n_val_examples", "n_sam', ', "n_sam'),
        ("one response to each question", ', "n_samples": "eval_samples"}', "}"),
        ("the temperature of training", '    "sampling_temperature": "eval_temperature",\n', ""),
        ("settings of evaluations that are not set", "if saved.get(of_run) is not None}", "if of_run in saved}"),
        ("the name of a set is lost", "return found if name is None else", "return found if True else"),
        ("an older run has no questions", 'if isinstance(settings.get("data_path"), str):', "if False:"),
        ("the number of questions of another file", '    "n_examples": "--data-path",\n', ""),
        ("the mix of another reward", '    "reward_mix": "--reward",\n', ""),
        ("paths from here", "return str(there) if is_elsewhere else path", "return path"),
        ("paths of a run that was moved", "there.exists() and there.resolve()", "there.resolve()"),
        (
            "the other run is not compared",
            "if value != getattr(config, name) and not",
            "if False and not",
        ),
        ("flags of the user are shown as the run's", " and not _is_given(name, arguments)\n    }", "\n    }"),
        ("settings out of range", "        EvaluateConfig(**settings)\n    except", "    except"),
    ),
    *breaks(
        "describe_environment",
        "drivers/runs/log.py",
        f"{OF_RUN} -k describe_environment",
        ("the folder of the program", '"folder": os.getcwd(),', '"folder": str(Path(__file__).parent),'),
    ),
    *breaks(
        "wrap",
        "drivers/common/wrapping.py",
        "tests/drivers/test_display.py -k 'wrap or line'",
        ("values break at their spaces", 'part.replace(" ", _UNBROKEN) for part in parts', "part for part in parts"),
        ("commands are broken", 'command[0].replace(" ", _UNBROKEN)', "command[0]"),
        ("a pipe gets several lines", "if file.isatty() else text", "if True else text"),
        ("a terminal breaks words", "if file.isatty() else text", "if False else text"),
        ("what follows a command is lost", " + line[command.end() :]", ""),
    ),
    *breaks(
        "Display",
        "drivers/common/display.py",
        "tests/drivers/test_display.py",
        ("lines break inside words", "if self.is_terminal else", "if False else"),
        ("lines of a pipe are wrapped", "if self.is_terminal else", "if True else"),
        ("the phase has no time of its own", "clock(now - self._phase_begin)", "clock(now - self._begin)"),
        ("a stage is not shown", "        with self.phase(name, {}):\n            yield\n", "        yield\n"),
        ("a stage says nothing", '        self.say(f"{name} ...")\n', ""),
        ("steps do not advance", "        self._n_done = step\n", ""),
        ("an evaluation comes before its step", "if not self._is_in_step:", "if True:"),
        (
            "an evaluation is lost at the end",
            "        self._print_held_lines()\n        with suppress",
            "        with suppress",
        ),
        ("the set is not named", 'f" on {name}"', '""'),
        ("rates of the fewest responses", 'f"{kind}_at_{max(numbers)}"', 'f"{kind}_at_{min(numbers)}"'),
    ),
    *breaks(
        "fit_help",
        "drivers/common/cli.py",
        "tests/drivers/test_display.py -k help",
        ("a closed pipe is an error", "except BrokenPipeError:", "except ZeroDivisionError:"),
        ("the description is one line", "if len(plain) <= width:", "if True:"),
        ("colors count", 're.sub(r"\\x1b\\[[\\d;]*m", "", line)', "line"),
        ("lists have no indent", 'if plain.startswith((" ", "usage:")) else ""', 'if False else ""'),
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
