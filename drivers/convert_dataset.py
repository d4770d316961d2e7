r"""Convert common datasets to jsonl with `question` and `answer`: `python drivers/convert_dataset.py --help`.

The layout is recognized by the keys of a line: Hendrycks MATH (`problem`, `solution` with the answer in \boxed{}),
GSM8K (`question`, `answer` that ends in `#### 18`), verl's (`prompt`, a chat, with `reward_model.ground_truth`),
`prompt` or `question` with `response`, `ground_truth`, `target`, `final_answer` or `answer`. With --demonstrations the
worked solution is kept as a response to train on.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from drivers.common.atomic_files import write_jsonl
from drivers.common.cli import exit_on_user_error
from drivers.common.errors import UsageError
from drivers.tasks.questions import read_jsonl

QUESTION_KEYS = ("question", "problem", "prompt")
ANSWER_KEYS = (
    "ground_truth",
    "reward_model.ground_truth",
    "final_answer",
    "expected_answer",
    "target",
    "answer",
    "response",
    "solution",
)
RESPONSE_KEYS = ("response", "solution", "answer")
Form = Literal["r1_zero", "question_only"]
_LAST_LINE = re.compile(r"####([^\n#]+)\Z")
"""GSM8K states the answer like this; elsewhere #### is a heading."""


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a dataset to jsonl with `question` and `answer`, or restore the backup of a converted file."""

    source: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files (.jsonl, or .json holding a list), folders of such files, or one hub dataset with --hub."""
    output: str | None = None
    """File to write. Default: rewrite a single source file in place and keep its old content as FILE.backup."""
    hub: bool = False
    """Treat the source as a dataset on the Hugging Face hub (needs the extra `hub` and a network)."""
    subset: tuple[str, ...] = ()
    """Configurations of the dataset: `main` for openai/gsm8k. Default: its only one."""
    split: str = "train"
    """Split of the dataset."""
    question_key: str | None = None
    """Key of the question, for unknown layouts. Nested values: keys and list positions joined by dots, like
    `reward_model.ground_truth`."""
    answer_key: str | None = None
    """Key of the answer, for unknown layouts."""
    demonstrations: Form | None = None
    """Write demonstrations for sft.py, with the worked solution as `response` in the form of this reward.
    `r1_zero`: continues data/prompts/r1_zero.prompt; `question_only`: unchanged, the final answer in \\boxed{}."""
    response_key: str | None = None
    """Key of the worked solution. Default: the first of `response`, `solution` and `answer`."""
    skip_bad_lines: bool = False
    """Report and drop lines without a question or an answer. Default: such a line is an error."""
    restore: bool = False
    """Replace each source file with its FILE.backup."""


def convert_row(
    row: Mapping[str, Any], question_key: str | None = None, answer_key: str | None = None
) -> dict[str, Any]:
    """Return a row in our layout. Raise a ValueError that says what is missing."""
    _, question = _find_first(row, "question", question_key, QUESTION_KEYS)
    key, value = _find_first(row, "answer", answer_key, ANSWER_KEYS)
    return {"question": _to_text(question, "user"), "answer": _final_answer(key, value)}


def convert_demonstration(
    row: Mapping[str, Any],
    form: Form,
    question_key: str | None = None,
    answer_key: str | None = None,
    response_key: str | None = None,
) -> dict[str, Any]:
    r"""Return a row with its worked solution. Raise a ValueError that says what is missing.

    The response ends with the solution's own final answer; `answer` is the dataset's. `sft.py --correct-only`
    compares them.
    """
    converted = convert_row(row, question_key, answer_key)
    if converted["question"].rstrip().endswith("<think>"):
        raise ValueError("the question is a whole prompt that opens <think>: sft.py takes such a file as it is")
    _, value = _find_first(row, "worked solution", response_key, RESPONSE_KEYS)
    text = _to_text(value, "assistant").strip()
    thoughts, tag, rest = text.removeprefix("<think>").partition("</think>")
    tagged = re.search(r"<answer>(.*?)</answer>", rest, flags=re.DOTALL)
    final = (tagged and tagged.group(1).strip()) or _stated_answer(rest if tag else text)
    if final is None:
        raise ValueError("the worked solution states no final answer: none after ####, none in \\boxed{}")
    # Drop GSM8K's calculator annotations and its final #### line.
    worked = re.sub(r"<<[^<>\n]*>>", "", thoughts if tag else _LAST_LINE.sub("", text)).strip()
    if form == "r1_zero":
        response = f" {worked} </think> <answer> {final} </answer>"
    else:
        response = text if tag else worked
        response += "" if _boxed_answer(response) else f"\n\\boxed{{{final}}}"
    return {**converted, "response": response}


def _find_first(row: Mapping[str, Any], what: str, named: str | None, known: Sequence[str]) -> tuple[str, Any]:
    """Return the first key with a value, and the value."""
    for key in (named,) if named else known:
        value = _look_up(row, key)
        if value not in (None, "", []):
            return key, value
    raise ValueError(f"no {what} under {named or ', '.join(known)}; keys here: {sorted(row)}")


def _look_up(row: Any, key: str) -> Any:
    """Return the value of a key, or of keys and list positions joined by dots; None if there is no value."""
    if isinstance(row, Mapping) and key in row:
        return row[key]
    first, dot, rest = key.partition(".")
    if isinstance(row, list) and first.isdecimal() and int(first) < len(row):
        return _look_up(row[int(first)], rest) if dot else row[int(first)]
    return _look_up(row[first], rest) if dot and isinstance(row, Mapping) and first in row else None


