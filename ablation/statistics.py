"""What a set of final losses shows: differences to the baseline with their uncertainty, and a verdict on each arm.

Runs of one seed share the order of their data and the initial weights outside the FFN, so arms are compared seed by seed: the
differences of a seed vary less than the losses do. A p-value is of the two-sided paired t-test; over the arms of a comparison
they are adjusted as in Holm 1979, so that the chance of one false "better" or "worse" anywhere stays below `ALPHA`. The
smallest detectable difference is the one that such a test finds with probability `POWER`, at the strictest level of Holm's
steps (a noncentral t distribution); without it "not significant" says nothing.

A run that diverged stays in: its loss is that of a model that knows nothing, and its arm is not called better.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import optimize, stats

ALPHA = 0.05
POWER = 0.8
FEWEST_SEEDS = 3  # with two, the deviation is a guess: 95% of intervals are 13 times as wide as with many
_RESAMPLES = 9999


class Verdict(str, enum.Enum):
    """What can be said of an arm beside the baseline."""

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference shown"  # one of the size that was asked for would have been
    UNDERPOWERED = "underpowered"
    BLOCKED = "blocked"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm beside the baseline. Losses in nats a token; a difference is the arm's less the baseline's, so less is better."""

    arm: str
    seeds: int  # that both have
    diverged: int  # of the arm's
    difference: float  # mean over seeds
    deviation: float  # of a seed's difference, from the sample (n - 1)
    p: float  # of this test alone; nan with one seed
    p_holm: float  # adjusted for all arms of the comparison
    interval: tuple[float, float]  # 95%, from t, for this arm alone
    bootstrap: tuple[float, float]  # 95%, bias-corrected and accelerated (Efron 1987); nan where not computed
    detectable: float  # smallest detectable difference
    verdict: Verdict
    reason: str  # why the verdict is no plain better or worse; "" where it is


def compare(
    losses: Mapping[str, Mapping[int, float]],
    baseline: str,
    smallest_effect: float,
    ceiling: float,
    blocked: Mapping[str, str] | None = None,
    resamples: int = _RESAMPLES,
) -> list[Comparison]:
    """Compare every arm with the baseline, seed by seed.

    Args:
        losses: final held-out loss by arm and seed; not finite where the run diverged. A seed that is missing on one side is
            left out of that arm's comparison.
        smallest_effect: the difference that is worth finding, in nats a token: where one of this size would not have been
            found, the verdict is "underpowered" instead of "no difference shown".
        ceiling: the loss that a diverged run counts as, ln(vocabulary).
        blocked: arms without a verdict, with the reason; the baseline's reason blocks all.
        resamples: of the bootstrap; 0 leaves it out.

    Raises:
        ValueError: there is no baseline among the losses.
    """
    if baseline not in losses:
        raise ValueError(f"no losses of the baseline {baseline!r}")
    blocked = blocked or {}
    pairs = {arm: (of_arm, losses[baseline]) for arm, of_arm in losses.items() if arm != baseline}
    of_all = dict.fromkeys(losses, blocked.get(baseline, ""))
    return compare_pairs(pairs, smallest_effect, ceiling, of_all | blocked, resamples)


def compare_pairs(
    pairs: Mapping[str, tuple[Mapping[int, float], Mapping[int, float]]],
    smallest_effect: float,
    ceiling: float,
    blocked: Mapping[str, str] | None = None,
    resamples: int = _RESAMPLES,
    margin: float = 0.0,
) -> list[Comparison]:
    """Compare as `compare` does, each arm with a baseline of its own; Holm's adjustment is for all of them.

    Args:
        pairs: the losses of the arm, and of its baseline, by seed. A pair without seeds counts in the adjustment.
        margin: added to every difference, so that "better" says: by more than this, and "worse": not better by this.
    """
    found = []
    for arm, sides in pairs.items():
        seeds = sorted(sides[0].keys() & sides[1].keys())
        diverged = [sum(not math.isfinite(side[seed]) for seed in seeds) for side in sides]
        counted = [[_counted(side[seed], ceiling) for seed in seeds] for side in sides]
        differences = np.subtract(*counted) + margin if seeds else np.empty(0)
        found.append(_Test(arm, *diverged, *_paired(differences), _bootstrap(differences, resamples)))
    return _judge(found, smallest_effect, blocked or {})


