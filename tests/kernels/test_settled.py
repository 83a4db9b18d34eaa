"""A formula at given values of its scheduled parameters: what has faded out is gone, everything else is as it was."""

from __future__ import annotations

import pytest
import torch

from bench.formulas import formulas
from kernels import activation, parse
from kernels.formula.domains import _same
from kernels.formula.settled import settled, written

RAMP = {"schedule": "linear", "from": 0, "to": 1}
FORMULAS = formulas()


@pytest.mark.parametrize(
    ("text", "at_0", "at_1"),
    [
        ("(1 - t)*(silu(gate)*up) + t*(relu(gate)*up)", "silu(gate) * up", "relu(gate) * up"),
        ("(1-t)*relu(x) + t*(x - relu(2*x)**2)", "relu(x)", "x - relu(2 * x)**2"),
        ("relu(x) - t*x", "relu(x)", "relu(x) - x"),
        ("t*x - relu(x)", "-relu(x)", "x - relu(x)"),
        ("x/(1 + t) + relu(x)", "x + relu(x)", None),
        ("max(x, t*x)", "max(x, 0)", "max(x, x)"),
        ("abs(x)**t", "1", "abs(x)"),
        ("where(t > 0.5, relu(x), silu(x))", "silu(x)", "relu(x)"),
        ("t*x*relu(x) + x*(t*x + 0)", "x * 0", "x * relu(x) + x * (x + 0)"),
        ("t*x/(1 + x*x) + sin(x)", "sin(x)", "x / (1 + x * x) + sin(x)"),
        ("-(t*x) + x", "x", "-x + x"),
        ("min(x, 3*t) + 0*x", None, None),  # neither 0 nor 1: as it was
        ("(1-t)*relu(gate)*up + t*up", "relu(gate) * up", None),  # it would lose its gate
        ("(1-t)*relu(x) + t*3", "relu(x)", None),
    ],
)
def test_what_is_left_at_the_ends(text, at_0, at_1):
    formula = parse(text, {"t": RAMP})
    for value, expected in ((0.0, at_0), (1.0, at_1)):
        found = settled(formula, {"t": value})
        simplified = expected if expected not in (None, "1") else text
        assert found.text == simplified
        assert found.fixed == ({} if simplified != text else {"t": value})
        assert not found.scheduled
    between = parse("silu(x)") if "where" in text else parse(text, {"t": 0.25})
    assert settled(formula, {"t": 0.25}) == between


def test_the_value_is_that_of_the_formula():
    text = "(1 - t)*where(x > 0, x, slope_old*x) + t*(slope*relu(x)**2/(1 + t)) + cos(t*x)"
    formula = parse(text, {"t": RAMP, "slope_old": {"init": 0.25}, "slope": 2})
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)[None]
    for t in (0.0, 0.3, 1.0):
        found = settled(formula, {"t": t})
        assert ("slope_old" in found.learned) == (t < 1)
        slope, value = (torch.tensor([each], dtype=torch.float64) for each in (0.5, t))
        learned = dict.fromkeys(found.learned, slope)
        whole = activation(formula, backend="reference")(x, slope_old=slope, t=value)
        torch.testing.assert_close(activation(found, backend="reference")(x, **learned), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_tree_is_written_as_text_that_parses_to_it(name):
    text, parameters = FORMULAS[name]
    tree = parse(text, parameters).tree
    assert _same(parse(written(tree), parameters).tree, tree)


@pytest.mark.parametrize(
    "text",
    [
        *("-x**-2 * x", "(-x)**2", "2 - (x - 3)", "2 / (x * x / 3)", "-(-x)", "x**x**2", "(x**2)**3", "-(x + 1) * x"),
        *("where(x - (1 - x) >= 2, x, 1)", "2 - (3 + x) * 1e-07", "2**(-x)", "x * -2 + 0.1"),
    ],
)
def test_brackets_are_kept_where_they_matter(text):
    again = written(parse(text).tree)
    assert _same(parse(again).tree, parse(text).tree)
    assert again.count("(") <= text.count("(")
