"""Data files, prompts and the shipped data."""

import json
import re
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from drivers.common.errors import UsageError
from drivers.tasks.questions import Prompt, fit_context, load_examples, load_prompt_template, make_questions
from drivers.tasks.wordadd import SHOTS, make_wordadd
from grpo_core import tokenize_prompt_and_output
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
        ('{"question": "q", "answer": 1' + "0" * 5000 + "}", "not valid JSON"),
        ('{"question": "q", "answer": "a"', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"answer": "a"}', "`question` must be"),
        ('{"question": " ", "answer": "a"}', "`question` must be"),
        ('{"question": "q"}', "`answer` must be"),
        ('{"question": "q", "answer": ""}', "`answer` must be"),
        ('{"question": "q", "answer": []}', "`answer` must be"),
        ('{"question": "q", "answer": ["a", null]}', "`answer` must be"),
        ('{"question": "q", "answer": true}', "`answer` must be"),
        ('{"question": "q", "response": "a"}', "keys here: ['question', 'response']"),
    ],
)
def test_load_examples_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "b.jsonl", '{"question": "q", "answer": "a"}', line)
    with pytest.raises(UsageError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)):
        load_examples("--data-path", path)


def test_load_examples_binary_file_is_named(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"c\.jsonl: not UTF-8"):
        load_examples("--data-path", str(tmp_path / "c.jsonl"))


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
    assert Prompt("{question}").token_ids("ab", tokenizer) == tuple(plain)
    assert Prompt("{question}").token_ids(f"ab{tokenizer.eos_token}", tokenizer) == (*plain, end)
    assert tokenize_prompt_and_output(["ab"], ["c"], tokenizer)["input_ids"].tolist() == [plain]
    ended = tokenize_prompt_and_output([f"ab{tokenizer.eos_token}"], ["c"], tokenizer)
    assert ended["input_ids"].tolist() == [[*plain, end]]
    assert Prompt("{question}").token_ids(f"ab{tokenizer.eos_token}", make_tiny_tokenizer()) == (*plain, end)


def test_r1_zero_prompt_opens_the_thought():
    template = load_prompt_template("data/prompts/r1_zero.prompt")
    assert template.startswith("A conversation between User and Assistant.")
    assert template.endswith("User: {question}\nAssistant: <think>")
    assert load_prompt_template("data/prompts/question_only.prompt") == "{question}"
    assert load_prompt_template("data/prompts/wordadd.prompt").endswith("User: {question}\nAssistant: <think>")


def test_prompt_cache_not_writable_raises_usage_error(tmp_path):
    from drivers.policy.loading import embedded_model

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