def compare_summaries(
    summaries: Mapping[str, tuple[float, float, int]], baseline: str, smallest_effect: float
) -> list[Comparison]:
    """Compare arms of which only (mean, standard deviation, runs) was published: Welch's test, since nothing is paired."""
    mean0, deviation0, runs0 = summaries[baseline]
    found = []
    for arm, (mean, deviation, runs) in summaries.items():
        if arm != baseline:
            test = _welch(mean - mean0, (deviation, runs), (deviation0, runs0))
            found.append(_Test(arm, 0, 0, *test, (math.nan, math.nan)))
    return _judge(found, smallest_effect, {})


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number as in Holm 1979; those that are nan stay so, and count."""
    order = sorted(range(len(p)), key=lambda i: (math.isnan(p[i]), p[i]))
    adjusted, largest = [math.nan] * len(p), 0.0
    for place, i in enumerate(order):
        if not math.isnan(p[i]):
            largest = max(largest, min(1.0, (len(p) - place) * p[i]))
            adjusted[i] = largest
    return adjusted


def detectable_difference(seeds: int, alpha: float = ALPHA, power: float = POWER, paired: bool = True) -> float:
    """Return the smallest difference that a two-sided t-test finds with probability `power`.

    In units of the standard deviation of a seed's difference, or, not paired, of one arm's losses; infinite with one seed.
    """
    if seeds < 2:
        return math.inf
    freedom, scale = (seeds - 1, 1.0) if paired else (2 * seeds - 2, math.sqrt(2.0))
    return scale * _detectable(freedom, alpha, power) / math.sqrt(seeds)


# ------------------------------------------------------------------------------------------------------------- one test


@dataclasses.dataclass(frozen=True)
class _Test:
    arm: str
    diverged: int
    diverged_baseline: int
    seeds: int
    difference: float
    deviation: float
    error: float  # standard error of the difference
    freedom: float
    p: float
    bootstrap: tuple[float, float]


def _counted(loss: float, ceiling: float) -> float:
    return min(loss, ceiling) if math.isfinite(loss) else ceiling


def _paired(differences: np.ndarray) -> tuple[int, float, float, float, float, float]:
    """Return seeds, mean, deviation, standard error, degrees of freedom and p of paired differences."""
    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        return n, mean, math.nan, math.nan, math.nan, math.nan
    deviation = float(differences.std(ddof=1))
    return n, mean, deviation, *_tested(mean, deviation / math.sqrt(n), n - 1)


def _welch(
    difference: float, one: tuple[float, int], other: tuple[float, int]
) -> tuple[int, float, float, float, float, float]:
    """Return the same of two samples, each (deviation, runs): Welch 1947."""
    runs = min(one[1], other[1])
    if runs < 2:
        return runs, difference, math.nan, math.nan, math.nan, math.nan
    variances = [deviation**2 / n for deviation, n in (one, other)]
    total = sum(variances)
    parts = sum(v**2 / (n - 1) for v, (_, n) in zip(variances, (one, other), strict=True))
    freedom = total**2 / parts if parts else float(one[1] + other[1] - 2)
    deviation = math.sqrt(one[0] ** 2 + other[0] ** 2)
    return runs, difference, deviation, *_tested(difference, math.sqrt(total), freedom)


def _tested(difference: float, error: float, freedom: float) -> tuple[float, float, float]:
    if error == 0.0:  # the same difference in every seed
        return error, freedom, 1.0 if difference == 0.0 else 0.0
    return error, freedom, float(2 * stats.t.sf(abs(difference) / error, freedom))


def _bootstrap(differences: np.ndarray, resamples: int) -> tuple[float, float]:
    if len(differences) < FEWEST_SEEDS or not resamples:
        return math.nan, math.nan
    if np.ptp(differences) == 0.0:
        return float(differences[0]), float(differences[0])
    generator = np.random.default_rng(0)
    with warnings.catch_warnings():  # few seeds: what it says of them stands in the report
        warnings.simplefilter("ignore")
        interval = stats.bootstrap(
            (differences,), np.mean, n_resamples=resamples, method="BCa", random_state=generator
        ).confidence_interval
    return float(interval.low), float(interval.high)


@functools.cache
def _detectable(freedom: float, alpha: float, power: float) -> float:
    """Return the difference in standard errors that is found, with the right sign, with probability `power`."""
    critical = stats.t.isf(alpha / 2, freedom)

    def found(difference: float) -> float:
        """The noncentral t beyond `critical`, as an integral over the estimated error; SciPy's own is NaN in places."""
        beyond = lambda square: stats.norm.cdf(difference - critical * math.sqrt(square / freedom))  # noqa: E731
        return stats.chi2.expect(beyond, (freedom,), lb=0, ub=stats.chi2.isf(1e-12, freedom))

    upper = 2 * critical + 4
    while found(upper) < power:
        upper *= 2
    return float(optimize.brentq(lambda difference: found(difference) - power, 0.0, upper, xtol=1e-6))


