"""The names in mathematical expressions: functions, letters and commands."""

FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot", "arcsec", "arccsc", "sinh",
    "cosh", "tanh", "ln", "log", "exp",
}  # fmt: skip
INVERSES = {name: "arc" + name for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda",
    "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta",
    "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega", "ell", "infty", "emptyset",
}  # fmt: skip
WORDS = FUNCTIONS | {"sqrt", "pi"}
DECORATIONS = {"\\overline", "\\vec", "\\hat", "\\bar", "\\mathbb", "\\mathcal", "\\angle", "\\triangle"}
NO_FACTORS = {"\\rfloor", "\\rceil", "\\circ", "\\choose"}
