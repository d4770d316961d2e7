"""Layouts, backups, and bad lines."""

import json

import pytest

from drivers.convert_dataset import convert_row, main
from drivers.data import load_examples

ROWS = [
    # Hendrycks MATH: the last box counts, nested braces and all
    ({"problem": "P", "solution": r"First \boxed{1}, so \boxed{\frac{1}{2}}.", "level": "1"}, "P", r"\frac{1}{2}"),
    # MATH with the answer already drawn out
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
]


@pytest.mark.parametrize(("row", "question", "answer"), ROWS)
def test_known_layouts(row, question, answer):
    assert convert_row(row) == {"question": question, "answer": answer}


def test_keys_can_be_named():
    assert convert_row({"q": "Q", "gold": "1", "answer": "2"}, "q", "gold") == {"question": "Q", "answer": "1"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, "no question under"),
        ({"question": "Q"}, "no answer under"),
        ({"question": "Q", "answer": ""}, "no answer under"),
        ({"problem": "P", "solution": "no box here"}, "no .*boxed"),
        ({"prompt": [{"role": "system", "content": "S"}], "response": "1"}, "without a message of the role `user`"),
    ],
)
def test_what_is_missing_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        convert_row(row)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(capsys, *arguments):
    """Exit status, stdout, stderr."""
    try:
        main(arguments)
        status = 0
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_file_is_rewritten_with_its_backup_and_restored(tmp_path, capsys):
    path = write(tmp_path / "gsm.jsonl", {"question": "Q", "answer": "so\n#### 5"})
    original = (tmp_path / "gsm.jsonl").read_bytes()
    assert run(capsys, path)[0] == 0
    assert [example.answer for example in load_examples("-", path)] == ["5"]
    assert (tmp_path / "gsm.jsonl.backup").read_bytes() == original
    assert run(capsys, path)[0] == 0  # again: the backup is still the original
    assert (tmp_path / "gsm.jsonl.backup").read_bytes() == original
    assert run(capsys, path, "--restore")[0] == 0
    assert (tmp_path / "gsm.jsonl").read_bytes() == original
    assert not (tmp_path / "gsm.jsonl.backup").exists()
    assert run(capsys, path, "--restore") == (2, "", f"convert_dataset.py: {path}.backup: no such backup\n")


def test_bad_lines_are_named_and_nothing_is_written(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"question": "Q", "answer": "1"}, {"question": "Q"}, {"answer": "1"})
    before = (tmp_path / "a.jsonl").read_bytes()
    status, _, errors = run(capsys, path)
    assert status == 2
    assert f"{path}:2: no answer" in errors
    assert f"{path}:3: no question" in errors
    assert "2 of 3 lines" in errors
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    status, out, _ = run(capsys, path, "--skip-bad-lines", "--output", str(tmp_path / "new/b.jsonl"))
    assert status == 0
    assert "1 questions, 2 lines left out" in out
    assert len(load_examples("-", str(tmp_path / "new/b.jsonl"))) == 1


def test_a_json_file_is_not_turned_into_jsonl_under_its_name(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "Q", "response": "1"}]))
    status, _, errors = run(capsys, str(tmp_path / "a.json"))
    assert status == 2
    assert "--output is required" in errors
    assert run(capsys, str(tmp_path / "a.json"), "--output", str(tmp_path / "a.jsonl"))[0] == 0


def test_a_folder_of_single_problems_becomes_one_file(tmp_path, capsys):
    for name, answer in (("algebra/1.json", "1"), ("geometry/2.json", "2")):
        file = tmp_path / "MATH" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"problem": "P" + answer, "solution": rf"\boxed{{{answer}}}"}))
    assert run(capsys, str(tmp_path / "MATH"))[0] == 2  # a folder is not rewritten in place
    assert run(capsys, str(tmp_path / "MATH"), "--output", str(tmp_path / "o.jsonl"))[0] == 0
    assert [example.answer for example in load_examples("-", str(tmp_path / "o.jsonl"))] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"question": "Q"', "not valid JSON"), ("", "no line could be converted"), ("[1]\n", "object is required")],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, capsys, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    status, _, errors = run(capsys, str(tmp_path / "a.jsonl"))
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors
    assert run(capsys, "nowhere.jsonl")[0] == 2
    assert run(capsys)[0] == 2


def test_the_hub_needs_its_extra(capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    status, _, errors = run(capsys, "openai/gsm8k", "--hub", "--output", "x.jsonl")
    assert status == 2
    assert "grpo_core[hub]" in errors
