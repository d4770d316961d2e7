"""Convert common datasets to jsonl with `question` and `answer`: `python drivers/convert_dataset.py --help`.

Each part of a row is recognized by its key (drivers/tasks/layouts.py). A row that is not understood is refused with a
reason. With --demonstrations the worked solution is kept as a response to train on.
"""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from drivers.common.arguments import parse_arguments
from drivers.common.atomic_files import write_texts
from drivers.common.cli import exit_on_user_error
from drivers.common.errors import UsageError
from drivers.tasks.layouts import KEYS, LAYOUTS, find_part, look_for, read_reply, read_row
from drivers.tasks.questions import shorten
from drivers.tasks.reference_answers import BadRowError, find_boxed_answer, find_stated_answer, strip_statement
from drivers.tasks.sources import Row, read_hub, read_rows

Form = Literal["r1_zero", "question_only"]
OUR_KEYS = ("question", "answer", "response")
N_SHOWN, N_CHARACTERS = 3, 240
"""Converted rows to print, and characters of each part."""


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a dataset to jsonl with `question` and `answer`, or restore the backup of a converted file."""

    source: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files (.jsonl, .json, .csv, .tsv, .parquet), folders of such files, or one hub dataset with --hub."""
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
    """Key of the worked solution. Default: the first of `response`, `solution`, `answer` and `output`."""
    skip_bad_lines: bool = False
    """Report and drop rows that are not understood. Default: such a row is an error."""
    deduplicate: bool = False
    """Write rows with the same question and answer once. Default: they are counted and kept."""
    restore: bool = False
    """Replace each source file with its FILE.backup."""


class Converted(NamedTuple):
    """A row in our layout, and the key that each part of it was read from."""

    row: dict[str, Any]
    keys: Mapping[str, str]


def convert_row(row: Mapping[str, Any], question_key: str | None = None, answer_key: str | None = None) -> Converted:
    """Return a row in our layout, with its other columns. Raise a BadRowError that says what is missing."""
    reading = read_row(row, question_key, answer_key)
    return Converted({"question": reading.question, "answer": reading.answer, **reading.others}, reading.keys)


def convert_demonstration(
    row: Mapping[str, Any],
    form: Form,
    question_key: str | None = None,
    answer_key: str | None = None,
    response_key: str | None = None,
) -> Converted:
    r"""Return a row with its worked solution. Raise a BadRowError that says what is missing.

    The response ends with the solution's own final answer; `answer` is the dataset's. `sft.py --correct-only`
    compares them.
    """
    converted, keys = convert_row(row, question_key, answer_key)
    if converted["question"].rstrip().endswith("<think>"):
        raise BadRowError("the question is a whole prompt that opens <think>: sft.py takes such a file as it is")
    solution = None if response_key else look_for(row, (*KEYS["worked solution"], "messages", "conversations"))
    key, value = solution or find_part(row, "worked solution", response_key)
    text = read_reply(key, value).strip()
    thoughts, tag, rest = text.removeprefix("<think>").partition("</think>")
    tagged = re.search(r"<answer>(.*?)</answer>", rest, flags=re.DOTALL)
    final = (tagged and tagged.group(1).strip()) or find_stated_answer(rest if tag else text)
    if final is None:
        raise BadRowError("the worked solution states no final answer: none after ####, none in \\boxed{}")
    # Drop GSM8K's calculator annotations and its final #### line.
    worked = re.sub(r"<<[^<>\n]*>>", "", thoughts if tag else strip_statement(text)).strip()
    if form == "r1_zero":
        response = f" {worked} </think> <answer> {final} </answer>"
    else:
        response = text if tag else worked
        response += "" if find_boxed_answer(response) else f"\n\\boxed{{{final}}}"
    kept = {name: value for name, value in converted.items() if name in OUR_KEYS or name != key}
    read_from = {part: name for part, name in keys.items() if (part, name) != ("nothing", key)}
    return Converted({**kept, "response": response}, {**read_from, "worked solution": key})


@dataclass
class Report:
    """Counts and samples of the rows that were read."""

    n_rows: int = 0
    n_written: int = 0
    n_repeated: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Number of refused rows by reason."""
    first_refused: dict[str, str] = field(default_factory=dict)
    """`file:line: message` of the first row that was refused for a reason."""
    keys: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of rows by part and the key that it was read from."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of rows by other column that was kept."""
    shown: list[dict[str, Any]] = field(default_factory=list)
    """Our keys of the first converted rows."""

    def refuse(self, where: str, error: BadRowError) -> None:
        """Count a refused row."""
        self.refused[error.reason] += 1
        self.first_refused.setdefault(error.reason, f"{where}: {error}")

    def refusals(self) -> list[str]:
        """Return a line per reason: the first row, and how many there are."""
        lines = (f"{self.first_refused[reason]}" + _and_others(n) for reason, n in self.refused.most_common())
        return [" ".join(line.split()) for line in lines]

    def __str__(self) -> str:
        n_refused = self.refused.total()
        parts = Counter[str]()
        for (part, _), n in self.keys.items():
            parts[part] += n
        read = (
            f"{part} from `{key}`" + (f" ({n})" if n < parts[part] or n < self.n_rows - n_refused else "")
            for (part, key), n in self.keys.items()
        )
        lines = [
            f"{_count(self.n_rows, 'row')} read, {self.n_written} written, {n_refused} refused, {self.n_repeated} "
            "repeat an earlier question with its answer",
            f"read as: {', '.join(read)}",
            *([f"other columns, kept: {', '.join(self.others)}"] if self.others else []),
            *(
                ", ".join(f"{name}: {shorten(value, N_CHARACTERS)}" for name, value in row.items())
                for row in self.shown
            ),
        ]
        return "\n".join(lines)


