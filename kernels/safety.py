"""What a formula must not do: divide by what can be 0, leave a function's domain, or overflow where its value is moderate.

Two passes. Intervals over the tree find divisions, logarithms, roots and powers that can leave their domain, and know where in
the formula they stand. Then the programs, forward and derivative, run in 32-bit arithmetic on a grid up to |pre-activation| =
10,000; where they give no finite number, the truth is computed with 30 digits, and if that is finite the formula is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kernels.formula import Formula, FormulaError, Node
from kernels.program import Program, run

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


_GRID = (0.0, *(s * m for m in (1e-3, 0.7, 5.0, 20.0, 100.0, 1e3, REACH) for s in (1, -1)))


def check_overflow(formula: Formula, programs: Mapping[str, Program]) -> None:
    """Refuse programs that give inf or NaN in 32-bit arithmetic where the true value is a moderate number.

    Args:
        programs: by what they compute, for the message: {"the formula": ..., "its derivative": ...}.

    Raises:
        FormulaError: says where.
    """
    points = np.array(list(itertools.product(_GRID, repeat=len(formula.pre_activations))), dtype=np.float32).T
    inputs = dict(zip(formula.pre_activations, points, strict=True))
    for offset in (0.0, LEARNED_REACH / 5, -LEARNED_REACH / 5) if formula.learned else (0.0,):
        learned = {name: np.float32(p.init + offset) for name, p in formula.learned.items()}
        values: dict[str, Any] = {**inputs, **learned, "dh": np.float32(1.0)}
        for what, program in programs.items():
            with np.errstate(all="ignore"):
                results = run(program, NUMPY, values)
            for name, result in results.items():
                _check_points(formula, what, program, name, np.broadcast_to(result, points.shape[1:]), values)


def _check_points(
    formula: Formula, what: str, program: Program, name: str, result: np.ndarray, values: Mapping[str, Any]
) -> None:
    for index in np.flatnonzero(~np.isfinite(result)):
        at = {key: float(value[index] if np.ndim(value) else value) for key, value in values.items()}
        truth = run(program, _mpmath(), at)[name]
        if abs(truth) < 3e38:
            where = ", ".join(f"{key} = {at[key]:g}" for key in (*formula.pre_activations, *formula.learned))
            raise FormulaError(
                f"{what} gives {result[index]} in 32-bit arithmetic at {where}, where it is {float(truth):g}: "
                "write it without numbers that overflow on the way, for instance with sigmoid, tanh or softplus",
                formula.text,
                _first_overflow(formula, at),
            )


def loses_nan(formula: Formula, forward: Program) -> list[str]:
    """Return the pre-activations whose NaN the program would turn into a number, as where(x > 0, 1, 0) does."""
    lost = []
    for name in formula.pre_activations:
        for other in (1.0, -1.0):
            values: dict[str, Any] = {each: np.float32(other) for each in formula.pre_activations}
            values |= {each: np.float32(p.init) for each, p in formula.learned.items()} | {name: np.float32("nan")}
            with np.errstate(all="ignore"):
                if not np.isnan(run(forward, NUMPY, values)["h"]):
                    lost.append(name)
                    break
    return lost


def _first_overflow(formula: Formula, at: Mapping[str, float]) -> int:
    """Return the place of the first operation that is not finite at a point; 0 if it is the derivative's alone."""

    def value(node: Node) -> tuple[Any, int | None]:
        if node.kind == "number":
            return np.float32(node.value), None
        if node.kind == "symbol":
            return np.float32({**formula.fixed, **at}[str(node.value)]), None
        parts = [value(argument) for argument in node.arguments]
        place = next((place for _, place in parts if place is not None), None)
        result = _TREE[node.value if node.kind == "call" else node.kind](*(part for part, _ in parts))
        return result, node.place if place is None and not np.isfinite(result) else place

    with np.errstate(all="ignore"):
        return value(formula.tree)[1] or 0


def _softplus(x: Any) -> Any:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _erf(x: Any) -> Any:
    return np.vectorize(math.erf, otypes=[np.float32])(x)


NUMPY: dict[str, Callable[..., Any]] = {
    "number": np.float32,
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative},
    **{"gt": np.greater, "ge": np.greater_equal, "select": np.where, "max": np.maximum, "min": np.minimum},
    **{
        name: getattr(np, name)
        for name in ("abs", "sign", "sqrt", "exp", "expm1", "log", "log1p", "tanh", "sin", "cos")
    },
    **{"atan": np.arctan, "erf": _erf, "softplus": _softplus, "sigmoid": lambda x: 1 / (1 + np.exp(-x))},
    "keep_nan": lambda value, source: np.where(np.isnan(source), source, value),
}
_TREE = {  # the same, by the names of the grammar
    **{name: NUMPY[name] for name in ("abs", "sign", "sqrt", "exp", "expm1", "log", "log1p", "sigmoid", "tanh", "sin")},
    **{name: NUMPY[name] for name in ("cos", "atan", "erf", "softplus", "max", "min")},
    **{"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "**": np.power, "negate": np.negative},
    **{"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "where": np.where, "clip": np.clip},
    **{"relu": lambda x: np.maximum(x, 0), "silu": lambda x: x / (1 + np.exp(-x))},
    "gelu": lambda x: x * (1 + _erf(x * math.sqrt(0.5))) / 2,
    "gelu_tanh": lambda x: x / (1 + np.exp(-1.5957691216057308 * (x + 0.044715 * x**3))),
}


def _mpmath() -> dict[str, Callable[..., Any]]:
    import mpmath

    mpmath.mp.dps = 30
    table: dict[str, Callable[..., Any]] = {
        name: getattr(mpmath, name)
        for name in ("sign", "sqrt", "exp", "expm1", "log", "log1p", "tanh", "sin", "cos", "atan", "erf", "sigmoid")
        if hasattr(mpmath, name)
    }
    return table | {
        "number": mpmath.mpf,
        **{"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: mpmath.mpf(a) * b},
        **{"div": lambda a, b: mpmath.mpf(a) / b if b else mpmath.nan, "neg": lambda a: -a, "abs": abs},
        **{"gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "select": lambda c, a, b: a if c else b},
        **{"max": max, "min": min, "keep_nan": lambda a, _: a},
        "log": lambda a: mpmath.log(a) if a else -mpmath.inf,
        "sigmoid": lambda a: 1 / (1 + mpmath.exp(-a)),
        "softplus": lambda a: mpmath.log1p(mpmath.exp(a)),
    }


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
