"""Laws of grading, with fractions and sympy as the oracles."""

import re
from fractions import Fraction

import sympy
from hypothesis import assume, example, given
from hypothesis import strategies as st

from grpo_core.grading.answers import answers_match, extract_boxed_answer, is_right, normalize_answer
from grpo_core.grading.rewards import question_only_reward_fn, r1_zero_reward_fn

PIECES = [
    "\\frac", "{", "}", "(", ")", "[", "]", "\\{", "\\}", "1", "2", "12", "0", ".", ",", " ", "x", "y", "e", "i",
    "\\pi", "\\sqrt", "^", "_", "-", "+", "/", "*", "=", "<", "\\le", "\\cup", "\\text{ cm}", "\\text{",
    "%", "$", "\\$", "^\\circ", "\\pm", "\\sin", "\\log", "!", "|", "\\binom", "\\left", "\\right", "\\overline{3}",
    " or ", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\infty", "½", "²", "yes", " apples",
    "\\", "\\boxed{", "1,234", "1e5", "\\lfloor", "\\rfloor", "'", "∞", "９", "π", "</think> <answer>", "</answer>",
    "<answer>",
]  # fmt: skip
SOUP = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
TEXT = st.text(max_size=200) | SOUP
ANSWERS = st.sampled_from(
    [
        "37",
        "-0.5",
        r"\frac{1}{2}",
        r"2\sqrt{3}",
        "x^2+1",
        "(1,2]",
        r"\{1,2\}",
        "yes",
        r"5\text{ cm}",
        r"50\%",
        "y=7",
        r"\pi",
        "1,3",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        r"x\ge 2",
        "1,234",
    ]
)
RATIONALS = st.fractions(min_value=-200, max_value=200, max_denominator=60)


@given(TEXT, TEXT)
def test_symmetric(first, second):
    assert answers_match(first, second) == answers_match(second, first)


@given(ANSWERS, ANSWERS)
def test_only_the_same_answer_matches(first, second):
    """No two of these mean the same."""
    assert answers_match(first, second) == (first == second)


@given(TEXT)
def test_reflexive(text):
    assert answers_match(text, text) == bool(text.strip())


WRAPPERS = [
    "{}",
    " {} ",
    "\n{}\t",
    "${}$",
    "$${}$$",
    r"\({}\)",
    r"\[{}\]",
    r"\boxed{{{}}}",
    "{}.",
    "{{{}}}",
    r"$\boxed{{{}}}$.",
    r"\displaystyle {}",
    r"\,{}\;",
]


@given(ANSWERS, ANSWERS, st.lists(st.sampled_from(WRAPPERS), max_size=3))
def test_wrappers_change_nothing(first, second, wrappers):
    wrapped = first
    for wrapper in wrappers:
        assume("$" not in wrapped or "$" not in wrapper)  # dollars do not nest
        assume(not (wrapper.endswith(".") and wrapped.rstrip().endswith(".")))  # two full stops are no wrapper
        wrapped = wrapper.format(wrapped)
    assert answers_match(wrapped, second) == answers_match(first, second)
    assert normalize_answer(wrapped) == normalize_answer(first)


@given(TEXT, TEXT)
@example("</think> <answer>" * 3, "37")
def test_rewards_never_raise_and_are_zero_or_one(response, gold):
    assume(gold.strip())
    for text in (response, f"</think> <answer> {response} </answer>", rf"\boxed{{{response}}}"):
        for reward_fn in (r1_zero_reward_fn, question_only_reward_fn):
            result = reward_fn(text, gold)
            assert set(result) == {"reward", "format_reward", "answer_reward"}
            assert all(type(value) is float and value in (0.0, 1.0) for value in result.values())
            assert result["reward"] == result["answer_reward"] <= result["format_reward"]


