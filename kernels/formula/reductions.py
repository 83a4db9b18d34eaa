"""Reductions over the d_ff channels of a token, and the programs of the passes over its row that compute them.

With R the numbers to which a formula reduces a token, h of channel i is f(p_i, R), of that channel's pre-activations p_i.
Reduction R_k reduces e_k(p_i, R), in which reductions of a lower level may occur. With dh the gradient of h, backward is

    S_k  = sum over i of  dh_i df/dR_k + sum over l of B_l w_l,i de_l/dR_k      for the outermost reductions first
    B_k  = S_k times the factor that all channels share: 1/n of a mean, 1/(n R_k) of rms and std, 1 otherwise
    dp_i = dh_i df/dp_i + sum over k of B_k w_k,i de_k/dp_i

where w_k,i is 1 for mean and sum, e_k,i for rms, e_k,i less its mean for std, and for max 1 at the first channel that attains
it and 0 elsewhere. So each pass is a program over channels, and `Reductions` holds them all. At rms or std 0, B_k is 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import sympy

from .program import Program

Kind = Literal["mean", "sum", "rms", "std", "max"]
COLUMN = "0c"  # number of a channel, as an input of a program; parameters cannot begin with a digit


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A number per token. The names are those of inputs of programs.

    Attributes:
        number: its place in `Reductions.all`.
        kind: what it computes of `argument`.
        argument: e, a number per channel.
        epsilon: added under the root of rms and std.
        level: 0 unless the argument uses other reductions.
    """

    number: int
    kind: Kind
    argument: sympy.Expr
    epsilon: float
    level: int

    @property
    def value(self) -> str:
        """The name of R."""
        return f"0r{self.number}"

    @property
    def adjoint(self) -> str:
        """The name of B."""
        return f"0b{self.number}"

    @property
    def second(self) -> str | None:
        """The name of what else is kept for backward: the mean for std, and for max the channel that attains it."""
        return {"std": f"0m{self.number}", "max": f"0i{self.number}"}.get(self.kind)

    @property
    def labels(self) -> dict[str, str]:
        """What its names are called where a person reads them."""
        own = f"{self.kind}{self.number}"
        second = {self.second: f"{'mean' if self.kind == 'std' else 'channel'}{self.number}"} if self.second else {}
        return {self.value: own, self.adjoint: f"d{own}", **second}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all numbers that are kept for backward."""
        return (self.value,) if self.second is None else (self.value, self.second)


@dataclasses.dataclass(frozen=True)
class Pass:
    """A pass over a row, which reduces one output of `program` for each of `reductions`.

    Attributes:
        program: outputs e (forward) or a term of S (backward) under the name of the reduction's value or adjoint.
    """

    reductions: tuple[Reduction, ...]
    program: Program


@dataclasses.dataclass(frozen=True)
class Reductions:
    """What a formula reduces; all empty for an elementwise one.

    Attributes:
        all: the reductions. Their numbers are kept in this order, `names` of each after the other.
        forward: the passes, level by level.
        backward: the passes that compute S, outermost reductions first.
        backward_with_h: the first of these, with the additional output "h".
    """

    all: tuple[Reduction, ...] = ()
    forward: tuple[Pass, ...] = ()
    backward: tuple[Pass, ...] = ()
    backward_with_h: Pass | None = None

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the numbers per token that are kept for backward."""
        return tuple(name for reduction in self.all for name in reduction.names)

    @functools.cached_property
    def adjoints(self) -> tuple[str, ...]:
        """The names of the adjoints."""
        return tuple(reduction.adjoint for reduction in self.all)

    def offset(self, reduction: Reduction) -> int:
        """Return the place of a reduction's first number among `names`."""
        return self.names.index(reduction.value)


