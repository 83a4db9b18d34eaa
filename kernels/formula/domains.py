"""What a formula must not do: divide by what can be 0, or leave the domain of a logarithm, a root or a power.

Interval arithmetic over the tree, which knows where in the formula each operation stands. Needs neither torch nor SymPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from .grammar import Formula, FormulaError, Node

REACH = 1e4  # pre-activations up to this size are answered for
LEARNED_REACH = 10.0  # and learned parameters that move this far from their start
_NEXT_TO_ZERO = 1e-30

Interval = tuple[float, float]


def check_domains(formula: Formula) -> None:
    """Refuse what can leave a function's domain for any |pre-activation| up to `REACH`.

    Raises:
        FormulaError: with the place.
    """
    ranges = dict.fromkeys(formula.pre_activations, (-REACH, REACH))
    ranges |= {name: (value, value) for name, value in formula.fixed.items()}
    ranges |= {name: (p.init - LEARNED_REACH, p.init + LEARNED_REACH) for name, p in formula.learned.items()}
    _Domains(formula.text).of(formula.tree, ranges)


class _Domains:
    """Interval arithmetic over the tree; refuses at the place where a domain is left."""

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
            raise self.refuse("the division can hit zero: what stands below must keep away from 0", node.arguments[1])
        if node.kind == "*" and _same(*node.arguments):
            return _power(parts[0], 2)
        if node.kind == "call":
            return self.call(node, parts)
        return {"+": _add, "-": _subtract, "*": _multiply, "/": _divide, "negate": _negate}[node.kind](*parts)

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
        """Return the ranges under which a comparison holds, or does not; None if it never is so."""
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
            gap = 0.0 if "=" in sign else _NEXT_TO_ZERO
            low, high = (max(low, bound[0] + gap), high) if greater else (low, min(high, bound[1] - gap))
            if low > high:
                return None
            result[str(side.value)] = low, high
        return result

    def power(self, node: Node, base: Interval, exponent: Interval) -> Interval:
        low, high = exponent
        if low != high:
            if base[0] <= 0:
                raise self.refuse("a power with a varying exponent needs a base that stays above 0", node.arguments[0])
            return _end_points(_exp, _multiply(_end_points(_log, base), exponent))
        if low == int(low):
            if low < 0 and base[0] <= 0 <= base[1]:
                raise self.refuse("a negative power is a division, and it can hit zero", node.arguments[0])
            return _power(base, int(low))
        if base[0] < 0 or (base[0] == 0 and low < 1):
            needed = "stays above 0" if low < 1 else "is never negative"
            raise self.refuse(f"a power that is no whole number needs a base that {needed}", node.arguments[0])
        return _end_points(lambda value: _exp(low * _log(value)), base)

    def call(self, node: Node, parts: list[Interval]) -> Interval:
        name, (low, high) = str(node.value), parts[0]
        argument = node.arguments[0]
        if name == "log" and low <= 0:
            raise self.refuse("log needs what stays above 0", argument)
        if name == "log1p" and low <= -1:
            raise self.refuse("log1p needs what stays above -1", argument)
        if name == "sqrt" and low <= 0:
            raise self.refuse(
                "sqrt needs what stays above 0: at 0 its derivative is infinite (add a small constant)", argument
            )
        if name in ("sin", "cos"):
            return -1.0, 1.0
        if name == "abs":
            return (0.0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))
        if name in ("silu", "gelu", "gelu_tanh"):
            return -0.2785 if low < 0 else 0.0, max(high, 0.0)
        if name == "max":
            return max(low, parts[1][0]), max(high, parts[1][1])
        if name == "min":
            return min(low, parts[1][0]), min(high, parts[1][1])
        if name == "clip":
            return max(low, parts[1][0]), min(high, parts[2][1])
        return _end_points(_RISING[name], parts[0])


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


_RISING: dict[str, Callable[[float], float]] = {
    "exp": lambda v: max(_exp(v), _NEXT_TO_ZERO),
    "expm1": lambda v: _exp(v) - 1,
    "log": _log,
    "log1p": lambda v: math.log1p(v),
    "sqrt": math.sqrt,
    "sigmoid": lambda v: max(1 / (1 + _exp(-v)), _NEXT_TO_ZERO),
    "softplus": lambda v: max(v, 0.0) + math.log1p(_exp(-abs(v))) + _NEXT_TO_ZERO,
    **{"tanh": math.tanh, "atan": math.atan, "erf": math.erf},
    "relu": lambda v: max(v, 0.0),
    "sign": lambda v: float((v > 0) - (v < 0)),
}


def _end_points(function: Callable[[float], float], interval: Interval) -> Interval:
    return function(interval[0]), function(interval[1])


def _add(a: Interval, b: Interval) -> Interval:
    return a[0] + b[0], a[1] + b[1]


def _subtract(a: Interval, b: Interval) -> Interval:
    return a[0] - b[1], a[1] - b[0]


def _negate(a: Interval) -> Interval:
    return -a[1], -a[0]


def _multiply(a: Interval, b: Interval) -> Interval:
    products = [0.0 if x == 0 or y == 0 else x * y for x in a for y in b]
    return min(products), max(products)


def _divide(a: Interval, b: Interval) -> Interval:
    return _multiply(a, (1 / b[1], 1 / b[0]))


def _power(base: Interval, exponent: int) -> Interval:
    if exponent < 0:
        return _power((1 / base[1], 1 / base[0]), -exponent)
    try:
        ends = [float(end) ** exponent for end in base]
    except OverflowError:
        ends = [-math.inf if exponent % 2 and base[0] < 0 else 0.0, math.inf]
    if exponent % 2 == 0 and base[0] <= 0 <= base[1]:
        ends.append(0.0)
    return min(ends), max(ends)


def _same(a: Node, b: Node) -> bool:
    """Whether two trees are the same formula, wherever they stand."""
    return (a.kind, a.value, len(a.arguments)) == (b.kind, b.value, len(b.arguments)) and all(
        map(_same, a.arguments, b.arguments)
    )
