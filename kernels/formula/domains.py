"""Domain checks of formulas: division by zero, and arguments outside the domain of a logarithm, a root or a power.

They are interval arithmetic over the tree, whose nodes know their place in the text. Imports neither torch nor SymPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import intervals
from .functions import REGISTRY
from .grammar import Formula, FormulaError, Node
from .intervals import Interval

REACH = 1e4  # largest |pre-activation| that is checked
LEARNED_REACH = 10.0  # largest distance of a learned parameter from its initial value that is checked


def check_domains(formula: Formula) -> None:
    """Refuse a formula that can leave the domain of a function for a |pre-activation| up to `REACH`.

    Raises:
        FormulaError: the message points at the place.
    """
    ranges = dict.fromkeys(formula.pre_activations, (-REACH, REACH))
    ranges |= {name: (value, value) for name, value in formula.fixed.items()}
    ranges |= {name: (p.init - LEARNED_REACH, p.init + LEARNED_REACH) for name, p in formula.learned.items()}
    _Domains(formula.text).of(formula.tree, ranges)


_OPERATORS: dict[str, Callable[..., Interval]] = {
    "+": intervals.add,
    "-": intervals.subtract,
    "*": intervals.multiply,
    "/": intervals.divide,
    "negate": intervals.negate,
}


class _Domains:
    """Interval arithmetic over the tree of one formula."""

    def __init__(self, text: str) -> None:
        self.text = text

    def refuse(self, reason: str, node: Node) -> FormulaError:
        return FormulaError(reason, self.text, node.place)

    def of(self, node: Node, ranges: Mapping[str, Interval]) -> Interval:
        """Return an interval that holds every value of `node`."""
        if node.kind == "number":
            return float(node.value), float(node.value)
        if node.kind == "symbol":
            return ranges[str(node.value)]
        if node.value == "where":
            return self.where(node, ranges)
        parts = [self.of(argument, ranges) for argument in node.arguments]
        if node.kind == "**":
            return self.power(node, *parts)
        if node.kind == "/" and parts[1][0] <= 0 <= parts[1][1]:
            raise self.refuse("the division can hit zero: keep the denominator away from 0", node.arguments[1])
        if node.kind == "*" and _same(*node.arguments):
            return intervals.power(parts[0], 2)
        if node.kind == "call":
            return self.call(node, parts)
        return _OPERATORS[node.kind](*parts)

    def where(self, node: Node, ranges: Mapping[str, Interval]) -> Interval:
        condition, then, otherwise = node.arguments
        for side in condition.arguments:
            self.of(side, ranges)
        branches = []
        for branch, holds in ((then, True), (otherwise, False)):
            narrowed = self.narrow(condition, ranges, holds)
            if narrowed is not None:
                branches.append(self.of(branch, narrowed))
        return min(low for low, _ in branches), max(high for _, high in branches)

    def narrow(self, condition: Node, ranges: Mapping[str, Interval], holds: bool) -> dict[str, Interval] | None:
        """Return the ranges narrowed to where a comparison is `holds`; None if they would be empty."""
        left, right = condition.arguments
        sign = condition.kind
        if not holds:
            sign = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}[sign]
        result = dict(ranges)
        for side, other, greater in ((left, right, ">" in sign), (right, left, "<" in sign)):
            if side.kind != "symbol":
                continue
            low, high = result[str(side.value)]
            bound = self.of(other, ranges)
            gap = 0.0 if "=" in sign else intervals.NEXT_TO_ZERO
            low, high = (max(low, bound[0] + gap), high) if greater else (low, min(high, bound[1] - gap))
            if low > high:
                return None
            result[str(side.value)] = low, high
        return result

    def power(self, node: Node, base: Interval, exponent: Interval) -> Interval:
        low, high = exponent
        if low != high:
            if base[0] <= 0:
                raise self.refuse("a power with a varying exponent requires a base above 0", node.arguments[0])
            return intervals.rising(intervals.exp)(intervals.multiply(intervals.rising(intervals.log)(base), exponent))
        if low == int(low):
            if low < 0 and base[0] <= 0 <= base[1]:
                raise self.refuse("a negative power is a division, and it can hit zero", node.arguments[0])
            return intervals.power(base, int(low))
        if base[0] < 0 or (base[0] == 0 and low < 1):
            bound = "above 0" if low < 1 else "that is never negative"
            raise self.refuse(f"a power with a fractional exponent requires a base {bound}", node.arguments[0])
        return intervals.rising(lambda value: intervals.exp(low * intervals.log(value)))(base)

    def call(self, node: Node, parts: list[Interval]) -> Interval:
        function, argument = REGISTRY[str(node.value)], node.arguments[0]
        if function.above is not None and parts[0][0] <= function.above:
            raise self.refuse(
                f"{node.value} requires an argument above {function.above:g}{function.above_reason}", argument
            )
        assert function.interval is not None, f"{node.value} is in the grammar but has no interval"
        return function.interval(*parts)


def _same(a: Node, b: Node) -> bool:
    """Whether two trees are equal, apart from their places."""
    return (a.kind, a.value, len(a.arguments)) == (b.kind, b.value, len(b.arguments)) and all(
        map(_same, a.arguments, b.arguments)
    )
