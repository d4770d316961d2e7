"""evaluate.py: several samples per question, categories, several data sets, and two models on the same questions."""

import json
import math
import random
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import chain, combinations
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drivers.common.display import Display
from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.engines.hf import HFEngine
from drivers.evaluate import main
from drivers.evaluation import standalone
from drivers.evaluation.comparison import Evaluation, read_earlier
from drivers.evaluation.outcomes import agresti_min_interval, category_of, compare, summarize, vote_of
from drivers.evaluation.policy import EVALUATION_SEED
from drivers.evaluation.standalone import load_sets
from drivers.grading.verdicts import make_inline_grader
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.evaluation import name_sets
from drivers.tasks.questions import Example, Question
from drivers.training.self_check import check_evaluation_engine
from grpo_core import r1_zero_reward_fn
from tests.drivers.helpers.letters import make_completion
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

RIGHT, WRONG, FORMLESS = "4 </think> <answer> 4 </answer>", "5 </think> <answer> 5 </answer>", "4"
SCORES = {RIGHT: (1.0, 1.0), WRONG: (1.0, 0.0), FORMLESS: (0.0, 0.0)}


def rows_of(*questions):
    """Return rows of responses, question after question, as evaluate.py writes them."""
    rows = []
    for number, responses in enumerate(questions):
        for response in responses:
            formatted, right = SCORES.get(response, (None, None))
            row = {"question_number": number, "question": str(number), "answer": "4", "response": response}
            row |= {"reward": right}
            if right is not None:
                row |= {"format_reward": formatted, "answer_reward": right}
            rows.append(row | {"category": category_of(row)})
    return rows


@given(st.lists(st.lists(st.sampled_from([RIGHT, WRONG, FORMLESS]), min_size=4, max_size=4), min_size=1, max_size=5))
def test_summarize_several_samples_equals_definitions(questions):
    values = summarize(rows_of(*questions), "r1_zero")
    is_right = [[response == RIGHT for response in responses] for responses in questions]
    assert values["avg_at_4"] == pytest.approx(fmean(fmean(row) for row in is_right))
    for k in (1, 2, 4):
        passed = [fmean(any(chosen) for chosen in combinations(row, k)) for row in is_right]
        assert values[f"pass_at_{k}"] == pytest.approx(fmean(passed))
        assert 0 <= values[f"pass_at_{k}_low"] <= values[f"pass_at_{k}"] <= values[f"pass_at_{k}_high"] <= 1
    for k in (2, 4):
        won = []
        for responses in questions:
            for start in range(0, 4, k):
                votes = [response for response in responses[start : start + k] if response != FORMLESS]
                n_right, n_wrong = votes.count(RIGHT), votes.count(WRONG)
                won.append(0.5 if n_right == n_wrong != 0 else float(n_right > n_wrong))
        assert values[f"maj_at_{k}"] == pytest.approx(fmean(won))
    every = [response for responses in questions for response in responses]
    assert values["category_both"] == every.count(RIGHT) / len(every)
    assert values["category_format_only"] == every.count(WRONG) / len(every)
    assert values["category_neither"] == every.count(FORMLESS) / len(every)


def test_summarize_unscored_is_excluded():
    values = summarize(rows_of([RIGHT, "unscored"], ["unscored", "unscored"]), "r1_zero")
    assert (values["category_both"], values["avg_at_2"], values["pass_at_1"]) == (1.0, 1.0, 1.0)
    assert "pass_at_2" not in values  # no question has two scored samples
    assert values["maj_at_2"] == 0.5
    assert summarize(rows_of(["unscored"]), "r1_zero") == {}


def test_summarize_custom_reward_has_no_votes_or_categories():
    rows = [{"question_number": 0, "question": "q", "answer": "a", "response": "x", "reward": 0.3}] * 2
    values = summarize(rows, "mine.py:reward")
    assert values["avg_at_2"] == pytest.approx(0.3)
    assert not any(name.startswith(("maj", "category")) for name in values)
    # A reward outside [0, 1] is not a rate.
    assert summarize([rows[0] | {"reward": 3.0}] * 2, "mine.py:reward") == {}


