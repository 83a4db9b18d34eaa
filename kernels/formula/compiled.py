"""Compilation of a formula: derivatives of its SymPy expression, and the programs that the backends print."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import sympy

from .derivative import MOST_WORK, Derivative, TooMuchWork, Work
from .grammar import Formula, FormulaError
from .program import Lowering, Program, keep_nan
from .reductions import COLUMN, Collector, Pass, Reduction, Reductions, symbol
from .rows import check_overflow_in_rows
from .safety import check_from_output, check_overflow, loses_nan
from .symbolic import abs, exp, plain_algebra, to_sympy, where, where_ge, without_double_steps

MOST_LINES = 400  # of forward and backward together; the arms of conf/ffn take up to 37
OUTPUT = "y"  # name of the formula's output as an input of `Compiled.from_output`


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """A formula's programs and the expressions behind them. `compile_formula` makes one per formula, so it can be a key.

    Attributes:
        expression: h.
        slopes: the derivative of h by each pre-activation and each learned parameter, with the values of reductions held.
        forward: inputs: pre-activations, parameters (`Formula.tensors`), then the values of reductions. Output: "h".
        backward: inputs: those of `forward`, "dh", the adjoints of reductions, and `COLUMN`. Outputs: "d" + name for each
            pre-activation and learned parameter.
        backward_with_h: `backward` with the additional output "h".
        from_output: inputs: `OUTPUT` and "dh". Output: "d" + `OUTPUT`, the gradient of the pre-activation. None unless the
            formula has a `from_output`.
        reductions: the passes over a row that come before `forward` and `backward`.
    """

    formula: Formula
    expression: sympy.Expr
    slopes: dict[str, sympy.Expr]
    forward: Program
    backward: Program
    backward_with_h: Program
    from_output: Program | None
    reductions: Reductions = dataclasses.field(default_factory=Reductions)


def compile_formula(formula: Formula) -> Compiled:
    """Differentiate a formula and lower it to programs; the result is cached per process.

    To the programs a learned parameter of a group of channels is one of each channel.

    Raises:
        FormulaError: a program overflows where its true value is moderate, or `from_output` is not the derivative.
    """
    learned = {name: parameter.in_kernels() for name, parameter in formula.learned.items()}
    formula = dataclasses.replace(formula, learned=learned)
    from_output = formula.from_output and formula.from_output[0]
    key = (formula.text, *map(tuple, (formula.fixed.items(), formula.tensors.items())), from_output)
    if key not in _compiled:
        _compiled[key] = _compile(formula)
    return _compiled[key]


_compiled: dict[tuple, Compiled] = {}


class _Gradients:
    """The gradients of a formula by its inputs and by the reductions in it.

    Args:
        expression: h.
        reductions: every reduction of the formula.
    """

    def __init__(self, formula: Formula, expression: sympy.Expr, reductions: Sequence[Reduction]) -> None:
        self.formula, self.expression, self.reductions = formula, expression, reductions
        self._work = Work()
        self._known: dict[str, Derivative] = {}  # remembers the derivative of every part

    def slope(self, name: str) -> sympy.Expr:
        """Return the derivative of h by one symbol, with all others held, the values of reductions too."""
        return self._derivative(name, [self.expression])[0]

    def of(self, name: str) -> sympy.Expr:
        """Return the gradient of one symbol: what arrives through h, and through every reduction's argument."""
        through_h, *through = self._derivative(name, [self.expression, *(r.argument for r in self.reductions)])
        # As autograd sums gradients. Everywhere it would cost a product more, and gain accuracy nowhere else.
        terms = through_h.args if _shares_an_exponential(through_h) else (through_h,)
        parts: list[sympy.Expr] = [symbol("dh") * term for term in terms]
        for reduction, slope in zip(self.reductions, through, strict=True):
            parts.append(symbol(reduction.adjoint) * _weighted(reduction, slope))
        return sympy.Add(*parts)

    def _derivative(self, name: str, expressions: list[sympy.Expr]) -> list[sympy.Expr]:
        try:
            derivative = self._known.setdefault(name, Derivative(symbol(name), self._work))
            return [without_double_steps(derivative.of(expression)) for expression in expressions]
        except TooMuchWork:
            raise self._too_long() from None

    def _too_long(self) -> FormulaError:
        reason = (
            f"the derivative of this formula is too long to compile: it has more than {MOST_WORK:,} operands, and nested "
            "functions and long products multiply them"
        )
        return FormulaError(reason, self.formula.text, 0)


