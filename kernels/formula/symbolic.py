"""Compilation of a formula: tree -> SymPy expression -> derivatives -> the programs that the backends print.

Every function of the registry (`functions.py`) becomes an opaque SymPy function: SymPy differentiates and collects terms, but
never rewrites one function into another. Derivatives have a form that is stable in 32-bit arithmetic and reuses the value of
the function, so that forward and backward share subexpressions.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import sympy
from sympy.core import exprtools
from sympy.core.parameters import distribute

from .derivative import MOST_WORK, Derivative, TooMuchWork, Work
from .domains import EXPONENT_TOO_LARGE, LARGEST, LARGEST_EXPONENT, MOST_BITS, SMALLEST
from .functions import REGISTRY, Function
from .grammar import Formula, FormulaError, Node
from .program import Lowering, Program, arguments_of, keep_nan
from .safety import check_from_output, check_overflow, loses_nan

MOST_LINES = 400  # of forward and backward together; the arms of conf/ffn take up to 26
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def plain_algebra() -> Iterator[None]:
    """SymPy as formulas are compiled: 0.5 * (1 + erf(x)) stays one product, and the sign of a sum comes from its terms alone.

    Where the terms do not tell, SymPy would write the sum over one denominator, and each part of that again, without
    remembering any: 24 nested quotients took it half a minute.
    """
    with _one_at_a_time, distribute(False):
        searched = exprtools._monotonic_sign
        exprtools._monotonic_sign = lambda _: None
        try:
            yield
        finally:
            exprtools._monotonic_sign = searched


class _Real(sympy.Function):
    """A function of real numbers, typed as the expressions that its calls and arguments are."""

    is_real = True
    _symbols: set[sympy.Basic] | None = None

    @property
    def is_number(self) -> bool:
        """False even of numbers: SymPy would walk the tree of gelu(gelu(...(2))) to its ends."""
        return False

    @property
    def free_symbols(self) -> set[sympy.Basic]:
        """The symbols that occur in it, remembered: SymPy asks for those of every part, and parts are shared."""
        if self._symbols is None:
            self._symbols = super().free_symbols
        return self._symbols

    def _eval_evalf(self, prec: int) -> None:
        """SymPy must not evaluate a function of numbers, exp(exp(100)) say, when it sorts the terms of a sum."""

    if TYPE_CHECKING:  # SymPy's annotations: a call returns a class, and arguments are any `Basic`

        def __new__(cls, *arguments: Any) -> sympy.Expr: ...

        @property
        def args(self) -> tuple[sympy.Expr, ...]: ...


class Primitive(_Real):
    """A function whose derivative is a formula of its argument: subclasses define `slope(u)`."""

    @staticmethod
    def slope(u: sympy.Expr) -> sympy.Expr:
        """Return the derivative at u."""
        raise NotImplementedError

    def fdiff(self, argindex: int = 1) -> sympy.Expr:  # noqa: ARG002 (SymPy's signature)
        return self.slope(*self.args)


class Choice(_Real):
    """A function that returns one of its arguments. Its derivative selects among theirs, and never multiplies the others."""


class _Functions:
    """The namespace of slopes and macros: the registry's functions over SymPy expressions, and exact numbers."""

    def __getattr__(self, name: str) -> Callable[..., sympy.Expr]:
        return _PRIMITIVES[name]

    @staticmethod
    def number(value: float) -> sympy.Rational:
        return number(value)

    @staticmethod
    def exact(value: float) -> sympy.Rational:
        """Return a float as the binary fraction that it is."""
        return _rational(value)


_f = _Functions()


def _rational(value: float | str | Fraction) -> sympy.Rational:
    exact = sympy.Rational(value)
    assert isinstance(exact, sympy.Rational), f"{value} is not a finite number"
    return exact


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

    def slope_by(self, derivative: Derivative) -> sympy.Expr:
        left, right, then, otherwise = self.args
        return _where(type(self), left, right, derivative.of(then), derivative.of(otherwise))


