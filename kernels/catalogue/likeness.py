"""Which published arms a formula is, and which of them differ from it only by constants.

Two formulas are the same where they agree to 1e-9 in float64, on a grid that reaches as far as the checks of formulas do: it
is dense near 0, and far out it finds a clamp that one of them has. Curves that are merely close (`gelu` and `gelu_tanh`) are
different.

They differ only by constants where their expressions are equal without their numbers and parameters: factors are left out, so
that `x*sigmoid(x)` and `x*sigmoid(1.702*x)` are alike, and a number that is added or compared with is one like any other.
Exponents count as structure.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..activations.eager import plain
from ..formula import Formula, Learned
from ..formula.domains import REACH
from ..formula.grammar import PRE_ACTIVATIONS
from ..formula.reductions import Collector, Reduction
from ..formula.symbolic import plain_algebra, to_sympy
from .arms import PublishedArm

if TYPE_CHECKING:
    import sympy

_NEAR = 8.0  # values here are finite, and compared at every point
_TOLERANCE = 1e-9  # of max(1, |h|): two ways to write a function differ by roundings
_CANCELLED = 1e-15  # of the squared pre-activation: what is left of x**2 - x**2
_MOST_LEARNED = 4  # parameters, of which all orders are tried
_SHIFTS = (0.37, -0.23)  # of learned parameters from their starts: the same function must be the same there too
_COMMUTATIVE = ("max", "min")
_CONSTANT = ("constant",)

Skeleton = tuple  # nested, of names and skeletons


@dataclasses.dataclass(frozen=True)
class Likeness:
    """What arms are to a formula; each arm is in one list at most.

    Attributes:
        same: they compute the same function, and learn the same parameters from the same start.
        at_start: they compute the same function at the start; the two do not learn the same.
        exchanged: they compute the same function at the start with gate and up exchanged.
        by_constants: they differ only by constants.
    """

    same: list[PublishedArm]
    at_start: list[PublishedArm]
    exchanged: list[PublishedArm]
    by_constants: list[PublishedArm]


def likeness(formula: Formula, arms: Iterable[PublishedArm]) -> Likeness:
    """Return what arms are to a formula."""
    result = Likeness([], [], [], [])
    own, skeletons = _values(formula), {skeleton(formula)}
    left = []
    for arm in arms:
        if arm.formula.gated != formula.gated:
            continue
        orders = _orders(formula, arm.formula)
        equal = _agree(own, _values(arm.formula), formula.gated)
        if equal and any(_same_starts(formula, arm.formula, order) for order in orders):
            result.same.append(arm)
            skeletons.add(skeleton(arm.formula))  # the formula may be written in another way
        elif equal:
            result.at_start.append(arm)
        elif formula.gated and _agree(own, _values(arm.formula, exchanged=True), gated=True):
            result.exchanged.append(arm)
        else:
            left.append((arm, bool(orders)))
    result.by_constants.extend(arm for arm, family in left if family or skeleton(arm.formula) in skeletons)
    return result


# ------------------------------------------------------------------------------------------------------------- numbers


@functools.cache
def _points(gated: bool) -> tuple[Tensor, Tensor]:
    """Return pre-activations (n,) or (2, n) and the size of the larger one at each of them (n,)."""
    near = torch.linspace(-_NEAR, _NEAR, 38 if gated else 398, dtype=torch.float64, device="cpu")
    # At round numbers functions may have their kinks, and just beside 0 a bound that is there for safety.
    special = torch.tensor([0.0, 1e-7, 1e-3, 0.5, 1.0, 2.0], dtype=torch.float64, device="cpu")
    far = torch.logspace(1, math.log10(REACH), 12 if gated else 60, dtype=torch.float64, device="cpu")
    axis = torch.cat([near, special, -special[1:], far, -far])
    if not gated:
        return axis, axis.abs()
    pairs = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
    return pairs, pairs.abs().amax(0)


def _values(formula: Formula, shift: Mapping[str, float] | None = None, exchanged: bool = False) -> Tensor:
    """Return h at the points, with learned parameters at their start plus a shift."""
    pre, _ = _points(formula.gated)
    learned = {
        name: torch.tensor([p.init + (shift or {}).get(name, 0.0)], dtype=torch.float64, device="cpu")
        for name, p in formula.tensors.items()
    }
    return plain(formula)(pre.flip(0) if exchanged else pre, **learned).expand(pre.shape[-1])


def _agree(one: Tensor, other: Tensor, gated: bool) -> bool:
    """Return whether values are the same, far out only where both are finite: there some ways to write a function overflow."""
    _, size = _points(gated)
    finite = one.isfinite() & other.isfinite()
    if not finite[size <= _NEAR].all():
        return False
    allowed = _TOLERANCE * other.abs().clamp(min=1) + _CANCELLED * size**2
    return bool(((one - other).abs() <= allowed)[finite].all())


def _orders(formula: Formula, other: Formula) -> list[dict[str, str]]:
    """Return {parameter of `formula`: that of `other`} for each way in which both learn the same function."""
    if not len(formula.learned) == len(other.learned) <= _MOST_LEARNED:
        return []
    found = []
    for order in itertools.permutations(other.learned):
        names = dict(zip(formula.learned, order, strict=True))
        alike = all(_shared_alike(formula.learned[name], other.learned[of]) for name, of in names.items())
        if alike and all(_agree_shifted(formula, other, names, shift) for shift in _SHIFTS):
            found.append(names)
    return found


def _shared_alike(one: Learned, other: Learned) -> bool:
    """Return whether as many values are learned of each, wherever they start."""
    return dataclasses.replace(one, init=0.0) == dataclasses.replace(other, init=0.0)


def _agree_shifted(formula: Formula, other: Formula, names: Mapping[str, str], shift: float) -> bool:
    """Return whether both are the same with their learned parameters at equal values, each at another distance."""
    moved = {name: shift * (1 + index) for index, name in enumerate(names)}
    to_other = {of: formula.learned[name].init + moved[name] - other.learned[of].init for name, of in names.items()}
    return _agree(_values(formula, moved), _values(other, to_other), formula.gated)


def _same_starts(formula: Formula, other: Formula, names: Mapping[str, str]) -> bool:
    return all(formula.learned[name].init == other.learned[of].init for name, of in names.items())


# --------------------------------------------------------------------------------------------------------- expressions


def skeleton(formula: Formula) -> Skeleton:
    """Return the structure of a formula without its numbers and parameters."""
    collected = Collector()
    with plain_algebra():
        expression = to_sympy(formula.tree, formula, collected)
        return _skeleton(expression, {reduction.value: reduction for reduction in collected.all})


def _skeleton(expression: sympy.Basic, reductions: Mapping[str, Reduction]) -> Skeleton:
    name = str(expression) if expression.is_Symbol else type(expression).__name__
    if name in reductions:
        return (reductions[name].kind, _skeleton(reductions[name].argument, reductions))
    if expression.is_Symbol and name in PRE_ACTIVATIONS:
        return (name,)
    if not expression.args:
        return _CONSTANT
    if expression.is_Pow:
        base, exponent = expression.args
        return (
            "power",
            _skeleton(base, reductions),
            str(exponent) if exponent.is_Number else _skeleton(exponent, reductions),
        )
    parts = [_skeleton(part, reductions) for part in expression.args]
    if all(part == _CONSTANT for part in parts):
        return _CONSTANT
    if expression.is_Mul:
        factors = [part for part in parts if part != _CONSTANT]
        return factors[0] if len(factors) == 1 else ("product", *sorted(factors, key=repr))
    if expression.is_Add:
        terms = [part for part in parts if part != _CONSTANT]
        return ("sum", *sorted(terms, key=repr), *([_CONSTANT] if len(terms) < len(parts) else []))
    return (name, *sorted(parts, key=repr)) if name in _COMMUTATIVE else (name, *parts)
