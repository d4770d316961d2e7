r"""Read words: sentences around an answer, phrases with a meaning, options, statement numbers, and prose."""

import re

from grpo_core.grading._clock import read_date
from grpo_core.grading._labels import is_label
from grpo_core.grading._names import WORDS

# Sentences around an answer -------------------------------------------------------------------------------------

_WHAT = (
    r"(?:final |correct |right |exact |required |numerical )?"
    r"(?:answer|result|solution(?: set)?|value|total|option|choice)"
)
_OF = r"(?: of \$?[\\\w]{1,12}\$?)?"
_SUBJECT = r"(?:it|they|he|she|this|that|there|we|you|i)"
_SAYS = (
    rf"(?:{_SUBJECT}|(?-i:[A-Z])[a-z]+|the [a-z]+)(?: (?:will|would|can|must|should))?"
    r" (?:take|make|have|need|get|earn|pay|cost|sell|buy|spend|save|eat|use|weigh|be|read|run|walk|bake|score)s?"
    rf"|{_SUBJECT} (?:has|had|got|ate|made|sold|bought|spent|saved|took|paid|used)|(?-i:[A-Z])[a-z]+ (?:has|had)"
)
_NEVER = r"(?:not|never|wrong|incorrect|false|minus|negative|opposite|twice|half|double|least|most|less|fewer)"
_THE = rf"the (?:(?!{_NEVER}\b)[a-z]+ ){{1,7}}(?:is|are|was|were|equals)"  # the number of apples is
_LEAD = re.compile(
    r"\s*(?:\\text\s*\{\s*)?"
    r"(?:(?:so|thus|hence|therefore|finally),? )?"
    rf"(?:(?:the |my |our )?{_WHAT}{_OF} ?(?:is|are|equals|=|:)|(?:it|this|that) is|it's|they are|there (?:is|are)"
    r"|a total of|in total,?|ans(?:wer)?\.?:|we (?:find|obtain)|#{2,4}"
    r"|(?:the )?(?:points?|vector|ordered pair|interval|set) ?(?=[(\[{\\}])"
    r"|答案(?:是|为|[:：])|答[:：]|故选[:：]?|选[:：]?(?=\s*[A-D])"
    rf"|(?:{_SAYS}|{_THE})(?= \\?\$?\d)|(?:so|thus|hence|therefore),?(?= \\?\$?\d))"
    r"\s*:?\s*(?P<close>\})?\s*",
    re.IGNORECASE,
)


_NAMED = re.compile(r"\s*(?:\\text\s*\{\s*)?([A-Za-z][A-Za-z ]{3,40}) ?: ?\}?\s*(?=[-\\$\d])")  # `Speed: 12`
_FOR_ALL = re.compile(
    r"[,\s]*(?:\\text\s*\{\s*)?\bfor (?:all|any|every)(?: reals?(?: numbers?)?)?\s*\}?\s*"
    r"\$?[a-z]\$?(?:\s*\\in\s*\\mathbb\{R\})?\}?\.?\s*$"
)


def without_sentence(text: str) -> str:
    r"""Remove fixed words around an answer, such as `The answer is` and `for all x`; any other word stays.

    A phrase that opens `\text{` and does not close it leaves the command to the rest.
    """
    text = _FOR_ALL.sub("", text) if "for " in text else text
    text = re.sub(r" is (?:the|my|our) (?:final |correct )?answer\.?\s*$", "", text)
    start = text.lstrip()[:5]
    if start[:1] == "=":
        text = text.lstrip()[1:].lstrip()
    elif not (start[:1].isalpha() or start[:1] == "#" or start == "\\text"):
        return text
    if (named := _NAMED.match(text)) and is_label(named[1]):
        return text[named.end() :]
    if not (found := _LEAD.match(text)) or found.end() == len(text):
        return text
    opened = found[0].lstrip().startswith("\\text")
    return (r"\text{" if opened and not found["close"] else "") + text[found.end() :]


# Phrases with a meaning -----------------------------------------------------------------------------------------