@pytest.mark.parametrize(
    ("answers", "share"),
    [(("0.5", "1/2", "7", "7"), 0.5), (("0.5", "0.50", "1/2", "7"), 1.0), (("0.5", "7", "7", r"\frac12"), 0.5)],
)
def test_summarize_votes_merge_spellings_of_right_answer(answers, share):
    responses = [f" </think> <answer> {answer} </answer>" for answer in answers]
    rows = [
        {"question_number": 0, "response": one, "reward": right, "format_reward": 1.0, "answer_reward": right}
        for one in responses
        for right in [r1_zero_reward_fn(one, "0.5")["answer_reward"]]
    ]
    assert summarize(rows, "r1_zero")["maj_at_4"] == share


def test_summarize_any_sample_count_has_pass_at_all():
    values = summarize(rows_of([RIGHT] * 2 + [WRONG] * 8), "r1_zero")
    assert [name for name in values if re.fullmatch(r"pass_at_\d+", name)] == [
        f"pass_at_{k}" for k in (1, 2, 4, 8, 10)
    ]
    assert values["pass_at_10"] == 1.0
    assert values["maj_at_10"] == 0.0
    assert values["accuracy"] == values["avg_at_10"] == 0.2
    assert values["accuracy_low"] == values["avg_at_10_low"] < 0.2 < values["accuracy_high"]


@pytest.mark.parametrize(
    ("response", "reward", "vote"),
    [
        (r" </think> <answer> \boxed{4} </answer>", "r1_zero", "4"),
        (" </think> <answer> 4. </answer> more", "r1_zero", "4"),
        (" </think> <answer> 4", "r1_zero", None),
        (" </think> <answer>  </answer>", "r1_zero", None),
        ("<answer> 4 </answer>", "r1_zero", None),
        (" </think> <answer> 4 </answer> <answer> 5 </answer>", "r1_zero", None),
        (r"\boxed{3} or \boxed{4}", "question_only", "4"),
        ("4", "question_only", None),
        ("4", "mine.py:reward", None),
    ],
)
def test_majority_vote_cases(response, reward, vote):
    assert vote_of(response, reward) == vote


def test_majority_vote_merges_equal_answers():
    spelled = [" </think> <answer> 0.50 </answer>", r" </think> <answer> $0.50$ </answer>"]
    assert len({vote_of(one, "r1_zero") for one in spelled}) == 1


def test_compare_pairs_by_question():
    ours, theirs = rows_of([RIGHT] * 2, [RIGHT, WRONG], [WRONG] * 2), rows_of([WRONG] * 2, [WRONG, RIGHT], [WRONG] * 2)
    found = compare(ours, theirs)
    assert found["difference"] == pytest.approx(1 / 3)
    assert (found["better_on"], found["worse_on"], found["n_compared"]) == (1, 0, 3)
    assert found["p_value"] == 1.0  # one coin toss
    back = compare(theirs, ours)
    assert back["difference"] == -found["difference"]
    assert back["difference_low"] == pytest.approx(-found["difference_high"])
    left_out = compare(rows_of([RIGHT], ["unscored"]), rows_of([WRONG], [WRONG]))
    assert left_out["n_compared"] == 1
    assert compare(rows_of(["unscored"]), rows_of([RIGHT])) == {"n_compared": 0.0}


def test_compare_question_with_an_unscored_response_is_excluded():
    """The mean over its other responses would compare different numbers of them."""
    ours, theirs = rows_of([RIGHT, "?"], [RIGHT, RIGHT]), rows_of([RIGHT, RIGHT], [WRONG, RIGHT])
    for found, difference in ((compare(ours, theirs), 0.5), (compare(theirs, ours), -0.5)):
        assert (found["n_compared"], found["difference"]) == (1, difference)


def test_compare_real_difference_is_significant():
    draw = random.Random(0)
    better = rows_of(*[[RIGHT if draw.random() < 0.7 else WRONG] for _ in range(200)])
    worse = rows_of(*[[RIGHT if draw.random() < 0.4 else WRONG] for _ in range(200)])
    found = compare(better, worse)
    assert found["p_value"] < 1e-4
    assert 0 < found["difference_low"] < 0.3 < found["difference_high"]


