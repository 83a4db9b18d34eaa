"""Domain checks of formulas: they are sound, and what they refuse is refused with a caret under the place."""

from __future__ import annotations

import contextlib
import random
import re

import numpy as np
import pytest
import torch
from random_formulas import check_every_node, points, random_formula

from kernels import FormulaError, activation, parse
from kernels.formula import Formula
from kernels.formula.compiled import compile_formula
from kernels.formula.domains import Domains, check_domains, ranges_of


def accepted(seeds: range) -> list[tuple[Formula, random.Random]]:
    """Return the random formulas of these seeds that the parser and the domain checks accept."""
    found = []
    for seed in seeds:
        draw = random.Random(seed)
        text, parameters = random_formula(draw)
        try:
            formula = parse(text, parameters)
            check_domains(formula)
        except FormulaError:
            continue
        found.append((formula, draw))
    return found


def test_every_value_of_a_random_formula_is_inside_its_interval():
    formulas = accepted(range(3000))
    assert len(formulas) > 1000
    for formula, draw in formulas:
        check_every_node(formula, points(formula, draw, 32))


def test_a_random_formula_that_is_accepted_compiles_or_is_refused_in_a_sentence():
    for formula, _ in accepted(range(10_000, 10_100)):
        with contextlib.suppress(FormulaError):
            compile_formula(formula)


@pytest.mark.parametrize(
    ("text", "reason", "caret"),  # the caret is marked in the text by what follows it
    [
        ("1/((x**2 + 1)**-0.5 - 0.5)", "the division can hit zero", "- 0.5"),
        ("1/(1/sqrt(x**2 + 1) - 0.5)", "the division can hit zero", "- 0.5"),
        ("log(1 - (1 + x**2)**-0.5)", "log requires an argument above 0", "- (1"),
        ("1/(1.5 - clip(sigmoid(gate), up, 100))*up", "the division can hit zero", "- clip"),
        ("log(clip(x, 1, -1))", "log requires an argument above 0", "clip"),
        ("1/(log(exp(x)) + 100)", "the division can hit zero", "+ 100"),
        ("1/(where(x > 0, log(x), 0) + 70)", "the division can hit zero", "+ 70"),
        ("1/(log(sigmoid(x)) + 100)", "the division can hit zero", "+ 100"),
        ("1/(log(softplus(x)) + 100)", "the division can hit zero", "+ 100"),
        ("x**sqrt(4)", "a varying exponent requires a base above 0", "x**"),
        ("x/(0.1 + 0.2 - 0.3)", "the division can hit zero", "- 0.3"),
        ("x*(1e308*10)", "this number is too large", "*10"),
        ("x*(1e-200*1e-200)", "this number is too small", "*1e-200"),
        ("x*2**1e9", "an exponent is at most 1,000", "1e9"),
        ("x**1e10", "an exponent is at most 1,000", "1e10"),
        ("x*0**-1", "a negative power is a division", "0**"),
        *(
            (f"1/{zero}", "the division can hit zero", zero)
            for zero in ("x", "abs(x)", "relu(x)", "tanh(x)", "silu(x)")
        ),
        *(
            (f"1/{zero}", "the division can hit zero", zero)
            for zero in ("min(x, 1)", "max(x, 0)", "sign(x)", "log1p(relu(x))")
        ),
        ("(x*x)**-1", "a negative power is a division", "*x"),
        ("where(x >= 0, 1/x, 1)", "the division can hit zero", "x, 1"),
        ("sqrt(where(x > 0, x, 0))", "sqrt requires an argument above 0", "where"),
    ],
)
def test_what_leaves_a_domain_is_refused_with_a_caret_under_the_place(text, reason, caret):
    with pytest.raises(FormulaError, match=re.escape(reason)) as caught:
        check_domains(parse(text))
    assert text[caught.value.place :].startswith(caret)


@pytest.mark.parametrize(
    "text",
    [
        "x/(1 + exp(x))**-0.5",
        "1/(exp(x) + exp(-x))",
        "1/exp(x)*exp(x)*x",
        "(1 - tanh(x))**1.5",
        "where(x > 0, log(x), 0)",
        "where(x > 0, 1/x, 1)",
        "x/where(x > 0, 1, -1)",
        "sqrt(x*x + 1e-6)",
        "x**(2**3) + x**(4/2) + x**-0.0",
        "log(1 + x**2)",
        "clip(x, 1, -1)",
    ],
)
def test_what_stays_inside_is_accepted(text):
    check_domains(parse(text))


B, SCHEDULED = {"b": {"init": 1.0}}, {"t": {"schedule": "linear", "from": 0, "to": 1}}


