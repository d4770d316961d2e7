"""Pass rates: counted from evaluation rows, used as a filter, and the order of a curriculum."""

import json
import math
import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.common.errors import UsageError
from drivers.evaluation.policy import evaluate_policy
from drivers.pass_rates import main, measure_pass_rates
from drivers.settings.grpo import GrpoConfig
from drivers.settings.recipes import QUICKSTART
from drivers.settings.sampling import Sampling
from drivers.tasks.questions import Example, Question, easiest_first, load_examples
from drivers.training.components import Components
from drivers.training.rollouts import collect, curriculum_subset
from drivers.training.setup import setup_grpo_run
from tests.drivers.helpers.letters import letter_grader, make_run, make_tiny_config, make_tiny_parts


def row(question, reward, answer="1", **more):
    return {"question": question, "answer": answer, "reward": reward, **more}


def write_pass_rates(*rows):
    return measure_pass_rates((f"c:{number}", one) for number, one in enumerate(rows, start=1))


def read_pass_rates(*rows):
    return [(one["question"], one["pass_rate"], one["n_samples"]) for one in write_pass_rates(*rows)]


def test_pass_rate_counts_reward_one_of_scored():
    rows = [row("a", 1.0), row("b", 0.0), row("a", 0.5), row("b", None), row("c", None), row("a", 1.0), row("b", 1)]
    assert read_pass_rates(*rows) == [("a", 2 / 3, 3), ("b", 0.5, 2), ("c", None, 0)]


def test_pass_rate_prefers_answer_reward():
    rows = [row("a", 0.9, answer_reward=1.0), row("a", 1.0, answer_reward=0.0), row("a", 1.0, answer_reward=None)]
    assert read_pass_rates(*rows, row("a", None, answer_reward=1.0)) == [("a", 0.5, 2)]


def test_pass_rate_same_text_other_answer_is_other_question():
    rows = write_pass_rates(row("a", 1.0, ["1", "2"]), row("a", 0.0, "1"), row("a", 0.0, ["1", "2"]))
    assert [(one["answer"], one["pass_rate"]) for one in rows] == [(["1", "2"], 0.5), ("1", 0.0)]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.3, 1.0, None]))))
def test_pass_rate_equals_count(samples):
    found = {one["question"]: one for one in write_pass_rates(*(row(*sample) for sample in samples))}
    counted = Counter(samples)
    assert list(found) == list(dict.fromkeys(question for question, _ in samples))
    for question, one in found.items():
        scored = sum(counted[question, reward] for reward in (0.0, 0.3, 1.0))
        assert one["n_samples"] == scored
        if scored:
            assert one["pass_rate"] == float(Fraction(counted[question, 1.0], scored))
        else:
            assert one["pass_rate"] is None


def test_pass_rates_reads_evaluation_output():
    parts = make_tiny_parts()
    sampling = Sampling(n=3, max_tokens=4, stop=())
    _, rows = evaluate_policy(parts.engine, parts.questions, sampling, letter_grader, seed=1)
    found = write_pass_rates(*json.loads(json.dumps(rows)))
    assert [one["question"] for one in found] == [question.example.question for question in parts.questions]
    assert all(one["n_samples"] == 3 for one in found)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(path)


def test_pass_rates_filters_and_train_reads_file(tmp_path, capsys):
    first = write_lines(
        tmp_path / "a.jsonl", *(row(name, float(k < n)) for name, n in (("x", 0), ("y", 1)) for k in range(2))
    )
    second = write_lines(tmp_path / "b.jsonl", *(row("z", 1.0) for _ in range(4)), row("y", 1.0), row("w", None))
    output = tmp_path / "new" / "rated.jsonl"
    main([first, second, "--output", str(output)])
    shown = capsys.readouterr().out
    assert "4 questions, 10 responses: 1 never correct, 1 always, 1 between; 1 could not be scored" in shown
    examples = load_examples("-", str(output))
    assert [(example.question, example.pass_rate) for example in examples] == [("x", 0.0), ("y", 2 / 3), ("z", 1.0)]
    assert [example.question for example in easiest_first("-", examples)] == ["z", "y", "x"]
    main([first, second, "--output", str(output), "--min-pass-rate", "0.1", "--max-pass-rate", "0.9"])
    assert [example.question for example in load_examples("-", str(output))] == ["y"]
    main([first, second, "--output", str(output), "--min-pass-rate", "1"])  # bounds are inclusive
    assert [example.question for example in load_examples("-", str(output))] == ["z"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no input; pass a completions.jsonl"),
        (["{good}"], "and --output FILE"),
        (["nowhere.jsonl", "--output", "o"], "nowhere.jsonl: cannot be read"),
        (["{other}", "--output", "o"], "other.jsonl:1: no `reward`; expected a completions.jsonl"),
        (["{run}", "--output", "o"], "run.jsonl:1: this is a training run, whose model changes"),
        (
            ["{good}", "--output", "o", "--min-pass-rate", "0.9"],
            "--min-pass-rate 0.9 --max-pass-rate 1.0: exclude all 1 questions",
        ),
        (
            ["{good}", "--output", "o", "--min-pass-rate", "0.9", "--max-pass-rate", "0.1"],
            "the first at most the second",
        ),
        (["{good}", "--output", "o", "--max-pass-rate", "nan"], "both must be from 0"),
        (["{good}", "--output", "{good}/x/o"], "cannot write"),
    ],
)
def test_pass_rates_invalid_flags_exit_and_write_nothing(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "good": write_lines(tmp_path / "good.jsonl", row("a", 0.0)),
        "run": write_lines(tmp_path / "run.jsonl", row("a", 1.0, step=0)),
        "other": write_lines(tmp_path / "other.jsonl", {"question": "a", "answer": "1"}),
    }
    with pytest.raises(SystemExit) as ended:
        main([argument.format(**names) for argument in arguments])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.replace("│", " ").split())
    assert "Traceback" not in captured.err
    assert not (tmp_path / "o").exists()