@pytest.mark.parametrize(("wins", "ties"), [(1, 0), (5, 0), (0, 3), (20, 0), (2, 100)])
def test_compare_interval_has_width(wins, ties):
    questions = [([RIGHT], [WRONG])] * wins + [([WRONG], [WRONG])] * ties
    found = compare(rows_of(*(ours for ours, _ in questions)), rows_of(*(theirs for _, theirs in questions)))
    low, high = found["difference_low"], found["difference_high"]
    assert -1 <= low < high <= 1
    assert low <= found["difference"] <= high
    assert (low, high) == agresti_min_interval([1.0] * wins + [0.0] * ties)
    assert found["p_value"] == pytest.approx(min(1.0, 2 * 0.5**wins))


def test_compare_interval_and_test_are_separate():
    """Five wins out of five: the exact test is not significant at 5 %, and the approximate interval excludes 0."""
    found = compare(rows_of(*[[RIGHT]] * 5), rows_of(*[[WRONG]] * 5))
    assert found["p_value"] == 0.0625
    assert found["difference_low"] == pytest.approx(
        5 / 7 - 1.959964 * math.sqrt(6 / 7 - 25 / 49) / math.sqrt(7), abs=1e-6
    )
    assert found["difference_high"] == 1.0


@given(st.lists(st.sampled_from([(RIGHT, RIGHT), (RIGHT, WRONG), (WRONG, RIGHT), (WRONG, WRONG)]), min_size=1))
def test_compare_interval_equals_agresti_min(pairs):
    """The interval follows from the four counts with half a question added to each."""
    found = compare(rows_of(*([one] for one, _ in pairs)), rows_of(*([other] for _, other in pairs)))
    n = len(pairs) + 2
    better, worse = (pairs.count(kind) + 0.5 for kind in ((RIGHT, WRONG), (WRONG, RIGHT)))
    half = 1.959964 * math.sqrt((better + worse) - (better - worse) ** 2 / n) / n
    assert found["difference_low"] == pytest.approx(max(-1, (better - worse) / n - half), abs=1e-6)
    assert found["difference_high"] == pytest.approx(min(1, (better - worse) / n + half), abs=1e-6)
    assert found["difference_low"] <= found["difference"] <= found["difference_high"]


def test_compare_fractional_rewards_have_no_exact_test():
    rows = [
        {"question_number": 0, "question": "q", "answer": "a", "response": "x", "reward": value} for value in (0.3, 1)
    ]
    assert "p_value" not in compare(rows[:1], rows[1:])


def test_compare_rewards_beyond_one_interval_holds_difference():
    ours, theirs = (
        [{"question_number": k, "reward": reward, "answer_reward": reward} for k, reward in enumerate(rewards)]
        for rewards in ([7.0, 9.0, 8.0, 9.0], [5.0, 5.0, 6.0, 5.0])
    )
    found = compare(ours, theirs)
    assert found["difference"] == 3.0
    assert found["difference_low"] == pytest.approx(3 - 1.959964 * math.sqrt(4 / 3) / 2, abs=1e-5)
    assert found["difference_high"] == pytest.approx(3 + 1.959964 * math.sqrt(4 / 3) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sampling_min_tokens": 40, "sampling_max_tokens": 32},
            "--sampling-min-tokens 40: must not exceed --sampling-max-tokens 32",
        ),
        ({"sampling_temperature": 0.0, "n_samples": 8}, "--n-samples 8: greedy responses are all the same"),
    ],
)
def test_evaluate_config_invalid_sampling_raises_usage_error(settings, message):
    with pytest.raises(UsageError, match=message):
        EvaluateConfig(**settings)