class Collector:
    """Collects the reductions of a formula while it is translated; equal ones are one."""

    def __init__(self) -> None:
        self.all: list[Reduction] = []
        self._known: dict[tuple, Reduction] = {}

    def symbol(self, kind: Kind, argument: sympy.Expr, epsilon: float = 0.0) -> sympy.Expr:
        """Return the symbol of a reduction's value."""
        key = (kind, argument, epsilon)
        if key not in self._known:
            level = max((r.level + 1 for r in self.all if symbol(r.value) in argument.free_symbols), default=0)
            self._known[key] = Reduction(len(self.all), kind, argument, epsilon, level)
            self.all.append(self._known[key])
        return symbol(self._known[key].value)

    def by_level(self) -> list[tuple[Reduction, ...]]:
        """Return the reductions of each level."""
        return _grouped(self.all, {r: r.level for r in self.all})

    def outermost_first(self) -> list[tuple[Reduction, ...]]:
        """Return the reductions in the order of backward: no group uses what a later one computes."""
        order: dict[Reduction, int] = {}
        for reduction in reversed(self.all):  # a reduction stands before those that use it
            users = (r for r in order if symbol(reduction.value) in r.argument.free_symbols)
            order[reduction] = max((order[r] + 1 for r in users), default=0)
        return _grouped(self.all, order)


def symbol(name: str) -> sympy.Symbol:
    """Return the symbol of an input."""
    return sympy.Symbol(name, real=True)


def _grouped(reductions: Sequence[Reduction], key: Mapping[Reduction, int]) -> list[tuple[Reduction, ...]]:
    count = max(key.values(), default=-1) + 1
    return [tuple(r for r in reductions if key[r] == group) for group in range(count)]


class ReducibleRow(Protocol):
    """Numbers over the channels of a row, or of many rows at once.

    Attributes:
        width: the number of channels.
    """

    width: int

    def run(self, program: Program, values: Mapping[str, Any], /) -> dict[str, Any]:
        """Return the outputs of a program by name, a number per channel each."""
        ...

    def total(self, values: Any) -> Any:
        """Return the sum over channels."""
        ...

    def top(self, values: Any) -> tuple[Any, Any]:
        """Return the largest value and the first channel that has it."""
        ...

    def sqrt(self, value: Any) -> Any:
        """Return the root of a number per row."""
        ...


class DifferentiableRow(ReducibleRow, Protocol):
    """A row for which gradients are computed too."""

    def quotient_or_zero(self, above: Any, below: Any) -> Any:
        """Return above / below, or 0 where below is 0, of numbers per row."""
        ...


def reduce_row(reductions: Reductions, values: Mapping[str, Any], row: ReducibleRow) -> dict[str, Any]:
    """Return the values of all reductions by name, from those of pre-activations and parameters."""
    found = dict(values)
    for each in reductions.forward:
        arguments = row.run(each.program, found)
        for reduction in each.reductions:
            found |= _reduced(reduction, arguments[reduction.value], row)
    return {name: found[name] for name in reductions.names}


def _reduced(reduction: Reduction, e: Any, row: ReducibleRow) -> dict[str, Any]:
    if reduction.kind == "max":
        return dict(zip(reduction.names, row.top(e), strict=True))
    if reduction.kind == "sum":
        return {reduction.value: row.total(e)}
    if reduction.kind == "rms":
        return {reduction.value: row.sqrt(row.total(e * e) / row.width + reduction.epsilon)}
    mean = row.total(e) / row.width
    if reduction.kind == "mean":
        return {reduction.value: mean}
    assert reduction.second is not None
    variance = row.total((e - mean) * (e - mean)) / row.width
    return {reduction.value: row.sqrt(variance + reduction.epsilon), reduction.second: mean}


def adjoints_of_row(reductions: Reductions, values: Mapping[str, Any], row: DifferentiableRow) -> dict[str, Any]:
    """Return the adjoints of all reductions by name.

    Args:
        values: of pre-activations, parameters, `dh`, `COLUMN`, and of the reductions.
    """
    found = dict(values)
    for each in reductions.backward:
        terms = row.run(each.program, found)
        for reduction in each.reductions:
            total = row.total(terms[reduction.adjoint])
            if reduction.kind == "mean":
                total = total / row.width
            elif reduction.kind in ("rms", "std"):
                total = row.quotient_or_zero(total / row.width, found[reduction.value])
            found[reduction.adjoint] = total
    return {name: found[name] for name in reductions.adjoints}