_REALS = (
    r"(?:x (?:is|can be) )?(?:the )?(?:set of )?(?:all |any |every )(?:the )?(?:reals?|real (?:numbers?|values?|x)|x)"
)
_PHRASES = [
    (re.compile(pattern, re.IGNORECASE), meaning)
    for pattern, meaning in (
        (rf"{_REALS}|(?:全体|一切|任意|所有)实数|实数集", r"\\mathbb{R}"),
        (rf"{_REALS},? (?:except|other than|excluding)(?: for)? (?:x ?= ?)?([^,]+)", r"\\mathbb{R}\\setminus\\{\1\\}"),
        (r"(?:the )?(?:set of )?all (?:the )?integers", r"\\mathbb{Z}"),
        (r"no solutions?|(?:the )?(?:empty|null) set|无解|空集", r"\\emptyset"),
        (r"dne|it does not exist", "does not exist"),
        (rf"yes,? {_SUBJECT} (?:is|are|does|do|can|will|has|have|was)", "yes"),
        (rf"no,? {_SUBJECT} (?:is|are|does|do|can|will|has|have|was)(?: ?not|n't)|no,? {_SUBJECT} cannot", "no"),
        (r"(?:option|choice) ?\(?((?-i:[A-J]))\)?", r"\1"),
        (r"(\d+(?:\.\d+)?) to (\d+(?:\.\d+)?)", r"\1 : \2"),
    )
]
_BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16", "binary": "2", "octal": "8",
}  # fmt: skip
_NUMERAL = re.compile(
    r"\(?(?P<digits>\d[0-9A-Fa-f]*(?:\.[0-9A-Fa-f]+)?)\)? ?"
    r"(?:_ ?\{?\(? ?(?:base ?)?(?P<sub>\d{1,2}|[a-z]+) ?\)?\}?|\(?(?:in )?base[ -]?(?P<base>\d{1,2}|[a-z]+)\)?)"
)


def read_phrase(text: str) -> str | None:
    """Return the meaning of a phrase as an expression, or None if the words have no fixed meaning.

    Args:
        text: a cleaned answer without text commands.

    Returns:
        LaTeX for all real numbers and for no solution, a date, or a word in its plain form.
    """
    if text[:1].isalpha() or " to " in text:
        for pattern, meaning in _PHRASES:
            if found := pattern.fullmatch(text):
                return found.expand(meaning)
    if ("_" in text or "base" in text) and (found := _NUMERAL.fullmatch(text)):
        base = found["sub"] or found["base"]
        base = _BASES.get(base, base)
        return f"{found['digits'].upper()}_{{{base}}}" if base.isdigit() and 2 <= int(base) <= 36 else None
    return read_date(text) if "\\" not in text and len(text) < 40 else None


# Options and statements -----------------------------------------------------------------------------------------

_OPTION = re.compile(r"\(?([A-J]) ?[).:] ?(.+)")
_NO_TEXT = re.compile(r"\(?[A-J] ?[).:]|(?:or|and|not|nor)\b|[,;/&=<>+|]|\\(?:cup|cap|cdot|times|le|ge|or|and)\b")


def read_option(text: str) -> tuple[str, str] | None:
    """Return the letter and the text of an option, such as `C. 1-i`; None for several options.

    Args:
        text: a cleaned answer without text commands.

    Returns:
        The letter, and what stands behind it.
    """
    found = _OPTION.fullmatch(text)
    return None if not found or _NO_TEXT.match(found[2]) else (found[1], found[2])


_STATEMENT = r"(?:\\textcircled\{(\d{1,2})\}|\((\d)\))"
_STATEMENTS = re.compile(rf"(?:{_STATEMENT}(?: ?(?:,|and|,? and)? ?))+")


def read_statements(text: str) -> list[str]:
    r"""Return the numbers of statements: circled, or several in parentheses. `(1)(3)` is no product.

    Args:
        text: a cleaned answer.

    Returns:
        The numbers in ascending order; nothing if the text is anything else.
    """
    if (")" not in text and r"\textcircled" not in text) or not _STATEMENTS.fullmatch(text):
        return []
    numbers = sorted(circled or enclosed for circled, enclosed in re.findall(_STATEMENT, text))
    return numbers if r"\textcircled" in text or len(numbers) > 1 else []


# Prose ----------------------------------------------------------------------------------------------------------


def is_prose(text: str) -> bool:
    """Return whether a text has a word: four letters that name no function, or three if it is only letters."""
    if "\\" in text or text.casefold() == "no":
        return "\\" not in text
    if not text.isascii() and re.search(r"[^\W\d_a-zA-Z]", text):
        return True
    shortest = 3 if re.fullmatch(r"[A-Za-z ,.']+", text) else 4
    return any(len(word) >= shortest and word not in WORDS for word in re.findall("[A-Za-z]+", text))


_ARTICLES = {"a", "an", "the"}
_STEMS = {"converges": "convergent", "converge": "convergent", "diverges": "divergent", "diverge": "divergent"}


def same_words(first: str, second: str) -> bool:
    """Return whether two texts have the same words; case, articles, plurals and spaces in Chinese do not count."""
    return first.casefold() == second.casefold() or _key(first) == _key(second)


def _key(text: str) -> list[str]:
    if not text.isascii() and re.search("[\u4e00-\u9fff]", text):
        return [re.sub(r"\s", "", text.casefold())]
    words = [word for word in re.split(r"[\s,]+", text.casefold().strip(".!")) if word and word not in _ARTICLES]
    words = [_STEMS.get(word, word) for word in words]
    if len(words) == 2 and sum(word.endswith("ly") for word in words) == 1:
        words.sort(key=lambda word: not word.endswith("ly"))
    return [word[:-1] if re.search(r"[a-z]{3}[a-rt-z]s$", word) and word[-2] not in "iu" else word for word in words]
