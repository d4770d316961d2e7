r"""Parse a mathematical expression in LaTeX or plain text into a tree.

The parser knows the notation of final answers and rejects everything else, including ambiguous notation. It never
backtracks, so its time is linear in the length of the text. The length, the nesting and the digits of a number are
limited. A library parser is too slow here: latex2sympy needs a second for twelve nested parentheses, and doubles with
each.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, NoReturn

from grpo_core.grading._names import DECORATIONS, FUNCTIONS, GREEK, INVERSES, NO_FACTORS, WORDS

MAX_CHARS = 1000
"""Longer texts are not parsed."""

MAX_DEPTH = 24
"""Deepest nesting of brackets, arguments and exponents."""

MAX_DIGITS = 90
"""Most digits of one number. Inexact values must agree in more digits, so no decimal equals an irrational number."""

_PAIRS = {"(": ")", "[": "]", "{": "}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:\\overline\{\d+\})?|\.\d+(?:\\overline\{\d+\})?)|(\\?[A-Za-z]+)|([-+*/^_()\[\]{}|!]))"
)
_REPEATING = re.compile(r"(\d*)\.?(\d*)\\overline\{(\d+)\}")


class Unreadable(ValueError):
    """The text is not an expression that this parser knows, or it exceeds a limit."""


class Node(NamedTuple):
    """An expression: its kind, its operands, and the name of a symbol or the value of a number."""

    kind: str
    operands: tuple["Node", ...] = ()
    name: str = ""
    value: Fraction = Fraction(0)


_MINUS_ONE = Node("negative", (Node("number", value=Fraction(1)),))


@lru_cache(maxsize=4096)
def read(text: str) -> Node:
    r"""Return the expression that a LaTeX or plain text denotes.

    Args:
        text: an expression whose spelling `_spelling.clean` has already unified.

    Returns:
        The tree of the expression.

    Raises:
        Unreadable: the text is not an expression, is ambiguous, or is too long or too deeply nested.
    """
    reader = _Reader(_tokenize(text))
    node = reader.sum()
    if reader.peek():
        raise Unreadable(f"stray {reader.peek()!r}")
    return node


def _tokenize(text: str) -> list[str]:
    """Split a text into numbers, commands, single letters and marks; a word that is not a function becomes letters."""
    if len(text) > MAX_CHARS:
        raise Unreadable("too long")
    tokens: list[str] = []
    position, text = 0, text.rstrip()
    while position < len(text):
        found = _TOKEN.match(text, position)
        if not found:
            raise Unreadable(f"unknown sign {text[position]!r}")
        number, word, mark = found.groups()
        if word and not word.startswith("\\"):
            tokens += _letters(word)
        else:
            tokens.append(number or word or mark)
        position = found.end()
    return tokens


def _letters(word: str) -> list[str]:
    """Return a run of letters as a function, pi, or a product of at most three variables."""
    if word in WORDS:
        return ["\\surd" if word == "sqrt" else f"\\{word}"]
    if len(word) > 3 or any(word.startswith(name) for name in WORDS):
        raise Unreadable(f"{word!r} is a word")
    return list(word)


class _Reader:
    """A recursive-descent parser; every recursion goes through `_descend`, which counts the depth."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def peek(self, ahead: int = 0) -> str:
        """Return the next token, or an empty string at the end."""
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else ""

    def take(self) -> str:
        """Consume and return the next token."""
        token = self.peek()
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        """Consume `token`, or raise `Unreadable`."""
        if self.take() != token:
            raise Unreadable(f"needs {token!r}")

    def _descend(self, part: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        node = part()
        self.depth -= 1
        return node

    def sign(self) -> int:
        """Parse the signs before a term and return their product."""
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        return sign

    def sum(self) -> Node:
        """Parse terms joined by plus and minus."""
        terms = [self.signed(self.product)]
        while self.peek() in ("+", "-"):
            terms.append(self.signed(self.product))
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def signed(self, part: Callable[[], Node]) -> Node:
        """Parse a part with the signs before it."""
        sign = self.sign()
        node = part()
        return node if sign > 0 else Node("negative", (node,))

    def product(self) -> Node:
        """Parse factors joined by times, divided by, or nothing."""
        factors = [self.power()]
        after_slash = False
        while True:
            token = self.peek()
            if token in ("*", "\\cdot", "\\times"):
                self.take()
                factors.append(self.signed(self.power))
                after_slash = False
            elif token in ("/", "\\div"):
                self.take()
                divisor = self.signed(self.power)
                factors.append(Node("inverse", (divisor,)))
                after_slash = divisor.kind != "number"
            elif self.starts_factor(token):
                if after_slash:
                    raise Unreadable("1/ab is ambiguous")
                factors.append(self.power())
                if token == "{" and factors[-1].kind == "number":
                    raise Unreadable("3{7} is typeset as 37")
            else:
                return factors[0] if len(factors) == 1 else Node("multiply", tuple(factors))

    def starts_factor(self, token: str) -> bool:
        """Return whether a factor can follow without a sign. A number cannot: `x2` and `1 2` are not products."""
        return token in ("(", "[", "{") or ((token.isalpha() or token[:1] == "\\") and token not in NO_FACTORS)

    def power(self) -> Node:
        """Parse an atom with factorials and at most one exponent."""
        node = self._descend(self.atom)
        while self.peek() == "!":
            self.take()
            node = Node("factorial", (node,))
        if self.peek() != "^":
            return node
        self.take()
        if self.peek() == "\\circ":
            self.take()
            return Node("multiply", (node, Node("degree")))
        node = Node("power", (node, self._descend(self.script)))
        if self.peek() in ("^", "!"):
            raise Unreadable("double exponent")
        return node

    def script(self) -> Node:
        """Parse an exponent: a group, or one signed number or letter."""
        if self.peek() in ("{", "("):
            return self.group()
        return self.signed(lambda: self._descend(self.single))

    def single(self) -> Node:
        r"""Parse an atom without a mixed number: in `x^2\frac{1}{2}` the exponent is 2."""
        return _literal(self.take()) if self.peek()[:1].isdigit() else self.atom()

    def group(self) -> Node:
        """Parse a bracketed sum."""
        opening = self.take()
        node = self._descend(self.sum)
        self.expect(_PAIRS[opening])
        return node

    def atom(self) -> Node:
        """Parse a number, a symbol, a bracketed sum, or a command with its arguments."""
        token = self.peek()
        if token in ("(", "[", "{"):
            return self.group()
        if token in _PAIRS:
            return Node({"|": "absolute", "\\lfloor": "floor", "\\lceil": "ceiling"}[token], (self.group(),))
        self.take()
        if token[:1].isdigit() or token[:1] == ".":
            return self.number(token)
        if token.isalpha():
            return self.symbol(token)
        return self.command(token)

    def number(self, token: str) -> Node:
        """Parse a literal; a proper fraction after it makes a mixed number, a subscript a numeral of another base."""
        if self.peek() == "_":
            return self.symbol(token)
        whole = _literal(token)
        if self.peek() == "\\frac":
            self.take()
            top, bottom = self.argument(), self.argument()
            if self.peek() == "^":
                raise Unreadable("an exponent of a mixed number")
            if not (top.kind == bottom.kind == "number"):
                return Node("multiply", (whole, top, Node("inverse", (bottom,))))
        elif self.peek().isdigit() and self.peek(1) == "/" and self.peek(2).isdigit():
            top, _, bottom = _literal(self.take()), self.take(), _literal(self.take())
        else:
            return whole
        integers = all(part.value.denominator == 1 for part in (whole, top, bottom))
        if "." in token or not integers or not 0 < top.value < bottom.value:
            raise Unreadable("neither a mixed number nor a product")
        return Node("number", value=whole.value + top.value / bottom.value)

    def argument(self) -> Node:
        """Parse an argument of a command: a group, one digit, or one symbol."""
        token = self.peek()
        if token == "{":
            return self.group()
        if token.isdigit():
            if len(token) > 1:
                self.tokens[self.position : self.position + 1] = [token[0], token[1:]]
            return _literal(self.take())
        if token.isalpha() or token == "\\pi":
            return self._descend(self.atom)
        raise Unreadable("needs an argument")

    def symbol(self, name: str) -> Node:
        """Return a variable with its subscript; `e` and `i` are constants."""
        if self.peek() == "_":
            self.take()
            name += "_" + self.raw()
        return Node("constant" if name in ("e", "i") else "symbol", name=name)

    def raw(self) -> str:
        """Consume the next group or token and return its text."""
        if self.peek() != "{":
            token = self.take()
            return token if token[-1:].isalnum() else _refuse("needs a subscript")
        self.take()
        inner = []
        while self.peek() not in ("{", "}", ""):
            inner.append(self.take())
        self.expect("}")
        return "".join(inner)

    def command(self, token: str) -> Node:
        """Parse the arguments of a LaTeX command and return its expression."""
        name = token[1:]
        if name == "frac":
            top, bottom = self.argument(), self.argument()
            return Node("multiply", (top, Node("inverse", (bottom,))))
        if name == "binom":
            return Node("binomial", (self.argument(), self.argument()))
        if name == "sqrt":
            return self.root()
        if name == "surd":
            inner = self.group() if self.peek() in ("(", "{") else self._descend(self.single)
            return Node("root", (Node("number", value=Fraction(2)), inner))
        if name in FUNCTIONS:
            return self.function(name)
        if name == "pi":
            return Node("constant", name=name)
        if name in GREEK:
            return self.symbol(token)
        if token in DECORATIONS:
            return Node("symbol", name=f"{token} {self.raw()}")
        return _refuse(f"unknown command {token!r}")

    def root(self) -> Node:
        r"""Parse a root with an optional index in brackets; an unbraced `\sqrt12` is ambiguous."""
        index = self.group() if self.peek() == "[" else Node("number", value=Fraction(2))
        if self.peek().isdigit() and len(self.peek()) > 1:
            raise Unreadable("an unbraced root")
        return Node("root", (index, self.group() if self.peek() == "(" else self.argument()))

    def function(self, name: str) -> Node:
        """Parse a named function; without brackets, its argument ends at the next sign or function."""
        base: tuple[Node, ...] = ()
        if name == "log":
            base = (Node("symbol", name="the base of log"),)
            if self.peek() == "_":
                self.take()
                base = (self.argument(),)
        exponent: Node | None = None
        if self.peek() == "^":
            self.take()
            exponent = self._descend(self.script)
            if exponent == _MINUS_ONE and name in INVERSES:
                name, exponent = INVERSES[name], None
            elif exponent.kind != "number":
                raise Unreadable("a negative or symbolic power of a function")
        if self.peek() in ("(", "{", "["):
            inner = self.group()
        else:
            factors = [self._descend(self.power)]
            while self.starts_factor(self.peek()) and self.peek()[1:] not in FUNCTIONS and self.peek() != "(":
                factors.append(self._descend(self.power))
            inner = Node("multiply", tuple(factors))
        node = Node("function", (inner, *base), name)
        return node if exponent is None else Node("power", (node, exponent))


def _refuse(reason: str) -> NoReturn:
    raise Unreadable(reason)


def _literal(token: str) -> Node:
    """Return the exact value of a decimal, including its repeating part."""
    if len(token) > MAX_DIGITS:
        raise Unreadable("too many digits")
    repeating = _REPEATING.fullmatch(token)
    if repeating is None:
        return Node("number", value=Fraction(token))
    whole, fixed, period = repeating.groups()
    if "." not in token:
        raise Unreadable("a repeating integer")
    value = Fraction(f"{whole or 0}.{fixed or 0}") + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
    return Node("number", value=value)
