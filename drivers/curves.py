"""curves.png of a run, from its metrics.jsonl: `python drivers/curves.py RUN_FOLDER`."""

import json
import sys
from pathlib import Path
from typing import Any

PANELS = (
    ("Reward per step", (("train", "reward", "reward"), ("train", "format_reward", "format")), "mean over rollouts"),
    (
        "Held-out accuracy",
        (("eval", "accuracy", "accuracy"), ("eval", "format_reward", "format")),
        "share of questions",
    ),
    ("Entropy", (("train", "rollout_entropy", "sampled"),), "nats per token"),
    ("Response length", (("train", "response_tokens", "rollouts"), ("eval", "response_tokens", "held-out")), "tokens"),
    ("Gradient norm", (("train", "grad_norm", "before clipping"),), ""),
)
PHASES = ("rollout", "reward", "update", "push", "check", "evaluate", "save")


def read_metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics.jsonl by phase."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(row["phase"], []).append(row)
    return rows


def draw_curves(folder: Path) -> Path:
    """Six panels: rewards, accuracy with its standard error, entropy, length, gradient norm, and time by phase."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(folder)
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    for axis, (title, series, unit) in zip(axes, PANELS, strict=False):
        for phase, key, label in series:
            points = [(row["step"], row[key]) for row in rows.get(phase, []) if row.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, marker="o", markersize=3, label=label)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if title in ("Reward per step", "Held-out accuracy"):
            axis.set_ylim(-0.03, 1.03)
        if len(axis.get_lines()) > 1:
            axis.legend(frameon=False)
    for row in rows.get("eval", []):
        axes[1].errorbar(row["step"], row["accuracy"], yerr=1.96 * row["accuracy_stderr"], color="C0", capsize=3)
    _stack_times(axes[5], rows.get("train", []))
    figure.suptitle(folder.name)
    target = folder / "curves.png"
    unfinished = folder / ".unfinished-curves.png"
    figure.savefig(unfinished, dpi=120)
    return unfinished.replace(target)


def _stack_times(axis: Any, rows: list[dict[str, Any]]) -> None:
    steps = [row["step"] for row in rows]
    base = [0.0] * len(rows)
    for phase in PHASES:
        seconds = [row.get(f"time_{phase}_s", 0.0) for row in rows]
        if any(seconds):
            axis.bar(steps, seconds, bottom=base, label=phase, width=0.8)
            base = [low + high for low, high in zip(base, seconds, strict=True)]
    axis.set(title="Time by phase", xlabel="step", ylabel="seconds")
    if axis.containers:
        # Above the bars, of which any may be the highest.
        axis.set_ylim(top=1.4 * max(base))
        axis.legend(frameon=False, fontsize="small", ncols=4, loc="upper center", columnspacing=1.0, handlelength=1.2)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python drivers/curves.py RUN_FOLDER")
    print(draw_curves(Path(sys.argv[1])))
