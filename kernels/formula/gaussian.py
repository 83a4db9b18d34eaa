"""Moments of h under standard normal pre-activations, by Gauss-Hermite quadrature."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

from .grammar import Formula
from .program import run
from .safety import NUMPY
from .symbolic import Compiled, compile_formula

_NODES = 180  # per dimension; the error at kinks and steps is about 1e-3


def gaussian_std(formula: Formula) -> float:
    """Return the standard deviation of h when every pre-activation is standard normal and independent."""
    return _moments(compile_formula(formula))[1]


def gaussian_rms(formula: Formula) -> float:
    """Return the root mean square of h when every pre-activation is standard normal and independent."""
    return math.hypot(*_moments(compile_formula(formula)))


@functools.lru_cache(maxsize=256)
def _moments(compiled: Compiled) -> tuple[float, float]:
    """Return the mean and the standard deviation of h."""
    formula = compiled.formula
    nodes, weights = _quadrature(len(formula.pre_activations))
    values = dict(zip(formula.pre_activations, nodes, strict=True))
    values |= {name: np.float64(p.init) for name, p in formula.tensors.items()}
    with np.errstate(all="ignore"):
        h = run(compiled.forward, NUMPY, values)["h"]
        mean = np.sum(weights * h)
        return float(mean), float(np.sqrt(np.sum(weights * np.square(h - mean))))


@functools.lru_cache(maxsize=2)
def _quadrature(dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points (dimensions, n) and weights (n,) whose weighted sum is the mean over standard normal numbers."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights = weights / math.sqrt(2 * math.pi)
    points = np.array(list(itertools.product(nodes, repeat=dimensions))).T
    return points, np.prod(np.array(list(itertools.product(weights, repeat=dimensions))), axis=1)
