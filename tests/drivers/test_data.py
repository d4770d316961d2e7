"""Data files, prompts and the shipped data."""

import json
import re
import resource
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from drivers.common.commands import spell_program
from drivers.common.errors import UsageError
from drivers.policy.loading import embedded_model, load_tokenizer
from drivers.tasks.demonstrations import WorkedExample, load_demonstrations, make_demonstrations
from drivers.tasks.questions import (
    N_AT_ONCE,
    Example,
    Prompt,
    distinct,
    fit_context,
    load_examples,
    load_prompt_template,
    make_questions,
)
from drivers.tasks.wordadd import SHOTS, make_wordadd
from drivers.training.state import fingerprint
from grpo_core import r1_zero_reward_fn, tokenize_prompt_and_output
from tests.drivers.helpers.letters import ask
from tests.tiny import make_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def write_lines(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_load_examples_keeps_order_source_and_alternatives(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        '{"question": "1+1?", "answer": 2}',
        "",
        '{"question": "half?", "answer": ["1/2", 0.5], "level": 3}',
    )
    first, second = load_examples("--data-path", path)
    assert (first.question, first.answer, first.source) == ("1+1?", "2", f"{path}:1")
    assert (second.answer, second.source) == (["1/2", "0.5"], f"{path}:3")


def test_load_examples_only_newline_ends_a_line(tmp_path):
    """Questions hold U+2028, U+0085 and form feeds, and the file begins with a byte order mark."""
    question = "one\u2028two\x85three\x0cfour"
    line = json.dumps({"question": question, "answer": "1"}, ensure_ascii=False)
    (tmp_path / "u.jsonl").write_text("\ufeff" + line + "\r\n" + line + "\n", encoding="utf-8", newline="")
    assert [example.question for example in load_examples("-", str(tmp_path / "u.jsonl"))] == [question] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answer": NaN}', "`answer` must be"),
        ('{"question": "q", "answer": "a"', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"answer": "a"}', "`question` must be"),
        ('{"question": " ", "answer": "a"}', "`question` must be"),
        ('{"question": "q"}', "`answer` must be"),
        ('{"question": "q", "answer": ""}', "`answer` must be"),
        ('{"question": "q", "answer": []}', "`answer` must be"),
        ('{"question": "q", "answer": ["a", null]}', "`answer` must be"),
        ('{"question": "q", "answer": true}', "`answer` must be"),
        ('{"question": "\\ud800", "answer": "a"}', "contains an unpaired surrogate"),
        ('{"question": "q", "answer": ["a", "\\udfff"]}', "contains an unpaired surrogate"),
        ('{"question": "q", "response": "a"}', "keys here: ['question', 'response']"),
    ],
)
def test_load_examples_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "b.jsonl", '{"question": "q", "answer": "a"}', line)
    with pytest.raises(UsageError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)):
        load_examples("--data-path", path)


def test_load_examples_binary_file_is_named(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"c\.jsonl: not UTF-8 text \(byte 0\)"):
        load_examples("--data-path", str(tmp_path / "c.jsonl"))
    (tmp_path / "c.jsonl").write_bytes(b'{"question": "q", "answer": "a"}\n{"\xff')
    with pytest.raises(UsageError, match=r"c\.jsonl: not UTF-8 text \(byte 35\)"):
        load_examples("--data-path", str(tmp_path / "c.jsonl"))


