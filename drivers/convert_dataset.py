r"""Common datasets as jsonl with `question` and `answer`: `python drivers/convert_dataset.py --help`.

Understood layouts, told by the keys of a line: Hendrycks MATH (`problem`, `solution` with the answer in \boxed{}),
GSM8K (`question`, `answer` that ends in `#### 18`), `prompt` or `question` with `response`, `ground_truth`, `target`,
`final_answer` or `answer`.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from drivers.checkpoint import write_jsonl
from drivers.config import exit_with
from drivers.data import read_jsonl
from drivers.errors import UsageError
from grpo_core import extract_boxed_answer

QUESTION_KEYS = ("question", "problem", "prompt")
ANSWER_KEYS = ("ground_truth", "final_answer", "target", "answer", "response", "solution")


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a dataset to jsonl with `question` and `answer`, or put a converted file's backup back."""

    source: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files (.jsonl, or .json holding a list), folders of such files, or one hub dataset with --hub."""
    output: str | None = None
    """File to write. Left out, a single source file is rewritten in place, its old content kept as FILE.backup."""
    hub: bool = False
    """The source is the name of a dataset on the Hugging Face hub (needs the extra `hub`, and a network)."""
    subset: str | None = None
    """Its configuration, `main` for openai/gsm8k."""
    split: str = "train"
    """Its split."""
    question_key: str | None = None
    """Key of the question, where the layout is none of the known ones."""
    answer_key: str | None = None
    """Key of the answer, likewise."""
    skip_bad_lines: bool = False
    """Report lines without a question or an answer, and leave them out; otherwise they are an error."""
    restore: bool = False
    """Put FILE.backup back in the place of each source file."""


def convert_row(
    row: Mapping[str, Any], question_key: str | None = None, answer_key: str | None = None
) -> dict[str, Any]:
    """One row in our layout. Raises ValueError, saying what is missing."""
    question = _first_of(row, (question_key,) if question_key else QUESTION_KEYS)
    answer = _first_of(row, (answer_key,) if answer_key else ANSWER_KEYS)
    if question is None:
        raise ValueError(f"no question under {question_key or ', '.join(QUESTION_KEYS)}; keys here: {sorted(row)}")
    if answer is None:
        raise ValueError(f"no answer under {answer_key or ', '.join(ANSWER_KEYS)}; keys here: {sorted(row)}")
    key, value = answer
    return {"question": _text_of(question[1]), "answer": _final_answer(key, value)}


def _first_of(row: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, Any] | None:
    return next(((key, row[key]) for key in keys if row.get(key) not in (None, "", [])), None)


def _text_of(question: Any) -> str:
    """A question that is a chat is the text of its last user message."""
    if isinstance(question, list):
        users = [turn["content"] for turn in question if isinstance(turn, dict) and turn.get("role") == "user"]
        if not users:
            raise ValueError("the prompt is a list without a message of the role `user`")
        return str(users[-1])
    return str(question)


def _final_answer(key: str, value: Any) -> Any:
    r"""What the text of an answer comes to: behind ####, else inside the last \boxed{}, else all of it."""
    if not isinstance(value, str):
        return value
    if "####" in value:
        answer = value.rsplit("####", 1)[1].strip()
        return answer.replace(",", "") if re.fullmatch(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?", answer) else answer
    boxed = extract_boxed_answer(value)
    if boxed is not None:
        return boxed
    if key == "solution":
        raise ValueError("the solution has no \\boxed{} answer")
    return value.strip()


def read_rows(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """`file:line` and row of each row of a file, or of every file of a folder."""
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix in (".json", ".jsonl")):
            yield from read_rows(file)
        return
    if path.suffix == ".json":
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read as JSON ({error})") from error
        # Hendrycks MATH ships one object per file; others a list of objects.
        for number, row in enumerate(loaded if isinstance(loaded, list) else [loaded], start=1):
            if not isinstance(row, dict):
                raise UsageError(f"{path}: entry {number} is {type(row).__name__}; an object is required")
            yield (f"{path}[{number}]" if isinstance(loaded, list) else str(path)), row
        return
    for number, row in read_jsonl(path):
        yield f"{path}:{number}", row


def read_hub(name: str, subset: str | None, split: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The rows of a dataset on the hub."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError("--hub needs the package datasets: pip install 'grpo_core[hub]'") from error
    try:
        loaded = load_dataset(name, subset, split=split)
    except Exception as error:  # the hub's client raises many kinds; all of them mean that there is no such data here
        raise UsageError(f"--hub {name} (subset {subset}, split {split}): {type(error).__name__}: {error}") from error
    for number, row in enumerate(loaded, start=1):
        yield f"{name}:{number}", row


def convert(config: ConvertConfig) -> Path:
    """Read, convert, write at once. Returns the file written."""
    if not config.source:
        raise UsageError("no source given: name a file, a folder, or a hub dataset with --hub")
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for name in config.source:
        if not config.hub and not Path(name).exists():
            raise UsageError(f"{name}: no such file or folder")
        rows += read_hub(name, config.subset, config.split) if config.hub else read_rows(Path(name))
    in_place = config.output is None
    if in_place and (config.hub or len(config.source) > 1 or Path(config.source[0]).suffix != ".jsonl"):
        raise UsageError("--output is required: only a single .jsonl file can be rewritten in place")
    converted, problems = [], []
    for where, row in rows:
        try:
            converted.append(convert_row(row, config.question_key, config.answer_key))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and not config.skip_bad_lines:
        raise UsageError(
            f"{len(problems)} of {len(rows)} lines cannot be converted (listed above), nothing was written; "
            "--skip-bad-lines leaves them out"
        )
    if not converted:
        raise UsageError("no line could be converted; nothing was written")
    target = Path(config.source[0] if config.output is None else config.output)
    _replace(target, converted)
    print(f"{target}: {len(converted)} questions" + (f", {len(problems)} lines left out" if problems else ""))
    return target


def _replace(target: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows in the target's place, with its old content kept; the first backup is the original, and stays."""
    backup = target.with_name(target.name + ".backup")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not backup.exists():
            shutil.copy2(target, backup)
        write_jsonl(target, rows)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror or error})") from error


def restore(config: ConvertConfig) -> None:
    """Put each source's backup back."""
    for name in config.source:
        backup = Path(name + ".backup")
        if not backup.exists():
            raise UsageError(f"{backup}: no such backup")
        backup.replace(name)
        print(f"{name}: restored from its backup")


def main(arguments: Sequence[str] | None = None) -> None:
    config = tyro.cli(ConvertConfig, args=None if arguments is None else list(arguments))
    try:
        if config.restore:
            restore(config)
        else:
            convert(config)
    except UsageError as error:
        exit_with("convert_dataset.py", error, status=2)


if __name__ == "__main__":
    main()
