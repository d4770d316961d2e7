"""Conversion of data sets: layouts, backups and bad lines."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from drivers.convert_dataset import convert_demonstration, convert_row, main
from drivers.tasks.demonstrations import load_demonstrations
from drivers.tasks.questions import load_examples
from grpo_core import question_only_reward_fn, r1_zero_reward_fn

ROWS = [
    # Hendrycks MATH: the last box counts, with nested braces
    ({"problem": "P", "solution": r"First \boxed{1}, so \boxed{\frac{1}{2}}.", "level": "1"}, "P", r"\frac{1}{2}"),
    # MATH with an extracted answer
    ({"problem": "P", "solution": "long", "answer": "3"}, "P", "3"),
    # GSM8K
    ({"question": "Q", "answer": "She has 3 + 4 = <<3+4=7>>7.\n#### 1,234"}, "Q", "1234"),
    ({"question": "Q", "answer": "#### (1,200)"}, "Q", "(1,200)"),
    ({"prompt": "Q", "response": "42"}, "Q", "42"),
    ({"prompt": "Q", "response": r"so \boxed{5}"}, "Q", "5"),
    ({"prompt": "Q", "ground_truth": 7, "response": "wrong: 8"}, "Q", 7),
    ({"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "target": "1"}, "Q", "1"),
    ({"question": "Q", "answer": ["1/2", "0.5"]}, "Q", ["1/2", "0.5"]),
    ({"question": "Q", "answer": 0}, "Q", 0),
    ({"question": "Q", "answer": "#### One\n\\boxed{7}\n#### Two\nAs was to be shown."}, "Q", "7"),
    # MATH also has boxes without braces
    ({"problem": "P", "solution": r"\boxed{1} or rather $\boxed 17$, as was to be shown."}, "P", "17"),
    ({"problem": "P", "solution": r"so it is $\boxed\frac12$"}, "P", r"\frac12"),
    ({"problem": "P", "solution": r"So it is \fbox{$17$} at last."}, "P", "$17$"),
    ({"problem": "P", "solution": r"\boxed{3} and not \fbox{4}"}, "P", "3"),
    ({"problem": "P", "expected_answer": "7", "solution": "long"}, "P", "7"),
    # verl's layout: a chat, and a nested answer
    ({"prompt": [{"role": "user", "content": "Q"}], "reward_model": {"style": "rule", "ground_truth": "7"}}, "Q", "7"),
]


@pytest.mark.parametrize(("row", "question", "answer"), ROWS)
def test_convert_known_layouts_are_recognized(row, question, answer):
    assert convert_row(row) == {"question": question, "answer": answer}


def test_convert_keys_can_be_named():
    assert convert_row({"q": "Q", "gold": "1", "answer": "2"}, "q", "gold") == {"question": "Q", "answer": "1"}


@pytest.mark.parametrize(
    ("question_key", "answer_key"), [("extra.ask", "turns.1.final.text"), ("a.b", "turns.1.final.text")]
)
def test_convert_named_keys_reach_nested_values(question_key, answer_key):
    row = {"extra": {"ask": "Q"}, "a.b": "Q", "a": {"b": "other"}, "turns": [{}, {"final": {"text": "5"}}]}
    assert convert_row(row, question_key, answer_key) == {"question": "Q", "answer": "5"}


@pytest.mark.parametrize(
    "key", ["extra.no", "extra.ask.no", "turns.1", "turns.x", "turns.-1", "no.ask", "extra.", "."]
)
def test_convert_missing_key_is_named(key):
    row = {"extra": {"ask": "Q"}, "turns": [{}], "answer": "1"}
    with pytest.raises(
        ValueError, match=re.escape(f"no question under {key}; keys here: ['answer', 'extra', 'turns']")
    ):
        convert_row(row, key)


def test_convert_lone_surrogate_is_a_bad_line(tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"question": "\\ud835", "answer": "1"}\n{"question": "Q", "answer": "1"}\n')
    with pytest.raises(SystemExit):
        main([str(source), "--output", str(target)])
    output = capsys.readouterr().err
    assert f"{source}:1: " in output
    assert "1 of 2 lines cannot be converted" in output
    assert [*tmp_path.iterdir()] == [source]
    main([str(source), "--output", str(target), "--skip-bad-lines"])
    assert len(target.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, "no question under"),
        ({"question": "Q"}, "no answer under"),
        ({"question": "Q", "answer": ""}, "no answer under"),
        ({"problem": "P", "solution": "no box here"}, "none in .*boxed"),
        ({"problem": "P", "solution": r"never closed \boxed{1"}, "none in .*boxed"),
        ({"problem": "P", "solution": r"an empty one \boxed{ }"}, "none in .*boxed"),
        ({"problem": "P", "solution": r"another command: $\boxedeq 1$"}, "none in .*boxed"),
        ({"question": "Q", "answer": "so\n#### "}, "the answer states no answer: none after ####"),
        ({"question": "Q", "answer": "  "}, "the answer states no answer"),
        ({"prompt": [{"role": "system", "content": "S"}], "response": "1"}, "no message of the role `user`"),
    ],
)
def test_convert_missing_field_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        convert_row(row)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def convert(capsys, *arguments):
    """Return exit status, stdout and stderr of the program."""
    try:
        main(arguments)
        status = 0
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_convert_in_place_keeps_backup(tmp_path, capsys):
    path = write_lines(tmp_path / "gsm.jsonl", {"question": "Q", "answer": "so\n#### 5"})
    original = (tmp_path / "gsm.jsonl").read_bytes()
    assert convert(capsys, path)[0] == 0
    assert [example.answer for example in load_examples("-", path)] == ["5"]
    assert (tmp_path / "gsm.jsonl.backup").read_bytes() == original
    assert convert(capsys, path)[0] == 0  # the second time, the backup is still the original
    assert (tmp_path / "gsm.jsonl.backup").read_bytes() == original
    assert convert(capsys, path, "--restore")[0] == 0
    assert (tmp_path / "gsm.jsonl").read_bytes() == original
    assert not (tmp_path / "gsm.jsonl.backup").exists()
    assert convert(capsys, path, "--restore") == (2, "", f"convert_dataset.py: {path}.backup: no such backup\n")


def test_convert_bad_lines_are_named_and_nothing_is_written(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", {"question": "Q", "answer": "1"}, {"question": "Q"}, {"answer": "1"})
    before = (tmp_path / "a.jsonl").read_bytes()
    status, _, errors = convert(capsys, path)
    assert status == 2
    assert f"{path}:2: no answer" in errors
    assert f"{path}:3: no question" in errors
    assert "2 of 3 lines" in errors
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    status, out, _ = convert(capsys, path, "--skip-bad-lines", "--output", str(tmp_path / "new/b.jsonl"))
    assert status == 0
    assert "1 questions, 2 lines dropped" in out
    assert len(load_examples("-", str(tmp_path / "new/b.jsonl"))) == 1


def test_convert_json_in_place_is_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "Q", "response": "1"}]))
    status, _, errors = convert(capsys, str(tmp_path / "a.json"))
    assert status == 2
    assert "--output is required" in errors
    assert convert(capsys, str(tmp_path / "a.json"), "--output", str(tmp_path / "a.jsonl"))[0] == 0


def test_convert_folder_becomes_one_file(tmp_path, capsys):
    for name, answer in (("algebra/1.json", "1"), ("geometry/2.json", "2")):
        file = tmp_path / "MATH" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"problem": "P" + answer, "solution": rf"\boxed{{{answer}}}"}))
    assert convert(capsys, str(tmp_path / "MATH"))[0] == 2  # a folder cannot be rewritten in place
    assert convert(capsys, str(tmp_path / "MATH"), "--output", str(tmp_path / "o.jsonl"))[0] == 0
    assert [example.answer for example in load_examples("-", str(tmp_path / "o.jsonl"))] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"question": "Q"', "not valid JSON"), ("", "no line could be converted"), ("[1]\n", "expected a JSON object")],
)
def test_convert_damaged_file_exits_with_one_line(tmp_path, capsys, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    status, _, errors = convert(capsys, str(tmp_path / "a.jsonl"))
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors
    assert convert(capsys, "nowhere.jsonl")[0] == 2
    assert convert(capsys)[0] == 2


def test_convert_hub_without_extra_names_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    status, _, errors = convert(capsys, "openai/gsm8k", "--hub", "--output", "x.jsonl")
    assert status == 2
    assert ".[hub]" in errors


SUBSETS = {  # numbers of the public release of MATH: training and test problems of each subject
    "algebra": (1744, 1187),
    "counting_and_probability": (771, 474),
    "geometry": (870, 479),
    "intermediate_algebra": (1295, 903),
    "number_theory": (869, 540),
    "prealgebra": (1205, 871),
    "precalculus": (746, 546),
}


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_convert_hub_subsets_become_one_file(tmp_path, capsys, monkeypatch):
    """MATH as EleutherAI/hendrycks_math stores it: 7,500 and 5,000 problems by subject."""

    def load(name, subset, split):
        assert name == "EleutherAI/hendrycks_math"
        n = SUBSETS[subset][("train", "test").index(split)]
        return ({"problem": f"{subset} {k}?", "level": "1", "solution": rf"so $\boxed{{{k}}}$."} for k in range(n))

    hub(monkeypatch, load)
    for split, file, n in (("train", "train", 7500), ("test", "validation", 5000)):
        output = str(tmp_path / f"data/math/{file}.jsonl")
        flags = ["--hub", "--subset", *SUBSETS, "--split", split, "--output", output]
        status, out, _ = convert(capsys, "EleutherAI/hendrycks_math", *flags)
        assert (status, out) == (0, f"{output}: {n} questions\n")
        examples = load_examples("-", output)
        assert len(examples) == n
        assert examples[-1].question == f"precalculus {SUBSETS['precalculus'][split == 'test'] - 1}?"
        assert {*json.loads((tmp_path / f"data/math/{file}.jsonl").read_text().partition("\n")[0])} == {
            "question",
            "answer",
        }


def test_convert_hub_missing_split_and_bad_row_are_named(tmp_path, capsys, monkeypatch):
    def load(name, subset, split):
        if subset == "none":
            raise FileNotFoundError("no such\nthing")
        return [{"question": "Q", "answer": "1"}, {"question": "Q"}]

    hub(monkeypatch, load)
    output = str(tmp_path / "o.jsonl")
    status, _, errors = convert(capsys, "a/b", "--hub", "--subset", "some", "none", "--output", output)
    assert (status, errors.count("\n")) == (2, 1)
    assert "--hub a/b (subset none, split train): FileNotFoundError: no such thing" in errors
    assert "a/b/some:2: no answer" in convert(capsys, "a/b", "--hub", "--subset", "some", "--output", output)[2]
    assert "a/b:2: no answer" in convert(capsys, "a/b", "--hub", "--output", output)[2]
    assert (
        convert(capsys, "a/b", "--subset", "x")[2] == "convert_dataset.py: --subset x: has no effect without --hub\n"
    )


# --- demonstrations --------------------------------------------------------------------------------------------------

GSM8K = {"question": "Q", "answer": "She has 3 + 4 = <<3+4=7>>7.\nTimes 100.\n#### 700"}
MATH = {"problem": "Q", "solution": r"Half, so $\boxed{\frac{1}{2}}$, as was to be shown."}
TRACE = {"question": "Q", "answer": "7", "response": "<think>\nLong.\n</think>\n\nIt is \\boxed{7}."}
TAGGED = {"question": "Q", "answer": "7", "response": " 3 + 4 = 7 </think> <answer> 7 </answer>"}
HEADINGS = {
    "question": "Q",
    "answer": "7",
    "response": "<think>#### First\n3 + 4</think>\n#### Then\nIt is \\boxed{7}\n",
}
WRONG = {"question": "Q", "answer": "7", "response": r"I take it for \boxed{8}"}
CHAT = {"prompt": "Q", "ground_truth": "7", "response": [{"role": "assistant", "content": "So: #### 7"}]}


@pytest.mark.parametrize(
    ("row", "r1_zero", "question_only"),
    [
        (GSM8K, " She has 3 + 4 = 7.\nTimes 100. </think> <answer> 700 </answer>", "= 7.\nTimes 100.\n\\boxed{700}"),
        (
            MATH,
            r" Half, so $\boxed{\frac{1}{2}}$, as was to be shown. </think> <answer> \frac{1}{2} </answer>",
            MATH["solution"],
        ),
        (TRACE, " Long. </think> <answer> 7 </answer>", TRACE["response"]),
        (HEADINGS, " #### First\n3 + 4 </think> <answer> 7 </answer>", HEADINGS["response"].strip()),
        (TAGGED, TAGGED["response"], "<answer> 7 </answer>\n\\boxed{7}"),
        (WRONG, r" I take it for \boxed{8} </think> <answer> 8 </answer>", WRONG["response"]),
        (CHAT, " So: </think> <answer> 7 </answer>", "So:\n\\boxed{7}"),
    ],
)
def test_convert_solution_becomes_response(row, r1_zero, question_only):
    shown = convert_demonstration(row, "r1_zero")
    assert shown == {**convert_row(row), "response": r1_zero}
    assert r1_zero_reward_fn(shown["response"], shown["answer"])["reward"] == float(row is not WRONG)
    shown = convert_demonstration(row, "question_only")
    assert shown["response"].endswith(question_only)
    assert question_only_reward_fn(shown["response"], shown["answer"])["reward"] == float(row is not WRONG)


@given(st.text(), st.integers(-(10**6), 10**6), st.sampled_from(["boxed", "hashes"]))
def test_convert_demonstrations_earn_full_reward(thoughts, answer, kind):
    assume(not re.search(r"####|\\boxed|</?think>|</?answer>|<<", thoughts))
    text = f"{thoughts}\n#### {answer:,}" if kind == "hashes" else rf"{thoughts} $\boxed{{{answer}}}$"
    row = {"question": "Q", "answer": text}
    for form, reward_fn in (("r1_zero", r1_zero_reward_fn), ("question_only", question_only_reward_fn)):
        shown = convert_demonstration(row, form)
        assert shown["answer"] == str(answer)
        assert reward_fn(shown["response"], shown["answer"])["reward"] == 1
        assert thoughts.strip() in shown["response"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q", "target": "7"}, "no worked solution under response, solution, answer"),
        ({"question": "Q", "target": "7", "response": "It is 7."}, "states no final answer: none after ####"),
        ({"question": "Q", "target": "7", "response": r"<think>\boxed{7}</think> Well."}, "states no final answer"),
        ({"prompt": "User: Q\nAssistant: <think>\n", "response": r"\boxed{7}"}, "sft.py takes such a file as it is"),
        ({"question": "Q", "target": "7", "answer": ["7", "seven"]}, "no message of the role `assistant`"),
        ({"question": "Q", "solution": r"\boxed{7}", "answer": ""}, None),
    ],
)
def test_convert_row_without_solution_is_named(row, message):
    if message is None:
        assert convert_demonstration(row, "r1_zero")["answer"] == "7"
        return
    with pytest.raises(ValueError, match=message):
        convert_demonstration(row, "r1_zero")


def test_convert_demonstrations_load_in_sft(tmp_path, capsys):
    source = write_lines(tmp_path / "gsm.jsonl", GSM8K, {**GSM8K, "why": {"text": "Because. #### 8"}})
    output = str(tmp_path / "data/gsm8k/sft.jsonl")
    status, out, _ = convert(capsys, source, "--demonstrations", "r1_zero", "--output", output)
    assert (status, out) == (0, f"{output}: 2 demonstrations\n")
    first, _ = load_demonstrations("--data-path", output)
    assert (first.question, first.answer, first.has_prompt) == ("Q", "700", False)
    assert first.response == convert_demonstration(GSM8K, "r1_zero")["response"]
    named = ["--response-key", "why.text", "--output", output]
    status, _, errors = convert(capsys, source, "--demonstrations", "question_only", *named)
    assert (status, "gsm.jsonl:1: no worked solution under why.text" in errors) == (2, True)
    assert "--response-key why.text: has no effect without --demonstrations" in convert(capsys, source, *named)[2]
    convert(capsys, source, "--demonstrations", "question_only", *named, "--skip-bad-lines")
    (shown,) = load_demonstrations("--data-path", output)
    assert (shown.answer, shown.response) == ("700", "Because.\n\\boxed{8}")
