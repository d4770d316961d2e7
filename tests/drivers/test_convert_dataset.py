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
from drivers.tasks.layouts import LAYOUTS
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
    ({"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "target": "1"}, "S\nQ", "1"),
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
    assert parts_of(row) == (question, answer)


def parts_of(row, *keys):
    """Return the question and the answer of a converted row."""
    converted = convert_row(row, *keys).row
    return converted["question"], converted["answer"]


def test_convert_keys_can_be_named():
    assert parts_of({"q": "Q", "gold": "1", "answer": "2"}, "q", "gold") == ("Q", "1")


@pytest.mark.parametrize(
    ("question_key", "answer_key"), [("extra.ask", "turns.1.final.text"), ("a.b", "turns.1.final.text")]
)
def test_convert_named_keys_reach_nested_values(question_key, answer_key):
    row = {"extra": {"ask": "Q"}, "a.b": "Q", "a": {"b": "other"}, "turns": [{}, {"final": {"text": "5"}}]}
    assert parts_of(row, question_key, answer_key) == ("Q", "5")


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
        ({"question": "Q", "answer": "so\n#### "}, "`answer` states no answer: none after ####"),
        ({"question": "Q", "answer": "  "}, "`answer` states no answer"),
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
    assert "1 question, 2 lines dropped" in out
    assert len(load_examples("-", str(tmp_path / "new/b.jsonl"))) == 1


def test_convert_unknown_layout_is_one_line(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", *({"ask": f"Q{k}", "gold": k} for k in range(50)))
    for flags in ((), ("--skip-bad-lines",)):
        status, out, errors = convert(capsys, path, *flags, "--output", str(tmp_path / "new/b.jsonl"))
        assert (status, out, errors.count("\n")) == (2, "", 1)
        assert f"{path}:1: no question under question, problem, " in errors
        assert "keys here: ['ask', 'gold'] (50 rows like this); nothing was written" in errors
        assert "with --question-key and --answer-key; --help lists the known ones" in errors
        assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    named = ["--question-key", "ask", "--answer-key", "gold", "--output", str(tmp_path / "b.jsonl")]
    assert convert(capsys, path, *named)[0] == 0


def test_convert_help_lists_the_known_layouts(capsys):
    out = convert(capsys, "--help")[1]
    assert "verl, DAPO, Skywork: prompt; reward_model.ground_truth" in out
    assert all(names in out for names in LAYOUTS)


def test_convert_refused_rows_are_counted_by_reason(tmp_path, capsys):
    answers = ["1", "proof", "So it is two and no more.", "proof", "2"]
    path = write_lines(tmp_path / "a.jsonl", *({"question": f"Q{k}", "answer": a} for k, a in enumerate(answers)))
    status, out, errors = convert(capsys, path)
    assert (status, out) == (2, "")
    assert errors.splitlines() == [
        f"{path}:2: `answer` is 'proof', a mark of the data set and not an answer (2 rows like this)",
        f"{path}:3: `answer` is prose and states no answer: 'So it is two and no more.'...",
        "convert_dataset.py: 3 of 5 lines cannot be converted (listed above by reason) and nothing was written; drop "
        "them with --skip-bad-lines",
    ]
    status, out, errors = convert(capsys, path, "--skip-bad-lines")
    assert (status, errors.count("\n")) == (0, 2)
    assert out.splitlines()[0] == "5 rows read, 2 written, 3 refused, 0 repeat an earlier question with its answer"
    assert out.splitlines()[-1] == f"{path}: 2 questions, 3 lines dropped"


def test_convert_reports_what_it_found(tmp_path, capsys):
    rows = [{"problem": f"P{k}", "answer": str(k), "level": 1} for k in range(5)]
    rows[3] = {"question": "x" * 500, "solution": r"\boxed{3}", "response": "R"}
    output = str(tmp_path / "b.jsonl")
    status, out, _ = convert(capsys, write_lines(tmp_path / "a.jsonl", *rows), "--output", output)
    assert (status, out.splitlines()) == (
        0,
        [
            "5 rows read, 5 written, 0 refused, 0 repeat an earlier question with its answer",
            "read as: question from `problem` (4), answer from `answer` (4), question from `question` (1), answer "
            "from `solution` (1), nothing from `response` (1)",
            "other columns, kept: level",
            "question: 'P0', answer: '0'",
            "question: 'P1', answer: '1'",
            "question: 'P2', answer: '2'",
            f"{output}: 5 questions",
        ],
    )


def test_convert_repeated_rows_are_reported_and_left_out_on_request(tmp_path, capsys):
    rows = [{"question": f"Q{k % 3}", "answer": "1", "index": k} for k in range(12)]
    rows.append({"question": "Q0", "answer": "2"})  # another answer is no repetition
    source, output = write_lines(tmp_path / "a.jsonl", *rows), str(tmp_path / "b.jsonl")
    out = convert(capsys, source, "--output", output)[1]
    assert f"{output}: 13 questions, 9 repeated lines kept (--deduplicate leaves them out)\n" in out
    assert len(load_examples("-", output)) == 13
    out = convert(capsys, source, "--output", output, "--deduplicate")[1]
    assert f"{output}: 4 questions, 9 repeated lines left out\n" in out
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == [*rows[:3], rows[-1]]
    rated = str(tmp_path / "c.jsonl")
    convert(capsys, write_lines(tmp_path / "r.jsonl", rows[0] | {"pass_rate": 0.5}), "--output", rated)
    assert load_examples("-", rated)[0].pass_rate == 0.5


TABLES = {
    "rows.csv": '\ufeffquestion,answer\r\n"Q, is it?",1\r\n',
    "rows.tsv": "question\tanswer\nQ, is it?\t1\n",
    "keyed.json": json.dumps({"0": {"question": "Q, is it?", "answer": "1"}}),
    "wrapped.json": json.dumps({"data": [{"question": "Q, is it?", "answer": "1"}]}),
    "single.json": json.dumps({"question": "Q, is it?", "answer": "1"}),
    "lines.json": '{"question": "Q, is it?", "answer": "1"}\n' * 2,
    "chats.json": json.dumps(
        [[{"from": "human", "value": "Q, is it?"}, {"from": "assistant", "ground_truth": {"value": "1"}}]]
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_convert_formats_are_read(tmp_path, capsys, name):
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8", newline="")
    assert convert(capsys, str(tmp_path / name), "--output", str(tmp_path / "o.jsonl"))[0] == 0
    examples = load_examples("-", str(tmp_path / "o.jsonl"))
    assert {(example.question, example.answer) for example in examples} == {("Q, is it?", "1")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,answer\nQ,1,2\n", "a.csv:2: has more values than the first line has keys"),
        ("a.csv", b"question,answer\n\xff,1\n", "a.csv: cannot be read as a table"),
        ("a.csv", b'question,answer\n"Q,1\n', "a.csv: cannot be read as a table"),
        ("a.json", b"[1, 2]", "a.json: entry 1 is int; expected an object"),
        ("a.json", b"[[]]", "a.json: entry 1 is list; expected an object"),
        ("a.json", b'{"question": ', "a.json: cannot be read as JSON"),
        ("a.json", b"[" * 100_000, "a.json: cannot be read as JSON"),
        ("a.jsonl", b'\xff\xfe{\x00"\x00', "a.jsonl: not UTF-8 text (byte 0)"),
    ],
)
def test_convert_unreadable_file_is_one_line(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    status, out, errors = convert(capsys, str(tmp_path / name), "--output", str(tmp_path / "o.jsonl"))
    assert (status, out, errors.count("\n")) == (2, "", 1)
    assert message in errors
    assert [file.name for file in tmp_path.iterdir()] == [name]


class ParquetFile:
    """A parquet file as pyarrow reads it, in batches of two rows."""

    def __init__(self, path):
        if path.read_bytes()[-4:] != b"PAR1":
            raise ValueError("Parquet magic bytes not found\nin footer")

    def iter_batches(self, batch_size):
        for start in (0, 2):
            rows = [
                {"question": f"Q{k}", "answer": k, "made": b"\x00" if k == 3 else None} for k in (start, start + 1)
            ]
            yield SimpleNamespace(to_pylist=lambda rows=rows: rows)


def test_convert_parquet_is_read_with_pyarrow(tmp_path, capsys, monkeypatch):
    source, output = tmp_path / "a.parquet", str(tmp_path / "o.jsonl")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    source.write_bytes(b"PAR1")
    assert (
        "a.parquet: parquet files need the package pyarrow: pip install"
        in convert(capsys, str(source), "--output", output)[2]
    )
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=SimpleNamespace(ParquetFile=ParquetFile)))
    status, _, errors = convert(capsys, str(source), "--output", output, "--skip-bad-lines")
    assert (status, "a.parquet[4]: a column cannot be written as JSON" in errors) == (0, True)
    assert [example.answer for example in load_examples("-", output)] == ["0", "1", "2"]
    source.write_bytes(b"PAR1\x15\x04\xff")
    status, _, errors = convert(capsys, str(source), "--output", output)
    assert (status, errors) == (
        2,
        f"convert_dataset.py: {source}: cannot be read as parquet (Parquet magic bytes not found)\n",
    )


def test_convert_json_in_place_is_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "Q", "response": "1"}]))
    status, _, errors = convert(capsys, str(tmp_path / "a.json"))
    assert status == 2
    assert "--output: is missing" in errors
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


