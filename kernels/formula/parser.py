"""The parser of formulas: text -> a checked `Formula`, by the grammar of `grammar.py`. Imports neither torch nor SymPy.

Formulas are untrusted input: nothing is ever evaluated, and everything outside of the grammar is refused, with a caret under
the place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Set
from typing import Any

from . import hints
from .grammar import (
    CALLABLE,
    COMPARISONS,
    CONSTANTS,
    FUNCTIONS,
    PRE_ACTIVATIONS,
    REDUCTIONS,
    Formula,
    FormulaError,
    Node,
)
from .parameters import Learned, Scheduled, read_parameter

LONGEST = 1000  # characters; the longest arm of conf/ffn has 98
MOST_OPERATIONS = 200  # binary ones; a sum of so many is a tree of that depth, which the compiler traverses recursively
DEEPEST = 50  # nested brackets, which bounds the recursion of the parser
MOST_LEVELS = 2  # of reductions inside each other; each is a pass over the row

_DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)+")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<sign>\*\*|<=|>=|[-+*/(),<>]))"
)


def parse(text: str, parameters: Mapping[str, Any] | None = None, from_output: str = "") -> Formula:
    """Return the checked formula of `text`.

    Args:
        text: the formula, at most `LONGEST` characters.
        parameters: what it may use in addition to the pre-activations `x`, or `gate` and `up`. A number is a fixed parameter;
            a mapping {init: 0.25, share: layer} is a learned one, one per layer or (share: channel) per channel of d_ff, or
            (share: group, groups: 8) per block of channels; {schedule: linear, from: 0, to: 1} is a scheduled one.
        from_output: the derivative as a formula of the output `h`, if it is one: "2*sqrt(h)" for relu(x)**2.

    Raises:
        FormulaError: the text is no formula of this grammar, or a parameter is invalid; the message points at the place.
    """
    if len(text) > LONGEST:
        raise FormulaError(f"the formula has {len(text):,} characters; at most {LONGEST:,} are read", text, LONGEST)
    given = {name: _parameter(text, name, value) for name, value in (parameters or {}).items()}
    parser = _Parser(text, tuple(given))
    tree = parser.expression()
    if parser.kind != "end":
        raise parser.unexpected()
    if tree.is_condition:
        raise FormulaError("a comparison has no value of its own: use where(condition, a, b)", text, tree.place)
    symbols = frozenset(parser.symbols)
    if "x" in symbols and symbols & {"gate", "up"}:
        place = min(parser.symbols[name] for name in symbols & {"gate", "up"})
        raise FormulaError(
            "x is the pre-activation of an ungated formula; it cannot occur together with gate or up", text, place
        )
    if not symbols & set(PRE_ACTIVATIONS):
        raise FormulaError("the formula uses no pre-activation: write it in x, or in gate and up", text, 0)
    if "x" not in symbols and not {"gate", "up"} <= symbols:
        missing = "gate" if "gate" not in symbols else "up"
        raise FormulaError(
            f"a gated formula uses gate and up, and {missing} is missing: write an ungated one in x", text, 0
        )
    for name in given:
        if name not in symbols:
            raise FormulaError(f"the formula does not use the parameter {name!r}", text, 0)
    learned = {name: value for name, value in given.items() if isinstance(value, Learned)}
    fixed = {name: value for name, value in given.items() if isinstance(value, float)}
    scheduled = {name: value for name, value in given.items() if isinstance(value, Scheduled)}
    of_layer = {name for name, value in learned.items() if value.share == "layer"}
    _check_reductions(text, tree, of_layer | fixed.keys() | scheduled.keys())
    derivative = None
    if from_output:
        if "x" not in symbols or learned or scheduled or tree.levels:
            reason = "from_output requires an ungated formula that learns nothing, without reductions: others need "
            reason += "pre-activations in backward"
            raise FormulaError(reason, from_output, 0)
        derivative = from_output, _parse_from_output(from_output, tuple(fixed))
    return Formula(text, tree, symbols, learned, fixed, derivative, scheduled)


def _parse_from_output(text: str, fixed: tuple[str, ...]) -> Node:
    parser = _Parser(text, ("h", *fixed))
    tree = parser.expression()
    if parser.kind != "end" or tree.is_condition or tree.levels or set(PRE_ACTIVATIONS) & set(parser.symbols):
        raise FormulaError("from_output may use only h and fixed parameters", text, parser.place)
    return tree


def _check_reductions(text: str, node: Node, constant: Set[str]) -> None:
    """Refuse reductions of what is equal in all channels, and nesting that is too deep.

    Args:
        constant: the parameters that have one value for all channels.
    """
    for argument in node.arguments:
        _check_reductions(text, argument, constant)
    if node.kind != "reduce":
        return
    argument = node.arguments[0]
    if node.levels > MOST_LEVELS:
        reason = f"reductions are nested at most once: this {node.value} is the outermost of {node.levels}"
        raise FormulaError(reason, text, node.place)
    if not _varies(argument, constant):
        raise FormulaError(f"{node.value} of what is the same in every channel: write it without", text, argument.place)


def _varies(node: Node, constant: Set[str]) -> bool:
    """Whether a node may differ between the channels of a token: a reduction does not, whatever is in it, but for norm."""
    if node.kind == "reduce" and node.value != "norm":
        return False
    if node.kind == "symbol":
        return node.value not in constant
    return any(_varies(argument, constant) for argument in node.arguments)


def _parameter(text: str, name: str, value: Any) -> float | Learned | Scheduled:
    """Return a checked entry of `parameters`."""
    match = re.search(rf"\b{re.escape(str(name))}\b", text)
    place = match.start() if match else 0
    if not isinstance(name, str) or not (name.isascii() and name.isidentifier()):
        raise FormulaError(f"a parameter cannot be named {name!r}: that is not an identifier", text, place)
    if name in {*PRE_ACTIVATIONS, *FUNCTIONS, *REDUCTIONS, *CONSTANTS} or re.fullmatch(r"dh|t[0-9]+", name):
        raise FormulaError(f"a parameter cannot be named {name!r}: that name is taken", text, place)
    try:
        return read_parameter(name, value)
    except ValueError as error:
        raise FormulaError(str(error), text, place) from None


class _Parser:
    """Recursive descent over the tokens of one formula; `kind`, `token` and `place` are those of the current token."""

    def __init__(self, text: str, parameters: tuple[str, ...]) -> None:
        self.text, self.parameters = text, parameters
        self.position = self.depth = self.operations = self.place = 0
        self.kind = self.token = ""
        self.symbols: dict[str, int] = {}  # name -> place of its first use
        self.advance()

    def error(self, reason: str, place: int | None = None) -> FormulaError:
        return FormulaError(reason, self.text, self.place if place is None else place)

    def advance(self) -> None:
        match = _TOKEN.match(self.text, self.position)
        if match:
            self.kind = match.lastgroup or ""
            self.token, self.place, self.position = match[self.kind], match.start(self.kind), match.end()
            return
        rest = self.text[self.position :]
        self.place = self.position + len(rest) - len(rest.lstrip())
        if rest.strip():
            character = self.text[self.place]
            raise self.error(f"the character {character!r} is not part of a formula{hints.of_character(character)}")
        self.kind, self.token = "end", "end of the formula"

    def unexpected(self) -> FormulaError:
        """Return the error of a token after the end of an expression."""
        reason = f"unexpected {self.token!r}"
        if self.token in ("if", "else"):
            reason += ": a choice is written where(condition, a, b)"
        elif self.token == ",":
            reason += ": it separates arguments of a function; a decimal point is a dot"
        elif self.token != ")":
            reason += ": is an operator missing? A product is written with *"
        return self.error(reason)

    def take(self, *signs: str) -> str | None:
        if self.kind == "sign" and self.token in signs:
            sign = self.token
            self.advance()
            return sign
        return None

    def expect(self, sign: str, why: str) -> None:
        if not self.take(sign):
            raise self.error(f"expected {sign!r} {why}, found {self.token!r}")

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
        # A loop, because a recursion would nest a thousand frames for a thousand signs.
        while sign := self.take("+", "-"):
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
        token, place = self.token, self.place
        if self.kind == "number":
            if math.isinf(float(token)):
                raise self.error(f"the number {token} is too large", place)
            self.advance()
            return Node("number", float(token), (), place)
        if self.take("("):
            inside = self.expression()
            self.expect(")", f"to close the bracket opened at character {place + 1}")
            return inside
        if self.kind != "name":
            raise self.error(f"expected a number, a name or a bracket, found {token!r}")
        if dotted := _DOTTED.match(self.text, place):
            raise self.error(f"{dotted[0]!r} is not part of a formula{hints.of_dotted(dotted[0], CALLABLE)}", place)
        self.advance()
        if token in CALLABLE:
            return self.call(token, place)
        if self.kind == "sign" and self.token == "(":
            if token in (*PRE_ACTIVATIONS, *CONSTANTS, *self.parameters):
                raise self.error(f"{token} is a number, not a function: a product is written {token}*(...)", place)
            raise self.error(f"unknown function {token!r}: {hints.of_name(token, CALLABLE)}", place)
        if token in CONSTANTS:
            return Node("number", CONSTANTS[token], (), place)
        if token not in PRE_ACTIVATIONS and token not in self.parameters:
            known = [*PRE_ACTIVATIONS, *CONSTANTS, *self.parameters]
            hint = hints.of_name(token, known)
            if hint.startswith("known") and token not in ("h", *self.parameters):
                hint += f"; a parameter needs a value: ffn.parameters.{token}=1, or {token}=1 for kernels.show"
            raise self.error(f"unknown symbol {token!r}: {hint}", place)
        self.symbols.setdefault(token, place)
        return Node("symbol", token, (), place)

    def call(self, name: str, place: int) -> Node:
        self.expect("(", f"after {name}")
        arguments = [self.expression()]
        while self.take(","):
            arguments.append(self.expression())
        self.expect(")", f"to close {name}(")
        if name in REDUCTIONS and len(arguments) in (1, 1 + REDUCTIONS[name]):
            return Node("reduce", name, tuple(map(self.value, arguments)), place)
        if len(arguments) != FUNCTIONS.get(name):
            raise self.error(f"{name} takes {_arity(name)}, not {len(arguments)}", place)
        if name == "where":
            if not arguments[0].is_condition:
                raise self.error("the first argument of where must be a comparison such as x > 0", arguments[0].place)
            arguments[1:] = [self.value(argument) for argument in arguments[1:]]
        else:
            arguments = [self.value(argument) for argument in arguments]
        return Node("call", name, tuple(arguments), place)


def _arity(name: str) -> str:
    """Say how many arguments a function or reduction takes."""
    if name not in REDUCTIONS:
        return f"{FUNCTIONS[name]} argument(s)"
    if name in FUNCTIONS:
        return "1 argument, as a reduction over d_ff, or 2"
    return "1 argument, or a second one, its epsilon" if REDUCTIONS[name] else "1 argument"