@given(st.text(alphabet="ab{}\\ ", max_size=30))
def test_a_boxed_answer_is_a_balanced_part(text):
    boxed = extract_boxed_answer(rf"{text}\boxed{{37}} end")
    assert boxed == "37"
    inner = extract_boxed_answer(text)
    assert inner is None or inner in text


def spellings(value):
    """Ways to write a rational; each names the same number to a reader."""
    top, bottom, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    yield f"{value.numerator}/{bottom}"
    yield rf"{sign}\frac{{{top}}}{{{bottom}}}"
    yield rf"\dfrac{{{value.numerator}}}{{{bottom}}}"
    yield rf"{sign}\tfrac {{{3 * top}}} {{{3 * bottom}}}"
    yield rf"\left({sign}\frac{{{top}}}{{{bottom}}}\right)"
    yield f"{sign}{top} / {bottom}".replace("-", "−")
    if top > bottom > 1:
        yield rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"
        yield f"{sign}{top // bottom} {top % bottom}/{bottom}"
    if top < 10 and bottom < 10:
        yield rf"{sign}\frac{top}{bottom}"
    if bottom == 1:
        yield from (
            f"{value.numerator}.0",
            f"{sign}00{top}",
            rf"{value.numerator}\text{{ cm}}",
            f"${value.numerator}$.",
        )
    if 10**6 % bottom == 0:
        yield format(value.numerator / bottom, ".6f")
        yield rf"{value * 1000 / 1} \times 10^{{-3}}" if (value * 1000).denominator == 1 else f"{float(value)}"


ENCLOSING = ["{}", "({})", "-({})", r"\frac{{{}}}{{1}}", "({})^1", "|{}|", r"\sqrt{{({})^2}}", "x+{}-x", "{}+0i"]


@given(RATIONALS, RATIONALS, st.data())
def test_a_rational_matches_its_spellings_and_no_other(first, second, data):
    one, same = (data.draw(st.sampled_from(list(spellings(first)))) for _ in range(2))
    other = data.draw(st.sampled_from(list(spellings(second))))
    assert answers_match(one, same)
    assert answers_match(one, other) == (first == second)


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_thousands_separators(first, second):
    for spelling in (
        f"{first:,}",
        f"{first:,}".replace(",", "{,}"),
        f"{first:,}".replace(",", r"\,"),
        f"\\${first:,}",
    ):
        assert answers_match(spelling, first)
        assert answers_match(spelling, second) == (first == second)


@given(st.lists(RATIONALS, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_order_counts_in_tuples_only(values, random):
    shuffled = random.sample(values, len(values))
    first, second = (",".join(map(str, numbers)) for numbers in (values, shuffled))
    assert answers_match(rf"\{{{first}\}}", rf"\{{{second}\}}")
    assert answers_match(first.replace(",", ", "), second.replace(",", ", "))
    assert answers_match(f"({first})", f"({second})") == (values == shuffled)
    assert not answers_match(f"({first})", f"[{second}]")


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 3), st.integers(0, 3)), st.integers(-9, 9).filter(bool), min_size=1, max_size=5
    ),
    st.data(),
)
def test_a_polynomial_matches_its_terms_in_any_order(polynomial, data):
    def written(terms):
        return " ".join(
            f"{c:+d} {x} {y}" for (i, j), c in terms for x, y in [data.draw(st.permutations([f"x^{{{i}}}", f"y^{j}"]))]
        )

    terms = list(polynomial.items())
    one, same = written(terms), written(data.draw(st.permutations(terms)))
    assert answers_match(one, same)
    power, coefficient = data.draw(st.sampled_from(terms))
    assert not answers_match(one, written([*((p, c) for p, c in terms if p != power), (power, -coefficient)]))


x, y = sympy.symbols("x y", positive=True)
LEAVES = st.sampled_from([x, y, sympy.pi, sympy.sqrt(2), sympy.Integer(3), sympy.Rational(-2, 5), sympy.sqrt(x)])
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: (
        st.tuples(inner, inner).map(lambda p: p[0] + p[1])
        | st.tuples(inner, inner).map(lambda p: p[0] * p[1])
        | st.tuples(inner, st.integers(1, 3)).map(lambda p: p[0] ** p[1])
    ),
    max_leaves=6,
)


