"""Straight-line programs, the intermediate representation that every backend prints, and the lowering of SymPy expressions.

A line is one operation on numbers, inputs and earlier lines. Equal subexpressions become one line, across all outputs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, cast

import sympy

from .functions import REGISTRY
from .grammar import PRE_ACTIVATIONS

Argument = str | float  # the name of an input or of a line, or a number

# The operations that a backend must print, with their number of operands: arithmetic, and the operations of the registry.
# - gt and ge return a condition, which only `select` takes
# - max and min return NaN where one operand is NaN; keep_nan(a, b) is b where b is NaN, else a
# - complement(s, u) is 1 - s with s = sigmoid(u), and sech2(t, u) is 1 - t**2 with t = tanh(u), computed from whichever
#   operand is more exact
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
# Notation common to C and Python.
INFIX = {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "gt": "{} > {}", "ge": "{} >= {}"}


@dataclasses.dataclass(frozen=True)
class Line:
    """`name = operation(*arguments)`."""

    name: str
    operation: str
    arguments: tuple[Argument, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """Lines in order of execution; `outputs` maps each result to the line, input or number that holds it."""

    inputs: tuple[str, ...]
    lines: tuple[Line, ...]
    outputs: Mapping[str, Argument]

    def count(self) -> Counter[str]:
        """Return the number of lines per operation."""
        return Counter(line.operation for line in self.lines)

    @property
    def used(self) -> frozenset[str]:
        """The inputs that the program reads."""
        read = {argument for line in self.lines for argument in line.arguments} | set(self.outputs.values())
        return frozenset(name for name in self.inputs if name in read)

    def split(self, same: Set[str]) -> tuple[list[Line], list[Line]]:
        """Return the lines that depend on no inputs but `same`, which a loop over the others computes once, and all others."""
        known, before, inside = set(same), [], []
        for line in self.lines:
            once = all(argument in known for argument in line.arguments if isinstance(argument, str))
            (before if once else inside).append(line)
            known |= {line.name} if once else set()
        return before, inside


def arguments_of(expression: sympy.Basic) -> tuple[sympy.Expr, ...]:
    """Return the arguments of an expression, which SymPy types as `Basic`."""
    return cast("tuple[sympy.Expr, ...]", expression.args)


class Lowering:
    """Lowering of expressions to lines; equal expressions share a line.

    Args:
        inputs: names of the symbols that may occur.
        expressions: everything that will be lowered, by the name of the output.
    """

    def __init__(self, inputs: tuple[str, ...], expressions: Mapping[str, sympy.Expr]) -> None:
        self.inputs = inputs
        self.lines: list[Line] = []
        self._names: dict[tuple, str] = {}
        self._done: dict[sympy.Basic, Argument] = {}
        shared, reduced = _shared(list(expressions.values()))
        self._uses: Counter[sympy.Basic] = Counter()  # a node that is used once may be folded into its user
        self._sigmoids: set[sympy.Basic] = set()  # arguments whose sigmoid is needed anyway
        for expression in [value for _, value in shared] + reduced:
            for node in sympy.preorder_traversal(expression):
                arguments = arguments_of(node)
                self._uses.update(arguments)
                if type(node).__name__ == "complement":
                    self._sigmoids.add(arguments[0])
        self._uses.update(reduced)
        for symbol, value in shared:
            self._done[symbol] = self.lower(value)
        self.outputs = {name: self.lower(value) for name, value in zip(expressions, reduced, strict=True)}

    def program(self) -> Program:
        return Program(self.inputs, tuple(self.lines), self.outputs)

    def lower(self, node: sympy.Expr) -> Argument:
        """Return the name or number that holds `node`; appends the lines that compute it."""
        if node not in self._done:
            self._done[node] = self._lower(node)
        return self._done[node]

    def _lower(self, node: sympy.Expr) -> Argument:
        if node.is_Symbol:
            return str(node)
        if node.is_Rational:
            return float(node)
        if isinstance(node, sympy.Add):
            return self._sum(node)
        if isinstance(node, (sympy.Mul, sympy.Pow)):
            return self._product(node)
        return self._function(type(node).__name__, arguments_of(node))

    def _function(self, name: str, operands: tuple[sympy.Expr, ...]) -> Argument:
        """Lower a function of the registry, or one of those that `symbolic.py` defines."""
        if name.startswith("where_"):
            left, right, then, otherwise = (self.lower(operand) for operand in operands)
            return self._line("select", self._line(name.removeprefix("where_"), left, right), then, otherwise)
        if name == "step":
            return self._line("select", self._line("gt", self.lower(operands[0]), 0.0), 1.0, 0.0)
        if name in ("complement", "sech2"):
            argument = self.lower(operands[0])
            return self._line(name, self._line("sigmoid" if name == "complement" else "tanh", argument), argument)
        if name.startswith("tanh_softplus"):
            return self._tanh_softplus(self.lower(operands[0]), slope=name.endswith("slope"))
        if name == "relu":
            return self._line("max", self.lower(operands[0]), 0.0)
        if name == "power":  # of a base that is not negative, to an exponent that is no integer
            base, exponent = (self.lower(operand) for operand in operands)
            return self._line("exp", self._line("mul", self._line("log", base), exponent))
        return self._line(name, *(self.lower(operand) for operand in operands))

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
        quotient = self._line("div", above, below)
        return self._line("select", positive, self._line("sub", 1.0, quotient), quotient)

    def _line(self, operation: str, *arguments: Argument) -> str:
        assert len(arguments) == OPERATIONS[operation], (operation, arguments)
        key = (operation, *arguments)
        if key not in self._names:
            self._names[key] = f"t{len(self.lines)}"
            self.lines.append(Line(self._names[key], operation, arguments))
        return self._names[key]

    def _sum(self, node: sympy.Add) -> Argument:
        terms = arguments_of(node)
        plus = [term for term in terms if not term.could_extract_minus_sign()]
        minus = [-term for term in terms if term.could_extract_minus_sign()]
        # Numbers last: a fused multiply-add can take one as its addend.
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
                gates.append(self.lower(arguments_of(factor)[0]))
            elif exponent.is_Integer:
                (factors if exponent > 0 else divisors).append(self._power(base, abs(int(exponent))))
            else:
                raise AssertionError(f"{factor} has an exponent that is no integer")
        return self._line_of_product(number, factors, divisors, gates)

    def _folds(self, factor: sympy.Expr, product: sympy.Expr) -> bool:
        """Whether a * sigmoid(b) may be one operation, because nothing else needs the sigmoid."""
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

    def _power(self, base: sympy.Expr, exponent: int) -> Argument:
        value, result = self.lower(base), None
        while True:
            if exponent & 1:
                result = value if result is None else self._line("mul", result, value)
            exponent >>= 1
            if not exponent:
                assert result is not None
                return result
            value = self._line("mul", value, value)


def _shared(expressions: list[sympy.Expr]) -> tuple[list[tuple[sympy.Symbol, sympy.Expr]], list[sympy.Expr]]:
    """Return the common subexpressions under symbols, and the expressions in terms of these."""
    shared, reduced = sympy.cse(expressions, symbols=sympy.numbered_symbols("_s"), order="none")
    return cast("list[tuple[sympy.Symbol, sympy.Expr]]", shared), cast("list[sympy.Expr]", reduced)


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
        operations: a function for each entry of `OPERATIONS`, and "number", which converts a Python float to a value.
        inputs: a value for each input that the program uses.

    Returns:
        The value of each output.
    """
    values = dict(inputs)
    number = operations["number"]

    def value_of(argument: Argument) -> Any:
        return values[argument] if isinstance(argument, str) else number(argument)

    for line in program.lines:
        values[line.name] = operations[line.operation](*(value_of(argument) for argument in line.arguments))
    return {name: value_of(argument) for name, argument in program.outputs.items()}
