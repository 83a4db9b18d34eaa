"""The grammar: what is a formula, what is refused, and that the caret stands under the place."""

from __future__ import annotations

import re

import pytest

from kernels.formula import hints
from kernels.formula.grammar import CALLABLE, CONSTANTS, FUNCTIONS, REDUCTIONS, FormulaError, Learned, Node
from kernels.formula.parser import DEEPEST, LONGEST, MOST_OPERATIONS, parse


def prefix_notation(node: Node) -> str:
    """Write a tree with every bracket."""
    if node.kind in ("number", "symbol"):
        return f"{node.value:g}" if node.kind == "number" else str(node.value)
    arguments = [prefix_notation(argument) for argument in node.arguments]
    if node.kind in ("call", "negate"):
        return f"{node.value or '-'}({', '.join(arguments)})"
    return f"({arguments[0]}{node.kind}{arguments[1]})"


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("x", "x"),
        ("  x\n\t", "x"),
        ("gate*up", "(gate*up)"),
        ("x + 2 * x", "(x+(2*x))"),
        ("x - 1 - 2", "((x-1)-2)"),
        ("x / 2 / 3", "((x/2)/3)"),
        ("x / 2 * 3", "((x/2)*3)"),
        ("(x - 1) * 2", "((x-1)*2)"),
        ("-x ** 2", "-((x**2))"),
        ("(-x) ** 2", "(-(x)**2)"),
        ("x ** 2 ** 3", "(x**(2**3))"),
        ("2 ** -x", "(2**-(x))"),
        ("-x * x", "(-(x)*x)"),
        ("x - -x", "(x--(x))"),
        ("--x", "x"),
        ("+-+x", "-(x)"),
        ("1.5e-3*x", "(0.0015*x)"),
        (".5*x + 2.*x + 1E3", "(((0.5*x)+(2*x))+1000)"),
        ("pi * x", "(3.14159*x)"),
        ("where(x > 0, x, -x)", "where((x>0), x, -(x))"),
        ("where(x <= 1 + x, 1, 0) * x", "(where((x<=(1+x)), 1, 0)*x)"),
        ("max(x, 0) + min(0, x) + clip(x, -1, 1)", "((max(x, 0)+min(0, x))+clip(x, -(1), 1))"),
        ("silu(gate) * up", "(silu(gate)*up)"),
        ("where(gate < up, gate, up)", "where((gate<up), gate, up)"),
    ],
)
def test_a_formula_is_read_with_the_precedence_of_python(text, tree):
    assert prefix_notation(parse(text).tree) == tree


@pytest.mark.parametrize(
    ("text", "symbols", "gated", "matrices"),
    [
        ("relu(x)**2", {"x"}, False, 2),
        ("silu(gate)*up", {"gate", "up"}, True, 3),
        ("where(gate>0,up,0)", {"gate", "up"}, True, 3),
    ],
)
def test_its_symbols_say_how_many_matrices_a_layer_has(text, symbols, gated, matrices):
    formula = parse(text)
    assert (formula.symbols, formula.gated, formula.matrices, formula.text) == (symbols, gated, matrices, text)


def test_parameters_are_known_by_name():
    formula = parse("where(x > 0, a*x, slope * x)", {"slope": {"init": 0.25}, "a": 2})
    assert formula.symbols == {"x", "slope", "a"}
    assert (formula.learned, formula.fixed) == ({"slope": Learned(0.25, "layer")}, {"a": 2.0})
    assert parse("b * x", {"b": {"init": 1, "share": "channel"}}).learned == {"b": Learned(1.0, "channel")}


@pytest.mark.parametrize(
    ("text", "parameters", "reason", "place"),
    [
        ("x", {"x": 1}, "a parameter cannot be named 'x': that name is taken", 0),
        ("up*gate", {"gate": 1}, "that name is taken", 3),
        ("x*silu(x)", {"silu": 1}, "that name is taken", 2),
        ("x*pi", {"pi": 3}, "that name is taken", 2),
        ("x", {"dh": 3}, "that name is taken", 0),
        ("t0*x", {"t0": 3}, "that name is taken", 0),  # by a line of the program
        ("x", {"2a": 3}, "that is not an identifier", 0),
        ("x", {"": 3}, "that is not an identifier", 0),
        ("x", {"é": 3}, "that is not an identifier", 0),
        ("x", {3: 3}, "that is not an identifier", 0),
        ("x + b*x", {"b": "1"}, "the parameter 'b' must be a finite number, not '1'", 4),
        ("x + b*x", {"b": True}, "must be a finite number, not True", 4),
        ("x + b*x", {"b": None}, "must be a finite number, not None", 4),
        ("x + b*x", {"b": float("nan")}, "must be a finite number, not nan", 4),
        ("x + b*x", {"b": 10**400}, "must be a finite number, not 1000000", 4),
        ("x + b*x", {"b": {"init": 1e300}}, "starts at 1e+300, beyond 32-bit arithmetic", 4),
        ("x + b*x", {"b": {"init": "one"}}, "must be a finite number, not 'one'", 4),
        ("x + b*x", {"b": {"init": 1, "share": "row"}}, "is shared by layer, by channel or by group, not 'row'", 4),
        ("x + b*x", {"b": {"share": "layer"}}, "takes init and share, not share", 4),
        ("x + b*x", {"b": {"init": 1, "decay": 0}}, "takes init and share, not init, decay", 4),
        ("x", {"b": 1}, "the formula does not use the parameter 'b'", 0),
    ],
)
def test_what_is_no_parameter_is_refused(text, parameters, reason, place):
    with pytest.raises(FormulaError, match=re.escape(reason)) as caught:
        parse(text, parameters)
    assert caught.value.place == place