@pytest.mark.medium
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
        assert (status, out.splitlines()[-1]) == (0, f"{output}: {n} questions")
        examples = load_examples("-", output)
        assert len(examples) == n
        assert examples[-1].question == f"precalculus {SUBSETS['precalculus'][split == 'test'] - 1}?"
        assert {*json.loads((tmp_path / f"data/math/{file}.jsonl").read_text().partition("\n")[0])} == {
            "question",
            "answer",
            "level",
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
    shown = convert_demonstration(row, "r1_zero").row
    assert shown == {**convert_row(row).row, "response": r1_zero}
    assert r1_zero_reward_fn(shown["response"], shown["answer"])["reward"] == float(row is not WRONG)
    shown = convert_demonstration(row, "question_only").row
    assert shown["response"].endswith(question_only)
    assert question_only_reward_fn(shown["response"], shown["answer"])["reward"] == float(row is not WRONG)


@given(st.text(), st.integers(-(10**6), 10**6), st.sampled_from(["boxed", "hashes"]))
def test_convert_demonstrations_earn_full_reward(thoughts, answer, kind):
    assume(not re.search(r"####|\\boxed|</?think>|</?answer>|<<", thoughts))
    text = f"{thoughts}\n#### {answer:,}" if kind == "hashes" else rf"{thoughts} $\boxed{{{answer}}}$"
    row = {"question": "Q", "answer": text}
    for form, reward_fn in (("r1_zero", r1_zero_reward_fn), ("question_only", question_only_reward_fn)):
        shown = convert_demonstration(row, form).row
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
        assert convert_demonstration(row, "r1_zero").row["answer"] == "7"
        return
    with pytest.raises(ValueError, match=message):
        convert_demonstration(row, "r1_zero")


def test_convert_demonstrations_load_in_sft(tmp_path, capsys):
    source = write_lines(tmp_path / "gsm.jsonl", GSM8K, {**GSM8K, "why": {"text": "Because. #### 8"}})
    output = str(tmp_path / "data/gsm8k/sft.jsonl")
    status, out, _ = convert(capsys, source, "--demonstrations", "r1_zero", "--output", output)
    closing = f"{output}: 2 demonstrations, 1 repeated line kept (--deduplicate leaves them out)"
    assert (status, out.splitlines()[-1]) == (0, closing)
    first, _ = load_demonstrations("--data-path", output)
    assert (first.question, first.answer, first.has_prompt) == ("Q", "700", False)
    assert first.response == convert_demonstration(GSM8K, "r1_zero").row["response"]
    named = ["--response-key", "why.text", "--output", output]
    status, _, errors = convert(capsys, source, "--demonstrations", "question_only", *named)
    assert (status, "gsm.jsonl:1: no worked solution under why.text" in errors) == (2, True)
    assert "--response-key why.text: has no effect without --demonstrations" in convert(capsys, source, *named)[2]
    convert(capsys, source, "--demonstrations", "question_only", *named, "--skip-bad-lines")
    (shown,) = load_demonstrations("--data-path", output)
    assert (shown.answer, shown.response) == ("700", "Because.\n\\boxed{8}")