# ------------------------------------------------------------------------------------------------------------- verdicts


def _judge(tests: list[_Test], smallest_effect: float, blocked: Mapping[str, str]) -> list[Comparison]:
    adjusted = holm([test.p for test in tests])
    return [
        _judged(test, p, len(tests), smallest_effect, blocked.get(test.arm, ""))
        for test, p in zip(tests, adjusted, strict=True)
    ]


def _judged(test: _Test, p_holm: float, arms: int, smallest_effect: float, blocked: str) -> Comparison:
    detectable, interval = math.inf, (math.nan, math.nan)
    if not math.isnan(test.p):
        detectable = test.error * _detectable(test.freedom, ALPHA / arms, POWER) if test.error else 0.0
        reach = test.error * float(stats.t.isf(0.025, test.freedom))
        interval = (test.difference - reach, test.difference + reach)
    verdict, reason = _verdict(test, p_holm, detectable, smallest_effect)
    if blocked:
        verdict, reason = Verdict.BLOCKED, blocked
    return Comparison(
        test.arm, test.seeds, test.diverged, test.difference, test.deviation, test.p, p_holm,
        interval, test.bootstrap, detectable, verdict, reason,
    )  # fmt: skip


def _verdict(test: _Test, p_holm: float, detectable: float, smallest_effect: float) -> tuple[Verdict, str]:
    diverged = f"{test.diverged} of {test.seeds} seeds diverged" if test.diverged else ""
    if test.seeds < FEWEST_SEEDS:
        return Verdict.UNDERPOWERED, f"{test.seeds} seed(s): a verdict takes {FEWEST_SEEDS} at least"
    if p_holm < ALPHA and test.difference > 0:
        return Verdict.WORSE, diverged
    if p_holm < ALPHA and test.diverged <= test.diverged_baseline:
        return Verdict.BETTER, ""
    if detectable > smallest_effect:
        size = f"a difference below {detectable:.3g} nats would not have been found, {smallest_effect:g} was asked for"
        return Verdict.UNDERPOWERED, "; ".join(filter(None, (diverged, size)))
    return Verdict.NO_DIFFERENCE, diverged or f"one of {detectable:.2g} nats would have been found"


# ------------------------------------------------------------------------------------- compute, learning rates and sizes


@dataclasses.dataclass(frozen=True)
class SpeedUp:
    """Compute of the baseline that reaches an arm's loss, over the arm's."""

    factor: float  # nan where the baseline's curve says nothing about that loss
    extrapolated: bool  # the baseline never reached that loss