class where_ge(where_gt):
    """where_ge(a, b, c, d) is c where a >= b, else d."""


class max(Choice):
    """The larger one; where both are equal, the derivative is that of the first."""

    def slope_by(self, derivative: Derivative) -> sympy.Expr:
        first, second = self.args
        return _where(where_ge, first, second, derivative.of(first), derivative.of(second))


class min(Choice):
    """The smaller one; where both are equal, the derivative is that of the first."""

    def slope_by(self, derivative: Derivative) -> sympy.Expr:
        first, second = self.args
        return _where(where_ge, second, first, derivative.of(first), derivative.of(second))


def _where(
    kind: type[where_gt], left: sympy.Expr, right: sympy.Expr, then: sympy.Expr, otherwise: sympy.Expr
) -> sympy.Expr:
    return then if then == otherwise else kind(left, right, then, otherwise)


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    if exponent.is_Integer:
        return base**exponent
    if exponent.is_Rational:
        return sqrt(base) if exponent == sympy.Rational(1, 2) else power(base, exponent)
    return exp(exponent * (sympy.Rational(math.log(float(base))) if base.is_Rational else log(base)))


def number(value: float) -> sympy.Rational:
    """Return a number as the exact decimal that was typed."""
    return _rational(repr(value))


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
    """Translate a tree of the formula, its own or that of `from_output`; fixed parameters become their numbers.

    Raises:
        FormulaError: a division by 0, an exponent beyond `LARGEST_EXPONENT`, or the numbers of a product or a sum, taken
            together, are beyond 64-bit arithmetic or have too many digits.
    """
    expression = _translated(node, formula)
    for number_ in (expression.as_coeff_Mul()[0], expression.as_coeff_Add()[0]):
        if number_ and not _SMALLEST <= builtins.abs(number_) <= _LARGEST:
            raise FormulaError(
                "the numbers here, taken together, are beyond floating-point arithmetic", formula.text, node.place
            )
        if _bits_of(number_) > MOST_BITS:
            raise FormulaError("the numbers here, taken together, have too many digits", formula.text, node.place)
    return expression


_LARGEST, _SMALLEST = _rational(LARGEST), _rational(SMALLEST)


def _bits_of(number_: sympy.Expr) -> int:
    return builtins.max(part.bit_length() for part in map(int, number_.as_numer_denom()))


def _translated(node: Node, formula: Formula) -> sympy.Expr:
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
    if _divides_by_zero(node.kind, *arguments):
        raise FormulaError("this divides by zero", formula.text, node.place)
    if node.kind == "**":
        _check_power(arguments[0], arguments[1], formula, node)
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


def _divides_by_zero(sign_: str, left: sympy.Expr, right: sympy.Expr | None = None) -> bool:
    return right is not None and (
        (sign_ == "/" and right == 0) or (sign_ == "**" and left == 0 and bool(right.is_negative))
    )


def _check_power(base: sympy.Expr, exponent: sympy.Expr, formula: Formula, node: Node) -> None:
    """Refuse a power that SymPy cannot compute, or whose numbers it would compute for long: (2*x)**n becomes 2**n * x**n."""
    if exponent.is_Rational and builtins.abs(exponent) > LARGEST_EXPONENT:
        raise FormulaError(EXPONENT_TOO_LARGE, formula.text, node.place)
    bits = _bits_of(base.as_coeff_Mul()[0])
    if exponent.is_Integer and bits > 1 and bits * builtins.abs(exponent) > MOST_BITS:
        raise FormulaError("the power of the number in this base has too many digits", formula.text, node.place)
    if base.is_Rational and base <= 0 and not exponent.is_Integer:
        reason = "a power with a fractional or varying exponent requires a base above 0"
        raise FormulaError(reason, formula.text, node.place)


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
            (exponent,) = arguments_of(other)
            return exponent
    return None