# --- the curriculum --------------------------------------------------------------------------------------------------


def make_rated_questions(*pass_rates):
    return [Example(f"q{k}", "1", f"r:{k}", pass_rate=rate) for k, rate in enumerate(pass_rates)]


@pytest.mark.parametrize("bad", [None, True, "0.5", 1.5, -0.1, math.nan, [1]])
def test_curriculum_line_without_pass_rate_is_named(tmp_path, bad):
    lines = [{"question": "q", "answer": "1", "pass_rate": 0}, {"question": "q", "answer": "1", "pass_rate": bad}]
    examples = load_examples("--data-path", write_lines(tmp_path / "d.jsonl", *lines))  # unread so far
    assert [example.pass_rate for example in examples] == [0, None]
    with pytest.raises(UsageError, match=r"--curriculum-steps: .*d\.jsonl:2 has no `pass_rate`, a number from 0 to 1"):
        easiest_first("--curriculum-steps", examples)


@given(st.lists(st.floats(0, 1), max_size=30))
def test_curriculum_order_is_stable_easiest_first(pass_rates):
    ordered = easiest_first("-", make_rated_questions(*pass_rates))
    assert sorted(ordered, key=lambda example: example.source) == sorted(
        make_rated_questions(*pass_rates), key=lambda example: example.source
    )
    for one, next_one in pairwise(ordered):
        places = [int(example.source[2:]) for example in (one, next_one)]
        assert (-one.pass_rate, places[0]) < (-next_one.pass_rate, places[1])


def test_train_curriculum_sorts_questions(tmp_path, monkeypatch):
    path = write_lines(
        tmp_path / "d.jsonl", *({"question": f"q{k}", "answer": "1", "pass_rate": k / 9} for k in range(9))
    )
    monkeypatch.setattr(
        "drivers.training.setup.setup_run", lambda config, display, make_train_set: make_train_set.args[0]
    )

    def order(**settings):
        examples = setup_grpo_run(
            make_tiny_config(data_path=path, prompt_path=QUICKSTART["prompt_path"], **settings), None
        )
        return [int(example.question[1:]) for example in examples]

    assert order(curriculum_steps=3) == list(range(8, -1, -1))
    assert order() == list(range(9))
    with pytest.raises(UsageError, match=r"--curriculum-steps: .*train\.jsonl:1 has no `pass_rate`"):
        setup_grpo_run(make_tiny_config(data_path=QUICKSTART["data_path"], curriculum_steps=3), None)


@given(st.integers(2, 60), st.integers(1, 30))
def test_curriculum_subset_grows_to_all_questions(n_questions, steps):
    config = make_tiny_config(
        curriculum_steps=steps, rollout_batch_size=16, train_batch_size=16
    )  # two questions a step
    questions = list(range(n_questions))
    reached = [curriculum_subset(config, questions, step) for step in range(1, steps + 3)]
    assert all(list(pool) == questions[: len(pool)] for pool in reached)
    sizes = [len(pool) for pool in reached]
    assert sizes == sorted(sizes)
    assert all(size >= 2 for size in sizes)
    assert sizes[steps - 1 :] == [n_questions] * 3
    assert abs(sizes[0] - max(2, n_questions / steps)) < 1
    assert curriculum_subset(make_tiny_config(), questions, 1) is questions


@pytest.fixture
def ask(tmp_path):
    """Return a function that lists the questions of a step's rounds; no response earns a reward."""
    config = make_tiny_config(
        rollout_batch_size=16, train_batch_size=16, curriculum_steps=8, n_grpo_steps=8, max_refills=3
    )
    parts, asked = make_tiny_parts(), []
    questions = [Question(Example(f"q{k}", "a", f"q:{k}"), (5, 6 + k)) for k in range(24)]
    generate = parts.engine.generate

    def record(prompts, *arguments, **named):
        asked.append({prompt[1] - 6 for prompt in prompts})
        return generate(prompts, *arguments, **named)

    parts.engine.generate = record
    run = make_run(config, tmp_path, parts.tokenizer)

    def grade_wrong(texts, _):
        return letter_grader(["b"] * len(texts), ["a"] * len(texts))

    def ask(draw, step):
        asked.clear()
        components = Components(parts.policy, parts.engine, grade_wrong, questions, questions)
        collect(config, components, draw, run, step, run.timer)
        return list(asked)

    return ask


def test_curriculum_step_and_refills_stay_in_subset(ask):
    for step in (1, 4, 8):
        rounds = ask(random.Random(step), step)
        assert [len(one) for one in rounds] == [2] * 4
        assert set().union(*rounds) <= set(range(3 * step))
    assert any(number >= 12 for number in set().union(*rounds))


def test_curriculum_draw_depends_on_position_and_step_only(ask):
    """So a resumed run asks the same questions; tests/drivers/test_resume.py checks whole runs."""
    draw = random.Random(0)
    ask(draw, 1)
    stands = draw.getstate()
    expected = [ask(draw, step) for step in (2, 3)]
    again = random.Random(1)
    again.setstate(stands)
    assert [ask(again, step) for step in (2, 3)] == expected


def test_curriculum_steps_is_checked_and_warned(tmp_path):
    with pytest.raises(UsageError, match="--curriculum-steps -1: must be at least 0"):
        make_tiny_config(curriculum_steps=-1)
    assert any(
        "the hardest questions are never asked" in warning
        for warning in make_tiny_config(curriculum_steps=21).warnings
    )
    assert not make_tiny_config(curriculum_steps=20).warnings
    assert GrpoConfig(model_path="m").curriculum_steps == 0
