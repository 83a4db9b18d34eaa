"""Domain checks of formulas: division by zero, and arguments outside the domain of a logarithm, a root or a power.

They are interval arithmetic over the tree, whose nodes know their place in the text. Imports neither torch nor SymPy.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from . import intervals
from .functions import REGISTRY
from .grammar import EPSILON, OPERATORS, REDUCTIONS, Formula, FormulaError, Node
from .intervals import Interval

REACH = 1e4  # largest |pre-activation| that is checked
LEARNED_REACH = 10.0  # largest distance of a learned parameter from its initial value that is checked
LARGEST_EXPONENT = 1000
EXPONENT_TOO_LARGE = f"an exponent is at most {LARGEST_EXPONENT:,} in size"
MOST_BITS = 1 << 15  # of an exact number: its numerator, or its denominator
LARGEST, SMALLEST = Fraction(sys.float_info.max), Fraction(sys.float_info.min)  # sizes of a number


def check_domains(formula: Formula) -> None:
    """Refuse a formula that can leave the domain of a function for a |pre-activation| up to `REACH`.

    Raises:
        FormulaError: the message points at the place.
    """
    domains = Domains(formula)
    domains.of(formula.tree, domains.ranges)


def ranges_of(formula: Formula) -> dict[str, Interval]:
    """Return the interval of every symbol: pre-activations, fixed, learned and scheduled parameters."""
    ranges = dict.fromkeys(formula.pre_activations, Interval(-REACH, REACH))
    ranges |= {name: Interval(value, value) for name, value in formula.fixed.items()}
    ranges |= {name: Interval(*p.extremes) for name, p in formula.scheduled.items()}
    return ranges | {
        name: Interval(p.init - LEARNED_REACH, p.init + LEARNED_REACH) for name, p in formula.learned.items()
    }


_OPERATORS: dict[str, Callable[..., Interval]] = {
    "+": intervals.add,
    "-": intervals.subtract,
    "*": intervals.multiply,
    "/": intervals.divide,
    "negate": intervals.negate,
}


class Domains:
    """Interval arithmetic over the tree of one formula.

    Attributes:
        ranges: the intervals of its symbols, which a branch of `where` narrows for what is computed channel by channel.
            Reductions ignore that: they run over all channels of every token, whichever of them take the branch, and where
            none does, backward multiplies their slopes by 0, which does not silence a NaN. So a condition on a parameter
            counts for nothing there either.
    """

    def __init__(self, formula: Formula) -> None:
        self.text, self.fixed, self.ranges = formula.text, formula.fixed, ranges_of(formula)
        self.numbers: dict[int, Fraction | None] = {}  # by the id of the node

    def refuse(self, reason: str, node: Node) -> FormulaError:
        return FormulaError(reason, self.text, node.place)

    def of(self, node: Node, ranges: Mapping[str, Interval]) -> Interval:
        """Return an interval that holds every value of `node`."""
        if (number := self.number(node)) is not None:
            return Interval(float(number), float(number))
        if node.kind == "symbol":
            return ranges[str(node.value)]
        if node.kind == "reduce":
            return self.reduction(node, ranges)
        if node.value == "where":
            return self.where(node, ranges)
        parts = [self.of(argument, ranges) for argument in node.arguments]
        if node.kind == "**":
            return self.power(node, *parts)
        if node.kind == "/" and not intervals.excludes_zero(parts[1]):
            raise self.refuse(f"the division can hit zero: {_away_from_zero(node.arguments[1])}", node.arguments[1])
        if node.kind == "*" and _same(*node.arguments):
            return intervals.power(parts[0], 2)
        if node.kind == "call":
            return self.call(node, parts)
        return _OPERATORS[node.kind](*parts)

    def where(self, node: Node, ranges: Mapping[str, Interval]) -> Interval:
        condition, then, otherwise = node.arguments
        sides = [self.of(side, ranges) for side in condition.arguments]
        branches = []
        for branch, holds in ((then, True), (otherwise, False)):
            narrowed = self.narrow(condition, sides, ranges, holds)
            if narrowed is not None:
                branches.append(self.of(branch, narrowed))
                continue
            for part in branch.walk():  # no channel takes the branch, and its reductions are computed all the same
                if part.kind == "reduce":
                    self.reduction(part, self.ranges)
        return functools.reduce(intervals.either, branches)

    def narrow(
        self, condition: Node, sides: Sequence[Interval], ranges: Mapping[str, Interval], holds: bool
    ) -> dict[str, Interval] | None:
        """Return the ranges narrowed to where a comparison of two `sides` is `holds`; None if they would be empty."""
        left, right = condition.arguments
        sign = condition.kind
        if not holds:
            sign = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}[sign]
        result = dict(ranges)
        for side, other, greater in ((left, sides[1], ">" in sign), (right, sides[0], "<" in sign)):
            if side.kind != "symbol":
                continue
            narrowed = _beyond(result[str(side.value)], other, greater, strictly="=" not in sign)
            if narrowed[0] > narrowed[1]:
                return None
            result[str(side.value)] = narrowed
        return result

    def power(self, node: Node, base: Interval, exponent: Interval) -> Interval:
        number = self.number(node.arguments[1])
        if number is None:
            if not intervals.is_positive(base):
                raise self.refuse("a power with a varying exponent requires a base above 0", node.arguments[0])
            return intervals.varying_power(base, exponent)
        self.check_exponent(number, node)
        if number.denominator == 1:
            if number < 0 and not intervals.excludes_zero(base):
                raise self.refuse("a negative power is a division, and it can hit zero", node.arguments[0])
            return intervals.power(base, int(number))
        if base[0] < 0 or (number < 1 and not intervals.is_positive(base)):
            bound = "above 0" if number < 1 else "that is never negative"
            raise self.refuse(f"a power with a fractional exponent requires a base {bound}", node.arguments[0])
        return intervals.real_power(base, float(number))

    def number(self, node: Node) -> Fraction | None:
        """Return the exact value of numbers and fixed parameters under arithmetic; None of anything else."""
        if id(node) not in self.numbers:
            self.numbers[id(node)] = self._number(node)
        return self.numbers[id(node)]

    def _number(self, node: Node) -> Fraction | None:
        if node.kind == "number":
            return Fraction(repr(node.value))
        if node.kind == "symbol":
            fixed = self.fixed.get(str(node.value))
            return None if fixed is None else Fraction(repr(fixed))
        if node.kind in ("call", "reduce") or node.is_condition:
            return None
        parts = [self.number(argument) for argument in node.arguments]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or (node.kind == "**" and known[1].denominator != 1):
            return None
        if node.kind == "/" and known[1] == 0:
            raise self.refuse("the division can hit zero: keep the denominator away from 0", node.arguments[1])
        if node.kind == "**":
            self.check_exponent(known[1], node)
            if known[0] == 0 and known[1] < 0:
                raise self.refuse("a negative power is a division, and it can hit zero", node.arguments[0])
            if bits_of(known[0]) * abs(known[1]) > MOST_BITS:
                raise self.refuse("the power of this number has too many digits", node)
        exact = _ARITHMETIC[node.kind](*known)
        if bits_of(exact) > MOST_BITS:
            raise self.refuse("this number has too many digits", node)
        if abs(exact) > LARGEST or (exact and abs(exact) < SMALLEST):
            bound = "large" if abs(exact) > LARGEST else "small"
            raise self.refuse(f"this number is too {bound} for floating-point arithmetic", node)
        return exact

    def reduction(self, node: Node, ranges: Mapping[str, Interval]) -> Interval:
        """Return an interval of a reduction over at most `intervals.WIDEST` channels, where a channel has these ranges."""
        inside = self.of(node.arguments[0], self.ranges)
        if node.value == "norm" and ranges is not self.ranges:  # the numerator is the channel's own
            inside = self.of(node.arguments[0], ranges)
        name, epsilon = str(node.value), EPSILON if node.value == "norm" else 0.0
        if node.arguments[1:]:
            given = self.number(node.arguments[1])
            if given is None or not given > 0:
                raise self.refuse(f"the epsilon of {name} must be a number above 0", node.arguments[1])
            epsilon = float(given)
        return intervals.reduction(name, inside, epsilon)

    def check_exponent(self, exponent: Fraction, node: Node) -> None:
        if abs(exponent) > LARGEST_EXPONENT:
            raise self.refuse(EXPONENT_TOO_LARGE, node.arguments[1])

    def call(self, node: Node, parts: list[Interval]) -> Interval:
        function, argument = REGISTRY[str(node.value)], node.arguments[0]
        bound = function.above
        if bound is not None and not (parts[0][0] > bound or (bound == 0 and intervals.is_positive(parts[0]))):
            raise self.refuse(f"{node.value} requires an argument above {bound:g}{function.above_reason}", argument)
        assert function.interval is not None, f"{node.value} is in the grammar but has no interval"
        return function.interval(*parts)


def _away_from_zero(denominator: Node) -> str:
    if denominator.kind == "reduce" and REDUCTIONS[str(denominator.value)]:
        return f"give {denominator.value} an epsilon, as in {denominator.value}(x, {EPSILON:g})"
    return "keep the denominator away from 0"


def bits_of(number: Fraction) -> int:
    """Return the length of a number that is kept exactly."""
    return max(number.numerator.bit_length(), number.denominator.bit_length())


_ARITHMETIC = OPERATORS | {"**": lambda base, exponent: base ** int(exponent)}  # of exact numbers


def _beyond(value: Interval, bound: Interval, greater: bool, strictly: bool) -> Interval:
    """Return the part of an interval that is above (`greater`) or below a value in another one."""
    if not greater:
        return intervals.negate(_beyond(intervals.negate(value), intervals.negate(bound), True, strictly))
    positive = bound[0] >= 0 if strictly else intervals.is_positive(bound)
    return Interval(max(value[0], bound[0]), value[1], value.nonzero or positive)


def _same(a: Node, b: Node) -> bool:
    """Whether two trees are equal, apart from their places."""
    return (a.kind, a.value, len(a.arguments)) == (b.kind, b.value, len(b.arguments)) and all(
        map(_same, a.arguments, b.arguments)
    )