def _without_double_steps(expression: sympy.Expr) -> sympy.Expr:
    """relu(u) * step(u) is relu(u)."""

    def once(product: sympy.Mul) -> sympy.Expr:
        positive = {f.as_base_exp()[0].args[0] for f in product.args if isinstance(f.as_base_exp()[0], relu)}
        kept = [f for f in product.args if not (isinstance(f, step) and f.args[0] in positive)]
        return product if len(kept) == len(product.args) else sympy.Mul(*kept)

    known: dict[sympy.Expr, sympy.Expr] = {}  # equal parts are replaced once

    def replaced(node: sympy.Expr) -> sympy.Expr:
        if node.args and node not in known:
            arguments = tuple(map(replaced, arguments_of(node)))
            rebuilt = node if arguments == node.args else node.func(*arguments)
            known[node] = once(rebuilt) if isinstance(rebuilt, sympy.Mul) else rebuilt
        return known.get(node, node)

    return replaced(expression)


OUTPUT = "y"  # name of the formula's output as an input of `Compiled.from_output`


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """A formula's programs and the expressions behind them. `compile_formula` makes one per formula, so it can be a key.

    Attributes:
        expression: h.
        slopes: the derivative of h by each pre-activation and each learned parameter.
        forward: inputs: pre-activations, then learned parameters, then scheduled ones. Output: "h".
        backward: inputs: those of `forward` and "dh". Outputs: "d" + name for each pre-activation and learned parameter.
        backward_with_h: `backward` with the additional output "h".
        from_output: inputs: `OUTPUT` and "dh". Output: "d" + `OUTPUT`, the gradient of the pre-activation. None unless the
            formula has a `from_output`.
    """

    formula: Formula
    expression: sympy.Expr
    slopes: dict[str, sympy.Expr]
    forward: Program
    backward: Program
    backward_with_h: Program
    from_output: Program | None


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


def _slopes(formula: Formula, expression: sympy.Expr, names: tuple[str, ...]) -> dict[str, sympy.Expr]:
    """Return the derivative by each of the names."""
    work = Work()
    try:
        derivatives = {name: Derivative(sympy.Symbol(name, real=True), work).of(expression) for name in names}
    except TooMuchWork:
        raise FormulaError(
            f"the derivative of this formula is too long to compile: it has more than {MOST_WORK:,} operands, and nested "
            "functions and long products multiply them",
            formula.text,
            0,
        ) from None
    return {name: _without_double_steps(slope) for name, slope in derivatives.items()}


def _refuse_long(formula: Formula, program: Program) -> None:
    if len(program.lines) > MOST_LINES:
        raise FormulaError(
            f"the formula and its derivative take {len(program.lines):,} operations; at most {MOST_LINES:,} are compiled",
            formula.text,
            0,
        )


def _compile(formula: Formula) -> Compiled:
    with plain_algebra():
        expression = to_sympy(formula.tree, formula)
        names = (*formula.pre_activations, *formula.learned)
        slopes = _slopes(formula, expression, names)
        dh = sympy.Symbol("dh", real=True)
        gradients = {f"d{name}": dh * slope for name, slope in slopes.items()}
        given = (*formula.pre_activations, *formula.tensors)
        inputs = (*given, "dh")
        both = Lowering(inputs, gradients | {"h": expression}).program()
        _refuse_long(formula, both)
        forward = Lowering(given, {"h": expression}).program()
        backward = Lowering(inputs, gradients).program()
        check_overflow(formula, {"the formula": forward, "its derivative": backward})
        keep = loses_nan(formula, forward)
        from_output = None
        if formula.from_output is not None:
            h, y = sympy.Symbol("h", real=True), sympy.Symbol(OUTPUT, real=True)
            slope = to_sympy(formula.from_output[1], dataclasses.replace(formula, text=formula.from_output[0])).subs(
                h, y
            )
            from_output = Lowering((OUTPUT, "dh"), {f"d{OUTPUT}": dh * slope}).program()
            check_from_output(formula, forward, backward, from_output)
        programs = keep_nan(forward, keep), backward, keep_nan(both, keep), from_output
        return Compiled(formula, expression, slopes, *programs)
