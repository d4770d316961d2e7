"""Folders of runs as if they had been logged."""

import json

HOSTILE_TEXT = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- <b>&amp;\"' \u2028 $title \\frac{$"


def make_step_rows(values, key="reward", **more):
    """Return one training row for each value."""
    return [
        {"phase": "train", "step": k, key: value, "time_update_s": 2.0, **more} for k, value in enumerate(values, 1)
    ]


def write_run(folder, rows=(), completions=None, program="train.py", planned=None, **settings):
    """Write a run's settings, metrics and completions into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {"program": program, "steps": planned, "config": settings, "environment": {"python": "3.11"}}
    (folder / "config.json").write_text(json.dumps(written))
    for name, lines in (("metrics", rows), ("completions", completions)):
        if lines is not None:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
