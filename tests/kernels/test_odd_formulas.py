"""Formulas that nobody publishes: what is constant, what sees parameters alone, and numbers at the ends of arithmetic."""

from __future__ import annotations

import pytest
import torch

from kernels import activation, parse
from kernels.activations.eager import plain
from kernels.catalogue import arms
from kernels.catalogue.likeness import likeness
from kernels.formula.compiled import compile_formula
from kernels.formula.gaussian import gaussian_reductions

CHANNEL = {"b": {"init": 2.0, "share": "channel"}}


@pytest.mark.parametrize(
    ("reduced", "value"),
    [("max(b)", 2.0), ("min(b*b)", 4.0), ("mean(b)", 2.0), ("sum(b)", 20.0), ("rms(b)", 2.0), ("std(b, 1)", 1.0)],
)
def test_a_reduction_of_parameters_alone_has_a_value_at_the_start(reduced, value):
    found = gaussian_reductions(compile_formula(parse(f"x*{reduced}", CHANNEL)), width=10)
    assert abs(next(iter(found.values()))) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "parameters", "value"),
    [
        ("where(b > 0, x, 0)", {"b": -1.0}, 0.0),
        ("where(b > 0, gate*up, b)", {"b": -1.0}, -1.0),
        ("where(1 > 0, b, x)", {"b": {"init": 3.0}}, 3.0),
        ("where(b > 0, x, b)", {"b": {"init": -3.0, "share": "channel"}}, -3.0),
    ],
)
def test_a_formula_whose_value_is_the_same_everywhere_fills_its_shape(text, parameters, value):
    formula = parse(text, parameters)
    pre = torch.randn((4, 2, 6) if formula.gated else (4, 6))
    tensors = {name: torch.full((p.size(6),), p.init) for name, p in formula.tensors.items()}
    for function in (plain(formula), activation(formula, backend="reference"), activation(formula, backend="c")):
        assert torch.equal(function(pre, **tensors), torch.full((4, 6), value))
    assert not likeness(formula, arms.arms()).same