@pytest.mark.parametrize("n_digits", [1, 309, 4301, 100_000])
def test_load_examples_integer_answer_of_any_size(tmp_path, n_digits):
    """Python turns no text of more than 4300 digits into an integer, and no integer above 10 ** 308 into a float."""
    digits = "7" * n_digits
    line = f'{{"question": "q", "answer": {digits}, "other": {digits}, "pass_rate": {digits}}}'
    (example,) = load_examples("-", write_lines(tmp_path / "a.jsonl", line))
    assert (example.answer, example.pass_rate) == (digits, None)
    (listed,) = load_examples(
        "-", write_lines(tmp_path / "b.jsonl", f'{{"question": "q", "answer": [-{digits}, 0.5]}}')
    )
    assert listed.answer == [f"-{digits}", "0.5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "question,answer\n", "--data-path {file}: is csv, not jsonl; {command}"),
        ("a.tsv", "question\tanswer\n", "--data-path {file}: is tsv, not jsonl; {command}"),
        ("a.parquet", "PAR1", "--data-path {file}: is parquet, not jsonl; {command}"),
        ("a.json", '[{"question": "q"}]', "{file}:1: expected a JSON object, got list; {command}"),
        ("a.json", '{\n"question": "q"}', "{file}:1: not valid JSON (Expecting property name"),
        ("a.jsonl", '{"problem": "q", "solution": "s"}', "{file}:1: `question` must be a non-empty string, got None;"),
        ("a.jsonl", '{"question": "q", "solution": "s"}', "keys here: ['question', 'solution']; {command}"),
    ],
)
def test_load_examples_other_layout_names_the_converter(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_text(content)
    command = (
        f"convert it: {spell_program('convert_dataset.py')} {file} --output a-converted.jsonl (for unknown keys: "
    )
    with pytest.raises(UsageError) as raised:
        load_examples("--data-path", str(file))
    assert message.format(file=file, command=command) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_load_demonstrations_other_layout_names_the_converter(tmp_path, name):
    (tmp_path / name).write_text('{"problem": "q", "solution": "s"}')
    with pytest.raises(UsageError, match=rf"convert_dataset.py {tmp_path}/{name} --demonstrations r1_zero --output"):
        load_demonstrations("--data-path", str(tmp_path / name))


def test_load_examples_long_values_are_cut_in_messages(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", json.dumps({"question": "q", "answer": ["a" * 10_000, None]}))
    with pytest.raises(UsageError) as raised:
        load_examples("--data-path", path)
    assert len(str(raised.value)) < 500


def test_equal_rows_are_one_example_and_one_question(tmp_path):
    """A data set may repeat each row a hundred times: texts, tokens and sums are kept and computed once."""
    rows = [
        {"question": "a", "answer": "1"},
        {"question": "b", "answer": "1"},
        {"question": "a", "answer": 1, "index": 2},
        {"question": "a", "answer": ["1"]},
        {"question": "a", "answer": "2"},
        {"question": "a", "answer": "1", "pass_rate": 0.5},
    ]
    path = write_lines(tmp_path / "a.jsonl", *map(json.dumps, rows))
    examples = load_examples("-", path)
    assert [example.source for example in examples] == [f"{path}:{number}" for number in (1, 2, 1, 4, 5, 6)]
    assert examples[2] is examples[0]
    questions = make_questions(examples, Prompt("{question}"), make_tiny_tokenizer())
    assert [question.example for question in questions] == examples
    assert questions[2] is questions[0]
    assert distinct(questions) == [questions[index] for index in (0, 1, 3, 4, 5)]
    apart = [replace(question) for question in questions]
    assert fingerprint(questions) == fingerprint(apart[::-1]) != fingerprint(questions[:-1])
    worked = [row | {"response": "r"} for row in rows] + [rows[0] | {"response": "s"}]
    shown = load_demonstrations("-", write_lines(tmp_path / "w.jsonl", *map(json.dumps, worked)))
    assert len(distinct(shown)) == 5  # `pass_rate` is not read
    assert shown[5] is shown[0]
    made = make_demonstrations(shown, Prompt("{question}"), (), make_tiny_tokenizer())
    assert [demonstration.example for demonstration in made] == shown
    assert made[5] is made[0]


def test_prompts_tokenized_together_equal_single_ones():
    """Texts of more than one call, short and long, with an end token in some of them."""
    tokenizer = make_tiny_tokenizer()
    texts = [f"{k} {'+' * (k % 7)}" + tokenizer.eos_token * (k % 3 == 0) for k in range(2 * N_AT_ONCE + 1)]
    questions = make_questions([Example(text, "1", "a:1") for text in texts], Prompt("{question}"), tokenizer)
    assert [question.prompt_token_ids for question in questions] == [tuple(tokenizer.encode(text)) for text in texts]
    shown = [WorkedExample("q", "1", "a:1", text, has_prompt=k % 2 == 0) for k, text in enumerate(texts)]
    made = make_demonstrations(shown, Prompt("{question}!"), ("+",), tokenizer)
    for text, demonstration, k in zip(texts, made, range(len(texts)), strict=True):
        end = [] if text.endswith("+") else [tokenizer.eos_token_id]
        assert list(demonstration.response_token_ids) == tokenizer.encode(text) + end
        assert list(demonstration.prompt_token_ids) == tokenizer.encode("q" if k % 2 == 0 else "q!")


@pytest.mark.medium
def test_repeated_rows_take_little_memory(tmp_path):
    """20,000 rows of 20 different ones: no row costs more than its place in two lists."""
    lines = [json.dumps({"question": f"{k % 20}" + "?" * 500, "answer": "1", "index": k}) for k in range(20_000)]
    path, tokenizer = write_lines(tmp_path / "a.jsonl", *lines), make_tiny_tokenizer()
    tracemalloc.start()
    try:
        questions = make_questions(load_examples("-", path), Prompt("{question}"), tokenizer)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(questions) == 20_000
    assert peak < 20_000 * 30 + 500_000
    assert len(questions[0].packed_prompt) * questions[0].packed_prompt.itemsize < 5 * 501


@pytest.mark.nightly
def test_large_file_starts_quickly_in_little_memory(tmp_path):
    """200,000 rows, a tenth of them different, as `train.py` reads them before it loads the model."""
    text = "A rectangle has sides $a$ and $b$ with $a > b$, and its diagonal is $\\sqrt{a^2 + b^2}$. " * 8
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"question": f"{k % 20_000} {text}", "answer": "1"}) + "\n" for k in range(200_000))
    tokenizer = load_tokenizer(str(embedded_model()))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    questions = make_questions(load_examples("-", str(tmp_path / "a.jsonl")), Prompt("{question}"), tokenizer)
    fit_context(questions, max_new_tokens=100, context=2048, long_prompts="refuse")
    fingerprint(questions)
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB; texts and ids alone are 40 MB


