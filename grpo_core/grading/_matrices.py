r"""Read matrices: every environment, any brackets around it, a factor before it, a transposition after it."""

import re
from collections.abc import Callable

from grpo_core.grading._answer import Answer
from grpo_core.grading._spelling import scan, unwrap

_MATRIX = re.compile(
    r"(.*?)\\begin\{(small|[pbBvV])?(matrix|array)\}(?:(?<=array\})\{[lcr| ]*\})?(.*)"
    r"\\end\{(small|[pbBvV])?(matrix|array)\}(.*)",
    re.DOTALL,
)
_BRACKETS = {("(", ")"): "matrix", ("[", "]"): "matrix", (r"\{", r"\}"): "matrix", ("|", "|"): "determinant"}
_TRANSPOSED = re.compile(r"\^(?:T|\{T\}|\\top|\{\\top\}|\{\\text\{T\}\}|\{\\math(?:sf|rm)\{T\}\})")


def read_matrix(text: str, parse: Callable[[str], Answer]) -> Answer | None:
    """Return a matrix with its factor, or None if the text is anything else.

    Args:
        text: a cleaned and tightened answer.
        parse: reads one entry.

    Returns:
        A `matrix` of rows, or a `determinant` for vertical bars.
    """
    found = _MATRIX.fullmatch(text) if text.count(r"\begin") == 1 else None
    if found is None or found[2] != found[5] or found[3] != found[6]:
        return None
    before, after, kind = found[1], found[7], "determinant" if (found[2] or "") in ("v", "V") else "matrix"
    for (left, right), bracketed in _BRACKETS.items():
        if before.endswith(left) and after.startswith(right):
            before, after, kind = before.removesuffix(left), after.removeprefix(right), bracketed
            break
    if (after and not _TRANSPOSED.fullmatch(after)) or not _is_factor(before):
        return None
    body = re.sub(r"\\\\\[-?[\d.]+(?:pt|em|ex|mm|cm)\]", r"\\\\", found[4])
    lines = [line.replace(r"\hline", "") for line in body.strip().removesuffix(r"\\").split(r"\\")]
    cells = [[parse(unwrap(entry)) for entry in line.split("&")] for line in lines]
    if after and len({len(row) for row in cells}) == 1:
        cells = [list(column) for column in zip(*cells, strict=True)]
    factor = re.sub(r"\\cdot$|\\times$|\*$", "", before)
    return Answer(kind, tuple(Answer("row", tuple(row)) for row in cells), factor + "1" if factor == "-" else factor)


_SYSTEM = re.compile(
    r"(?:\\\{)?\\begin\{(cases|array|aligned|matrix)\}(?:(?<=array\})\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL
)


def read_system(text: str) -> str:
    r"""Return the lines of `\begin{cases} x=1 \\ y=2 \end{cases}` joined by commas; other text unchanged."""
    found = _SYSTEM.fullmatch(text) if text.count(r"\begin") == 1 else None
    if found is None or "=" not in found[2] or not (found[1] == "cases" or text.startswith(r"\{")):
        return text
    lines = [line.strip().strip(",;") for line in found[2].strip().removesuffix(r"\\").split(r"\\")]
    is_list = all("=" in line and not re.search(r"\\(?:le|ge|text)|[<>,]", line) for line in lines)
    return ",".join(line.replace("&", "") for line in lines) if is_list else text


def read_transposed(text: str, parse: Callable[[str], Answer]) -> Answer | None:
    """Return a row in brackets with a transposition behind it as a column vector; None for any other text."""
    found = re.fullmatch(rf"[(\[]([^()\[\]&]+)[)\]]{_TRANSPOSED.pattern}", text)
    if found is None or "," not in found[1]:
        return None
    return Answer("matrix", tuple(Answer("row", (parse(entry),)) for entry in found[1].split(",")))


def _is_factor(text: str) -> bool:
    """Return whether a text before a matrix is a factor: no sum, no relation, no list."""
    signs = {"+", "=", "<", ">", ",", ";", ":", "&", "(", "[", "|", r"\cup", r"\in", "or", "and"}
    tokens = [(token, depth) for _, token, depth in scan(text.removeprefix("-"))]
    return all(depth == 0 or token not in (r"\begin",) for token, depth in tokens) and not any(
        depth == 0 and token in signs | {"-"} for token, depth in tokens
    )


def column(answer: Answer) -> tuple[Answer, ...]:
    """Return the entries of a column vector, or nothing if the answer is none."""
    if answer.kind != "matrix" or answer.text or any(len(row.parts) != 1 for row in answer.parts):
        return ()
    return tuple(row.parts[0] for row in answer.parts)
