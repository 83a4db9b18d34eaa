"""Derivatives of SymPy expressions whose equal parts are one object, in time proportional to the number of distinct parts.

SymPy's `diff` walks trees: silu(u) has u twice, its derivative four times, and nested eight deep that is a tree of a million
nodes. The rules here are those of `diff`, remembered per part. The work is counted, and bounded.
"""

from __future__ import annotations

import sympy

from .program import arguments_of

MOST_WORK = 2000  # operands of the derivative while it is computed; those of the arms of conf/ffn need up to 150


class TooMuchWork(Exception):
    """Derivatives have more than `MOST_WORK` operands."""


class Work:
    """The operands that derivatives have taken so far."""

    done = 0

    def spend(self, operands: int) -> None:
        """Count operands.

        Raises:
            TooMuchWork: there are more than `MOST_WORK`.
        """
        self.done += operands
        if self.done > MOST_WORK:
            raise TooMuchWork


class Derivative:
    """The derivative by one symbol, of any number of expressions.

    Subclasses of `sympy.Function` give theirs by `fdiff`, or by `slope_by(derivative)` if they have no single factor.

    Args:
        work: counts the operands, perhaps of several derivatives.
    """

    def __init__(self, symbol: sympy.Symbol, work: Work) -> None:
        self.symbol, self.work = symbol, work
        self._known: dict[sympy.Expr, sympy.Expr] = {symbol: sympy.Integer(1)}

    def of(self, expression: sympy.Expr) -> sympy.Expr:
        """Return the derivative of an expression.

        Raises:
            TooMuchWork: it is too long.
        """
        if expression not in self._known:
            self._known[expression] = self._of(expression)
        return self._known[expression]

    def _of(self, expression: sympy.Expr) -> sympy.Expr:
        if not expression.args:
            return sympy.Integer(0)
        by_self = getattr(expression, "slope_by", None)
        if by_self is not None:
            self.work.spend(4)
            return by_self(self)
        arguments = arguments_of(expression)
        slopes = [self.of(argument) for argument in arguments]
        varying = [place for place, slope in enumerate(slopes) if slope != 0]
        if isinstance(expression, sympy.Add):
            self.work.spend(len(arguments))
            return sympy.Add(*slopes)
        if isinstance(expression, sympy.Mul):
            self.work.spend(len(arguments) * len(varying))
            return sympy.Add(
                *(sympy.Mul(*arguments[:place], slopes[place], *arguments[place + 1 :]) for place in varying)
            )
        self.work.spend(4)
        if isinstance(expression, sympy.Pow):
            assert slopes[1] == 0, "the exponent is a number"
            base, exponent = arguments
            return expression * (slopes[0] * exponent / base)
        assert isinstance(expression, sympy.Function)
        return sympy.Add(*(expression.fdiff(place + 1) * slopes[place] for place in varying))
