"""Test differences: paired and unpaired t-tests, what they can find, and Holm's adjustment for several of them."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import optimize, special, stats

ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 10_000  # that anyone is told to run
FEWEST_SEEDS = 3  # two leave one degree of freedom: the 95% interval is 6.5 times as wide as with many seeds


@dataclasses.dataclass(frozen=True)
class TTest:
    """A two-sided t-test of a mean difference; nan where fewer than two seeds leave it undefined."""

    seeds: int
    difference: float
    deviation: float = math.nan
    error: float = math.nan  # standard error of the difference
    freedom: float = math.nan
    p: float = math.nan
    regret: float = 0.0  # part of `error`

    def interval(self, alpha: float) -> tuple[float, float]:
        """Return the interval of the difference with the confidence 1 - alpha; nan where the test is undefined."""
        if math.isnan(self.p):
            return math.nan, math.nan
        reach = self.error * float(stats.t.isf(alpha / 2, self.freedom)) if self.error else 0.0
        return self.difference - reach, self.difference + reach

    def detectable(self, alpha: float) -> float:
        """Return the smallest difference that the test finds with probability `POWER`."""
        if math.isnan(self.p):
            return math.inf
        return self.error * _detectable(self.freedom, alpha, POWER) if self.error else 0.0

    def equivalence(self, smallest_effect: float) -> float:
        """Return the p-value of the two one-sided tests: that the difference is not within the smallest effect."""
        inside = smallest_effect - abs(self.difference)
        if math.isnan(self.p):
            return math.nan
        if self.error == 0.0:
            return 0.0 if inside > 0 else 1.0
        return float(stats.t.sf(inside / self.error, self.freedom))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted as in Holm 1979. nan stays nan, and counts as a test.

    By hand: `scipy.stats.false_discovery_control` has the methods for false discovery rates alone, not Holm's.
    """
    order = sorted(range(len(p)), key=lambda i: (math.isnan(p[i]), p[i]))
    adjusted, largest = [math.nan] * len(p), 0.0
    for position, i in enumerate(order):
        if not math.isnan(p[i]):
            largest = max(largest, min(1.0, (len(p) - position) * p[i]))
            adjusted[i] = largest
    return adjusted


def detectable_difference(seeds: int, alpha: float = ALPHA, power: float = POWER, paired: bool = True) -> float:
    """Return the smallest difference that a two-sided t-test finds with probability `power`; infinite with one seed.

    Its unit is the standard deviation: of the per-seed differences if paired, else of the losses of one arm.
    """
    if seeds < 2:
        return math.inf
    freedom, scale = (seeds - 1, 1.0) if paired else (2 * seeds - 2, math.sqrt(2.0))
    return scale * _detectable(freedom, alpha, power) / math.sqrt(seeds)


def paired_test(differences: np.ndarray, regret: float) -> TTest:
    """Return the t-test of differences (seeds,), with a regret that joins their standard error."""
    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        return TTest(n, mean)
    deviation = float(differences.std(ddof=1))
    error = math.hypot(deviation / math.sqrt(n), regret)
    if regret > 0:
        # The freedom of the seeds' part alone: that of both is higher.
        return TTest(n, mean, deviation, error, n - 1, two_sided_p(mean, error, n - 1), regret)
    if error == 0.0:  # the same difference in every seed, where t is undefined or infinite
        return TTest(n, mean, deviation, error, n - 1, 1.0 if mean == 0.0 else 0.0)
    # SciPy warns where the differences are nearly equal; their spread is still the test's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result: Any = stats.ttest_1samp(differences, 0.0)  # SciPy has no types
    return TTest(n, mean, deviation, error, n - 1, float(result.pvalue))


def two_sided_p(difference: float, error: float, freedom: float) -> float:
    """Return the p-value of t, which is a difference over its standard error."""
    return 2 * float(stats.t.sf(abs(difference) / error, freedom))


def welch_test(one: tuple[float, float, int], other: tuple[float, float, int]) -> TTest:
    """Return Welch's test (Welch 1947) of two samples, each given as (mean, standard deviation, runs)."""
    (mean, deviation, runs), (mean0, deviation0, runs0) = one, other
    difference = mean - mean0
    if min(runs, runs0) < 2:
        return TTest(min(runs, runs0), difference)
    # By hand: SciPy returns p alone, and the interval and the detectable difference need the error and its freedom.
    variances = [deviation**2 / runs, deviation0**2 / runs0]
    error = math.sqrt(sum(variances))
    spread = math.sqrt(deviation**2 + deviation0**2)
    if error == 0.0:
        return TTest(min(runs, runs0), difference, spread, error, runs + runs0 - 2.0, float(difference == 0.0))
    freedom = sum(variances) ** 2 / sum(v**2 / (n - 1) for v, n in zip(variances, (runs, runs0), strict=True))
    p = float(stats.ttest_ind_from_stats(mean, deviation, runs, mean0, deviation0, runs0, equal_var=False).pvalue)
    return TTest(min(runs, runs0), difference, spread, error, freedom, p)


@functools.cache
def _detectable(freedom: float, alpha: float, power: float) -> float:
    """Return the difference, in standard errors, that is found with the right sign with probability `power`."""
    critical = float(stats.t.isf(alpha / 2, freedom))
    # t exceeds `critical` if the estimated error over the true one, chi / sqrt(freedom), is below (difference + z) / critical.
    # That is integrated over the normal z; `scipy.stats.nct` returns nan in places.
    z, weights = _normal_nodes()

    def power_of(difference: float) -> float:
        ratio = np.maximum(difference + z, 0.0) / critical
        return float(special.gammainc(freedom / 2, freedom / 2 * ratio**2) @ weights)

    upper = 2 * critical + 4
    while power_of(upper) < power:
        upper *= 2
    return optimize.root_scalar(lambda d: power_of(d) - power, bracket=(0.0, upper), method="brentq", xtol=1e-6).root


@functools.cache
def _normal_nodes() -> tuple[np.ndarray, np.ndarray]:
    """Return 1,000 values of a normal variable and their weights: Gauss-Legendre from -8 to 8."""
    nodes, weights = np.polynomial.legendre.leggauss(1000)
    return 8 * nodes, 8 * weights * stats.norm.pdf(8 * nodes)


def seeds_needed(
    deviation: float, regret: float, smallest_effect: float, level: Callable[[int], float], most: int = MOST_SEEDS
) -> float:
    """Return how many seeds find a difference with probability `POWER`; infinite if `most` do not.

    Args:
        deviation: of the per-seed differences, nats.
        regret: part of the standard error that more seeds do not reduce, nats.
        level: of a test with so many seeds; more of them never lower it.
    """
    few, many = FEWEST_SEEDS - 1, most

    def finds(seeds: int) -> bool:
        error, alpha = math.hypot(deviation / math.sqrt(seeds), regret), level(seeds)
        return alpha > 0 and error * _detectable(seeds - 1, alpha, POWER) <= smallest_effect

    if math.isnan(deviation) or not finds(many):
        return math.inf
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if finds(middle) else (middle, many)
    return float(many)


def skewness(samples: np.ndarray) -> np.ndarray:
    """Return the skewness of each row of (..., seeds); 0 where all are equal."""
    centered = samples - samples.mean(-1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(-1))
    return (centered**3).mean(-1) / np.where(deviation > 0, deviation, 1.0) ** 3


@functools.cache
def largest_skewness(seeds: int) -> float:
    """Return the absolute skewness that 1% of normal samples exceed, from 20,000 of them."""
    samples = np.random.default_rng(0).normal(size=(20_000, seeds))
    return float(np.quantile(np.abs(skewness(samples)), 0.99))
