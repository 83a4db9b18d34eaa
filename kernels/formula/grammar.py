"""The grammar of formulas: its rules, its names and operators, and the tree of a formula. Imports neither torch nor SymPy.

    expression := sum [("<" | "<=" | ">" | ">=") sum]
    sum        := product (("+" | "-") product)*
    product    := unary (("*" | "/") unary)*
    unary      := ("+" | "-") unary | power
    power      := atom ["**" unary]
    atom       := number | name | name "(" expression ("," expression)* ")" | "(" expression ")"

A name that is called is a function of its arguments, or a reduction: mean(e) is one number per token, the mean of e over the
d_ff channels. `max` and `min` are reductions with one argument, and functions with two.

`parser.py` reads a formula by it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from .functions import REGISTRY
from .parameters import Learned, Scheduled

FUNCTIONS = {  # name: number of arguments
    **{name: function.arity for name, function in REGISTRY.items() if function.in_grammar},
    "where": 3,
}
REDUCTIONS = {  # over the d_ff channels of a token; name: whether it takes an epsilon as a second argument
    "mean": False,
    "sum": False,
    "max": False,
    "min": False,
    "rms": True,  # sqrt(mean(e**2) + epsilon)
    "std": True,  # sqrt(mean((e - mean(e))**2) + epsilon)
    "norm": True,  # e / rms(e, epsilon), a number per channel
}
EPSILON = 1e-6  # of norm, unless it is given; rms and std have none by default
CONSTANTS = {"pi": 3.141592653589793}
PRE_ACTIVATIONS = ("x", "gate", "up")
COMPARISONS = ("<", "<=", ">", ">=")
OPERATORS: dict[str, Callable[..., Any]] = {  # by the kind of a node
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
    "negate": operator.neg,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
CALLABLE = (*FUNCTIONS, *(name for name in REDUCTIONS if name not in FUNCTIONS))


class FormulaError(ValueError):
    """A formula is refused: one sentence, then the formula with a caret under the place.

    Attributes:
        reason: the sentence.
        place: index of the character in the formula.
    """

    def __init__(self, reason: str, text: str, place: int) -> None:
        self.reason, self.place = reason, place
        first = max(0, place - 60)
        excerpt = text[first : place + 40].replace("\n", " ").replace("\t", " ")
        super().__init__(f"{reason}\n  {excerpt}\n  {' ' * (place - first)}^")


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of the expression tree.

    Attributes:
        kind: "number", "symbol", "call", "reduce", "negate", or the sign of a binary operator.
        value: the number, or the name of the symbol, function or reduction.
        arguments: the operands.
        place: index of the character in the formula where it begins.
    """

    kind: str
    value: float | str = ""
    arguments: tuple[Node, ...] = ()
    place: int = 0

    @property
    def is_condition(self) -> bool:
        """Whether it is a comparison, which only `where` takes."""
        return self.kind in COMPARISONS

    def walk(self) -> Iterator[Node]:
        """Return the node and everything in it."""
        yield self
        for argument in self.arguments:
            yield from argument.walk()

    def __str__(self) -> str:
        """Return a text that is equal for equal trees, wherever they stand."""
        return f"{self.kind}:{self.value}({', '.join(map(str, self.arguments))})" if self.arguments else str(self.value)

    @functools.cached_property
    def levels(self) -> int:
        """Return how many reductions are nested inside each other in it."""
        return max((argument.levels for argument in self.arguments), default=0) + (self.kind == "reduce")


@dataclasses.dataclass(frozen=True)
class Formula:
    """A checked formula.

    Attributes:
        text: as it was written.
        tree: its expression tree.
        symbols: the pre-activations and parameters that it uses.
        learned: the learned parameters by name, in the order in which they were given.
        fixed: the numbers of the fixed parameters by name.
        from_output: text and tree of the derivative as a formula of the output h; None if not given.
        scheduled: the parameters that follow a schedule, by name.
    """

    text: str
    tree: Node
    symbols: frozenset[str]
    learned: dict[str, Learned] = dataclasses.field(default_factory=dict)
    fixed: dict[str, float] = dataclasses.field(default_factory=dict)
    from_output: tuple[str, Node] | None = None
    scheduled: dict[str, Scheduled] = dataclasses.field(default_factory=dict)

    @property
    def gated(self) -> bool:
        """Whether the layer has two pre-activations (and so 3 matrices, not 2)."""
        return "x" not in self.symbols

    @property
    def pre_activations(self) -> tuple[str, ...]:
        """The names of the pre-activations: ("x",) or ("gate", "up")."""
        return ("gate", "up") if self.gated else ("x",)

    @property
    def matrices(self) -> int:
        """Matrices of d_model x d_ff in a layer with this formula."""
        return 3 if self.gated else 2

    @property
    def reduces(self) -> bool:
        """Whether h of a channel depends on the other channels of its token."""
        return self.tree.levels > 0

    @functools.cached_property
    def reductions(self) -> dict[str, int]:
        """The reductions, and how many numbers per token are kept of each: std has its mean beside it, max the channel."""
        found: dict[str, int] = {}
        for node in self.tree.walk():
            if node.kind == "reduce":
                name = "rms" if node.value == "norm" else str(node.value)
                epsilon = [EPSILON] if node.value == "norm" and not node.arguments[1:] else []
                key = ", ".join(map(str, (node.arguments[0], *node.arguments[1:], *epsilon)))
                found[f"{name}({key})"] = 1 + (name in ("std", "max", "min"))
        return found

    @property
    def tensors(self) -> dict[str, Learned | Scheduled]:
        """The parameters that are passed to kernels as tensors, in this order: the learned ones, then the scheduled ones."""
        return {**self.learned, **self.scheduled}

    def on_ranks(self, tensor: int) -> Formula:
        """Return the formula of one of `tensor` ranks over which the channels of a layer are sharded."""
        learned = {name: parameter.on_ranks(tensor) for name, parameter in self.learned.items()}
        return dataclasses.replace(self, learned=learned)
