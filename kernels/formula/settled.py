"""A formula with numbers for its scheduled parameters, as it is served: terms that have faded out are gone.

At t = 1, (1 - t) * (silu(gate) * up) + t * (relu(gate) * up) is relu(gate) * up. Only what a scheduled parameter has made 0 or
1 is simplified; everything else stays as it was written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .grammar import COMPARISONS, OPERATORS, Formula, FormulaError, Node
from .parser import parse

_ZERO, _ONE = Node("number", 0.0), Node("number", 1.0)


def settled(formula: Formula, values: Mapping[str, float]) -> Formula:
    """Return the formula in which the scheduled parameters are fixed at these values.

    Its learned parameters are those that are left. A formula that would lose a pre-activation is not simplified.
    """
    kept: dict[str, Any] = {name: parameter.settings() for name, parameter in formula.learned.items()}
    kept |= formula.fixed | {name: float(values[name]) for name in formula.scheduled}
    simpler = _Settling(values).of(formula.tree)
    if simpler is formula.tree:
        return parse(formula.text, kept)
    used = _symbols(simpler)
    try:
        return parse(written(simpler), {name: given for name, given in kept.items() if name in used})
    except FormulaError:
        return parse(formula.text, kept)


class _Settling:
    """Simplification of a tree by the values of scheduled parameters."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = values

    def of(self, node: Node) -> Node:
        """Return the node, the same object where nothing in it became simpler."""
        if node.value == "where":
            condition, then, otherwise = node.arguments
            left, right = map(self.literal, condition.arguments)
            if left is not None and right is not None and _symbols(condition):
                return self.of(then if OPERATORS[condition.kind](left, right) else otherwise)
        if self.number(node) is not None:
            return node  # a number such as 1 - t: whether it matters, the operation around it tells
        arguments = tuple(map(self.of, node.arguments))
        numbers = [self.number(argument) for argument in arguments]
        if (shorter := _shorter(node.kind, arguments, numbers)) is not None:
            return shorter
        same = all(ours is theirs for ours, theirs in zip(arguments, node.arguments, strict=True))
        return node if same else dataclasses.replace(node, arguments=arguments)

    def number(self, node: Node) -> float | None:
        """Return the value of a node that consists of numbers and scheduled parameters, at least one of these."""
        return self.literal(node) if _symbols(node) else None

    def literal(self, node: Node) -> float | None:
        """Return the value of a node that consists of numbers and scheduled parameters."""
        if node.kind == "number":
            return float(node.value)
        if node.kind == "symbol":
            return self.values.get(str(node.value))
        known = [self.literal(argument) for argument in node.arguments]
        if None in known or node.is_condition or node.kind not in OPERATORS:
            return None
        try:
            value = OPERATORS[node.kind](*known)
        except (ZeroDivisionError, OverflowError):
            return None
        return value if isinstance(value, float) else None


def _shorter(kind: str, arguments: tuple[Node, ...], numbers: list[float | None]) -> Node | None:
    """Return what an operation is where one of its operands is a scheduled 0 or 1; None if it stays."""
    if kind == "*":
        if any(map(_is_zero, arguments, numbers)):
            return _ZERO
        return next((arguments[1 - i] for i in (0, 1) if numbers[i] == 1.0), None)
    if kind in ("/", "**") and numbers[1] == 1.0:
        return arguments[0]
    if (kind == "/" and _is_zero(arguments[0], numbers[0])) or (kind == "negate" and arguments[0] is _ZERO):
        return _ZERO
    if kind == "**" and numbers[1] == 0.0:
        return _ONE
    zero = list(map(_is_zero, arguments, numbers))
    if kind in ("+", "-") and zero[1]:
        return arguments[0]
    if kind in ("+", "-") and zero[0]:
        return arguments[1] if kind == "+" else Node("negate", "", (arguments[1],))
    return None


def _is_zero(node: Node, number: float | None) -> bool:
    return node is _ZERO or number == 0.0


def _symbols(node: Node) -> set[str]:
    inside = set().union(*map(_symbols, node.arguments)) if node.arguments else set()
    return inside | {str(node.value)} if node.kind == "symbol" else inside


_STRENGTH = {**dict.fromkeys(COMPARISONS, 0), "+": 1, "-": 1, "*": 2, "/": 2, "negate": 3, "**": 4}
_ATOM = 5


def written(node: Node, strength: int = 0) -> str:
    """Return a tree as text that parses to it again.

    Args:
        strength: of the operator around it: what binds less is put in brackets.
    """
    if node.kind == "number":
        return repr(float(node.value)).removesuffix(".0")
    if node.kind == "symbol":
        return str(node.value)
    if node.kind in ("call", "reduce"):
        return f"{node.value}({', '.join(map(written, node.arguments))})"
    own = _STRENGTH[node.kind]
    if node.kind == "negate":
        text = f"-{written(node.arguments[0], 4)}"
    elif node.kind == "**":
        text = f"{written(node.arguments[0], _ATOM)}**{written(node.arguments[1], 3)}"
    else:  # from left to right; a comparison has sums on both sides
        left, right = node.arguments
        text = f"{written(left, max(own, 1))} {node.kind} {written(right, own + 1)}"
    return f"({text})" if own < strength else text
