"""Formulas that would take hours or gigabytes to compile: each is refused in one sentence, or compiled in linear time."""

from __future__ import annotations

import sys

import pytest
import sympy
from sympy.core.cache import clear_cache

from kernels.activations.telemetry import stats_program
from kernels.formula import FormulaError, parse
from kernels.formula import derivative as bounds
from kernels.formula.compiled import MOST_LINES, Compiled, compile_formula
from kernels.formula.derivative import Derivative, TooMuchWork, Work
from kernels.formula.domains import Domains, check_domains, ranges_of
from kernels.formula.reductions import Collector
from kernels.formula.symbolic import to_sympy


def nested(outside: str, depth: int, inside: str = "x") -> str:
    for _ in range(depth):
        inside = outside.replace("@", inside)
    return inside


def compiled(text: str) -> Compiled:
    formula = parse(text)
    check_domains(formula)
    return compile_formula(formula)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x*9**9**9", "an exponent is at most 1,000"),
        ("x + 0.5**1e30", "an exponent is at most 1,000"),
        ("x*2**2**2**2**2**2", "an exponent is at most 1,000"),
        ("x**1e9", "an exponent is at most 1,000"),
        ("x**(10**400)", "too large for floating-point"),
        ("x*10**999", "too large for floating-point"),
        ("x*((1 + 1e-300)**1000)**1000", "the power of this number has too many digits"),
        ("x*((1 + 1e-16)**900)**900", "the power of this number has too many digits"),
        ("*".join(["(1 + 1e-307)"] * 40) + "*x", "this number has too many digits"),
        ("*".join([f"({factor}*x)**600" for factor in (1.03, 0.97) * 5]), "taken together, have too many digits"),
        ("x*1e300*1e300", "too large for floating-point|beyond floating-point"),
        ("abs(x)**exp(1000)", "requires a base above 0"),
        ("sqrt(log(clip(0.5, 2, x)))", "log requires an argument above 0"),
        ("sign(7)/clip(abs(0.5), gelu(x), (0))", "the division can hit zero"),
        ("(x)**relu(3)", "requires a base above 0"),
        (nested("gelu_tanh(@)", 45), "derivative of this formula is too long"),
        (nested("silu(@)", 49), "derivative of this formula is too long"),
        ("*".join(f"(x+{i})" for i in range(60)), "derivative of this formula is too long"),
        ("+".join(f"gelu(gate+{i})*up**{i + 1}" for i in range(40)), "operations; at most 400 are compiled"),
    ],
)
def test_what_would_take_long_is_refused_in_a_sentence(text, reason):
    with pytest.raises(FormulaError, match=reason) as caught:
        compiled(text)
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize(
    ("claimed", "reason"),
    [
        ("h*9**9**9", "power of the number in this base has too many digits|exponent is at most"),
        ("h**1e30", "an exponent is at most 1,000"),
        ("(-2)**h", "a power with a fractional or varying exponent requires a base above 0"),
        ("0**h", "a power with a fractional or varying exponent requires a base above 0"),
        ("h/0", "this divides by zero"),
        (nested("silu(@)", 40, "h"), "from_output is not the derivative|at most 400"),
    ],
)
def test_what_is_no_derivative_is_refused_as_fast(claimed, reason):
    with pytest.raises(FormulaError, match=reason):
        compile_formula(parse("relu(x)**2", from_output=claimed))


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh"])
def test_nested_functions_are_differentiated_once(function, monkeypatch):
    """Twice the levels multiply the work by a constant (the chain rule makes products), where a tree would square it."""
    monkeypatch.setattr(bounds, "MOST_WORK", 10**9)

    def work(depth: int) -> int:
        counted, formula = Work(), parse(nested(f"{function}(@)", depth))
        Derivative(sympy.Symbol("x", real=True), counted).of(to_sympy(formula.tree, formula, Collector()))
        return counted.done

    assert work(16) < 2**3 * work(8) < 2**6 * work(4)


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh"])
def test_nested_functions_of_a_number_are_no_tree(function):
    assert len(compiled("x + " + nested(f"{function}(@)", 12, "2")).backward.lines) == 0


@pytest.mark.parametrize(
    "outside", ["1/(1+silu(@)**2)", "1/(1+@**2)", "1/(1+sigmoid(@))", "sqrt(1+@**2)", "x+0.1*tanh(@)", "exp(-@**2)"]
)
def test_what_a_formula_costs_to_compile_is_no_tree(outside):
    """Twice the levels cost at most their cube: SymPy's search for the sign of a sum made a level of the first 1.6 times."""

    def calls(depth: int) -> int:
        clear_cache()
        formula, count = parse(nested(outside, depth)), 0

        def counted(_frame: object, event: str, _argument: object) -> None:
            nonlocal count
            count += event == "call"

        previous = sys.getprofile()
        sys.setprofile(counted)
        try:
            check_domains(formula)
            compile_formula(formula)
        finally:
            sys.setprofile(previous)
        return count

    assert 0 < calls(18) < 2**3 * calls(9)


def test_a_condition_is_visited_once_per_level():
    class Counted(Domains):
        visits = 0

        def of(self, node, ranges):
            self.visits += 1
            return super().of(node, ranges)

    def visits(depth: int) -> int:
        formula = parse(nested("where(x > @, 1, 0)", depth))
        domains = Counted(formula)
        domains.of(formula.tree, ranges_of(formula))
        return domains.visits

    assert visits(12) - visits(8) == visits(8) - visits(4)


def test_work_ends_where_it_is_said_to(monkeypatch):
    monkeypatch.setattr(bounds, "MOST_WORK", 10)
    counted = Work()
    counted.spend(10)
    with pytest.raises(TooMuchWork):
        counted.spend(1)


def test_telemetry_of_a_long_formula_is_refused_in_a_sentence(monkeypatch):
    function = compiled("gelu(gelu(gate)*up)*gelu(gate + up)")
    monkeypatch.setattr(bounds, "MOST_WORK", 30)
    with pytest.raises(FormulaError, match="telemetry of this formula is too long"):
        stats_program.__wrapped__(function)


def test_a_long_formula_that_is_within_the_bounds_compiles():
    assert len(compiled("+".join(f"exp(-{i}*x**2)" for i in range(1, 60))).backward.lines) < MOST_LINES
    assert compiled(nested("silu(@)", 8))
