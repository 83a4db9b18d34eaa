"""The grammar of formulas: text -> a checked expression tree. Needs neither torch nor SymPy, and never calls `eval`.

    expression := sum [("<" | "<=" | ">" | ">=") sum]
    sum        := product (("+" | "-") product)*
    product    := unary (("*" | "/") unary)*
    unary      := ("+" | "-") unary | power
    power      := atom ["**" unary]
    atom       := number | name | name "(" expression ("," expression)* ")" | "(" expression ")"

Formulas come from users, so everything that is not listed here is refused, with a caret under the place.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from .functions import REGISTRY

FUNCTIONS = {  # name: number of arguments
    **{name: function.arity for name, function in REGISTRY.items() if function.in_grammar},
    "where": 3,
}
CONSTANTS = {"pi": 3.141592653589793}
PRE_ACTIVATIONS = ("x", "gate", "up")
COMPARISONS = ("<", "<=", ">", ">=")
LONGEST = 1000  # characters: the longest known arm has 70
MOST_OPERATIONS = 200  # of two arguments: a sum of them is a tree as deep, which every backend walks
DEEPEST = 50  # nested brackets, so that the parser cannot run out of stack

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>\*\*|<=|>=|[-+*/(),<>]))"
)


class FormulaError(ValueError):
    """A formula that is refused: one sentence, then the formula with a caret under the place."""

    def __init__(self, reason: str, text: str, place: int) -> None:
        self.reason, self.place = reason, place
        first = max(0, place - 60)
        shown = text[first : place + 40].replace("\n", " ").replace("\t", " ")
        super().__init__(f"{reason}\n  {shown}\n  {' ' * (place - first)}^")


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation: `kind` is "number", "symbol" (with `value`), "call", or an operator's sign, over `arguments`."""

    kind: str
    value: float | str = ""
    arguments: tuple[Node, ...] = ()
    place: int = 0

    @property
    def is_condition(self) -> bool:
        return self.kind in COMPARISONS


@dataclasses.dataclass(frozen=True)
class Learned:
    """A learned parameter of a formula: its value at the start, and whether a layer has one of it or each channel its own."""

    init: float
    share: str = "layer"  # or "channel"


@dataclasses.dataclass(frozen=True)
class Formula:
    """A checked formula. `symbols` are the pre-activations and parameters that it uses.

    `learned` has the parameters that training changes, in the order in which they were given; `fixed` those that are numbers.
    """

    text: str
    tree: Node
    symbols: frozenset[str]
    learned: dict[str, Learned] = dataclasses.field(default_factory=dict)
    fixed: dict[str, float] = dataclasses.field(default_factory=dict)
    from_output: tuple[str, Node] | None = None  # text and tree of the derivative as a function of h

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


