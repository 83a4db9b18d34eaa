"""Random formulas, and a check of every node of one against the intervals of `kernels/formula/domains.py`."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from kernels.formula import Formula, Node
from kernels.formula.domains import LEARNED_REACH, REACH, Domains, ranges_of
from kernels.formula.functions import REGISTRY
from kernels.formula.grammar import FUNCTIONS
from kernels.formula.intervals import Interval

NUMBERS = ("0", "0.5", "1", "1.5", "2", "3", "0.1", "100", "1e-3", "pi", "0.044715", "1e4", "1e-30", "1e30")
EXPONENTS = ("2", "3", "-1", "-2", "0.5", "-0.5", "1.5", "0", "-1.5", "4", "7", "(1/3)", "(4/2)", "b", "-b")


def random_text(draw: random.Random, depth: int, leaves: tuple[str, ...]) -> str:
    """Return the text of a random expression."""
    if depth == 0 or draw.random() < 0.15:
        return draw.choice(leaves) if draw.random() < 0.7 else draw.choice(NUMBERS)

    def part() -> str:
        return random_text(draw, depth - 1, leaves)

    kind = draw.random()
    if kind < 0.4:
        return f"({part()} {draw.choice('++--**///')} {part()})"
    if kind < 0.52:
        return f"({part()})**{draw.choice(EXPONENTS) if draw.random() < 0.85 else f'({part()})'}"
    if kind < 0.56:
        return f"(-{part()})"
    name = draw.choice(sorted(FUNCTIONS))
    if name == "where":
        return f"where({part()} {draw.choice(('<', '<=', '>', '>='))} {part()}, {part()}, {part()})"
    return f"{name}({', '.join(part() for _ in range(FUNCTIONS[name]))})"


def random_formula(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Return text and parameters of a random formula; most are refused."""
    leaves = draw.choice((("x", "x", "x", "b", "a"), ("x",), ("gate", "up"), ("gate", "up", "b", "a")))
    text = random_text(draw, draw.choice((1, 2, 2, 3, 3, 4)), leaves)
    if draw.random() < 0.4:  # what is often above 0
        text = draw.choice(("1/({} + 1)", "log({} + 1.5)", "sqrt({})", "1/({} - 0.5)", "({})**-0.5 - 0.5")).format(text)
    text += {"x": " + 0*x", "gate": " + 0*gate*up"}[leaves[0]]
    used: dict[str, Any] = {"b": draw.choice((2, -1, 0.5, 1e-3, -3.5)), "a": {"init": draw.choice((0.25, 1, -2, 12))}}
    return text, {name: value for name, value in used.items() if name in _names(text)}


def _names(text: str) -> set[str]:
    return set("".join(c if c.isalnum() or c == "_" else " " for c in text).split())


def points(formula: Formula, draw: random.Random, count: int) -> dict[str, np.ndarray]:
    """Return values of every symbol inside the reach of the checks: small, large, 0, and the ends."""
    rng = np.random.default_rng(draw.getrandbits(32))
    values: dict[str, np.ndarray] = {}
    for name in formula.pre_activations:
        large = 10.0 ** rng.uniform(-12, math.log10(REACH), count) * rng.choice([-1, 1], count)
        values[name] = np.where(rng.random(count) < 0.5, rng.uniform(-4, 4, count), large)
        values[name][:5] = rng.permutation([0.0, REACH, -REACH, 1.0, -1.0])
    for name, parameter in formula.learned.items():
        values[name] = parameter.init + rng.uniform(-LEARNED_REACH, LEARNED_REACH, count)
    return values | {name: np.full(count, value) for name, value in formula.fixed.items()}


def check_every_node(formula: Formula, values: Mapping[str, np.ndarray]) -> None:
    """Assert that every node's values, computed in float64, are inside its interval, wherever `where` reaches the node."""
    domains = Domains(formula)

    def visit(node: Node, at: Mapping[str, np.ndarray], ranges: Mapping[str, Interval]) -> np.ndarray:
        size = len(next(iter(at.values())))
        if node.value == "where":
            condition, then, otherwise = node.arguments
            left, right = (visit(side, at, ranges) for side in condition.arguments)
            holds = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}[condition.kind](
                left, right
            )
            known = np.isfinite(left) & np.isfinite(right)
            result = np.full(size, np.nan)
            for branch, mask in ((then, holds & known), (otherwise, ~holds & known)):
                sides = [domains.of(side, ranges) for side in condition.arguments]
                narrowed = domains.narrow(condition, sides, ranges, branch is then)
                if mask.any():
                    assert narrowed is not None, f"{formula.text}: a branch is reached that was thought not to be"
                    result[mask] = visit(branch, {name: each[mask] for name, each in at.items()}, narrowed)
        elif (number := domains.number(node)) is not None:
            result = np.full(size, float(number))
        else:
            parts = [visit(argument, at, ranges) for argument in node.arguments]
            result = _value(node, parts, at)
            if node.kind == "/" and 0 in domains.of(node.arguments[1], ranges):
                result[parts[1] == 0] = np.nan  # exp(-1e4), say, which is above 0 and underflows
        low, high = domains.of(node, ranges)
        for edge, outside in ((low, result < low), (high, result > high)):
            if outside.any():
                index = int(np.flatnonzero(outside)[0])
                where = {name: float(each[index]) for name, each in at.items()}
                raise AssertionError(
                    f"{formula.text} {formula.fixed} {formula.learned}: {result[index]!r} at {where}, beyond {edge!r} "
                    f"of the node at {node.place}"
                )
        return result

    with np.errstate(all="ignore"):
        visit(formula.tree, values, ranges_of(formula))


def _value(node: Node, parts: list[np.ndarray], at: Mapping[str, np.ndarray]) -> np.ndarray:
    if node.kind == "symbol":
        return at[str(node.value)]
    if node.kind == "call":
        return _FUNCTIONS[str(node.value)](*parts)
    return {
        "+": np.add,
        "-": np.subtract,
        "*": np.multiply,
        "/": np.divide,
        "**": np.power,
        "negate": np.negative,
    }[node.kind](*parts)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * np.vectorize(math.erfc, otypes=[float])(-x * math.sqrt(0.5)) / 2


_FUNCTIONS: dict[str, Any] = {
    **{
        name: getattr(np, name)
        for name in ("abs", "sign", "sqrt", "exp", "expm1", "log", "log1p", "tanh", "sin", "cos")
    },
    "atan": np.arctan,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "erf": np.vectorize(math.erf, otypes=[float]),
    "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": _gelu,
    "gelu_tanh": lambda x: x / (1 + np.exp(-math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))),
    "max": np.maximum,
    "min": np.minimum,
    "clip": lambda x, low, high: np.minimum(np.maximum(x, low), high),
}
assert set(_FUNCTIONS) == {name for name, function in REGISTRY.items() if function.in_grammar}
