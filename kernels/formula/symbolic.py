"""From a formula's tree to SymPy, to its derivatives, to the programs that the backends print.

Every function of the registry (`functions.py`) becomes a SymPy function of its own here: SymPy differentiates and collects, but
it never rewrites a function into another one. Each carries the derivative in the form that is stable in 32-bit arithmetic,
written with what the function itself has computed, so that forward and backward share it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import sympy
from sympy.core.parameters import distribute

from .functions import REGISTRY, Function
from .grammar import Formula, Node
from .program import Lowering, Program, keep_nan
from .safety import check_from_output, check_overflow, loses_nan


class Primitive(sympy.Function):
    """A function whose derivative is a formula of its argument: subclasses give `slope(u)`."""

    is_real = True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:  # noqa: ARG002 (SymPy's signature)
        return self.slope(*self.args)


class Choice(sympy.Function):
    """A function that picks one of its arguments: its derivative picks among theirs, and never multiplies what it drops."""

    is_real = True


class _Functions:
    """What the registry writes slopes and macros with: its functions over SymPy expressions, and exact numbers."""

    def __getattr__(self, name: str) -> Callable[..., sympy.Expr]:
        return _PRIMITIVES[name]

    @staticmethod
    def number(value: float) -> sympy.Rational:
        return number(value)

    @staticmethod
    def exact(value: float) -> sympy.Rational:
        """Return the binary fraction that a float is."""
        return sympy.Rational(value)


_f = _Functions()


def _primitive(name: str, function: Function) -> type[Primitive]:
    def slope(u: sympy.Expr) -> sympy.Expr:
        assert function.slope is not None, f"{name} has no derivative"
        return function.slope(_f, u)

    return type(name, (Primitive,), {"slope": staticmethod(slope), "__module__": __name__})


class power(Primitive):
    """u ** p for a number p that is no integer, and u >= 0."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        base, exponent = self.args
        assert argindex == 1, "the exponent is a number"
        return exponent * _power(base, exponent - 1)


class where_gt(Choice):
    """where_gt(a, b, c, d) is c where a > b, else d."""

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return _where(type(self), *self.args[:2], *(branch.diff(symbol) for branch in self.args[2:]))


class where_ge(where_gt):
    """where_ge(a, b, c, d) is c where a >= b, else d."""


class max(Choice):
    """The larger one; where both are equal, the derivative is that of the first."""

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        first, second = self.args
        return _where(where_ge, first, second, first.diff(symbol), second.diff(symbol))


class min(Choice):
    """The smaller one; where both are equal, the derivative is that of the first."""

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        first, second = self.args
        return _where(where_ge, second, first, first.diff(symbol), second.diff(symbol))


def _where(kind: type, left: sympy.Expr, right: sympy.Expr, then: sympy.Expr, otherwise: sympy.Expr) -> sympy.Expr:
    return then if then == otherwise else kind(left, right, then, otherwise)


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    if exponent.is_Integer:
        return base**exponent
    if exponent.is_Rational:
        return sqrt(base) if exponent == sympy.Rational(1, 2) else power(base, exponent)
    return exp(exponent * (sympy.Rational(math.log(float(base))) if base.is_Rational else log(base)))


def number(value: float) -> sympy.Rational:
    """Return a number as the exact decimal that was typed."""
    return sympy.Rational(repr(value))


_MACROS = {name: function.macro for name, function in REGISTRY.items() if function.macro is not None}
_PRIMITIVES: dict[str, Any] = {
    **{name: _primitive(name, function) for name, function in REGISTRY.items() if function.slope is not None},
    "max": max,
    "min": min,
}
exp, log, sqrt, sigmoid = (_PRIMITIVES[name] for name in ("exp", "log", "sqrt", "sigmoid"))
softplus, tanh_softplus = _PRIMITIVES["softplus"], _PRIMITIVES["tanh_softplus"]
relu, step, abs = _PRIMITIVES["relu"], _PRIMITIVES["step"], _PRIMITIVES["abs"]


def to_sympy(node: Node, formula: Formula) -> sympy.Expr:
    """Translate a tree; fixed parameters become their numbers."""
    if node.kind == "number":
        return number(float(node.value))
    if node.kind == "symbol":
        fixed = formula.fixed.get(str(node.value))
        return sympy.Symbol(str(node.value), real=True) if fixed is None else number(fixed)
    if node.value == "where":
        condition = node.arguments[0]
        left, right, then, otherwise = (to_sympy(n, formula) for n in (*condition.arguments, *node.arguments[1:]))
        if condition.kind in ("<", "<="):
            left, right = right, left
        return _where(where_ge if "=" in condition.kind else where_gt, left, right, then, otherwise)
    arguments = [to_sympy(argument, formula) for argument in node.arguments]
    if node.kind == "call":
        return _call(str(node.value), arguments)
    return _operate(node.kind, arguments)


