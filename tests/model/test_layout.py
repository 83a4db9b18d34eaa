"""Which formulas Transformers knows: each entry of the table computes what it does there, and arms are found by structure."""

from __future__ import annotations

import pytest
import torch

from kernels import activation, parse
from model.huggingface.layout import ACTIVATIONS, canonical, recognise

SLOPE = {"slope": {"init": 0.2, "share": "layer"}}


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_each_is_what_transformers_computes(transformers, hidden_act):
    theirs = transformers.activations.ACT2FN[hidden_act].to(torch.float64)
    native = ACTIVATIONS[hidden_act]
    stored = theirs.state_dict()
    with torch.no_grad():
        for name, _ in native.learned.values():
            stored[name] += 0.3
    fixed = {name: float(stored[name]) for name in native.fixed}
    learned = {name: stored[theirs] for name, (theirs, _) in native.learned.items()}
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    with torch.no_grad():
        ours = activation(native.formula, native.parameters | fixed, "reference")(x, **learned)
        # gelu_fast writes sqrt(2 / pi) with 10 digits.
        torch.testing.assert_close(ours, theirs(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("formula", "parameters", "expected"),
    [
        ("gate * sigmoid(gate) * up", {}, "silu"),
        ("up * (gate * sigmoid(gate))", {}, "silu"),
        ("relu(gate) * up * relu(gate)", {}, "relu2"),
        ("x * relu(x)", {}, None),
        ("max(x, 0) * max(0, x)", {}, "relu2"),
        ("where(0 < x, x, x * 0.01)", {}, "leaky_relu"),
        ("where(x > 0, x, a * x)", {"a": 0.01}, "leaky_relu"),
        ("where(x > 0, x, a * x)", {"a": 0.02}, None),
        ("where(x > 0, x, slope * x)", SLOPE, "prelu"),
        ("where(x > 0, x, slope * x)", {"slope": {"init": 0.2, "share": "channel"}}, None),
        ("slope * where(x > 0, x, slope * x)", SLOPE, None),
        ("min(max(x, 0), 6)", {}, None),
        ("clip(x, 0, 6)", {}, "relu6"),
        ("x * sigmoid(b * x)", {"b": 1.702}, "quick_gelu"),
        ("gelu(up) * gate", {}, None),  # the other half is activated
        ("silu(gate) + up", {}, None),
        ("silu(gate * up)", {}, None),
        ("silu(gate) * up * up", {}, None),
        ("silu(gate) * up * 2", {}, None),
        ("gate * up", {}, "linear"),
        ("2 * 0.5 * x", {}, "linear"),
        ("max(gate, up)", {}, None),
    ],
)
def test_a_formula_is_recognised_by_its_structure(formula, parameters, expected):
    parsed = parse(formula, parameters)
    actual = recognise(parsed, "llama" if parsed.gated else "arcee")
    assert (actual and actual[0]) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("where(x > 0, x, x + x)", "where(x > 0, x, x + x + x)"),
        ("where(x > 0, tanh(x) + x, exp(-x**2) + x + x)", "where(x > 0, tanh(x), exp(-x**2)) + x"),
    ],
)
def test_a_term_counts_as_often_as_a_branch_has_it(one, other):
    assert canonical(parse(one).tree) != canonical(parse(other).tree)


def test_what_it_learns_is_mapped_by_its_place():
    name, _, learned = recognise(parse("where(x > 0, x, k * x)", {"k": SLOPE["slope"]}), "arcee") or (None, None, None)
    assert (name, learned) == ("prelu", {"k": "slope"})


BETA_OUTSIDE = "where(x > 0, softplus(p) * x**2, (0.5 + softplus(n)) * (expm1(MIN) - x)) + 0.5 * x"
BETA_INSIDE = "where(x > 0, x * softplus(p) * x + x / 2, (softplus(n) + 0.5) * (expm1(MIN) - x) + 0.5 * x)"


@pytest.mark.parametrize("formula", [BETA_OUTSIDE, BETA_INSIDE.replace("x / 2", "0.5 * x")])
@pytest.mark.parametrize(("inner", "eps"), [("min(x, -1e-6)", -1e-6), ("x", 0.0)])
def test_xielu_is_recognised_where_its_numbers_keep_their_dtype(formula, inner, eps):
    parsed = parse(formula.replace("MIN", inner), {"p": SLOPE["slope"], "n": SLOPE["slope"]})
    assert recognise(parsed, "arcee") is None
    name, native, learned = recognise(parsed, "apertus") or (None, None, None)
    assert (name, learned) == ("xielu", {"p": "ap", "n": "an"})
    assert native.fixed | native.absent == {"beta": 0.5, "eps": eps}


def test_an_alpha_that_beta_does_not_bound_is_another_function():
    loose = parse(
        BETA_OUTSIDE.replace("(0.5 + softplus(n))", "softplus(n)").replace("MIN", "x"),
        {"p": SLOPE["slope"], "n": SLOPE["slope"]},
    )
    assert recognise(loose, "apertus") is None


@pytest.mark.parametrize(
    "text", ["x - 1", "1 - x", "x / 2", "2 / x", "x**2", "2**x", "where(x > 1, x, 1)", "where(x < 1, x, 1)"]
)
def test_what_differs_stays_different(text):
    others = {"x - 1", "1 - x", "x / 2", "2 / x", "x**2", "2**x", "where(x > 1, x, 1)", "where(x < 1, x, 1)"} - {text}
    assert all(canonical(parse(text).tree) != canonical(parse(other).tree) for other in others)
