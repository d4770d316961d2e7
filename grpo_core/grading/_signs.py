"""The tables that unify signs: Unicode characters and LaTeX commands with one meaning get one spelling."""

_LETTERS = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ϵ": "epsilon", "ζ": "zeta", "η": "eta",
    "θ": "theta", "ϑ": "theta", "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "µ": "mu", "ν": "nu", "ξ": "xi",
    "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega",
    "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi",
    "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
_MARKS = {
    "−": "-", "﹣": "-", "–": "-", "—": "-", "‑": "-", "‐": "-", "‒": "-", "―": "-",
    "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "∗": "*", "⁄": "/", "∕": "/",
    "∞": r"\infty ", "√": r"\surd ", "∛": r"\sqrt[3]", "°": r"^\circ ", "º": r"^\circ ", "±": r"\pm ", "∓": r"\mp ",
    "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≦": r"\le ", "≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∈": r"\in ", "∅": r"\emptyset ", "∠": r"\angle ",
    "△": r"\triangle ", "∆": r"\Delta ", "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "…": "...", "∶": ":", "、": ",", "。": ".", "’": "'", "‘": "'", "′": "'",
    "“": '"', "”": '"', "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "€": r"\euro ", "£": r"\pound ", "¥": r"\yen ", "¢": r"\cent ", "₹": r"\rupee ",
    "\u200b": "", "\ufeff": "",
}  # fmt: skip
_FRACTIONS = {
    "½": "12", "⅓": "13", "⅔": "23", "¼": "14", "¾": "34", "⅕": "15", "⅖": "25", "⅗": "35", "⅘": "45", "⅙": "16",
    "⅚": "56", "⅛": "18", "⅜": "38", "⅝": "58", "⅞": "78",
}  # fmt: skip
UNICODE = str.maketrans(
    _MARKS
    | {sign: f"\\{name} " for sign, name in _LETTERS.items()}
    | {sign: rf"\frac{{{digits[0]}}}{{{digits[1]}}}" for sign, digits in _FRACTIONS.items()}
    | {chr(0x2460 + i): rf"\textcircled{{{i + 1}}}" for i in range(20)}
    | {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}
)
"""Single characters and what they are in LaTeX."""

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")

COMMANDS = {
    "dfrac": r"\frac ", "tfrac": r"\frac ", "cfrac": r"\frac ", "dbinom": r"\binom ", "tbinom": r"\binom ",
    "leq": r"\le ", "leqslant": r"\le ", "leqq": r"\le ", "geq": r"\ge ", "geqslant": r"\ge ", "geqq": r"\ge ",
    "neq": r"\ne ", "lt": "<", "gt": ">", "thickapprox": r"\approx ", "simeq": r"\approx ", "doteq": r"\approx ",
    "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "lvert": "|", "rvert": "|", "vert": "|",
    "mid": "|", "backslash": r"\setminus ", "smallsetminus": r"\setminus ", "dots": "...", "ldots": "...",
    "overrightarrow": r"\vec ", "varnothing": r"\emptyset ", "ast": "*", "degree": r"^\circ ",
    "infin": r"\infty ", "R": r"\mathbb{R}", "bigcup": r"\cup ", "textdollar": r"\$", "quad": " ", "qquad": " ",
    "thinspace": " ", "enspace": " ", "colon": ":", "And": "&", "lor": " or ", "vee": " or ", "land": " and ",
    "wedge": " and ",
} | dict.fromkeys(
    ["left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr", "displaystyle",
     "textstyle", "scriptstyle", "bf", "rm", "it", "sf", "tt", "bfseries", "itshape", "tiny", "scriptsize",
     "footnotesize", "small", "normalsize", "large", "Large", "LARGE", "huge", "Huge", "limits", "nolimits"], " "
)  # fmt: skip
"""Commands and what replaces them; a space removes a command that only sets type."""

WRAPPERS = (
    "text|textrm|textbf|textit|textsf|texttt|textup|textnormal|mathrm|mathbf|mathsf|mathtt|mathit|mathnormal|mbox|hbox"
    "|boldsymbol|bm|pmb|emph|ensuremath|underline|operatorname"
)
"""Commands that change the look of their argument, never its meaning."""