def _call(name: str, arguments: list[sympy.Expr]) -> sympy.Expr:
    if name == "max":  # max(0, u) is relu(u), with its derivative at 0
        for zero, other in (arguments, arguments[::-1]):
            if zero == 0:
                return relu(other)
        return max(*arguments)
    if name == "log" and (power_of_e := _one_plus_exp(arguments[0])) is not None:
        return softplus(power_of_e)  # log(1 + exp(u)) overflows, softplus does not
    if name == "tanh" and isinstance(arguments[0], softplus):
        return tanh_softplus(*arguments[0].args)
    if name in _MACROS:
        return _MACROS[name](_f, *arguments)
    return _PRIMITIVES[name](*arguments)


def _operate(sign_: str, arguments: list[sympy.Expr]) -> sympy.Expr:
    if sign_ == "negate":
        return -arguments[0]
    left, right = arguments
    if sign_ == "+":
        return left + right
    if sign_ == "-":
        return left - right
    if sign_ == "*":
        return left * right
    if sign_ == "/":
        exponent = _one_plus_exp(right)
        return left / right if exponent is None else left * sigmoid(-exponent)  # 1 / (1 + exp(u)), as articles write it
    return _power(left, right)


def _one_plus_exp(expression: sympy.Expr) -> sympy.Expr | None:
    """Return u if the expression is 1 + exp(u)."""
    if expression.is_Add and len(expression.args) == 2 and sympy.Integer(1) in expression.args:
        other = expression - 1
        if isinstance(other, exp):
            return other.args[0]
    return None


def _without_double_steps(expression: sympy.Expr) -> sympy.Expr:
    """relu(u) * step(u) is relu(u)."""

    def once(product: sympy.Mul) -> sympy.Expr:
        positive = {f.as_base_exp()[0].args[0] for f in product.args if isinstance(f.as_base_exp()[0], relu)}
        kept = [f for f in product.args if not (isinstance(f, step) and f.args[0] in positive)]
        return product if len(kept) == len(product.args) else sympy.Mul(*kept)

    return expression.replace(lambda node: node.is_Mul, once)


OUTPUT = "y"  # what a formula's output is called where the gradient is computed from it


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """A formula's programs, and the expressions they came from. There is one a formula, so it can be a key.

    Attributes:
        forward: inputs: pre-activations, then learned parameters. Output "h".
        backward: inputs: those and "dh". Outputs "d" + name for each pre-activation and each learned parameter.
        backward_with_h: the same and "h".
        from_output: inputs `OUTPUT` and "dh". Output "d" + `OUTPUT`, the gradient of the pre-activation; None: h is not enough.
        expression: h. `slopes` has its derivative for each of those names.
    """

    formula: Formula
    expression: sympy.Expr
    slopes: dict[str, sympy.Expr]
    forward: Program
    backward: Program
    backward_with_h: Program
    from_output: Program | None


def compile_formula(formula: Formula) -> Compiled:
    """Differentiate a formula and lower it to programs."""
    from_output = formula.from_output and formula.from_output[0]
    key = (formula.text, *map(tuple, (formula.fixed.items(), formula.learned.items())), from_output)
    if key not in _compiled:
        _compiled[key] = _compile(formula)
    return _compiled[key]


_compiled: dict[tuple, Compiled] = {}


def _compile(formula: Formula) -> Compiled:
    with distribute(False):
        expression = to_sympy(formula.tree, formula)
        names = (*formula.pre_activations, *formula.learned)
        slopes = {name: _without_double_steps(expression.diff(sympy.Symbol(name, real=True))) for name in names}
        dh = sympy.Symbol("dh", real=True)
        gradients = {f"d{name}": dh * slope for name, slope in slopes.items()}
        inputs = (*names, "dh")
        forward = Lowering(names, {"h": expression}).program()
        backward = Lowering(inputs, gradients).program()
        check_overflow(formula, {"the formula": forward, "its derivative": backward})
        keep = loses_nan(formula, forward)
        both = Lowering(inputs, gradients | {"h": expression}).program()
        from_output = None
        if formula.from_output is not None:
            h, y = sympy.Symbol("h", real=True), sympy.Symbol(OUTPUT, real=True)
            slope = to_sympy(formula.from_output[1], formula).subs(h, y)
            from_output = Lowering((OUTPUT, "dh"), {f"d{OUTPUT}": dh * slope}).program()
            check_from_output(formula, forward, backward, from_output)
        programs = keep_nan(forward, keep), backward, keep_nan(both, keep), from_output
        return Compiled(formula, expression, slopes, *programs)
