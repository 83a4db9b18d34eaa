"""What a near miss was meant to be: notation of mathematics, Python and its libraries, and how the grammar writes it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_CHARACTERS = {  # that no formula has: what to write
    "^": "a power is written **, as in x**2",
    **{power: f"a power is written **, as in x**{number}" for number, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **dict.fromkeys("×·∗⋅", "a product is written *"),
    **dict.fromkeys("÷∕", "a quotient is written /"),
    **dict.fromkeys("−–—", "minus is written -"),
    "≤": "write <=",
    "≥": "write >=",
    "π": "write pi",
    "σ": "write sigmoid(...)",
    "√": "write sqrt(...)",
    "|": "an absolute value is written abs(x)",
    "=": "a formula is the right-hand side alone, and comparisons are < <= > >=",
    "!": "comparisons are < <= > >=",
    "?": "a choice is written where(condition, a, b)",
    ":": "a choice is written where(condition, a, b)",
    "%": "there is no remainder",
    **dict.fromkeys("[]{}", "brackets are ( and )"),
    **dict.fromkeys("'\"", "a formula stands without quotes of its own"),
}
_WORDS = {  # names that the grammar does not know: what to write
    "arctan": "atan", "maximum": "max", "minimum": "min", "clamp": "clip", "absolute": "abs", "fabs": "abs", "ln": "log",
    "sgn": "sign", "logistic": "sigmoid", "expit": "sigmoid", "swish": "silu", "ndtr": "0.5*(1 + erf(x/sqrt(2)))",
    "square": "x**2", "pow": "x**2", "power": "x**2", "rsqrt": "1/sqrt(x)", "reciprocal": "1/x", "e": "exp(1)",
    "log2": "log(x)/log(2)", "log10": "log(x)/log(10)", "exp2": "2**x", "logsigmoid": "-softplus(-x)",
    "erfc": "1 - erf(x)", "tan": "sin(x)/cos(x)", "sinh": "(exp(x) - exp(-x))/2", "cosh": "(exp(x) + exp(-x))/2",
    "relu2": "relu(x)**2", "relu6": "clip(x, 0, 6)", "hardtanh": "clip(x, -1, 1)", "mish": "x*tanh(softplus(x))",
    "hardsigmoid": "clip(x/6 + 0.5, 0, 1)", "hardswish": "x*clip(x/6 + 0.5, 0, 1)", "elu": "where(x > 0, x, expm1(x))",
    "leaky_relu": "where(x > 0, x, 0.01*x)", "glu": "sigmoid(gate)*up", "swiglu": "silu(gate)*up",
    "geglu": "gelu(gate)*up", "reglu": "relu(gate)*up", "bilinear": "gate*up", "heaviside": "where(x > 0, 1, 0)",
    "if": "where(condition, a, b)", "else": "where(condition, a, b)", "lambda": "the expression alone, in x",
    "return": "the expression alone, in x", "value": "gate and up",
    "average": "mean", "avg": "mean", "amax": "max", "amin": "min", "stdev": "std", "rms_norm": "norm", "rmsnorm": "norm",
    "var": "std(x)**2", "layer_norm": "(x - mean(x))/std(x, 1e-6)", "layernorm": "(x - mean(x))/std(x, 1e-6)",
    "softmax": "exp(x - max(x))/sum(exp(x - max(x)))", "l2norm": "x/sqrt(sum(x**2) + 1e-6)",
}  # fmt: skip
_MODULES = ("torch", "nn", "functional", "F", "np", "numpy", "math", "jax", "jnp", "lax", "special", "tf", "scipy")


def of_character(character: str) -> str:
    """Return ": " and what to write instead of a character; "" where nothing is known."""
    advice = _CHARACTERS.get(character)
    return f": {advice}" if advice else ""


def of_dotted(name: str, functions: Iterable[str]) -> str:
    """Return what to write instead of a name with dots, torch.tanh say, which stands before a call or an attribute."""
    *modules, last = name.split(".")
    known = _named(last, functions)
    if known:
        return f": functions stand without a module, as {known}(x)"
    if any(module in _MODULES for module in modules):
        return f": functions stand without a module, and {of_name(last, functions)}"
    return ": names have no attributes"


def of_name(name: str, known: Iterable[str]) -> str:
    """Return what was probably meant by an unknown name, and which names are known."""
    names = list(known)
    meant = _named(name, names)
    if meant:
        return f"did you mean {meant!r}? known are {', '.join(names)}"
    if name.lower() in _WORDS:
        return f"write {_WORDS[name.lower()]}; known are {', '.join(names)}"
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known are {', '.join(names)}"


def _named(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that differs only in its case, in underscores, or is the grammar's word for another one."""
    plain = {each.replace("_", ""): each for each in known}
    word = name.lower()
    return plain.get(word.replace("_", "")) or next(
        (meant for meant in (_WORDS.get(word),) if meant in plain.values()), None
    )
