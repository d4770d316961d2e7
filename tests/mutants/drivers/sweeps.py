"""Sweeps: drivers/sweeps/."""

from tests.mutants.table import breaks

SWEEP = "tests/drivers/test_sweep.py"
PLAN, RESULTS = "drivers/sweeps/plan.py", "drivers/sweeps/results.py"

MUTANTS = [
    *breaks(
        "plan",
        PLAN,
        f"{SWEEP} -k 'plan_run or plan_values or plan_grid or may_grow or other_sweep'",
        ("one seed for all runs", 'variant.flags | {"seed": seed}', 'variant.flags | {"seed": seeds[0]}'),
        (
            "shared flags win",
            "[*as_flags(SHORT[program] if is_short else {}), *shared, *as_flags(own)]",
            "[*as_flags(SHORT[program] if is_short else {}), *as_flags(own), *shared]",
        ),
        (
            "always short",
            "is_short = config.sweep in SWEEPS and not names_model(shared)",
            "is_short = config.sweep in SWEEPS",
        ),
        ("a run is not resumed", ', "--resume", "auto")', ")"),
    ),
    *breaks(
        "read_result",
        RESULTS,
        f"{SWEEP} -k results",
        ("the first value", "values[max(values)]", "values[min(values)]"),
        (
            "the worst is the best",
            "max(accuracies, key=lambda step: accuracies[step].value)",
            "min(accuracies, key=lambda step: accuracies[step].value)",
        ),
        ("seconds, not minutes", "logged.wall_clock / 60 if", "logged.wall_clock if"),
        (
            "a failed run is unfinished",
            'return "not finished" if status in (None, 0, STOPPED) else "failed"',
            'return "not finished"',
        ),
    ),
    *breaks(
        "presets",
        "drivers/sweeps/presets.py",
        f"{SWEEP} -k 'off-policy or of_2026'",
        ("one seed", '("variants", "off-policy-32"), (0, 1, 2, 3)', '("variants", "off-policy-32"), (0,)'),
        ("another constant", '_train(label, aggregation="constant", **flags)', "_train(label, **flags)"),
        ("a single update", "_reuse(base, 1, 32)", "_reuse(base, 1, 1)"),
        ("whole batches", "given.rollout_batch_size // parts", "given.rollout_batch_size"),
        (
            "other micro-batches",
            "max(1, given.gradient_accumulation_steps // parts)",
            "given.gradient_accumulation_steps",
        ),
    ),
]