@given(EXPRESSIONS, EXPRESSIONS)
def test_agrees_with_sympy(first, second):
    """Sums, products and powers: expanding decides them, and shares nothing with evaluating at points."""
    assert answers_match(sympy.latex(first), sympy.latex(sympy.expand(first)))
    assert answers_match(sympy.latex(first), str(first))
    assert answers_match(sympy.latex(first), sympy.latex(second)) == (sympy.expand(first - second) == 0)


@given(RATIONALS.filter(lambda value: value > 0), st.integers(2, 3))
def test_a_root_and_its_power(value, index):
    """A root alone would be work left undone beside its value, so both stand before a variable."""
    power = value**index
    latex = rf"\sqrt[{index}]{{\frac{{{power.numerator}}}{{{power.denominator}}}}}"
    assert answers_match(f"{latex} x", f"({value})x")
    assert not answers_match(f"{latex} x", f"({value + Fraction(1, 10**20)})x")
    assert not answers_match(latex, str(value))


@given(
    RATIONALS,
    RATIONALS,
    st.sampled_from(["+", "-", "*", r"\cdot ", r"\times "]),
    st.sampled_from(ENCLOSING),
    st.data(),
)
def test_arithmetic_does_not_match_its_result(first, second, sign, enclosing, data):
    result = {"+": first + second, "-": first - second}.get(sign, first * second)
    arithmetic = enclosing.format(f"({first}){sign}({second})")
    assert answers_match(arithmetic, f" {arithmetic}")
    for spelling in spellings(result):
        assert not answers_match(arithmetic, spelling)
        assert not answers_match(f"({arithmetic}, 1)", f"({spelling}, 1)")


@given(RATIONALS, RATIONALS, st.tuples(st.booleans(), st.booleans()), st.data())
def test_an_inequality_matches_the_interval_of_its_strictness_only(low, high, closed, data):
    left, right = (data.draw(st.sampled_from(list(spellings(value)))).removesuffix(".") for value in (low, high))
    assume("$" not in left + right)  # dollars in the middle set type
    chain = rf"{left} {'<' if not closed[0] else chr(92) + 'le'} x {'<' if not closed[1] else chr(92) + 'le'} {right}"
    for brackets in ("()", "(]", "[)", "[]"):
        interval = f"{brackets[0]}{low}, {high}{brackets[1]}"
        assert answers_match(chain, interval) == (brackets == "(["[closed[0]] + ")]"[closed[1]])
        assert not answers_match(chain, f"{brackets[0]}{low}, {high + 1}{brackets[1]}")


ENDS = st.tuples(RATIONALS, RATIONALS).filter(lambda pair: pair[0] < pair[1])


@given(ENDS, st.booleans(), st.booleans())
def test_a_complement_is_the_inequalities_outside(ends, left_closed, right_closed):
    low, high = ends
    inside = f"{'[' if left_closed else '('}{low}, {high}{']' if right_closed else ')'}"
    outside = rf"\mathbb{{R}} \setminus {inside}"
    for left in ("<", r"\le "):
        for right in (">", r"\ge "):
            same = (left == "<") == left_closed and (right == ">") == right_closed
            assert answers_match(f"x {left} {low} or x {right} {high}", outside) == same
    assert answers_match(f"x > {low} and x < {high}", inside) == (not left_closed and not right_closed)
    assert not answers_match(inside, outside)


MEASURES = ["cm", "m/s", "square feet", "kg", "hours", "cubic inches", "miles per hour", "gallons", "dollars", "km"]