def test_prompt_replaces_question_only():
    tokenizer = make_tiny_tokenizer()
    example = load_examples("--data-path", "data/wordadd/validation.jsonl")[0]
    prompt = Prompt("{x} {question} {question}")
    (question,) = make_questions([example], prompt, tokenizer)
    assert tokenizer.decode(question.prompt_token_ids) == f"{{x}} {example.question} {example.question}"


def test_prompt_question_may_hold_braces(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", json.dumps({"question": r"$\frac{1}{2}$ {question}", "answer": "1"}))
    tokenizer = make_tiny_tokenizer()
    examples, prompt = load_examples("-", path), Prompt("Q: {question}")
    (question,) = make_questions(examples, prompt, tokenizer)
    assert tokenizer.decode(question.prompt_token_ids) == r"Q: $\frac{1}{2}$ {question}"


def test_fit_context_counts_long_prompts_or_leaves_them_out(tmp_path, capsys):
    lines = [json.dumps({"question": "1" * n, "answer": "1"}) for n in (5, 7, 2, 6)]
    examples = load_examples("-", write_lines(tmp_path / "e.jsonl", *lines))
    questions = make_questions(examples, Prompt("{question}"), make_tiny_tokenizer())
    for context in (10, None):
        assert fit_context(questions, max_new_tokens=3, context=context, long_prompts="refuse") == questions
    problem = (
        "2 of 4 questions do not fit into the model's context of 8 tokens with --sampling-max-tokens 3; the longest, "
        f"{tmp_path}/e.jsonl:2, needs 10"
    )
    with pytest.raises(UsageError) as raised:
        fit_context(questions, max_new_tokens=3, context=8, long_prompts="refuse")
    assert str(raised.value) == (
        f"--long-prompts refuse: {problem}; lower --sampling-max-tokens or remove them, or pass --long-prompts drop"
    )
    kept = fit_context(questions, max_new_tokens=3, context=8, long_prompts="drop")
    assert kept == [questions[0], questions[2]]
    assert capsys.readouterr().out == f"warning: --long-prompts drop: {problem}; they are left out\n"
    with pytest.raises(UsageError, match=r"4 of 4 questions do not fit .* or remove them$"):
        fit_context(questions, max_new_tokens=3, context=4, long_prompts="drop")


def test_encode_prompt_leaves_out_an_appended_end_token():
    """The model would see an ended text; an end token that the prompt itself contains stays."""
    tokenizer = make_tiny_tokenizer()
    plain, end = tokenizer.encode("ab"), tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, end)]
    )
    assert tokenizer.encode("ab") == [*plain, end]
    assert ask(Prompt("{question}"), "ab", tokenizer) == tuple(plain)
    assert ask(Prompt("{question}"), f"ab{tokenizer.eos_token}", tokenizer) == (*plain, end)
    assert tokenize_prompt_and_output(["ab"], ["c"], tokenizer)["input_ids"].tolist() == [plain]
    ended = tokenize_prompt_and_output([f"ab{tokenizer.eos_token}"], ["c"], tokenizer)
    assert ended["input_ids"].tolist() == [[*plain, end]]
    assert ask(Prompt("{question}"), f"ab{tokenizer.eos_token}", make_tiny_tokenizer()) == (*plain, end)


