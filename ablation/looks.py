"""Pay for looks: when verdicts are made again as seeds are added, each time is another chance to be wrong.

The error probability is spent over the looks (Lan and DeMets 1983): by the function of O'Brien and Fleming, which leaves most
of it to the last planned look, or by that of Pocock, which spends it more evenly. A part, the reserve, is kept for looks that
nobody had planned: after n seeds, where m were planned, 1 - m/n of it is spent. Looks must not depend on the losses, so they
are numbers of seeds; in between, verdicts are withheld.

What a look may spend decides the level of its test. Looks share their earlier seeds; the levels take that into account exactly.
Where nothing differs, the differences x_1..x_n are a vector of random direction, and t depends on w, the cosine of its angle to
(1, ..., 1), alone. Another seed changes w to (sqrt(n) w + y) / sqrt((n + 1)(1 + y^2)), where sqrt(n) y is distributed as t with
n degrees of freedom, whatever w was. So the distribution of t over the plans that no look has decided follows step by step.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from scipy import special

SPENDINGS = ("obrien_fleming", "pocock")
_NOTHING = 1e-9  # of alpha: what is left to spend is rounding
_ALPHAS = np.geomspace(1e-9, 0.2, 30)  # at which levels are computed
_EDGES = np.linspace(0.0, 8.0, 401)  # of cells of |z|, where z is the normal variable that t is as extreme as


@dataclasses.dataclass(frozen=True)
class Looks:
    """When the verdicts of a plan are made."""

    seeds: tuple[int, ...]  # in the order in which the plan adds them
    counts: tuple[int, ...]  # of seeds, ascending: verdicts are made after so many, and withheld in between
    planned: int  # the last look that was planned when the first verdict was made
    reserve: float = 0.0  # fraction of the error probability that is kept for looks after that
    spending: str = SPENDINGS[0]

    def reached(self, seeds: int) -> int:
        """Return the last look at most so many seeds have reached; 0 if none."""
        return max((count for count in self.counts if count <= seeds), default=0)

    def next(self, seeds: int) -> int:
        """Return the look that follows so many seeds; 0 if none."""
        return next((count for count in self.counts if count > seeds), 0)

    def level(self, alpha: float, count: int) -> float:
        """Return the level of a test at the look after `count` seeds, so that those of all looks err with probability alpha."""
        return _levels(self._until(count), self.planned, self.reserve, self.spending, alpha)[-1]

    def paid(self, p: float, count: int) -> float:
        """Return the least error probability of all looks together at which a p-value of the look after `count` rejects."""
        if math.isnan(p):
            return math.nan
        if self.planned == count == self.counts[0]:
            return min(1.0, p / (1.0 - self.reserve))
        levels = _table(self._until(count), self.planned, self.reserve, self.spending)
        if levels[-1] == 0.0:  # nothing is left to spend
            return 1.0
        if p < levels[0]:
            return float(p * _ALPHAS[0] / levels[0])
        # The first may be 0: of the least error probability nothing is left.
        log_levels = np.log(np.maximum(levels, 1e-300))
        return float(np.exp(np.interp(math.log(max(p, 1e-300)), [*log_levels, 0.0], [*np.log(_ALPHAS), 0.0])))

    def level_to_come(self, alpha: float, count: int, reached: int) -> float:
        """Return the level of a look after `count` seeds, after the last one that was made (0: none); that one's, if no later.

        It is what the looks before it leave to spend. They share seeds with it, so its true level is higher: by little where
        it has several times as many.
        """
        if count <= reached:
            return self.level(alpha, reached)
        spent = [
            _spent(c, self.planned, self.reserve, self.spending, alpha) for c in (self.at_least(count), reached) if c
        ]
        left = spent[0] - sum(spent[1:])
        return left if left > _NOTHING * alpha else 0.0

    def at_least(self, count: int) -> int:
        """Return the first look after at least `count` seeds; `count` itself, a look that may be added, after the last one."""
        return next((c for c in self.counts if c >= count), count)

    def _until(self, count: int) -> tuple[int, ...]:
        return tuple(c for c in self.counts if c <= count)


@functools.cache
def _table(counts: tuple[int, ...], planned: int, reserve: float, spending: str) -> np.ndarray:
    """Return the levels of the last look for each of `_ALPHAS`, ascending."""
    return np.maximum.accumulate([_levels(counts, planned, reserve, spending, alpha)[-1] for alpha in _ALPHAS])


@functools.lru_cache(4096)
def _levels(counts: tuple[int, ...], planned: int, reserve: float, spending: str, alpha: float) -> tuple[float, ...]:
    """Return the two-sided levels of looks after `counts` seeds."""
    spent = [_spent(count, planned, reserve, spending, alpha) for count in counts]
    levels = [spent[0]]
    tails = 2 * special.ndtr(-_EDGES)
    mass = _below(np.append(tails[:-1] - tails[1:], tails[-1]), -float(special.ndtri(spent[0] / 2)))
    for before, count, more in zip(counts, counts[1:], np.diff(spent), strict=False):
        for seeds in range(before, count):
            mass = mass @ _transition(seeds)
        bound = _bound(mass, float(more)) if more > _NOTHING * alpha else math.inf
        levels.append(2 * float(special.ndtr(-bound)))
        mass = _below(mass, bound)
    return tuple(levels)


def _spent(count: int, planned: int, reserve: float, spending: str, alpha: float) -> float:
    """Return how much of alpha the looks until `count` seeds spend."""
    if count > planned:
        return alpha * (1 - reserve * planned / count)
    alpha, fraction = alpha * (1 - reserve), count / planned
    if spending == "pocock":
        return alpha * math.log(1 + (math.e - 1) * fraction)
    return 2 * float(special.ndtr(special.ndtri(alpha / 2) / math.sqrt(fraction)))


def _below(mass: np.ndarray, bound: float) -> np.ndarray:
    """Return the mass of the cells (cells,) that lies below a bound of |z|; the last cell has no upper edge."""
    width = _EDGES[1]
    return mass * np.clip((bound - _EDGES) / width, 0.0, 1.0)


def _bound(mass: np.ndarray, more: float) -> float:
    """Return the bound of |z| above which the cells have the mass `more`."""
    above = np.cumsum(mass[::-1])[::-1]  # of each edge
    return float(np.interp(-math.log(more), -np.log(np.maximum(above, 1e-300)), _EDGES))


@functools.cache
def _transition(n: int) -> np.ndarray:
    """Return the probability of each cell after n + 1 seeds, given the middle of a cell after n (cells, cells)."""
    middles = np.append((_EDGES[:-1] + _EDGES[1:]) / 2, _EDGES[-1])
    rest, to_rest = (_rest(np.abs(z), seeds)[:, None] for z, seeds in ((middles, n), (_EDGES, n + 1)))
    above = _exceeds(rest, to_rest.T, n, 1.0) + _exceeds(rest, to_rest.T, n, -1.0)
    return above - np.append(above[:, 1:], np.zeros((len(middles), 1)), 1)


def _rest(z: np.ndarray, n: int) -> np.ndarray:
    """Return 1 - w^2 of the t, after n seeds, that is as extreme as z."""
    t = -special.stdtrit(n - 1, special.ndtr(-z))
    return (n - 1) / (t**2 + n - 1)


def _exceeds(rest: np.ndarray, to_rest: np.ndarray, n: int, sign: float) -> np.ndarray:
    """Return the probability that w, from sign * sqrt(1 - rest), rises above sqrt(1 - to_rest) with the next seed."""
    # sqrt(n) w + y > v sqrt(1 + y^2), where v = sqrt((n + 1)(1 - to_rest)): for v < 1 above one y, else between two.
    w, v = sign * np.sqrt(n * (1 - rest)), np.sqrt((n + 1) * (1 - to_rest))
    discriminant = (n + 1) * to_rest - n * rest
    root = v * np.sqrt(np.maximum(discriminant, 0.0))
    leading = n - (n + 1) * to_rest  # v^2 - 1
    leading = np.where(np.abs(leading) < 1e-12, 1e-12, leading)
    above_low = special.stdtr(n, -math.sqrt(n) * (w - root) / leading)
    between = above_low - special.stdtr(n, -math.sqrt(n) * (w + root) / leading)
    return np.where(leading < 0, above_low, np.where((discriminant > 0) & (w > 0), between, 0.0))
