"""The loops: train.py, sft.py, expert_iteration.py."""

from tests.mutants.table import breaks

LOOP = "tests/drivers/test_loop.py"
GRPO = f"{LOOP} -k 'not sft and not expert and not fine_tuning and not collect'"

MUTANTS = [
    *breaks(
        "train",
        "drivers/train.py",
        GRPO,
        (
            "one order for all epochs",
            "rollouts.shuffled(state.shuffle)",
            "rollouts.shuffled(state.shuffle.manual_seed(1))",
        ),
        ("rollouts in the order of sampling", "rollouts.shuffled(state.shuffle).split", "rollouts.split"),
        ("a single epoch", "range(config.epochs_per_rollout_batch // config.passes_per_update)", "range(1)"),
        ("one train batch", ".split(config.train_batch_size)", ".split(config.rollout_batch_size)"),
        (
            "old log-probs anew in each epoch",
            "rollouts.shuffled(state.shuffle)",
            "prepare_rollouts(config, policy, reference, rollouts, collected.scores, collected.greedy_rewards)"
            ".shuffled(state.shuffle)",
        ),
        ("anomalies of the rollouts are forgotten", "metrics, anomalies, entropy_coef)", "metrics, (), entropy_coef)"),
    ),
    *breaks(
        "train",
        "drivers/train.py",
        "tests/drivers/test_samples.py tests/drivers/test_flags.py -k 'trained_values or (train and entropy_coef)'",
        (
            "advantages are not logged",
            "metrics.logged_token_values(), rollouts.advantages)",
            "metrics.logged_token_values())",
        ),
        ("token values of no completion", "UpdateMetrics(collected.logged_completions)", "UpdateMetrics()"),
    ),
    *breaks(
        "train",
        "drivers/train.py",
        "tests/drivers/test_train.py -k 'across_passes'",
        ("an update across passes is repeated", " // config.passes_per_update", ""),
    ),
    *breaks(
        "train",
        "drivers/train.py",
        "tests/drivers/test_overlap.py -k 'stale or in_main_thread'",
        ("nothing is sampled ahead", "            prefetcher.prefetch(step + 1)\n", ""),
        ("the same step is sampled ahead", "prefetcher.prefetch(step + 1)", "prefetcher.prefetch(step)"),
        ("a push while samples are drawn", "            prefetcher.drain()\n", ""),
    ),
    *breaks(
        "train",
        "drivers/train.py",
        "tests/drivers/test_guards.py -k 'entropy_bonus'",
        (
            "equal rewards are no anomaly with a penalty",
            "has_regularization_gradient=config.has_regularization_gradient",
            "has_regularization_gradient=False",
        ),
    ),
    *breaks(
        "fine_tune",
        "drivers/sft.py",
        f"{LOOP} -k 'sft or fine_tuning'",
        ("the sampling temperature in the loss", "update(at_temperature_one, policy", "update(config, policy"),
        ("the engine stays awake at first", "    engine.sleep()\n\n    for", "\n    for"),
        (
            "the engine stays awake after a push",
            "                run.evaluate(components, step=step)\n            engine.sleep()\n",
            "                run.evaluate(components, step=step)\n",
        ),
        ("a push after every step", "if run.is_first_step(step) or run.is_evaluation_due(step):", "if True:"),
        (
            "no push after the first step",
            "if run.is_first_step(step) or run.is_evaluation_due(step):",
            "if run.is_evaluation_due(step):",
        ),
        (
            "an evaluation after the first step",
            "            if run.is_evaluation_due(step):\n                run.evaluate",
            "            if True:\n                run.evaluate",
        ),
    ),
    *breaks(
        "select_batch",
        "drivers/sft.py",
        f"{LOOP} tests/drivers/test_sft.py -k 'sft_updates or select_batch'",
        ("the first batch is left out", "divmod(step - 1, -(-n // size))", "divmod(step, -(-n // size))"),
        ("the rest of an epoch is dropped", "divmod(step - 1, -(-n // size))", "divmod(step - 1, n // size)"),
        ("one order for all epochs", 'f"{seed}, {epoch}"', 'f"{seed}"'),
        ("one order for all seeds", 'f"{seed}, {epoch}"', 'f"{epoch}"'),
        ("batches overlap", "order[batch * size : (batch + 1) * size]", "order[batch : batch + size]"),
        ("the order of the file", ".sample(range(n), n)", ".sample(range(n), n) and list(range(n))"),
    ),
    *breaks(
        "choose_demonstrations",
        "drivers/sft.py",
        "tests/drivers/test_sft.py -k choose_demonstrations",
        ("one more example", "[:n_examples]", "[: n_examples + 1]"),
        ("the first of the file", "random.Random(settings.seed).sample(examples, len(examples))[", "list(examples)["),
        ("wrong ones too", "if settings.correct_only:", "if False:"),
        ("a partial reward is correct", 'verdict.scores["reward"] == 1', 'verdict.scores["reward"] is not None'),
        ("only the wrong ones", 'verdict.scores["reward"] == 1', 'verdict.scores["reward"] != 1'),
    ),
    *breaks(
        "iterate",
        "drivers/expert_iteration.py",
        f"{LOOP} tests/drivers/test_expert_iteration.py -k 'expert or epoch or ignores or partial or imitates'",
        ("a partial reward is right", "if reward == 1]", "if reward > 0]"),
        ("everything is imitated", "if reward == 1]", "]"),
        ("a single epoch", "range(settings.epochs if correct else 0)", "range(1 if correct else 0)"),
        (
            "one order for all epochs",
            "imitation_batch(correct).shuffled(state.shuffle)",
            "imitation_batch(correct).shuffled(state.shuffle.manual_seed(1))",
        ),
        ("the order of sampling", "imitation_batch(correct).shuffled(state.shuffle)", "imitation_batch(correct)"),
        ("one train batch", ".split(settings.train_batch_size)", ".split(config.train_batch_size)"),
    ),
]