@pytest.mark.parametrize(
    ("text", "reason", "caret"),  # the caret is marked in the text by what follows it
    [
        ("", "expected a number, a name or a bracket, found 'end of the formula'", ""),
        ("   ", "expected a number, a name or a bracket", ""),
        ("x +", "found 'end of the formula'", ""),
        ("x * * x", "expected a number, a name or a bracket, found '*'", "* x"),
        ("x^2", "the character '^' is not part of a formula", "^2"),
        ("x; x", "the character ';'", "; x"),
        ("x.real", "'x.real' is not part of a formula: names have no attributes", "x.real"),
        ("x[0]", "the character '['", "[0]"),
        ("x if 1", "unexpected 'if'", "if 1"),
        ("x == 1", "the character '='", "== 1"),
        ("'x'", 'the character "\'"', "'x'"),
        ("x\x00", "is not part of a formula", "\x00"),
        ("2 x", "unexpected 'x'", "x"),
        ("2x", "unexpected 'x'", "x"),
        ("x)", "unexpected ')'", ")"),
        ("(x", "expected ')' to close the bracket opened at character 1, found 'end of the formula'", ""),
        ("x*()", "expected a number, a name or a bracket, found ')'", ")"),
        ("silu(x", "expected ')' to close silu(", ""),
        ("silu x", "expected '(' after silu, found 'x'", "x"),
        ("silu()", "expected a number, a name or a bracket, found ')'", ")"),
        ("x + silu(x, x)", "silu takes 1 argument(s), not 2", "silu(x, x)"),
        ("max(x, x, x)", "max takes 1 argument, as a reduction over d_ff, or 2, not 3", "max(x, x, x)"),
        ("where(x > 0, x)", "where takes 3 argument(s), not 2", "where"),
        ("clip(x, 0)", "clip takes 3 argument(s), not 2", "clip"),
        ("x * sigmiod(x)", "unknown function 'sigmiod': did you mean 'sigmoid'?", "sigmiod(x)"),
        ("eval(x)", "unknown function 'eval'", "eval(x)"),
        ("__import__(x)", "unknown function '__import__'", "__import__"),
        ("gat * up", "unknown symbol 'gat': did you mean 'gate'?", "gat * up"),
        ("x * slope", "unknown symbol 'slope': known are x, gate, up, pi", "slope"),
        ("x * lambda", "unknown symbol 'lambda'", "lambda"),
        ("x * \u0663", "the character '\u0663'", "\u0663"),
        ("é * x", "the character 'é'", "é * x"),
        ("1e999 * x", "the number 1e999 is too large", "1e999"),
        ("x > 0", "a comparison has no value of its own", "> 0"),
        ("(x > 0) * x", "a comparison can only be the first argument of where", "> 0"),
        ("-(x > 0)", "a comparison can only be the first argument of where", "> 0"),
        ("relu(x > 0)", "a comparison can only be the first argument of where", "> 0"),
        ("where(x > 0, x < 1, x)", "a comparison can only be the first argument of where", "< 1"),
        ("where(x, x, x)", "the first argument of where must be a comparison", "x, x, x"),
        ("where(0 < x < 1, x, 0)", "expected ')' to close where(, found '<'", "< 1"),
        ("x * gate", "cannot occur together with gate or up", "gate"),
        ("up + x", "cannot occur together with gate or up", "up + x"),
        ("silu(gate)", "a gated formula uses gate and up, and up is missing", "silu"),
        ("2 * up", "a gated formula uses gate and up, and gate is missing", "2 * up"),
        ("2 + pi", "uses no pre-activation", "2 + pi"),
    ],
)  # fmt: skip
def test_what_is_no_formula_is_refused_with_a_caret_under_the_place(text, reason, caret):
    with pytest.raises(FormulaError) as caught:
        parse(text)
    sentence, formula, pointer = str(caught.value).split("\n")
    assert reason in sentence
    assert text[caught.value.place :].startswith(caret)
    assert bool(text[caught.value.place :].strip()) == bool(caret)
    assert formula[len(pointer) - 1 :].startswith(caret)
    assert pointer.strip() == "^"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x^2", "the character '^' is not part of a formula: a power is written **, as in x**2"),
        ("x²", "the character '²' is not part of a formula: a power is written **, as in x**2"),
        ("x*b", "a parameter needs a value: ffn.parameters.b=1, or b=1 for kernels.show"),
        ("F.silu(x)", "'F.silu' is not part of a formula: functions stand without a module, as silu(x)"),
        ("torch.tanh(x)", "functions stand without a module, as tanh(x)"),
        ("x*torch.nn.functional.gelu(x)", "functions stand without a module, as gelu(x)"),
        ("nn.SiLU(x)", "functions stand without a module, as silu(x)"),
        ("np.exp(x)", "functions stand without a module, as exp(x)"),
        ("np.arctan(x)", "functions stand without a module, as atan(x)"),
        ("torch.bessel_j0(x)", "functions stand without a module, and known are abs"),
        ("X*2", "unknown symbol 'X': did you mean 'x'?"),
        ("ReLU(x)", "unknown function 'ReLU': did you mean 'relu'?"),
        ("clamp(x, 0, 6)", "did you mean 'clip'?"),
        ("leaky_relu(x)", "write where(x > 0, x, 0.01*x)"),
        ("swiglu", "unknown symbol 'swiglu': write silu(gate)*up"),
        ("e**x", "write exp(1)"),
        ("2x", "is an operator missing? A product is written with *"),
        ("x(1 + x)", "x is a number, not a function: a product is written x*(...)"),
        ("x if x > 0 else 0", "a choice is written where(condition, a, b)"),
        ("0,5*x", "a decimal point is a dot"),
        ("h = x*2", "a formula is the right-hand side alone"),
        ("|x|", "an absolute value is written abs(x)"),
        ("x − 1", "minus is written -"),
    ],
)
def test_a_near_miss_is_told_what_to_write(text, reason):
    with pytest.raises(FormulaError, match=re.escape(reason)):
        parse(text)