def _shares_an_exponential(slope: sympy.Expr) -> bool:
    """Whether a slope is a sum whose terms have one factor exp(u), as the product rule makes of f(x) exp(g(x)).

    Where one term is all of the sum, a sum that is multiplied by dh afterwards is rounded once more than that product.
    """
    if not isinstance(slope, sympy.Add):
        return False
    terms = [sympy.Mul.make_args(term) for term in slope.args]
    return any(isinstance(factor, exp) and all(factor in term for term in terms) for factor in terms[0])


def _weighted(reduction: Reduction, slope: sympy.Expr) -> sympy.Expr:
    """Return w * slope, of a channel's weight in a reduction (`reductions.py`) and the slope of its argument."""
    if reduction.kind == "rms":
        return reduction.argument * slope
    if reduction.second is None:
        return slope
    second = symbol(reduction.second)
    if reduction.kind == "std":
        return (reduction.argument - second) * slope
    return where(where_ge, sympy.Integer(0), abs(symbol(COLUMN) - second), slope, sympy.Integer(0))


def _reductions(formula: Formula, collected: Collector, gradients: _Gradients, inputs: tuple[str, ...]) -> Reductions:
    """Return the programs of all passes over a row.

    Args:
        inputs: everything that a program of backward may read.
    """
    forward = [
        Pass(group, Lowering(inputs, {r.value: r.argument for r in group}).program()) for group in collected.by_level()
    ]
    backward, with_h = [], None
    for group in collected.outermost_first():
        terms = {r.adjoint: gradients.of(r.value) for r in group}
        if with_h is None:
            with_h = Pass(group, Lowering(inputs, terms | {"h": gradients.expression}).program())
        backward.append(Pass(group, Lowering(inputs, terms).program()))
    for each in (*forward, *backward):
        _refuse_long(formula, each.program)
    return Reductions(tuple(collected.all), tuple(forward), tuple(backward), with_h)


def _refuse_long(formula: Formula, program: Program) -> None:
    if len(program.lines) > MOST_LINES:
        raise FormulaError(
            f"the formula and its derivative take {len(program.lines):,} operations; at most {MOST_LINES:,} are compiled",
            formula.text,
            0,
        )


def _compile(formula: Formula) -> Compiled:
    with plain_algebra():
        collected = Collector()
        expression = to_sympy(formula.tree, formula, collected)
        names = (*formula.pre_activations, *formula.learned)
        gradients = _Gradients(formula, expression, collected.all)
        values = tuple(name for reduction in collected.all for name in reduction.names)
        given = (*formula.pre_activations, *formula.tensors)
        inputs = (*given, "dh")
        if collected.all:
            inputs = (*inputs, *values, *(reduction.adjoint for reduction in collected.all), COLUMN)
        reductions = _reductions(formula, collected, gradients, inputs)
        outputs = {f"d{name}": gradients.of(name) for name in names}
        both = Lowering(inputs, outputs | {"h": expression}).program()
        _refuse_long(formula, both)
        forward = Lowering((*given, *values), {"h": expression}).program()
        backward = Lowering(inputs, outputs).program()
        programs = {"the formula": forward, "its derivative": backward}
        if collected.all:
            check_overflow_in_rows(formula, programs, reductions)
        else:
            check_overflow(formula, programs)
        keep = loses_nan(formula, forward)
        from_output = _from_output(formula, forward, backward)
        slopes = {name: gradients.slope(name) for name in names}
        kept_nan = keep_nan(forward, keep), backward, keep_nan(both, keep)
        return Compiled(formula, expression, slopes, *kept_nan, from_output, reductions)


def _from_output(formula: Formula, forward: Program, backward: Program) -> Program | None:
    """Return the program of the derivative as a formula of the output, checked; None if the formula has none."""
    if formula.from_output is None:
        return None
    text, tree = formula.from_output
    slope = to_sympy(tree, dataclasses.replace(formula, text=text), Collector()).subs(symbol("h"), symbol(OUTPUT))
    from_output = Lowering((OUTPUT, "dh"), {f"d{OUTPUT}": symbol("dh") * slope}).program()
    check_from_output(formula, forward, backward, from_output)
    return from_output
