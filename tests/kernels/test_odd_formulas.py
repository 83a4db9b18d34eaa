"""Formulas that nobody publishes: what is constant, what sees parameters alone, and numbers at the ends of arithmetic."""

from __future__ import annotations

import re

import mpmath
import pytest
import torch

from kernels import FormulaError, activation, parse, show
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


@pytest.mark.parametrize("number", ["1e-400", "2e-324", "1e-310", f"0.{'0' * 320}1", "100e-350"])
def test_a_number_that_underflows_is_refused_as_one_that_overflows_is(number):
    for text, reason in ((f"x*{number}", "small"), (f"max(x, {number})", "small"), ("x*1e400", "large")):
        with pytest.raises(FormulaError, match=rf"the number .* is too {reason}") as refusal:
            parse(text)
        assert text[refusal.value.place] in number[0] + "1"


@pytest.mark.parametrize("zero", ["0", "0.0", "0e-500", "0.000e5", ".0"])
def test_zero_is_no_number_that_underflows(zero):
    assert activation(f"x + {zero}").compiled.forward.outputs == {"h": "x"}


@pytest.mark.parametrize(
    ("text", "parameters", "reason", "caret"),
    [
        (
            "x*1e-46",
            {},
            "the number 1e-46 in 32-bit arithmetic, which has all digits of a number from 1.2e-38",
            "1e-46",
        ),
        ("x + relu(x)*1e-40", {}, "the number 1e-40 in 32-bit", "1e-40"),
        ("x*a", {"a": -1e-46}, "the number 1e-46 in 32-bit", "a"),
        ("x/1e39", {}, "the number 1e-39 in 32-bit", "x/"),
        ("x*(1e-30*1e-30)", {}, "the number 1e-60 in 32-bit", "x*"),
        ("x*sqrt(1e-50)", {}, "the number 1e-50 in 32-bit", "1e-50"),
        ("x*mean(x*1e-46)", {}, "the number 1e-46 in 32-bit", "1e-46"),
        ("x + 1e39", {}, "the number 1e+39 in 32-bit arithmetic, whose largest is 3.4e38", "1e39"),
        ("x*a", {"a": {"init": 1e-46}}, "the learned parameter 'a' starts at 1e-46, too small for 32-bit", "a"),
        ("x*a", {"a": {"schedule": "linear", "from": 1, "to": 1e-40}}, "'a' reaches 1e-40, too small", "a"),
    ],
)
def test_a_number_that_vanishes_or_overflows_in_the_kernels_is_refused(text, parameters, reason, caret):
    with pytest.raises(FormulaError, match=re.escape(reason)) as refusal:
        assert activation(text, parameters).compiled
    assert text[refusal.value.place :].startswith(caret)


@pytest.mark.parametrize(
    "text",
    ["x*1e-46*1e46", "x*1e39*1e-39", "x + 1e-46", "max(x, 1e-50)", "clip(x, -1e300, 1e300)", "where(x > 1e-50, x, 0)"],
)
def test_a_number_whose_rounding_changes_nothing_is_accepted(text):
    pre = torch.tensor([[3.0, -3.0, 0.0, 1e4, -1e4]])
    torch.testing.assert_close(
        activation(text, backend="c")(pre).double(), activation(text)(pre.double()), rtol=1e-6, atol=1e-30
    )


@pytest.mark.parametrize(("text", "truth"), [("exp(x)*exp(-x)*x", 100), ("norm(x**5)", "1e+20")])
def test_checks_with_30_digits_leave_the_precision_of_mpmath_as_it_is(text, truth):
    with mpmath.workdps(7):
        with pytest.raises(FormulaError, match=re.escape(f"where it is {truth}")):
            assert compile_formula(parse(text))
        assert mpmath.mp.dps == 7


def test_looking_at_a_formula_draws_no_random_numbers():
    state = torch.get_rng_state()
    show.main(["x*sigmoid(b*x)*norm(x)", "b=learned:1"])
    assert torch.equal(torch.get_rng_state(), state)