def _and_others(n_rows: int) -> str:
    return f" ({n_rows} rows like this)" if n_rows > 1 else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def convert_rows(config: ConvertConfig, rows: Iterable[Row], report: Report) -> Iterator[str]:
    """Yield each converted row as a line of JSON, and write down in `report` what was found."""
    keys, seen = (config.question_key, config.answer_key), set[bytes]()
    for where, row in rows:
        report.n_rows += 1
        try:
            if config.demonstrations is None:
                converted = convert_row(row, *keys)
            else:
                converted = convert_demonstration(row, config.demonstrations, *keys, config.response_key)
            line = _to_json(converted.row)
        except BadRowError as error:
            report.refuse(where, error)
            continue
        report.keys.update(converted.keys.items())
        report.others.update(name for name in converted.row if name not in OUR_KEYS)
        essence = json.dumps([converted.row.get(name) for name in OUR_KEYS])
        digest = blake2b(essence.encode(), digest_size=16).digest()
        is_repeated = digest in seen
        report.n_repeated += is_repeated
        seen.add(digest)
        if is_repeated and config.deduplicate:
            continue
        report.n_written += 1
        if len(report.shown) < N_SHOWN:
            report.shown.append({name: converted.row[name] for name in OUR_KEYS if name in converted.row})
        yield line


def _to_json(row: Mapping[str, Any]) -> str:
    try:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        line.encode()
    except TypeError as error:  # bytes, images and dates of parquet files
        raise BadRowError("a column cannot be written as JSON", f" ({error})") from error
    except UnicodeEncodeError as error:
        raise BadRowError("contains an unpaired surrogate, which is no character") from error
    return line


def check_refused(config: ConvertConfig, report: Report) -> None:
    """Print why rows were refused. Raise a UsageError unless rows are left and --skip-bad-lines drops the others."""
    refusals, n_refused = report.refusals(), report.refused.total()
    hint = ""
    if any(reason.startswith(("no question under", "no answer under")) for reason in report.refused):
        hint = "; name the keys of an unknown layout with --question-key and --answer-key; --help lists the known ones"
    if len(refusals) == 1 and n_refused == report.n_rows:
        raise UsageError(f"{refusals[0]}; nothing was written{hint}")
    for line in refusals:
        print(line, file=sys.stderr)
    if n_refused and not config.skip_bad_lines:
        raise UsageError(
            f"{n_refused} of {report.n_rows} lines cannot be converted (listed above by reason) and nothing was "
            f"written; drop them with --skip-bad-lines{hint}"
        )
    if n_refused == report.n_rows:
        raise UsageError(f"{' '.join(config.source)}: no line could be converted; nothing was written")


def convert(config: ConvertConfig) -> Path:
    """Convert all rows, write them atomically, report what was found, and return the file written."""
    if not config.source:
        raise UsageError("no source given: name a file, a folder, or a hub dataset with --hub")
    if config.response_key is not None and config.demonstrations is None:
        raise UsageError(f"--response-key {config.response_key}: has no effect without --demonstrations")
    if config.subset and not config.hub:
        raise UsageError(f"--subset {' '.join(config.subset)}: has no effect without --hub")
    for name in config.source:
        if not config.hub and not Path(name).exists():
            raise UsageError(f"{name}: no such file or folder")
    rewrites_source = config.output is None
    if rewrites_source and (config.hub or len(config.source) > 1 or Path(config.source[0]).suffix != ".jsonl"):
        raise UsageError("--output: is missing; without it, only a single .jsonl file can be rewritten in place")
    rows = chain.from_iterable(
        read_hub(name, config.subset, config.split) if config.hub else read_rows(Path(name)) for name in config.source
    )
    target, report = Path(config.source[0] if config.output is None else config.output), Report()
    _replace(target, convert_rows(config, rows, report), lambda: check_refused(config, report))
    print(report)
    kind = "question" if config.demonstrations is None else "demonstration"
    closing = f"{target}: {_count(report.n_written, kind)}"
    if report.refused:
        closing += f", {_count(report.refused.total(), 'line')} dropped"
    if report.n_repeated:
        effect = "left out" if config.deduplicate else "kept (--deduplicate leaves them out)"
        closing += f", {_count(report.n_repeated, 'repeated line')} {effect}"
    print(closing)
    return target


def _replace(target: Path, lines: Iterator[str], check: Callable[[], None]) -> None:
    """Write the lines and keep the old content as a backup; an existing backup is the original and stays.

    `check` is called after the last line. If it raises, nothing is written.
    """

    def write_checked() -> Iterator[str]:
        yield from lines
        check()
        backup = target.with_name(target.name + ".backup")
        if target.exists() and not backup.exists():
            shutil.copy2(target, backup)

    is_new_folder = not target.parent.exists()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_texts(target, write_checked())
    except OSError as error:
        raise UsageError(f"{target}: cannot write ({error.strerror or error})") from error
    finally:
        if is_new_folder and not target.exists():
            with suppress(OSError):
                target.parent.rmdir()


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
    listed = "\n".join(f"  {names}: {keys}" for names, keys in LAYOUTS.items())
    description = f"{ConvertConfig.__doc__}\n\nKnown layouts:\n{listed}"
    words = sys.argv[1:] if arguments is None else arguments
    with exit_on_user_error("convert_dataset.py"):
        config: ConvertConfig = parse_arguments(ConvertConfig, words, description=description)
        (restore if config.restore else convert)(config)


if __name__ == "__main__":
    main()
