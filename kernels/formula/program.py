"""Straight-line programs: what every backend prints.

A program is a list of lines, each one operation on numbers, inputs and earlier lines. It is made from SymPy expressions; equal
subexpressions become one line, across all outputs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy

from .functions import REGISTRY
from .grammar import PRE_ACTIVATIONS

Argument = str | float  # the name of an input or of a line, or a number

# What a backend must be able to print, with the number of operands: arithmetic, and the operations of the registry.
# - gt and ge give a condition, which only `select` takes
# - max and min give NaN where one operand is NaN; keep_nan(a, b) is b where b is NaN, else a
# - complement(s, u) is 1 - s where s = sigmoid(u), and sech2(t, u) is 1 - t**2 where t = tanh(u), each from whichever of the
#   two is more exact
OPERATIONS = {
    "add": 2,
    "sub": 2,
    "mul": 2,
    "div": 2,
    "neg": 1,
    "gt": 2,
    "ge": 2,
    "select": 3,
    "keep_nan": 2,
    **{name: function.operands or function.arity for name, function in REGISTRY.items() if function.operation},
}
# How C and Python both write some of them.
INFIX = {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "gt": "{} > {}", "ge": "{} >= {}"}


@dataclasses.dataclass(frozen=True)
class Line:
    """`name = operation(*arguments)`."""

    name: str
    operation: str
    arguments: tuple[Argument, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """Lines in an order in which they can run. `outputs` says which line, input or number is which result."""

    inputs: tuple[str, ...]
    lines: tuple[Line, ...]
    outputs: Mapping[str, Argument]

    def count(self) -> Counter[str]:
        """Return how often each operation stands in it."""
        return Counter(line.operation for line in self.lines)

    @property
    def used(self) -> frozenset[str]:
        """The inputs that it reads."""
        read = {argument for line in self.lines for argument in line.arguments} | set(self.outputs.values())
        return frozenset(read & set(self.inputs))


class Lowering:
    """Turns expressions into lines. An expression that was seen before costs nothing.

    Args:
        inputs: names of the symbols that may occur.
        expressions: all that are going to be lowered, to know what is shared.
    """

    def __init__(self, inputs: tuple[str, ...], expressions: Mapping[str, sympy.Expr]) -> None:
        self.inputs = inputs
        self.lines: list[Line] = []
        self._names: dict[tuple, str] = {}
        self._done: dict[sympy.Basic, Argument] = {}
        shared, reduced = sympy.cse(list(expressions.values()), symbols=sympy.numbered_symbols("_s"), order="none")
        # How often each node is used: one that is used once may be folded into its user.
        self._uses: Counter[sympy.Basic] = Counter()
        self._sigmoids: set[sympy.Basic] = set()  # arguments whose sigmoid is needed anyway
        for whole in (*(value for _, value in shared), *reduced):
            for node in sympy.preorder_traversal(whole):
                self._uses.update(node.args)
                if type(node).__name__ == "complement":
                    self._sigmoids.add(node.args[0])
        self._uses.update(reduced)
        for symbol, value in shared:
            self._done[symbol] = self.lower(value)
        self.outputs = {name: self.lower(value) for name, value in zip(expressions, reduced, strict=True)}

    def program(self) -> Program:
        return Program(self.inputs, tuple(self.lines), self.outputs)

    def lower(self, node: sympy.Basic) -> Argument:
        """Return the name (or number) that holds `node`, adding the lines that compute it."""
        if node not in self._done:
            self._done[node] = self._lower(node)
        return self._done[node]

    def _lower(self, node: sympy.Basic) -> Argument:
        if node.is_Symbol:
            return str(node)
        if node.is_Rational:
            return float(node)
        if node.is_Add:
            return self._sum(node)
        if node.is_Mul or node.is_Pow:
            return self._product(node)
        name = type(node).__name__
        if name.startswith("where_"):
            left, right, then, otherwise = (self.lower(argument) for argument in node.args)
            return self._line("select", self._line(name.removeprefix("where_"), left, right), then, otherwise)
        if name == "step":
            return self._line("select", self._line("gt", self.lower(node.args[0]), 0.0), 1.0, 0.0)
        if name in ("complement", "sech2"):
            argument = self.lower(node.args[0])
            return self._line(name, self._line("sigmoid" if name == "complement" else "tanh", argument), argument)
        if name.startswith("tanh_softplus"):
            return self._tanh_softplus(self.lower(node.args[0]), slope=name.endswith("slope"))
        if name == "relu":
            return self._line("max", self.lower(node.args[0]), 0.0)
        if name == "power":  # of a base that is not negative, to an exponent that is no integer
            base, exponent = (self.lower(argument) for argument in node.args)
            return self._line("exp", self._line("mul", self._line("log", base), exponent))
        return self._line(name, *(self.lower(argument) for argument in node.args))

    def _tanh_softplus(self, u: Argument, slope: bool) -> Argument:
        """Lower n / (n + 2), n = e (e + 2), e = exp(u), or its derivative; where u > 0, over e^2, for e would overflow."""
        z = self._line("exp", self._line("neg", self._line("abs", u)))
        positive, square, twice = self._line("gt", u, 0.0), self._line("mul", z, z), self._line("mul", z, 2.0)
        # n, or where u > 0 the 2 of 1 - 2 / (n + 2): what is near 1 is rounded once, below it.
        above = self._line("select", positive, self._line("mul", square, 2.0), self._line("add", square, twice))
        below = self._line("add", above, self._line("select", positive, self._line("add", twice, 1.0), 2.0))
        if slope:
            half = self._line("mul", self._line("select", positive, square, z), self._line("add", z, 1.0))
            return self._line("div", self._line("mul", half, 4.0), self._line("mul", below, below))
        share = self._line("div", above, below)
        return self._line("select", positive, self._line("sub", 1.0, share), share)

    def _line(self, operation: str, *arguments: Argument) -> str:
        assert len(arguments) == OPERATIONS[operation], (operation, arguments)
        key = (operation, *arguments)
        if key not in self._names:
            self._names[key] = f"t{len(self.lines)}"
            self.lines.append(Line(self._names[key], operation, arguments))
        return self._names[key]

    def _sum(self, node: sympy.Add) -> Argument:
        plus = [term for term in node.args if not term.could_extract_minus_sign()]
        minus = [-term for term in node.args if term.could_extract_minus_sign()]
        # A number last: it is the term that a fused multiply-add can take up.
        plus.sort(key=lambda term: term.is_Rational)
        total: Argument | None = None
        for term in plus:
            value = self.lower(term)
            total = value if total is None else self._line("add", total, value)
        for term in minus:
            value = self.lower(term)
            total = self._line("neg", value) if total is None else self._line("sub", total, value)
        assert total is not None
        return total

    def _product(self, node: sympy.Mul | sympy.Pow) -> Argument:
        number, factors, divisors, gates = 1.0, [], [], []
        for factor in sympy.Mul.make_args(node):
            base, exponent = factor.as_base_exp()
            if factor.is_Rational:
                number *= float(factor)
            elif self._folds(factor, node):
                gates.append(self.lower(factor.args[0]))
            elif exponent.is_Integer:
                (factors if exponent > 0 else divisors).append(self._power(base, abs(int(exponent))))
            else:
                raise AssertionError(f"{factor} has an exponent that is no integer")
        return self._line_of_product(number, factors, divisors, gates)

    def _folds(self, factor: sympy.Basic, product: sympy.Basic) -> bool:
        """Tell whether a * sigmoid(b) may be one operation, shorter than two: nothing else needs the sigmoid."""
        others = [other for other in product.args if other != factor and not other.is_Rational]
        varies = any(str(symbol) in PRE_ACTIVATIONS for symbol in factor.free_symbols)
        needed = self._uses[factor] > 1 or (factor.args[:1] and factor.args[0] in self._sigmoids)
        return type(factor).__name__ == "sigmoid" and not needed and varies and bool(others)

    def _line_of_product(
        self, number: float, factors: list[Argument], divisors: list[Argument], gates: list[Argument]
    ) -> Argument:
        """Return the product of numbers, factors, reciprocals, and sigmoids of `gates`."""
        total: Argument | None = None
        for value in factors:
            total = value if total is None else self._line("mul", total, value)
        if divisors:
            divisor = divisors[0]
            for value in divisors[1:]:
                divisor = self._line("mul", divisor, value)
            if total is None:
                total, number = self._line("div", number, divisor), 1.0
            else:
                total = self._line("div", total, divisor)
        for gate in gates:
            total, number = (number, 1.0) if total is None else (total, number)
            total = self._line("mul_sigmoid", total, gate)
        assert total is not None
        if number == -1.0:
            return self._line("neg", total)
        return total if number == 1.0 else self._line("mul", total, number)

    def _power(self, base: sympy.Basic, exponent: int) -> Argument:
        value, result = self.lower(base), None
        while True:
            if exponent & 1:
                result = value if result is None else self._line("mul", result, value)
            exponent >>= 1
            if not exponent:
                assert result is not None
                return result
            value = self._line("mul", value, value)


def keep_nan(program: Program, sources: Sequence[str]) -> Program:
    """Return a program whose output "h" is NaN where one of the inputs `sources` is."""
    lines, h = list(program.lines), program.outputs["h"]
    for source in sources:
        name = f"t{len(lines)}"
        lines.append(Line(name, "keep_nan", (h, source)))
        h = name
    return Program(program.inputs, tuple(lines), {**program.outputs, "h": h})


def run(program: Program, operations: Mapping[str, Callable[..., Any]], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Interpret a program.

    Args:
        operations: a function for each entry of `OPERATIONS`, and "number", which makes a value of a Python float.
        inputs: a value for each input that the program uses.

    Returns:
        The value of each output.
    """
    values = dict(inputs)
    number = operations["number"]
    value_of = lambda argument: values[argument] if isinstance(argument, str) else number(argument)  # noqa: E731
    for line in program.lines:
        values[line.name] = operations[line.operation](*(value_of(argument) for argument in line.arguments))
    return {name: value_of(argument) for name, argument in program.outputs.items()}