def parse(text: str, parameters: Mapping[str, Any] | None = None, from_output: str = "") -> Formula:
    """Parse and check `text`.

    Args:
        text: the formula, at most `LONGEST` characters.
        parameters: names that it may use beside the pre-activations `x`, or `gate` and `up`. A number is fixed; a mapping
            {init: 0.25, share: layer} is learned, one for the layer or (share: channel) one for each of the d_ff channels.
        from_output: the derivative written as a formula of the output `h`, where it is one: "2*sqrt(h)" for relu(x)**2.

    Raises:
        FormulaError: what is wrong and where.
    """
    if len(text) > LONGEST:
        raise FormulaError(f"the formula has {len(text):,} characters; at most {LONGEST:,} are read", text, LONGEST)
    given = {name: _parameter(text, name, value) for name, value in (parameters or {}).items()}
    parser = _Parser(text, tuple(given))
    tree = parser.expression()
    if parser.kind != "end":
        raise parser.error(f"unexpected {parser.word!r}")
    if tree.is_condition:
        raise FormulaError("a comparison has no value of its own: use where(condition, a, b)", text, tree.place)
    symbols = frozenset(parser.symbols)
    if "x" in symbols and symbols & {"gate", "up"}:
        place = min(parser.symbols[name] for name in symbols & {"gate", "up"})
        raise FormulaError(
            "x is the one pre-activation of an ungated arm; it cannot stand beside gate or up", text, place
        )
    if not symbols & set(PRE_ACTIVATIONS):
        raise FormulaError("the formula uses no pre-activation: write it of x, or of gate and up", text, 0)
    if "x" not in symbols and not {"gate", "up"} <= symbols:
        missing = "gate" if "gate" not in symbols else "up"
        raise FormulaError(
            f"a gated formula uses gate and up, and {missing} is missing: write an ungated one of x", text, 0
        )
    for name in given:
        if name not in symbols:
            raise FormulaError(f"the parameter {name!r} does not stand in the formula", text, 0)
    learned = {name: value for name, value in given.items() if isinstance(value, Learned)}
    fixed = {name: value for name, value in given.items() if isinstance(value, float)}
    derivative = None
    if from_output:
        if "x" not in symbols or learned:
            reason = (
                "from_output is for ungated formulas that learn nothing: others need their pre-activations in backward"
            )
            raise FormulaError(reason, from_output, 0)
        derivative = from_output, _parse_from_output(from_output, tuple(fixed))
    return Formula(text, tree, symbols, learned, fixed, derivative)


def _parse_from_output(text: str, fixed: tuple[str, ...]) -> Node:
    parser = _Parser(text, ("h", *fixed))
    tree = parser.expression()
    if parser.kind != "end" or tree.is_condition or set(PRE_ACTIVATIONS) & set(parser.symbols):
        raise FormulaError("from_output is a formula of h and of fixed parameters alone", text, parser.place)
    return tree


def _parameter(text: str, name: str, value: Any) -> float | Learned:
    """Check one entry of `parameters`."""
    found = re.search(rf"\b{re.escape(str(name))}\b", text)
    place = found.start() if found else 0
    if not isinstance(name, str) or not (name.isascii() and name.isidentifier()):
        raise FormulaError(f"a parameter cannot be named {name!r}: that is no name", text, place)
    if name in PRE_ACTIVATIONS or name in FUNCTIONS or name in CONSTANTS or re.fullmatch(r"dh|t[0-9]+", name):
        raise FormulaError(f"a parameter cannot be named {name!r}: that name is taken", text, place)
    settings = {"init": value, "share": None} if not isinstance(value, Mapping) else {"share": "layer", **value}
    if settings.keys() != {"init", "share"}:
        said = ", ".join(map(str, value)) or "nothing"
        raise FormulaError(f"the learned parameter {name!r} takes init and share, and {said} was given", text, place)
    number, share = settings["init"], settings["share"]
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise FormulaError(f"the parameter {name!r} must be a finite number, not {number!r}", text, place)
    if share not in (None, "layer", "channel"):
        raise FormulaError(f"the parameter {name!r} is shared by layer or by channel, not {share!r}", text, place)
    return Learned(float(number), share) if share else float(number)


