"""Reports: drivers/reports/."""

from tests.mutants.table import breaks

REPORT = "tests/drivers/test_report.py"
SERIES, LOGGED = "drivers/reports/series.py", "drivers/reports/logged_run.py"
WORDS = "'series or panel or times or anomalies or downsampled or page_table or incomplete or logged_numbers'"

MUTANTS = [
    *breaks(
        "make_panels",
        SERIES,
        f"{REPORT} -k {WORDS}",
        (
            "the sum over seeds",
            "fmean(values), min(values), max(values), len(known))",
            "sum(values), min(values), max(values), len(known))",
        ),
        (
            "bounds exchanged",
            "fmean(values), min(values), max(values), len(known))",
            "fmean(values), max(values), min(values), len(known))",
        ),
        (
            "steps of all runs only",
            "(run, estimates[step]) for run, estimates in estimates_of if step in estimates]",
            "(run, estimates.get(step, [*estimates.values()][0])) for run, estimates in estimates_of if estimates]",
        ),
        ("of one set", "others = [key.removesuffix", "others = [] and [key.removesuffix"),
        ("constants are drawn", "if spec.hides_constants and all(", "if False and all("),
        ("nothing is drawn", "if spec.hides_constants and all(", "if spec.hides_constants or all("),
        ("the last point is lost", "    if (len(items) - 1) % stride:\n        kept.append(items[-1])\n", ""),
    ),
    *breaks(
        "LoggedRun",
        LOGGED,
        f"{REPORT} -k {WORDS}",
        ("logged intervals are not drawn", "if low is not None and high is not None:", "if False:"),
        ("intervals of the first set", 'f"{of_set}{slash}")', '"")'),
        ("bounds of training are intervals", 'if phase != "eval":', "if False:"),
        ("seeds are experiments", 'IGNORED_SETTINGS = ("seed", "save_dir"', 'IGNORED_SETTINGS = ("save_dir"'),
        ("background sampling takes time", 'times |= {"rollout": 0.0, "reward": 0.0}', "pass"),
        ("saving is free", '            times["save"] = saving.get(step, 0.0)\n', ""),
        (
            "the legend has another name than the tables",
            "    if len(members) == 1:\n        return first.name\n",
            "    if n_series < 2:\n        return first.name\n",
        ),
        ("every anomaly alone", "if spans and spans[-1].last_step >= step - 1:", "if False:"),
    ),
]