def effective_speed_up(compute: Sequence[float], losses: Sequence[float], loss: float, spent: float) -> SpeedUp:
    """Return how many times as much compute the baseline needs for an arm's loss.

    Between points of the baseline's own curve, log compute is interpolated over the loss; below its last, the line through
    the later half of the curve goes on, at most to four times the compute.

    Args:
        compute: of the baseline (FLOPs, or seconds), rising.
        losses: of the baseline there.
        loss: the arm's final loss.
        spent: by the arm, in the unit of `compute`.
    """
    curve = [(math.log(c), v) for c, v in zip(compute, losses, strict=True) if c > 0 and math.isfinite(v)]
    falling: list[tuple[float, float]] = []
    for point in curve:  # a loss that was reached before counts when it was reached
        if not falling or point[1] < falling[-1][1]:
            falling.append(point)
    if len(falling) < 2 or not math.isfinite(loss) or loss > falling[0][1]:
        return SpeedUp(math.nan, False)
    logs, values = (np.array(side) for side in zip(*falling, strict=True))
    if loss >= values[-1]:
        return SpeedUp(math.exp(float(np.interp(-loss, -values, logs))) / spent, False)
    later = slice(len(logs) // 2 if len(logs) >= 4 else 0, None)
    slope, _ = np.polyfit(logs[later], values[later], 1)
    reached = logs[-1] + (loss - values[-1]) / slope if slope < 0 else math.inf
    return SpeedUp(math.exp(reached) / spent if reached <= logs[-1] + math.log(4) else math.nan, True)


def loss_at(places: Sequence[float], losses: Sequence[float], place: float) -> float:
    """Return the loss of a curve at a place (seconds, FLOPs, bytes), linear in between; nan outside of it."""
    if len(places) == 0 or not places[0] <= place <= places[-1]:
        return math.nan
    return float(np.interp(place, places, losses))


@dataclasses.dataclass(frozen=True)
class RateSweep:
    """What a sweep of learning rates showed of an arm."""

    best: float  # the rate with the lowest loss
    loss: float
    edge: str  # "lowest" or "highest" when no rate beyond the best was tried, else ""
    rise: float  # nats lost at twice or half the best rate, from a parabola through its neighbours; nan without both


def sweep(losses: Mapping[float, float]) -> RateSweep:
    """Return the best rate of {rate: loss}, and what a miss costs. Rates that diverged are not finite.

    Raises:
        ValueError: no rate has a finite loss.
    """
    finite = {rate: loss for rate, loss in sorted(losses.items()) if math.isfinite(loss)}
    if not finite:
        raise ValueError("no learning rate has a finite loss")
    best = min(finite, key=finite.__getitem__)
    tried = sorted(losses)
    place = tried.index(best)
    edge = "lowest" if place == 0 else "highest" if place == len(tried) - 1 else ""
    rise = math.nan
    if not edge and all(math.isfinite(losses[tried[place + side]]) for side in (-1, 1)):
        x = np.log2([tried[place + side] / best for side in (-1, 0, 1)])
        curvature = np.polyfit(x, [losses[tried[place + side]] for side in (-1, 0, 1)], 2)[0]
        rise = float(curvature)  # of (log2 rate)^2, so at a distance of one factor of 2
    return RateSweep(best, finite[best], edge, rise)


@dataclasses.dataclass(frozen=True)
class RankStability:
    """Whether arms keep their order from one size to the next."""

    tau: float  # Kendall's: 1 the same order, -1 the reverse; nan with fewer than two arms
    swapped: list[tuple[str, str]]  # pairs whose order changes; the first was ahead


def rank_stability(smaller: Mapping[str, float], larger: Mapping[str, float]) -> RankStability:
    """Compare the order of the arms' mean losses at two sizes, of the arms that both have."""
    arms = [arm for arm in smaller if arm in larger]
    swapped = []
    for one, other in itertools.combinations(arms, 2):
        first, second = sorted((one, other), key=smaller.__getitem__)
        if larger[first] > larger[second]:
            swapped.append((first, second))
    tau = (
        float(stats.kendalltau([smaller[a] for a in arms], [larger[a] for a in arms])[0]) if len(arms) > 1 else math.nan
    )
    return RankStability(tau, swapped)