class _Parser:
    """Recursive descent over the tokens of one formula."""

    def __init__(self, text: str, parameters: tuple[str, ...]) -> None:
        self.text, self.parameters = text, parameters
        self.position = self.depth = self.operations = 0
        self.symbols: dict[str, int] = {}  # name -> where it first stands
        self.advance()

    def error(self, reason: str, place: int | None = None) -> FormulaError:
        return FormulaError(reason, self.text, self.place if place is None else place)

    def advance(self) -> None:
        match = _TOKEN.match(self.text, self.position)
        if match:
            self.kind = match.lastgroup or ""
            self.word, self.place, self.position = match[self.kind], match.start(self.kind), match.end()
            return
        rest = self.text[self.position :]
        self.place = self.position + len(rest) - len(rest.lstrip())
        if rest.strip():
            raise self.error(f"the character {self.text[self.place]!r} is not part of a formula")
        self.kind, self.word = "end", "end of the formula"

    def take(self, *signs: str) -> str | None:
        if self.kind == "sign" and self.word in signs:
            sign = self.word
            self.advance()
            return sign
        return None

    def expect(self, sign: str, why: str) -> None:
        if not self.take(sign):
            raise self.error(f"expected {sign!r} {why}, found {self.word!r}")

    def value(self, node: Node) -> Node:
        """Refuse a comparison where a number is needed."""
        if node.is_condition:
            raise self.error("a comparison can only be the first argument of where(condition, a, b)", node.place)
        return node

    def binary(self, sign: str, left: Node, right: Node, place: int) -> Node:
        self.operations += 1
        if self.operations > MOST_OPERATIONS:
            raise self.error(f"more than {MOST_OPERATIONS} operations", place)
        return Node(sign, "", (self.value(left), self.value(right)), place)

    def expression(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.error(f"more than {DEEPEST} nested brackets")
        left, place = self.sum(), self.place
        if sign := self.take(*COMPARISONS):
            left = self.binary(sign, left, self.sum(), place)
        self.depth -= 1
        return left

    def sum(self) -> Node:
        return self.from_left(self.product, "+", "-")

    def product(self) -> Node:
        return self.from_left(self.unary, "*", "/")

    def from_left(self, operand: Callable[[], Node], *signs: str) -> Node:
        left, place = operand(), self.place
        while sign := self.take(*signs):
            left = self.binary(sign, left, operand(), place)
            place = self.place
        return left

    def unary(self) -> Node:
        place, signs = self.place, 0
        while sign := self.take("+", "-"):  # a loop: a thousand signs must not become a thousand frames
            signs += sign == "-"
        node = self.power()
        return Node("negate", "", (self.value(node),), place) if signs % 2 else node

    def power(self) -> Node:
        base, place = self.atom(), self.place
        if not self.take("**"):
            return base
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.error(f"more than {DEEPEST} nested powers")
        exponent = self.unary()
        self.depth -= 1
        return self.binary("**", base, exponent, place)

    def atom(self) -> Node:
        word, place = self.word, self.place
        if self.kind == "number":
            if math.isinf(float(word)):
                raise self.error(f"the number {word} is too large", place)
            self.advance()
            return Node("number", float(word), (), place)
        if self.take("("):
            inside = self.expression()
            self.expect(")", f"to close the bracket opened at character {place + 1}")
            return inside
        if self.kind != "name":
            raise self.error(f"expected a number, a name or a bracket, found {word!r}")
        self.advance()
        if word in FUNCTIONS:
            return self.call(word, place)
        if self.kind == "sign" and self.word == "(":
            raise self.error(f"unknown function {word!r}: {_near(word, FUNCTIONS)}", place)
        if word in CONSTANTS:
            return Node("number", CONSTANTS[word], (), place)
        if word not in PRE_ACTIVATIONS and word not in self.parameters:
            known = [*PRE_ACTIVATIONS, *CONSTANTS, *self.parameters]
            raise self.error(f"unknown symbol {word!r}: {_near(word, known)}", place)
        self.symbols.setdefault(word, place)
        return Node("symbol", word, (), place)

    def call(self, name: str, place: int) -> Node:
        self.expect("(", f"after {name}")
        arguments = [self.expression()]
        while self.take(","):
            arguments.append(self.expression())
        self.expect(")", f"to close {name}(")
        if len(arguments) != FUNCTIONS[name]:
            raise self.error(f"{name} takes {FUNCTIONS[name]} argument(s), {len(arguments)} were given", place)
        if name == "where":
            if not arguments[0].is_condition:
                raise self.error("the first argument of where must be a comparison such as x > 0", arguments[0].place)
            arguments[1:] = [self.value(argument) for argument in arguments[1:]]
        else:
            arguments = [self.value(argument) for argument in arguments]
        return Node("call", name, tuple(arguments), place)


def _near(word: str, known: object) -> str:
    names = list(known)  # type: ignore[call-overload]
    close = difflib.get_close_matches(word, names, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known are {', '.join(names)}"