@pytest.mark.parametrize("word", sorted(hints._WORDS))
def test_what_a_hint_says_to_write_is_a_formula(word):
    advice = hints._WORDS[word]
    if advice in CALLABLE:
        advice = f"{advice}({', '.join('x' * FUNCTIONS.get(advice, 1))})"
    if not advice.startswith(("gate and", "the expression")):
        parse(advice.replace("condition, a, b", "x > 0, x, 0").replace("exp(1)", "exp(1)*x"))


def test_the_caret_stands_right_in_a_long_formula():
    text = " + ".join(["x"] * 80) + " + y" + " + x" * 80
    with pytest.raises(FormulaError) as caught:
        parse(text)
    _, formula, pointer = str(caught.value).split("\n")
    assert text[caught.value.place] == formula[pointer.index("^")] == "y"
    assert len(formula) < 120


@pytest.mark.parametrize(
    "text",
    [
        "x" * 10**6,
        "x+" * 500_000,
        "(" * 10**6,
        "-" * 10**6 + "x",
        " " * 10**6 + "x",
        "1" * 10**6,
        "(" * 499 + "x" + ")" * 499,
        "silu(" * 166 + "x" + ")" * 166,
        "-(" * 333 + "x" + ")" * 333,
        "x**-" * 240 + "x",
        "x" + "+x" * 499,
        "x" + "-x" * 499,
        "x" + "*x" * 499,
        "where(x>0," * 90 + "x",
        "max(x," * 160 + "x",
        "(" * 999,
    ],
    ids=lambda text: f"{text[:6]}..({len(text)})",
)
def test_what_is_too_long_or_too_deep_is_refused_not_crashed_on(text):
    with pytest.raises(FormulaError) as caught:
        parse(text)
    assert len(str(caught.value)) < 500


def test_the_limits_are_where_they_are_said_to_be():
    parse("x" + " " * (LONGEST - 1))
    parse("(" * (DEEPEST - 1) + "x" + ")" * (DEEPEST - 1))
    parse("-" * (LONGEST - 1) + "x")
    parse("x" + "+x" * MOST_OPERATIONS)
    for text in ("x" + " " * LONGEST, "(" * DEEPEST + "x" + ")" * DEEPEST, "x" + "+x" * (MOST_OPERATIONS + 1)):
        with pytest.raises(FormulaError):
            parse(text)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_takes_its_number_of_arguments(name):
    first = "x > 0" if name == "where" else "x"
    for given in range(1, 5):
        call = f"{name}({', '.join([first, *['x'] * (given - 1)])})"
        if given == FUNCTIONS[name] or (given == 1 and name in REDUCTIONS):
            assert len(parse(call).tree.arguments) == given
            assert parse(call).reduces == (given == 1 and name in REDUCTIONS)
        else:
            with pytest.raises(
                FormulaError, match=rf"{name} takes {FUNCTIONS[name]} argument|{name} takes 1 argument, as"
            ):
                parse(call)
    with pytest.raises(FormulaError, match=rf"expected '\(' after {name}"):
        parse(f"{name} * x")


def test_constants_are_numbers():
    assert {name: parse(f"{name} * x").tree.arguments[0].value for name in CONSTANTS} == {"pi": 3.141592653589793}