@given(
    RATIONALS, st.sampled_from(MEASURES), st.sampled_from(MEASURES), st.sampled_from([r"{}\text{{ {}}}", "{} ({})"])
)
def test_a_unit_may_be_missing_and_must_not_differ(value, first, second, form):
    assert is_right(f"{value} {first}", str(value))
    assert is_right(str(value), form.format(value, first))
    assert is_right(f"{value} {first}", form.format(value, second)) == (first == second)
    assert not is_right(f"{value + 1} {first}", form.format(value, first))


NO_WORDS = st.text(alphabet="bcdfghjklmnpqrstvwxz", min_size=3, max_size=7).map("q{}".format)


@given(st.integers(2, 999), NO_WORDS.filter(lambda word: not re.search("(?:lls|ths)$|th$", word)))
def test_an_unknown_word_is_a_unit_only_if_the_reference_has_it(value, word):
    """Words with q and without a vowel are in no list."""
    assert not is_right(f"{value} {word}", str(value))
    assert not answers_match(f"{value} {word}", value)
    assert is_right(f"{value} {word}", f"{value} ({word})")
    assert is_right(str(value), f"{value} {word}")
    assert not is_right(f"{value} {word}", f"{value} q{word}")


SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety"


def in_words(value):
    """The oracle: spell an integer below a million."""
    if value < 20:
        return SMALL.split(" ")[value]
    if value < 100:
        return TENS.split(" ")[value // 10] + (f"-{in_words(value % 10)}" if value % 10 else "")
    scale, name = (100, "hundred") if value < 1000 else (1000, "thousand")
    rest = f" {in_words(value % scale)}" if value % scale else ""
    return f"{in_words(value // scale)} {name}{rest}"


@given(st.integers(0, 999_999), st.integers(0, 999_999))
def test_a_number_in_words_matches_its_digits_only(first, second):
    assert answers_match(in_words(first), first)
    assert answers_match(in_words(first), second) == (first == second)
    assert answers_match(in_words(first).replace("hundred ", "hundred and ").upper(), first)


@given(
    st.lists(st.lists(RATIONALS, min_size=2, max_size=2), min_size=2, max_size=3), RATIONALS.filter(bool), st.data()
)
def test_a_factor_multiplies_every_entry(rows, factor, data):
    def matrix(entries):
        return r"\begin{pmatrix}" + r"\\".join(" & ".join(map(str, row)) for row in entries) + r"\end{pmatrix}"

    product = [[factor * entry for entry in row] for row in rows]
    assert answers_match(f"{factor}{matrix(rows)}", matrix(product))
    i, j = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, 1))
    product[i][j] += 1
    assert not answers_match(f"{factor}{matrix(rows)}", matrix(product))


@given(st.dictionaries(st.sampled_from("abcmnpqxyz"), st.integers(-50, 50), min_size=2, max_size=4), st.data())
def test_named_values_match_in_any_order_with_their_names_only(values, data):
    def named(pairs):
        return ", ".join(f"{name} = {value}" for name, value in pairs)

    shuffled = data.draw(st.permutations(list(values.items())))
    exchanged = dict(zip(values, [value for _, value in shuffled], strict=True))
    assert is_right(named(shuffled), named(values.items()))
    assert is_right(named(exchanged.items()), named(values.items())) == (exchanged == values)
    in_order = [value for _, value in sorted(values.items())]
    assert is_right(named(shuffled), f"({', '.join(map(str, in_order))})")
    other = data.draw(st.permutations(in_order))
    assert is_right(f"({', '.join(map(str, other))})", named(shuffled)) == (list(other) == in_order)


@given(st.integers(100, 160), st.integers(100, 160), st.integers(1, 9), st.integers(100, 160))
def test_a_ratio_reduces(first, second, factor, other):
    """No such ratio may be a time of the day."""
    assert answers_match(f"{first}:{second}", f"{factor * first} : {factor * second}")
    assert answers_match(f"{first}:{second}", f"{first}:{other}") == (second == other)
    assert answers_match(f"{first}:{second}", f"{second}:{first}") == (first == second)
