"""Moments of h, and the values of reductions, under standard normal pre-activations, by Gauss-Hermite quadrature."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .compiled import Compiled, compile_formula
from .grammar import Formula
from .program import Program, run
from .reductions import reduce_row
from .safety import NUMPY

_NODES = 180  # per dimension; the error at kinks and steps is about 1e-3
WIDTH = 1024  # d_ff, of which sums and maxima depend, where none is given


def gaussian_std(formula: Formula, width: int = WIDTH) -> float:
    """Return the standard deviation of h when every pre-activation is standard normal and independent, of `width` channels."""
    return _moments(compile_formula(formula), width)[1]


def gaussian_rms(formula: Formula, width: int = WIDTH) -> float:
    """Return the root mean square of h when every pre-activation is standard normal and independent, of `width` channels."""
    return math.hypot(*_moments(compile_formula(formula), width))


def gaussian_reductions(compiled: Compiled, width: int = WIDTH) -> dict[str, float]:
    """Return the values of a formula's reductions over many standard normal channels, by the names of `Reductions.names`.

    A maximum is the value that one channel in `width` exceeds.
    """
    nodes, weights = _quadrature(len(compiled.formula.pre_activations))
    values: dict[str, Any] = dict(zip(compiled.formula.pre_activations, nodes, strict=True))
    values |= {name: np.float64(p.init) for name, p in compiled.formula.tensors.items()}
    with np.errstate(all="ignore"):
        reduced = reduce_row(compiled.reductions, values, _Normal(weights, width))
    return {name: float(value) for name, value in reduced.items()}


@functools.lru_cache(maxsize=256)
def _moments(compiled: Compiled, width: int) -> tuple[float, float]:
    """Return the mean and the standard deviation of h."""
    formula = compiled.formula
    nodes, weights = _quadrature(len(formula.pre_activations))
    values: dict[str, Any] = dict(zip(formula.pre_activations, nodes, strict=True))
    values |= {name: np.float64(p.init) for name, p in formula.tensors.items()}
    values |= gaussian_reductions(compiled, width)
    with np.errstate(all="ignore"):
        h = run(compiled.forward, NUMPY, values)["h"]
        mean = np.sum(weights * h)
        return float(mean), float(np.sqrt(np.sum(weights * np.square(h - mean))))


class _Normal:
    """A row of normal channels, as the points and weights of a quadrature stand for it (`reductions.ReducibleRow`)."""

    def __init__(self, weights: np.ndarray, width: int) -> None:
        self.weights, self.width = weights, width

    def run(self, program: Program, values: Mapping[str, Any]) -> dict[str, Any]:
        return run(program, NUMPY | {"number": np.float64}, values)

    def total(self, values: Any) -> Any:
        return self.width * np.sum(self.weights * values)

    def top(self, values: Any) -> tuple[Any, Any]:
        values = np.broadcast_to(values, self.weights.shape)  # a parameter of each channel starts as one number
        order = np.argsort(values)
        below = np.cumsum(self.weights[order])
        return values[order[min(np.searchsorted(below, 1 - 1 / self.width), len(order) - 1)]], -1

    def sqrt(self, value: Any) -> Any:
        return np.sqrt(value)


@functools.lru_cache(maxsize=2)
def _quadrature(dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points (dimensions, n) and weights (n,) whose weighted sum is the mean over standard normal numbers."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights = weights / math.sqrt(2 * math.pi)
    points = np.array(list(itertools.product(nodes, repeat=dimensions))).T
    return points, np.prod(np.array(list(itertools.product(weights, repeat=dimensions))), axis=1)