@pytest.mark.parametrize(
    ("text", "parameters", "caret"),
    [
        ("where(x > 0, x*log(mean(x)), 0)", {}, "mean(x)), 0)"),
        ("where(x > 0, x/mean(x), 0)", {}, "mean(x), 0)"),
        ("where(x > 0, x/rms(x), 0)", {}, "rms(x), 0)"),
        ("where(x > 0, x, x*log(-max(x)))", {}, "-max"),
        ("where(x > 0, x*mean(log(x)), 0)", {}, "x)), 0)"),
        ("where(x > 0, norm(log(x)), 0)", {}, "x)), 0)"),
        ("where(gate > 0, up*log(mean(gate)), 0)", {}, "mean(gate)), 0)"),
        ("x*mean(where(x > 0, log(sum(x)), 0))", {}, "sum(x)), 0"),
        ("where(x > 0, where(x > 1, x*log(min(x)), 0), 0)", {}, "min(x)), 0)"),
        ("where(x > 0, x*mean(b*log(b)), 0) + where(b > 0, x, 0)", {"b": {"init": 1, "share": "channel"}}, "b)), 0)"),
        # Backward multiplies by 0 what a branch that nobody takes reduces, and 0 times NaN is NaN.
        ("where(b > 0, x*mean(x*log(b)), x)", B, "b)), x)"),
        ("where(t > 0.5, x*mean(x*sqrt(t - 0.5)), x)", SCHEDULED, "- 0.5))"),
        ("where(a > 0, x, x*mean(x*log(a - 2)))", {"a": 1.0}, "- 2)))"),
        ("where(x > 20000, x*mean(x*log(x)), x)", {}, "x)), x)"),
        ("x*mean(where(x > 20000, x*mean(x*log(x)), x))", {}, "x)), x))"),
    ],
)
def test_a_condition_counts_for_nothing_inside_a_reduction_in_its_branches(text, parameters, caret):
    with pytest.raises(FormulaError, match=r"requires an argument above 0|can hit zero") as caught:
        check_domains(parse(text, parameters))
    assert text[caught.value.place :].startswith(caret)


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("x*mean(where(x > 0, log(x), 0))", {}),
        ("where(x > 0, x*mean(where(x > 0, log(x), 0)), 0)", {}),
        ("where(x > 0, log(x)*mean(x), 0)", {}),
        ("where(x > 0, x*log(max(mean(x), 0.1)), 0)", {}),
        ("where(x > 0, log(norm(x)), 0)", {}),  # of the channel's own x over a root mean square of all
        ("where(x > 0, x/norm(x), 0)", {}),
        ("where(b > 0, log(b)*mean(x), x)", B),
        ("where(t > 0.5, sqrt(t)*x*mean(x), x)", SCHEDULED),
        ("where(x > 20000, x*log(x)*mean(x), x)", {}),
    ],
)
def test_a_condition_counts_beside_a_reduction_and_where_it_is_inside_of_it(text, parameters):
    formula = parse(text, parameters)
    check_domains(formula)
    pre = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(4, 16).requires_grad_()
    for value in (-1.0, 0.0, 1.0):
        tensors = {name: torch.full((1,), value, dtype=torch.float64) for name in formula.tensors}
        h = activation(formula, backend="reference")(pre, **tensors)
        (gradient,) = torch.autograd.grad(h.sum(), pre)
        assert h.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("exp(x) + 0*x", 0, np.inf),
        ("(4 + x*x)**-0.5", 1e-4, 0.5),
        ("clip(x, -1, 2)", -1, 2),
        ("clip(x, 2, -1)", -1, -1),
        ("min(max(x, 0), 6)/6", 0, 1),
        ("x**2 - 1", -1, 1e8),
    ],
)
def test_intervals_are_tight(text, low, high):
    formula = parse(text)
    domains = Domains(formula)
    assert domains.of(formula.tree, ranges_of(formula)) == pytest.approx((low, high), rel=1e-7)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gelu_tanh(expm1(x))", "its derivative gives nan in 32-bit arithmetic at x = "),
        ("exp(exp(exp(exp(x))))*0 + sin(exp(exp(exp(x))))", "32-bit arithmetic"),  # of numbers of 10**4000 digits
        ("x*1e300", "the number 1e+300 is beyond it, for its largest is 3.4e38"),
        ("x*1e308*1e308", "the numbers here, taken together, are beyond floating-point arithmetic"),
        ("((2*x)**1000)**1000", "has too many digits"),
    ],
)
def test_what_no_kernel_can_compute_is_refused_before_it_is_built(text, reason):
    with pytest.raises(FormulaError, match=re.escape(reason)):
        assert activation(text).compiled


@pytest.mark.parametrize("from_output", ["h/0", "1/(h - h)", "0**(0 - 1)*h", "h*1e308*1e308"])
def test_a_from_output_that_is_no_number_is_refused(from_output):
    with pytest.raises(FormulaError, match=r"divides by zero|are beyond floating-point arithmetic") as caught:
        assert activation("tanh(x)", from_output=from_output).compiled
    assert from_output in str(caught.value)
