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
    actual = recognise(parse(formula, parameters))
    assert (actual and actual[0]) == expected


def test_what_it_learns_is_mapped_by_its_place():
    assert recognise(parse("where(x > 0, x, k * x)", {"k": SLOPE["slope"]})) == ("prelu", {"k": "slope"})


@pytest.mark.parametrize(
    "text", ["x - 1", "1 - x", "x / 2", "2 / x", "x**2", "2**x", "where(x > 1, x, 1)", "where(x < 1, x, 1)"]
)
def test_what_differs_stays_different(text):
    others = {"x - 1", "1 - x", "x / 2", "2 / x", "x**2", "2**x", "where(x > 1, x, 1)", "where(x < 1, x, 1)"} - {text}
    assert all(canonical(parse(text).tree) != canonical(parse(other).tree) for other in others)
