"""The page of one or several runs: it holds the logged numbers, escapes foreign text and fetches nothing."""

import json
import math
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, fmean

import pytest

from drivers.common.errors import UsageError
from drivers.report import main
from drivers.reports.curves import DARK_PALETTE, PALETTE
from drivers.reports.logged_run import group_runs, read_metrics, read_runs
from drivers.reports.page import MAX_POINTS_PER_LINE, accuracy_at, make_page, write_report
from drivers.reports.series import downsample, make_panels, make_times, steps_within
from tests.drivers.helpers.reports import HOSTILE_TEXT, make_step_rows, write_run
from tests.drivers.helpers.runs import make_letter_demonstrations, run_sft, run_training

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "input", "br", "hr", "img", "link"}


class Page(HTMLParser):
    """A parsed page: elements, texts and the data of the script. Wrong nesting is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(text for tag, text in self.texts if tag not in ("script", "style"))
        (self.data,) = (json.loads(text) for tag, text in self.texts if tag == "script" and text.startswith("{"))

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), tag
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def count(self, tag):
        return [name for name, _ in self.elements].count(tag)


def parse_page(*folders, title="A title"):
    runs = read_runs(folders)
    return Page(make_page(runs, group_runs(runs), title))


def get_panels(page):
    return {panel["title"]: panel for panel in page.data["panels"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of real runs: GRPO with an active clip, and SFT."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drivers.training.run.draw_curves", lambda _: None)  # drawn in another test
        settings = {"n_grpo_steps": 3, "eval_steps": 2, "loss_type": "grpo_clip", "train_batch_size": 16}
        run_training(folder / "grpo", cliprange=0.01, **settings)
        run_sft(folder / "sft", make_letter_demonstrations("aa", "ab", "ba", "bb"), train_batch_size=2)
    return folder


@pytest.mark.medium
def test_page_holds_logged_numbers(trained):
    page, rows = parse_page(trained / "grpo"), read_metrics(trained / "grpo")
    panels = get_panels(page)
    kept = {
        "Reward": [("train", "reward"), ("train", "format_reward")],
        "Held-out accuracy": [("eval", "accuracy"), ("eval", "format_reward")],
        "Entropy": [("train", "rollout_entropy"), ("train", "entropy")],
        "Response length": [("train", "response_tokens"), ("eval", "response_tokens")],
        "Excluded": [("train", "zero_std_groups"), ("train", "truncated"), ("train", "unscored")],
        "Distance": [("train", "approx_kl"), ("train", "sampler_log_prob_diff")],
        "Clip fraction": [("train", "clip_fraction")],
        "Gradient norm": [("train", "grad_norm")],
        "Speed": [("train", "rollout_tokens_per_s"), ("train", "update_tokens_per_s")],
        "Groups solved": [("train", "pass_at_2"), ("train", "pass_at_4"), ("train", "pass_at_8")],
    }
    assert panels.keys() == kept.keys()
    for title, sources in kept.items():
        assert len(panels[title]["quantities"]) == len(panels[title]["lines"]) == len(sources)
        for line, (phase, key) in zip(panels[title]["lines"], sources, strict=True):
            found = [(step, value) for step, _, value, *_ in line["points"]]
            assert found == [(row["step"], row[key]) for row in rows[phase] if row.get(key) is not None]
    first, second, third = rows["train"]
    assert [point[0] for point in panels["Held-out accuracy"]["lines"][0]["points"]] == [0, 2, 3]
    seconds = [point[1] for point in panels["Reward"]["lines"][0]["points"]]
    before = rows["eval"][0]["time_evaluate_s"]
    spent = [sum(value for name, value in row.items() if name.startswith("time_")) for row in (first, second, third)]
    assert seconds == pytest.approx([before + sum(spent[:n]) for n in (1, 2, 3)], abs=0.005)
    last = rows["eval"][-1]["accuracy"]
    assert f"{last:.3f}" in page.text
    assert "3 of 3" not in page.text  # all planned steps were made
    speed = sum(row["sampled_tokens"] for row in rows["train"]) / sum(row["time_rollout_s"] for row in rows["train"])
    assert f"{speed:.0f}" in page.text.split()
    assert "cliprange" in page.text


def test_page_holds_logged_responses_and_tokens(trained):
    page = parse_page(trained / "grpo")
    lines = [json.loads(line) for line in (trained / "grpo/completions.jsonl").read_text().splitlines()]
    found = page.data["responses"]
    assert len(found) == len(lines) == 3 * 8 + 3 * 4
    for ours, theirs in zip(found, lines, strict=True):
        for name in ("step", "phase", "question", "answer", "response", "reward", "tokens", "sampler_log_probs"):
            assert ours[name] == theirs[name]
        assert {name: ours.get(name) for name in ("advantage", "log_probs", "entropy")} == {
            name: theirs.get(name) for name in ("advantage", "log_probs", "entropy")
        }
        assert ours["details"]["finish_reason"] == theirs["finish_reason"]
    written = [json.loads((trained / name / "config.json").read_text())["steps"] for name in ("grpo", "sft")]
    assert written == [3, 2]  # SFT has no setting for it: two batches of two
    demonstrated = [row for row in parse_page(trained / "sft").data["responses"] if row["phase"] == "train"]
    assert len(demonstrated) == 4
    assert all("reward" not in row and "log_probs" in row for row in demonstrated)


@pytest.mark.slow
def test_write_report_is_deterministic(trained, tmp_path):
    """A run without rollouts is absent from their panels; two programs are compared by the settings of both."""
    folders = [trained / "grpo", trained / "sft"]
    page = write_report(folders, tmp_path / "one", "Two programs")
    files = ["curves-by-time.png", "curves.png", "report.html"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == files
    assert page == tmp_path / "one/report.html"
    for name in files[:2]:
        assert (tmp_path / "one" / name).read_bytes().startswith(b"\x89PNG")
    runs = read_runs(folders)
    assert page.read_text() == make_page(runs, group_runs(runs), "Two programs")
    panels = get_panels(Page(page.read_text()))
    assert {line["series"] for line in panels["Reward"]["lines"]} == {0}
    assert {line["series"] for line in panels["Demonstrations"]["lines"]} == {1}
    assert {line["series"] for line in panels["Held-out accuracy"]["lines"]} == {0, 1}
    assert "Clip fraction" in panels
    assert page.stat().st_size < 200_000


def test_write_report_without_picture_warns(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("no font")

    monkeypatch.setattr("drivers.reports.page.draw", fail)
    run = write_run(tmp_path / "run", make_step_rows([1.0]))
    assert "<title>x</title>" in write_report([run], tmp_path / "out", "x").read_text()
    assert "out/curves.png could not be drawn (ValueError: no font)" in capsys.readouterr().err


def test_page_fetches_nothing_and_has_one_script(trained):
    runs = read_runs([trained / "grpo"])
    text = make_page(runs, group_runs(runs), "x")
    page = Page(text)
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "action", "style", "data", "poster"} & attributes.keys(), tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    (style,) = (text for tag, text in page.texts if tag == "style")
    assert not re.search(r"url\(|@import|@font-face", style)
    (script,) = (text for tag, text in page.texts if tag == "script" and not text.startswith("{"))
    assert not re.search(
        r"fetch\(|XMLHttpRequest|import\(|innerHTML|insertAdjacentHTML|document\.write|eval\(", script
    )
    assert set(re.findall(r"\w+://[^\"'`]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not a URL
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_page_security_policy_matches_script_and_style(trained):
    page = parse_page(trained / "sft")
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    for kind in ("script", "style"):
        (text,) = (text for tag, text in page.texts if tag == kind and not text.startswith("{"))
        assert f"{kind}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" in policy


@pytest.mark.medium
def test_page_hostile_text_is_escaped(tmp_path):
    """This includes names of runs, settings, anomalies and the title."""
    row = {
        "step": 1,
        "phase": "train",
        "question": HOSTILE_TEXT,
        "answer": [HOSTILE_TEXT, "b"],
        "response": HOSTILE_TEXT,
    }
    row |= {
        "reward": 1.0,
        "why": HOSTILE_TEXT,
        "tokens": [HOSTILE_TEXT, "\ud83d", ""],
        "log_probs": [-1.0, None, -2.0],
    }
    anomaly = {"phase": "anomaly", "step": 1, "kind": "loss", "value": None, "limit": 0.0, "text": HOSTILE_TEXT}
    rows = [*make_step_rows([0.5]), anomaly]
    folders = [
        write_run(tmp_path / f"<img src={name}>", rows, [row], model_path=f"{HOSTILE_TEXT}{name}")
        for name in ("a", "b")
    ]
    plain = parse_page(write_run(tmp_path / "plain", make_step_rows([0.5]), [row | {"question": "", "response": ""}]))
    page = parse_page(*folders, title=HOSTILE_TEXT)
    assert [page.count(tag) for tag in ("script", "style", "img", "b")] == [2, 1, 0, 0]
    assert page.count("script") == plain.count("script")
    response = page.data["responses"][0]
    assert response["question"] == response["response"] == HOSTILE_TEXT
    assert response["tokens"] == row["tokens"]
    assert response["answer"] == f"{HOSTILE_TEXT} or b"
    assert HOSTILE_TEXT in page.data["anomalies"][0]["text"]
    assert page.data["runs"] == ["<img src=a>", "<img src=b>"]
    assert page.text.count(HOSTILE_TEXT) >= 4  # title, settings, anomalies
    report, again = (write_report(folders, tmp_path / name, HOSTILE_TEXT) for name in ("out", "again"))
    assert Page(report.read_text()).data == page.data
    for file in report.parent.iterdir():  # equal input, equal bytes
        assert file.read_bytes() == (again.parent / file.name).read_bytes()


def test_series_of_seeds_has_one_band(tmp_path):
    values = {0: [0.1, 0.5, 0.9], 1: [0.3, 0.4], 2: [0.2, 0.6, None]}
    folders = [
        write_run(tmp_path / f"seed-{s}", make_step_rows(v), seed=s, save_dir=f"runs/{s}", rate=1e-5)
        for s, v in values.items()
    ]
    other = write_run(tmp_path / "other", make_step_rows([0.0, 0.0]), seed=0, save_dir="x", rate=3e-5)
    page = parse_page(*folders, other)
    assert page.data["series"] == [{"name": "rate=1e-05 (3 runs)", "runs": 3}, {"name": "other", "runs": 1}]
    (ours, theirs) = get_panels(page)["Reward"]["lines"]
    assert [step for step, *_ in ours["points"]] == [1, 2, 3]
    for (_, seconds, mean, low, high, n), column in zip(
        ours["points"], [(0.1, 0.3, 0.2), (0.5, 0.4, 0.6), (0.9,)], strict=True
    ):
        assert (mean, low, high, n) == (pytest.approx(fmean(column)), min(column), max(column), len(column))
        assert seconds == 2 * ours["points"].index([_, seconds, mean, low, high, n]) + 2
    assert [point[2:] for point in theirs["points"]] == [[0.0, None, None, 1]] * 2
    assert "the band spans minimum to maximum" in page.text
    assert "rate" in page.text
    headed = [text for tag, text in page.texts if tag == "th"]
    assert headed[:6] == ["run", "accuracy before", "last", "best", "rate", "steps"]
    assert {"rate=1e-05 (3 runs)", "seed-1, seed 1", "other"} <= set(headed)


def test_series_name_is_first_runs_and_unknown_settings_are_separate(tmp_path):
    same = [write_run(tmp_path / name, make_step_rows([1.0]), seed=number, a=1) for number, name in enumerate("xy")]
    assert [series.name for series in group_runs(read_runs(same))] == ["x (2 runs)"]
    for folder in same:
        (folder / "config.json").write_text("{")
    assert [series.name for series in group_runs(read_runs(same))] == ["x", "y"]
    assert len(read_runs([same[0], same[0]])) == 1
    # The legend calls a run as the tables do, whatever sets it apart.
    other = write_run(tmp_path / "z", make_step_rows([1.0]), seed=0, a=2)
    (folder / "config.json").unlink()
    runs = read_runs([same[0], other])
    assert [series.name for series in group_runs(runs)] == [run.name for run in runs] == ["x", "z"]
    deep = [write_run(tmp_path / place / "run", make_step_rows([1.0])) for place in ("one", "two")]
    assert [run.name for run in read_runs(deep)] == ["one/run", "two/run"]


def solve_wilson(p, n):
    """Return the shares that are 1.96 standard errors away from p."""
    z = NormalDist().inv_cdf(0.975)
    a, b, c = 1 + z * z / n, -(2 * p + z * z / n), p * p
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize("accuracy", [0.0, 0.25, 1.0])
def test_series_accuracy_has_wilson_interval(tmp_path, accuracy):
    """The interval is over the questions with a scored response."""
    row = {
        "phase": "eval",
        "step": 0,
        "accuracy": accuracy,
        "accuracy_stderr": 0.1,
        "n_examples": 200.0,
        "unscored": 0.5,
    }
    (run,) = read_runs([write_run(tmp_path, [row])])
    assert run.accuracies[0].value == accuracy
    assert (run.accuracies[0].low, run.accuracies[0].high) == pytest.approx(solve_wilson(accuracy, 100), abs=1e-12)
    (line,) = make_panels(group_runs([run]))[0].lines
    assert (line.points[0].low, line.points[0].high) == run.accuracies[0][1:]
    (run,) = read_runs([write_run(tmp_path, [row | {"accuracy": accuracy - 2}])])
    assert run.accuracies[0] == (accuracy - 2, accuracy - 2 - 0.196, accuracy - 2 + 0.196)
    (run,) = read_runs([write_run(tmp_path, [{"phase": "eval", "step": 0, "accuracy": accuracy}])])
    assert run.accuracies[0] == (accuracy, None, None)


def test_panels_of_several_held_out_sets(tmp_path):
    """Intervals that were logged are drawn; otherwise an accuracy has that of one response per question."""
    first = {"accuracy": 0.5, "n_examples": 100.0, "pass_at_2": 0.7, "pass_at_10": 0.9, "maj_at_2": 0.5}
    first |= {"pass_at_10_low": 0.8, "pass_at_10_high": 0.95, "format_reward": 1.0}
    second = {"accuracy": 0.25, "n_examples": 300.0, "unscored": 0.5, "pass_at_10": 0.3, "accuracy_stderr": 0.1}
    row = {"phase": "eval", "step": 0, **first, **{f"gsm/{key}": value for key, value in second.items()}}
    (run,) = read_runs([write_run(tmp_path, [row])])
    accuracy, several = make_panels(group_runs([run]))
    assert (accuracy.title, several.title) == ("Held-out accuracy", "Held-out, several responses")
    assert accuracy.quantities == ["accuracy", "accuracy, gsm", "format"]
    assert several.quantities == ["pass@10", "maj@2", "pass@10, gsm"]
    drawn = {
        name: line.points[0][2:5]
        for panel in (accuracy, several)
        for name, line in zip(panel.quantities, panel.lines, strict=True)
    }
    assert drawn["accuracy"] == pytest.approx((0.5, *solve_wilson(0.5, 100)), abs=1e-12)
    assert drawn["accuracy, gsm"] == pytest.approx((0.25, *solve_wilson(0.25, 150)), abs=1e-12)
    assert drawn["pass@10"] == (0.9, 0.8, 0.95)
    assert drawn["pass@10, gsm"] == (0.3, None, None)
    row |= {"accuracy_low": 0.45, "accuracy_high": 0.55}
    (run,) = read_runs([write_run(tmp_path, [row])])
    assert run.accuracies[0] == (0.5, 0.45, 0.55)
    clipped = {"clip_fraction": 0.1, "clip_fraction_low": 0.04, "clip_fraction_high": 0.06}  # by bound, no interval
    (run,) = read_runs([write_run(tmp_path, [{"phase": "train", "step": 1, **clipped}])])
    assert run.estimates("train/clip_fraction")[1] == (0.1, None, None)


def test_panels_include_named_reward_parts(tmp_path):
    rows = make_step_rows([0.5, 1.0], part_right=0.5, part_brief=0.25)
    rows[1] |= {"part_b": 0.0, "part_c": 0.0, "part_d": 1.0}
    page = parse_page(write_run(tmp_path, rows))
    titles = list(get_panels(page))
    assert titles[:2] == ["Reward", "Parts of the reward"]
    panel = get_panels(page)["Parts of the reward"]
    assert panel["quantities"] == ["b", "brief", "c", "d", "right"]
    assert [point[2] for point in panel["lines"][-1]["points"]] == [0.5, 0.5]
    write_report([tmp_path], tmp_path / "out", "more quantities than dashes")


def test_panel_single_quantity_is_labeled(tmp_path):
    page = parse_page(write_run(tmp_path, make_step_rows([0.5], sampler_log_prob_diff=0.1, grad_norm=1.0)))
    units = {title: panel["unit"] for title, panel in get_panels(page).items()}
    assert units["Distance"] == "to the sampler, nats per token"
    assert units["Gradient norm"] == "before clipping"


def test_panel_of_the_learning_rate_is_drawn_if_it_changes(tmp_path):
    """A constant one is a setting; of two runs, both are drawn if one changes it."""
    constant, falling = (
        write_run(tmp_path / name, make_step_rows(rates, "learning_rate"), a=name)
        for name, rates in (("constant", [1e-5, 1e-5]), ("falling", [1e-5, 5e-6]))
    )
    assert "Learning rate" not in get_panels(parse_page(constant))
    panel = get_panels(parse_page(constant, falling))["Learning rate"]
    assert [[point[2] for point in line["points"]] for line in panel["lines"]] == [[1e-5, 1e-5], [1e-5, 5e-6]]


def test_page_table_has_first_last_and_best_accuracy(tmp_path):
    values = {0: 0.1, 5: 0.8, 10: 0.8, 15: 0.6}
    rows = [{"phase": "eval", "step": step, "accuracy": value, "n_examples": 50} for step, value in values.items()]
    (run,) = read_runs([write_run(tmp_path, rows)])
    found = {which: accuracy_at(run, which) for which in ("before", "last", "best")}
    assert {which: (step, estimate.value) for which, (step, estimate) in found.items()} == {
        "before": (0, 0.1),
        "last": (15, 0.6),
        "best": (5, 0.8),
    }
    (run,) = read_runs([write_run(tmp_path, rows[:1])])
    assert accuracy_at(run, "last") is None
    low, high = solve_wilson(0.1, 50)
    assert f"0.100 {low:.3f} to {high:.3f}" in parse_page(tmp_path).text


def test_times_count_waiting_only(tmp_path):
    """Sampling in the background costs only the wait for it; a checkpoint is written after its step."""
    times = {"time_rollout_s": 10.0, "time_reward_s": 1.0, "time_update_s": 5.0, "time_wait_s": 2.0}
    rows = [{"phase": "eval", "step": 0, "accuracy": 0.5, "time_evaluate_s": 3.0}]
    rows += [{"phase": "train", "step": step, "reward": 0.0, **times} for step in (1, 2)]
    rows += [{"phase": "save", "step": 1, "time_save_s": 100.0}]
    (run,) = read_runs([write_run(tmp_path, rows, async_steps=1)])
    assert run.clock == {0: 3.0, 1: 3 + 18.0, 2: 3 + 18 + 100 + 7.0}
    assert run.wall_clock == 128.0
    (run,) = read_runs([write_run(tmp_path, rows, async_steps=0)])
    assert run.clock[2] == 3 + 18 + 100 + 18.0
    assert make_times(group_runs([run])).by_phase["update"] == [0.0, 5.0, 5.0]
    runs = read_runs([write_run(tmp_path / name, rows, rate=name) for name in "ab"])
    times = make_times(group_runs(runs))
    assert times.labels == ["a", "b"]
    assert (times.by_phase["rollout"], times.by_phase["save"]) == ([10.0, 10.0], [50.0, 50.0])
    assert "0:02:08" not in parse_page(tmp_path).text
    assert "2:19" in parse_page(tmp_path).text


def test_page_merges_anomalies_of_adjacent_steps(tmp_path):
    found = [
        ("spike", 2, "high"),
        ("none", 3, "no gradient"),
        ("none", 4, "again"),
        ("none", 5, "again"),
        ("none", 8, "later"),
    ]
    rows = make_step_rows([0.0] * 9) + [
        {"phase": "anomaly", "step": s, "kind": k, "value": 1, "limit": 0, "text": t} for k, s, t in found
    ]
    rows.append({"phase": "anomaly", "step": 9, "kind": "old", "value": None, "limit": 2})
    page = parse_page(write_run(tmp_path, rows))
    marks = [(mark["first"], mark["last"], mark["text"], mark["seconds"]) for mark in page.data["anomalies"]]
    assert marks == [
        (2, 2, "high", [4.0, 4.0]),
        (3, 5, "no gradient", [6.0, 10.0]),
        (8, 8, "later", [16.0, 16.0]),
        (9, 9, "old: None, the limit is 2", [18.0, 18.0]),
    ]
    assert "steps 3 to 5: no gradient" in page.text


def test_page_incomplete_run_renders(tmp_path):
    """No log yet, no settings, half a line, values that are not numbers, and a run that continues."""
    empty = write_run(tmp_path / "empty")
    (empty / "config.json").unlink()
    page = parse_page(empty)
    assert page.data["panels"] == page.data["responses"] == []
    assert page.data["times"] is None
    for message in ("One run", "Nothing has been logged yet.", "No config.json was found"):
        assert message in page.text
    assert "No responses were logged" in page.text
    odd = [None, [], 3, {"step": "1"}, {"step": True}, {"phase": "train"}, {"phase": ["train"], "step": 1}]
    rows = [*odd, *make_step_rows([0.1, None, "0.3", True, float("nan"), 0.6])]
    responses = [
        *odd,
        {"step": 1, "tokens": [1]},
        {"step": 2, "tokens": ["a"], "log_probs": [1, 2], "entropy": "x", "reward": "1"},
    ]
    going = write_run(tmp_path / "going", rows, responses, planned=9)
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "step": 7, "rew')
    with (going / "completions.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"step"')
    page = parse_page(going, empty)
    assert [point[::2] for point in get_panels(page)["Reward"]["lines"][0]["points"]] == [
        [1, 0.1, None],
        [6, 0.6, None],
    ]
    assert "6 of 9" in page.text
    assert [row.keys() & {"tokens", "log_probs", "entropy"} for row in page.data["responses"]] == [
        set(),
        set(),
        {"tokens"},
    ]
    assert page.data["responses"][2]["reward"] is None
    alone = write_run(tmp_path / "alone", [{"phase": "eval", "step": 0, "accuracy": 0.5}])
    assert list(get_panels(parse_page(alone))) == ["Held-out accuracy"]
    write_report([empty], tmp_path / "out", "Nothing yet")


def test_page_long_run_is_downsampled_and_labeled(tmp_path, monkeypatch):
    monkeypatch.setattr("drivers.reports.page.MAX_CHARACTERS", 30_000)
    rows = make_step_rows([step / 1000 for step in range(1000)])
    responses = [{"step": step, "response": "x" * 400, "question": f"{step}"} for step in range(100) for _ in range(2)]
    page = parse_page(write_run(tmp_path, rows, responses))
    found = [point[0] for point in get_panels(page)["Reward"]["lines"][0]["points"]]
    assert len(found) <= MAX_POINTS_PER_LINE + 1
    assert (found[0], found[-1]) == (1, 1000)
    assert {b - a for a, b in pairwise(found[:-1])} == {3}
    assert "Of 1000 steps, at most 400 evenly spaced ones and the last are drawn." in page.text
    shown_steps = [row["step"] for row in page.data["responses"]]
    assert shown_steps[-2:] == [99, 99]
    assert all(shown_steps.count(step) == 2 for step in shown_steps)
    assert 20_000 < len(json.dumps(page.data["responses"])) < 40_000
    assert f"{len(shown_steps)} of the 200" in page.text
    assert downsample([], 3) == []
    assert downsample(range(5), 5) == [0, 1, 2, 3, 4]
    assert downsample(range(5), 2) == [0, 3, 4]
    assert steps_within([{"step": 7, "response": "long" * 99}], 10) == {7}


def test_report_invalid_folder_exits_with_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", make_step_rows([1.0]))
    for arguments, message in (
        ([str(tmp_path)], "not the folder of a run; name a folder that contains metrics.jsonl"),
        ([], "no run folders given. Example: report.py runs/NAME"),
        ([str(run), str(tmp_path / "other")], "--output: a folder is required"),
        ([str(run), "--output", str(run / "config.json")], "cannot be written to"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(UsageError, match="not the folder of a run"):
        read_runs([tmp_path / "nowhere"])


def test_report_single_run_is_written_to_its_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("drivers.reports.page.draw", lambda *_, **__: None)  # drawn in another test
    run = write_run(tmp_path / "run", make_step_rows([1.0]))
    main([str(run)])
    assert capsys.readouterr().out == f"Written to {run}/report.html\n"
    assert "<title>run</title>" in (run / "report.html").read_text()
    main([str(run), "--output", str(tmp_path / "elsewhere"), "--title", "Mine & yours"])
    assert "<title>Mine &amp; yours</title>" in (tmp_path / "elsewhere/report.html").read_text()
    assert not list(tmp_path.rglob(".unfinished*"))


def test_report_damaged_lines_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("drivers.reports.page.draw", lambda *_, **__: None)  # drawn in another test
    run = write_run(tmp_path / "run", make_step_rows([1.0, 0.5]))
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"phase": "train"\n[1]\n\n{"phase": "train", "reward": 1}\n{"phase": "train", "st')
    main([str(run)])
    assert capsys.readouterr().err == f"warning: {run}/metrics.jsonl: the report leaves out 3 damaged lines\n"


MACHADO = {  # Machado, Oliveira and Fernandes 2009, severity 1; rows of a matrix on linear RGB
    "any": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def linearize(color):
    parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def compute_luminance(rgb):
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), rgb, strict=True))


def to_lab(rgb):
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    xyz = [sum(m * c for m, c in zip(row, rgb, strict=True)) / w for row, w in zip(to_xyz, white, strict=True)]
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize(("palette", "page"), [(PALETTE, "#ffffff"), (DARK_PALETTE, "#16181d")], ids=["light", "dark"])
def test_palette_is_distinguishable_with_color_blindness(palette, page):
    assert f"--page: {page};" in (ROOT / "drivers/reports/page.css").read_text()
    for kind, matrix in MACHADO.items():
        seen = [
            to_lab(
                [min(1.0, max(0.0, sum(m * c for m, c in zip(row, linearize(color), strict=True)))) for row in matrix]
            )
            for color in palette
        ]
        assert min(math.dist(a, b) for k, a in enumerate(seen) for b in seen[:k]) > 20, kind
    for color in palette:
        low, high = sorted(compute_luminance(linearize(shown)) for shown in (color, page))
        assert (high + 0.05) / (low + 0.05) > 3
