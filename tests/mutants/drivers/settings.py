"""Flags: drivers/settings/."""

from tests.mutants.table import breaks

FLAGS, CLI, OBJECTIVE, LOOP = (f"tests/drivers/test_{name}.py" for name in ("flags", "cli", "objective", "loop"))
GROUPS, ALGORITHM = "drivers/settings/groups.py", "drivers/settings/algorithm.py"

MUTANTS = [
    *breaks(
        "parse_arguments",
        "drivers/common/arguments.py",
        "tests/drivers/test_one_line.py -k 'wrong_input and flags'",
        ("tyro's own words", "        if message is not None:\n", "        if False:\n"),
        (
            "choices in any order",
            "            choices = choices or list(event.choices)\n",
            "            choices = sorted(event.choices)\n",
        ),
        ("no initials", '{known}?" if known else', '{known}?" if False else'),
        ("the last of the initials", "in reversed(list(flags))}", "in flags}"),
        ("values of switches are words", "and bool in _list_types(field.type)", "and False"),
        ("a positional is a flag", 'elif "Positional" not in str(field.type):', "else:"),
        ("underscores are another flag", 'is_here = name.replace("_", "-") == flag', "is_here = name == flag"),
        ("each text is a number", "{KINDS[kind] for kind in", "{KINDS[float] for kind in"),
    ),
    *breaks(
        "suggest",
        "drivers/common/errors.py",
        "tests/drivers/test_one_line.py -k 'suggest or flags'",
        ("the dashes count", 'bare = {name.lstrip("-"): name for', "bare = {name: name for"),
        ("capitals are other letters", "start = word.lower()", "start = word"),
        ("no beginning", "if start and name.startswith(start)]", "if False]"),
    ),
    *breaks(
        "make_sampling",
        GROUPS,
        f"{OBJECTIVE} -k config_sampling",
        ("the temperature is ignored", "        temperature=settings.sampling_temperature,\n", ""),
        ("top-p is ignored", "        top_p=settings.sampling_top_p,\n", ""),
        ("no minimum", "        min_tokens=settings.sampling_min_tokens,\n", ""),
        ("a fixed maximum", "        max_tokens=settings.sampling_max_tokens,\n", "        max_tokens=6,\n"),
    ),
    *breaks(
        "schedule_factor",
        "drivers/settings/schedule.py",
        "tests/drivers/test_optim.py -k schedule_factor",
        ("a first step of 0", "return step / (warmup_steps + 1)", "return (step - 1) / (warmup_steps + 1)"),
        ("full at the last step of the warm-up", "return step / (warmup_steps + 1)", "return step / warmup_steps"),
        ("a last step of 0", "/ (n_steps - warmup_steps)", "/ max(1, n_steps - warmup_steps - 1)"),
        ("decay counts the warm-up", "done = (step - 1 - warmup_steps) / (", "done = (step - 1) / ("),
        ("a line for the cosine", "return (1 + math.cos(math.pi * done)) / 2", "return 1 - done"),
    ),
    *breaks(
        "OptimizerSettings",
        GROUPS,
        "tests/drivers/test_optim.py -k 'betas or warmup'",
        ("any betas", "if not all(0 <= beta < 1 for", "if not all(True for"),
        ("a beta of 1", "0 <= beta < 1", "0 <= beta <= 1"),
    ),
    *breaks(
        "Sampling",
        "drivers/settings/sampling.py",
        f"{LOOP} tests/drivers/test_grading.py -k 'remax or evaluations or stop_strings'",
    ),
    *breaks(
        "GrpoConfig",
        GROUPS,
        f"{OBJECTIVE} -k 'illegal or derives'",
        (
            "any group size",
            '        check_multiple("rollout_batch_size", self.rollout_batch_size, "group_size", self.group_size)\n',
            "",
        ),
        (
            "responses, not questions",
            "return self.rollout_batch_size // self.group_size",
            "return self.rollout_batch_size",
        ),
        (
            "the number of micro-batches is their size",
            "return self.train_batch_size // self.gradient_accumulation_steps",
            "return self.gradient_accumulation_steps",
        ),
        ("a minimum above the maximum", "if self.sampling_min_tokens > self.sampling_max_tokens:", "if False:"),
    ),
    *breaks(
        "PromptSettings",
        GROUPS,
        "tests/drivers/test_chat.py tests/drivers/test_cli.py -k 'chat_date or sampling_stop'",
        ("the day is not kept", 'object.__setattr__(self, "chat_date", day.isoformat())', "pass"),
        ("a day of every run", "        if self.chat_template:\n", "        if True:\n"),
        (
            "any text is a day",
            "date.today() if self.chat_date is None else date.fromisoformat(self.chat_date)",
            "date.today()",
        ),
        (
            "an empty text ends responses",
            'if self.sampling_stop is not None and "" in self.sampling_stop:',
            "if False:",
        ),
    ),
    *breaks(
        "AlgorithmSettings",
        ALGORITHM,
        (
            f"{OBJECTIVE} tests/drivers/test_train.py tests/drivers/test_guards.py"
            " -k 'illegal or old_log_probs or ratio_off or ratio_on or overlong or length_penalty or gdpo or silent'"
        ),
        (
            "epochs are on-policy",
            "return self.updates_per_rollout_batch > 1",
            "return self.rollout_batch_size > self.train_batch_size",
        ),
        (
            "several updates are on-policy",
            "return self.updates_per_rollout_batch > 1",
            "return self.epochs_per_rollout_batch > 1",
        ),
        (
            "an update across passes takes any number of them",
            "if settings.epochs_per_rollout_batch % settings.passes_per_update:",
            "if False:",
        ),
        ("always off-policy", "return not self.is_off_policy and self.old_policy", "return False and self.old_policy"),
        (
            "old log-probs without need",
            "return corrects_before or needs_old_ratio or self.selects_by_old_policy",
            "return True",
        ),
    ),
    *breaks(
        "resolve_values",
        "drivers/settings/objectives.py",
        f"{OBJECTIVE} {FLAGS} tests/drivers/test_recipes.py -k 'calls_its_function or cliprange'",
        (
            "one bound for both sides",
            "config.cliprange if config.cliprange_high is None else config.cliprange_high",
            "config.cliprange",
        ),
        (
            "one bound for both sides of the clip",
            'CLIP = _same("cliprange", "cliprange_high")',
            'CLIP = {"cliprange": "cliprange", "cliprange_high": "cliprange"}',
        ),
        (
            "SAPO's temperatures exchanged",
            '"temperature_positive": "sapo_temperatures[0]", "temperature_negative": "sapo_temperatures[1]"',
            '"temperature_positive": "sapo_temperatures[1]", "temperature_negative": "sapo_temperatures[0]"',
        ),
        (
            "CISPO's bounds exchanged",
            'settings=_same("ratio_low", "ratio_high"),',
            'settings={"ratio_low": "ratio_high", "ratio_high": "ratio_low"},',
        ),
    ),
    *breaks(
        "find_objective",
        "drivers/settings/own_objective.py",
        "tests/drivers/test_own_objective.py",
        ("any name is a file", "    if not is_own(name):\n", "    if False:\n"),
        ("no law is required", "laws=REQUIRED_LAWS, **values)", 'laws=("shape",), **values)'),
        ("no law of advantages", 'laws=("shape", "unscored", "order"), **values)', "laws=(), **values)"),
        ("every loss is of tokens", "        has_response_loss=per_response,\n", ""),
        ("responses may be weighted by length", "        has_response_ratio=per_response,\n", ""),
        ("any loss takes advantages of tokens", 'not per_response and holds("shape", token_advantages=True)', "True"),
        ("silent responses are skipped", '        has_gradient_without_signal=not holds("signal"),\n', ""),
        (
            "equal groups are silent",
            "        compares_within_group = False\n",
            "        compares_within_group = True\n",
        ),
        ("settings are not passed", '        "settings": read,\n', '        "settings": {},\n'),
        ("files are never compared", "return None if file is None else", "return None if file else"),
    ),
    *breaks(
        "import_function",
        "drivers/common/own_functions.py",
        "tests/drivers/test_own_objective.py tests/drivers/test_grading.py -k 'own or reward'",
        ("a file replaces a module", "name = file.stem if known is None or", "name = file.stem if True or"),
        (
            "errors end in a traceback",
            "    except (Exception, SystemExit) as error:\n",
            "    except SystemExit as error:\n",
        ),
        ("anything is a function", "    if not callable(function):\n", "    if function is None:\n"),
        ("files that are not there", "    check_file(flag, name)\n", ""),
    ),
    *breaks(
        "ImitationSettings",
        "drivers/settings/imitation.py",
        f"{FLAGS} {LOOP} -k 'imitation or sft_flag or expert_iteration_flag or sft_updates'",
        (
            "the rest of an epoch is dropped",
            "self.epochs * -(-n_examples // size)",
            "self.epochs * (n_examples // size)",
        ),
        ("a single epoch", "self.epochs * -(-n_examples // size)", "-(-n_examples // size)"),
        ("fixed settings lose", "(shared | fixed | own)", "(fixed | own)"),
        (
            "questions, not responses",
            "sampled = self.question_batch_size * self.group_size",
            "sampled = self.question_batch_size",
        ),
    ),
    *breaks(
        "Bounds",
        "drivers/settings/base.py",
        f"{OBJECTIVE} -k illegal",
        ("the limit is allowed", "if value <= self.above or", "if value < self.above or"),
        ("no upper limit", " or value > self.at_most:", ":"),
        ("infinity is allowed", "        if not math.isfinite(value):\n", "        if math.isnan(value):\n"),
        ("no bounds", "            if problem:\n", "            if False:\n"),
    ),
    *breaks(
        "parse_train_config",
        "drivers/settings/command_line.py",
        f"{CLI} {OBJECTIVE} -k 'flag_given or gradient_accumulation or recipes_are or recipe_with'",
        (
            "the first value counts",
            '        if name.replace("_", "-") == flag:\n',
            '        if name.replace("_", "-") == flag and given is None:\n',
        ),
        (
            "the quickstart overrides the recipe",
            '{"recipe": recipe, **base, **RECIPES[recipe]}',
            '{"recipe": recipe, **RECIPES[recipe], **base}',
        ),
        (
            "the quickstart of a recipe with a model",
            'is not None or "model_path" in RECIPES.get(recipe, {})',
            "is not None",
        ),
        ("the recipe's budget stays", "return replace(config, micro_batch_tokens=None)", "return config"),
        (
            "recipes without the quickstart",
            'base = QUICKSTART if recipe == "quickstart" or not has_model else {}',
            "base = {}",
        ),
    ),
    *breaks(
        "parse_mix",
        "drivers/settings/reward_spec.py",
        "tests/drivers/test_grading.py -k mix",
        ("infinite weights", "and math.isfinite(value)):", "and value == value):"),
        ("names may repeat", 'if name in weights or name == "reward":', 'if name == "reward":'),
    ),
]