def _to_text(value: Any, role: Literal["user", "assistant"]) -> str:
    """Return a value as text: a chat gives its last message of this role."""
    if isinstance(value, list):
        messages = [turn["content"] for turn in value if isinstance(turn, dict) and turn.get("role") == role]
        if not messages:
            raise ValueError(f"the chat has no message of the role `{role}`")
        return str(messages[-1])
    return str(value)


def _final_answer(key: str, value: Any) -> Any:
    r"""Return the answer in a text: after ####, else inside the last \boxed{}, else the whole text."""
    if not isinstance(value, str):
        return value
    stated = _stated_answer(value)
    if stated is not None:
        return stated
    if key == "solution" or "####" in value or r"\boxed" in value or r"\fbox" in value or not value.strip():
        raise ValueError(f"the {key} states no answer: none after ####, none in \\boxed{{}}")
    return value.strip()


def _stated_answer(text: str) -> str | None:
    r"""Return the text after #### on the last line, else inside the last \boxed{}, else None."""
    last = _LAST_LINE.search(text.strip())
    if last:
        answer = last.group(1).strip()
        return answer.replace(",", "") if re.fullmatch(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?", answer) else answer
    text = text if r"\boxed" in text else text.replace(r"\fbox", r"\boxed")  # a few solutions of MATH use it
    box = text[max(text.rfind(r"\boxed"), 0) :]
    bare = re.match(r"\\boxed([^a-zA-Z{}$\n][^{}$\n]*)\$", box)  # MATH has a few boxes without braces
    return _boxed_answer(box) or (bare.group(1).strip() if bare else None) or None


def _boxed_answer(text: str) -> str | None:
    r"""Return the text in the last \boxed{}, or None."""
    from grpo_core import extract_boxed_answer  # it loads torch, which --help does without

    return extract_boxed_answer(text)


def read_rows(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield `file:line` and the row for each row of a file or of every file of a folder."""
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix in (".json", ".jsonl")):
            yield from read_rows(file)
    elif path.suffix != ".json":
        for number, row in read_jsonl(path):
            yield f"{path}:{number}", row
    else:
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read as JSON ({error})") from error
        # Hendrycks MATH ships one object per file; others a list of objects.
        for number, row in enumerate(loaded if isinstance(loaded, list) else [loaded], start=1):
            if not isinstance(row, dict):
                raise UsageError(f"{path}: entry {number} is {type(row).__name__}; expected an object")
            yield (f"{path}[{number}]" if isinstance(loaded, list) else str(path)), row


def read_hub(name: str, subsets: Sequence[str], split: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a dataset on the hub, or of a folder in its layout."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            "--hub needs the package datasets; in this clone, run: .venv/bin/pip install -e '.[hub]'"
        ) from error
    for subset in subsets or (None,):
        try:
            loaded = load_dataset(name, subset, split=split)
        except Exception as error:  # the hub client raises many kinds of errors
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UsageError(f"--hub {name} (subset {subset}, split {split}): {reason}") from error
        for number, row in enumerate(loaded, start=1):
            yield f"{name}{f'/{subset}' if subset else ''}:{number}", row


def convert(config: ConvertConfig) -> Path:
    """Convert all rows, write them atomically, and return the file written."""
    if not config.source:
        raise UsageError("no source given: name a file, a folder, or a hub dataset with --hub")
    if config.response_key is not None and config.demonstrations is None:
        raise UsageError(f"--response-key {config.response_key}: has no effect without --demonstrations")
    if config.subset and not config.hub:
        raise UsageError(f"--subset {' '.join(config.subset)}: has no effect without --hub")
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for name in config.source:
        if not config.hub and not Path(name).exists():
            raise UsageError(f"{name}: no such file or folder")
        rows += read_hub(name, config.subset, config.split) if config.hub else read_rows(Path(name))
    rewrites_source = config.output is None
    if rewrites_source and (config.hub or len(config.source) > 1 or Path(config.source[0]).suffix != ".jsonl"):
        raise UsageError("--output is required: only a single .jsonl file can be rewritten in place")
    converted, problems = [], []
    keys = config.question_key, config.answer_key
    for where, row in rows:
        try:
            if config.demonstrations is None:
                result = convert_row(row, *keys)
            else:
                result = convert_demonstration(row, config.demonstrations, *keys, config.response_key)
            json.dumps(result, ensure_ascii=False).encode()  # raises for unpaired surrogates, which JSON can escape
            converted.append(result)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and not config.skip_bad_lines:
        raise UsageError(
            f"{len(problems)} of {len(rows)} lines cannot be converted (listed above) and nothing was written; "
            "drop them with --skip-bad-lines"
        )
    if not converted:
        raise UsageError("no line could be converted; nothing was written")
    target = Path(config.source[0] if config.output is None else config.output)
    _replace(target, converted)
    kind = "questions" if config.demonstrations is None else "demonstrations"
    print(f"{target}: {len(converted)} {kind}" + (f", {len(problems)} lines dropped" if problems else ""))
    return target


def _replace(target: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows and keep the old content as a backup; an existing backup is the original and stays."""
    backup = target.with_name(target.name + ".backup")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not backup.exists():
            shutil.copy2(target, backup)
        write_jsonl(target, rows)
    except OSError as error:
        raise UsageError(f"{target}: cannot write ({error.strerror or error})") from error


def restore(config: ConvertConfig) -> None:
    """Replace each source with its backup."""
    for name in config.source:
        backup = Path(name + ".backup")
        if not backup.exists():
            raise UsageError(f"{backup}: no such backup")
        backup.replace(name)
        print(f"{name}: restored from its backup")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and convert or restore."""
    config = tyro.cli(ConvertConfig, args=arguments)
    with exit_on_user_error("convert_dataset.py"):
        (restore if config.restore else convert)(config)


if __name__ == "__main__":
    main()