def test_r1_zero_prompt_opens_the_thought():
    template = load_prompt_template("data/prompts/r1_zero.prompt")
    assert template.startswith("A conversation between User and Assistant.")
    assert template.endswith("User: {question}\nAssistant: <think>")
    assert load_prompt_template("data/prompts/question_only.prompt") == "{question}"
    assert load_prompt_template("data/prompts/wordadd.prompt").endswith("User: {question}\nAssistant: <think>")


def test_prompts_of_2026_have_correct_examples():
    """Each worked example gets the reward for its answer, and each of its equations holds."""
    bare, shots = (load_prompt_template(f"data/prompts/{name}.prompt") for name in ("r1_zero", "r1_zero_three_shot"))
    start, *examples, last = shots.split("User: ")
    assert [start + "User: " + last, len(examples)] == [bare, 3]
    for example, answer in zip(examples, ("18", "55", "23"), strict=True):
        response = example.partition("Assistant: <think>")[2].strip()
        assert r1_zero_reward_fn(response, answer)["reward"] == 1.0
        equations = re.findall(r"([\d+*/ -]+) = (\d+)", response)
        assert equations
        assert all(eval(left) == int(right) for left, right in equations)
    boxed = load_prompt_template("data/prompts/question_only_2026.prompt")
    assert boxed == r"{question} Please put your final answer within \boxed{}."


def test_prompt_cache_not_writable_raises_usage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be unpacked into .*set XDG_CACHE_HOME"):
        embedded_model(tmp_path / "file" / "cache")


def test_shipped_wordadd_equals_script_output():
    for split, rows in make_wordadd().items():
        shipped = (ROOT / f"data/wordadd/{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in shipped] == rows


def test_wordadd_validation_sums_are_unseen():
    def pairs(rows):
        return [tuple(sorted(map(int, re.findall(r"\d+", row["question"])))) for row in rows]

    splits = make_wordadd()
    train, held_out = set(pairs(splits["train"])), set(pairs(splits["validation"]))
    assert not train & held_out
    assert not {tuple(sorted(shot)) for shot in SHOTS} & held_out
    assert len(train | held_out) == 51 * 8
    assert len(splits["validation"]) >= 256
    for rows in splits.values():
        assert all(sum(pair) == int(row["answer"]) for pair, row in zip(pairs(rows), rows, strict=True))
        assert len({row["question"] for row in rows}) == len(rows)
    shots = re.findall(r"(\d+) \+ (\d+) = (\d+)", load_prompt_template("data/prompts/wordadd.prompt"))
    assert [(int(a), int(b)) for a, b, _ in shots] == list(SHOTS)
    assert all(int(a) + int(b) == int(c) for a, b, c in shots)