def test_results_keys_are_documented():
    page = (Path(__file__).resolve().parents[2] / "docs/evaluation.md").read_text()
    documented = {
        name for row in re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    rows = rows_of([RIGHT] * 4, [WRONG] * 4)
    found = summarize(rows, "r1_zero") | compare(rows, rows)
    plain = {re.sub("^avg_at_4$", "avg_at_n", re.sub("_(low|high)$", "", name)) for name in found} - {"accuracy"}
    assert plain == documented


# --- the program -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_flags(tmp_path):
    save_tiny(tmp_path / "tiny")
    for name in ("a", "b"):
        lines = [json.dumps({"question": f"{name} {k}?", "answer": str(k)}) for k in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return [
        *("--model-path", str(tmp_path / "tiny"), "--data-path", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")),
        *("--engine", "hf", "--dtype", "float32", "--sampling-max-tokens", "4", "--n-samples", "2"),
        *("--prompt-path", "data/prompts/question_only.prompt", "--reward", "question_only"),
    ]


@pytest.mark.slow
def test_evaluate_several_sets_compares_to_earlier(tmp_path, tiny_flags, capsys):
    main([*tiny_flags, "--output-dir", str(tmp_path / "first")])
    first = json.loads((tmp_path / "first/results.json").read_text())
    assert list(first["results"]) == ["a", "b"]
    assert first["comparison"] == {}
    rows = [json.loads(line) for line in (tmp_path / "first/completions.jsonl").read_text().splitlines()]
    assert [row["dataset"] for row in rows] == ["a"] * 6 + ["b"] * 6
    assert [row["question_number"] for row in rows] == [0, 0, 1, 1, 2, 2] * 2
    assert first["results"]["a"]["category_neither"] == 1.0  # a tiny policy is never right
    shown = capsys.readouterr().out
    assert "a: 3 questions, 2 responses to each" in shown
    assert "neither: a 0?" in shown
    # Again, compared with the first evaluation and with the model itself: nothing differs.
    main([*tiny_flags, "--output-dir", str(tmp_path / "second"), "--compare-to", str(tmp_path / "first")])
    main([*tiny_flags, "--output-dir", str(tmp_path / "third"), "--compare-to", str(tmp_path / "tiny")])
    for name in ("second", "third"):
        compared = json.loads((tmp_path / name / "results.json").read_text())["comparison"]
        assert {key: (one["difference"], one["p_value"]) for key, one in compared.items()} == {
            "a": (0, 1),
            "b": (0, 1),
        }
        written = json.loads((tmp_path / name / "results.json").read_text())
        assert written["compared"] == first["results"] == written["results"]
    same = (tmp_path / "third/completions_compared.jsonl").read_text()
    assert same == (tmp_path / "first/completions.jsonl").read_text()
    assert "accuracy 0: +0.0000" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_other_grading_is_not_compared(tmp_path, tiny_flags, capsys):
    main([*tiny_flags, "--output-dir", str(tmp_path / "first")])

    def compare_to(folder, *changed):
        main([*tiny_flags, *changed, "--compare-to", str(folder), "--output-dir", str(tmp_path / "next")])

    for folder, changed, message in (
        ("first", ["--reward", "r1_zero"], "was graded with --reward question_only instead of r1_zero"),
        ("run", [], "is the folder of a run; give a model, such as"),
        ("damaged", [], "results.json cannot be read"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / "run/metrics.jsonl").touch() if folder == "run" else None
        (tmp_path / "damaged/results.json").write_text("[]") if folder == "damaged" else None
        with pytest.raises(SystemExit) as ended:
            compare_to(tmp_path / folder, *changed)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    compare_to(tmp_path / "first", "--sampling-temperature", "0.5", "--sampling-top-p", "0.5")
    output = capsys.readouterr().err
    assert "was sampled with --sampling-temperature 1.0 (here 0.5), --sampling-top-p 1.0 (here 0.5)" in output


@pytest.mark.slow
def test_evaluate_other_questions_are_not_compared(tmp_path, tiny_flags, capsys):
    main([*tiny_flags, "--output-dir", str(tmp_path / "first")])
    for changed in (["--n-examples", "2"], ["--n-samples", "3"]):
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    *tiny_flags,
                    *changed,
                    "--compare-to",
                    str(tmp_path / "first"),
                    "--output-dir",
                    str(tmp_path / "none"),
                ]
            )
        assert ended.value.code == 2
        assert "evaluate both with the same" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


def test_evaluate_equal_file_names_get_distinct_labels(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text('{"question": "q", "answer": "1"}')
    paths = tuple(str(tmp_path / folder / "test.jsonl") for folder in ("x", "y"))
    assert list(load_sets(EvaluateConfig(data_path=paths))) == list(paths)
    assert list(load_sets(EvaluateConfig(data_path=(f"mine={paths[0]}", paths[1])))) == ["mine", "test"]
    with pytest.raises(
        UsageError, match=r"test.jsonl is given twice; give each file once, or a name of its own: NAME="
    ):
        EvaluateConfig(data_path=(paths[0], paths[0]))


def test_name_sets_reads_names_and_paths():
    assert name_sets("--data-path", ["a=x/b.jsonl", "c.jsonl", "./d=e.jsonl", "f-1=g=h.jsonl"]) == {
        "a": "x/b.jsonl",
        "c": "c.jsonl",
        "d=e": "./d=e.jsonl",
        "f-1": "g=h.jsonl",
    }
    assert list(name_sets("--data-path", ["x/a.jsonl", "a=b.jsonl"])) == ["x/a.jsonl", "a"]
    for entries, twice in ((["a=b", "a=c"], "a"), (["a/b", "c/b", "a/b"], "a/b")):
        with pytest.raises(UsageError, match=f": {twice} is given twice"):
            name_sets("--data-path", entries)


def write_evaluation(folder, config, rows):
    """Write the files of an evaluation as far as a later one reads them."""
    folder.mkdir(exist_ok=True)
    written = {"results": {"sums": {"accuracy": 0.5}}, "config": asdict(config)}
    (folder / "results.json").write_text(json.dumps(written))
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_read_earlier_returns_rows_of_the_same_questions_only(tmp_path, capsys):
    """Another reward or other questions raise a UsageError; other sampling is named in a warning."""
    before = EvaluateConfig(reward="question_only", sampling_temperature=0.5)
    rows = [{"dataset": name, "question": "1 + 1", "answer": "2", "reward": 1.0} for name in ("other", "sums")]
    folder = write_evaluation(tmp_path / "earlier", before, rows)
    now = replace(before, compare_to=str(folder))
    sets = {"sums": [Example("1 + 1", "2", "sums:1")]}
    found = read_earlier(now, sets)
    assert found is not None
    assert (found.values, found.rows) == ({"sums": {"accuracy": 0.5}}, {"sums": [rows[1]]})
    assert capsys.readouterr().err == ""
    assert read_earlier(replace(now, sampling_temperature=1.0), sets) is not None
    assert "was sampled with --sampling-temperature 0.5 (here 1.0)" in capsys.readouterr().err
    with pytest.raises(UsageError, match="graded with --reward question_only instead of r1_zero"):
        read_earlier(replace(now, reward="r1_zero"), sets)
    for example in (Example("1 + 2", "2", "sums:1"), Example("1 + 1", "3", "sums:1")):
        with pytest.raises(UsageError, match="its responses are not 1 to each of the 1 questions of sums"):
            read_earlier(now, {"sums": [example]})
    with pytest.raises(UsageError, match="its responses are not 2 to each"):
        read_earlier(replace(now, n_samples=2), sets)
    assert read_earlier(replace(now, compare_to=str(tmp_path)), sets) is None


class CountingEngine:
    """An engine whose responses are numbered, and that records prompts and seeds."""

    def __init__(self):
        self.calls = []

    def load_weights(self, version):
        self.calls.append(version)

    def generate(self, prompts, sampling, *, seed):
        self.calls.append(([*prompts], seed))
        n_responses = len(prompts) * sampling.n
        return [make_completion(prompts[k // sampling.n], [3], text=str(k)) for k in range(n_responses)]

    def close(self):
        self.calls.append("closed")


def test_sample_and_grade_numbers_questions_and_asks_every_set(monkeypatch, capsys):
    engine, sets = CountingEngine(), {}
    for name, numbers in (("sums", (1, 2)), ("products", (3,))):
        sets[name] = [Question(Example(f"{name} {n}", "1", f"{name}:{n}"), (n, n)) for n in numbers]
    monkeypatch.setattr(standalone, "load_policy", lambda *_, attention: make_tiny_policy())
    monkeypatch.setattr(standalone, "make_engine", lambda *_: engine)
    grade = make_inline_grader(lambda response, ground_truth: float(response == ground_truth))
    config = EvaluateConfig(n_samples=2, seed=7, dtype="float32")
    inputs = standalone.ModelInputs("model", None, sets)

    def check(config, engine, policy, prompts):
        engine.calls.append(("checked", prompts))

    found = standalone.sample_and_grade(config, inputs, torch.device("cpu"), grade, check, Display())
    checked = ("checked", [(1, 1), (2, 2), (3, 3)])
    seed = EVALUATION_SEED + 7  # that of a run's evaluations, moved by --seed
    assert engine.calls == [0, checked, ([(1, 1), (2, 2)], seed), ([(3, 3)], seed), "closed"]
    numbered = [(row["dataset"], row["question_number"], row["reward"]) for row in chain(*found.rows.values())]
    assert numbered == [
        *(("sums", k // 2, float(k == 1)) for k in range(4)),
        *(("products", 0, r) for r in (0.0, 1.0)),
    ]
    assert {name: values["accuracy"] for name, values in found.values.items()} == {"sums": 0.25, "products": 0.5}
    assert capsys.readouterr().out.splitlines() == [
        "Loading model ...",
        "Starting vLLM ...",
        "Asking sums: 2 questions, 2 responses to each ...",
        "Asking products: 1 question, 2 responses to each ...",
    ]


@pytest.mark.parametrize(
    "settings",
    [{}, {"sampling_temperature": 0.0}, {"sampling_top_p": 0.1}, {"sampling_min_tokens": 8}, {"n_samples": 3}],
    ids=["default", "greedy", "top-p", "minimum", "samples"],
)
def test_check_evaluation_engine_compares_any_sampling(settings, capsys):
    """The check has a sampling of its own, in which the log-probs of a right engine are the model's."""
    config = EvaluateConfig(sampling_max_tokens=8, dtype="float32", **settings)
    policy, other = make_tiny_policy(1), make_tiny_policy(2)
    for engine_policy, is_right in ((policy, True), (other, False)):
        engine = HFEngine(engine_policy, make_tiny_tokenizer())
        engine.load_weights(0)
        if is_right:
            check_evaluation_engine(config, engine, policy, [(5, 6), (7, 8, 9)])
            assert "self-check: mean |difference|" in capsys.readouterr().out
            continue
        with pytest.raises(TrainingAbortedError, match="disagree on the log-probs"):
            check_evaluation_engine(config, engine, policy, [(5, 6), (7, 8, 9)])
        check_evaluation_engine(replace(config, self_check_tolerance=100.0), engine, policy, [(5, 6), (7, 8, 9)])


def test_evaluate_compares_the_model_with_the_other(tmp_path, monkeypatch):
    """The difference is that of the model minus that of the other one."""
    rows = {"ours": [], "theirs": []}
    for number, rewards in enumerate(((1.0, 0.0), (1.0, 1.0), (0.0, 0.0))):
        for path, reward in zip(rows, rewards, strict=True):
            question = {"question_number": number, "question": str(number), "answer": "1", "response": "1"}
            rows[path].append(question | {"reward": reward, "category": None})
    monkeypatch.setattr(standalone, "load_sets", lambda _: {"sums": [Example("1", "1", "sums:1")]})
    monkeypatch.setattr(standalone, "start_grading", lambda *_: nullcontext())
    monkeypatch.setattr(standalone, "tokenize_questions", lambda *a: standalone.ModelInputs(a[-1], None, {}))
    monkeypatch.setattr(standalone, "describe_environment", dict)
    monkeypatch.setattr(
        standalone,
        "sample_and_grade",
        lambda _, inputs, *__: Evaluation(
            {"sums": {"n_examples": 3.0, "accuracy": 0.0}}, {"sums": rows[inputs.model_path]}
        ),
    )
    config = EvaluateConfig(model_path="ours", compare_to="theirs", output_dir=str(tmp_path / "out"), device="cpu")
    folder = standalone.evaluate(config, lambda *_: None)
    written = json.loads((folder / "results.json").read_text())
    assert written["comparison"]["sums"]["difference"] == pytest.approx(1 / 3)
    assert (written["results"]["sums"]["accuracy"], written["compared"]["sums"]["accuracy"]) == pytest.approx(
        (2 / 3, 1 / 3)
    )
    for name, path in (("completions", "ours"), ("completions_compared", "theirs")):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["reward"] for line in lines] == [row["reward"] for row in rows[path]]
