"""Compare final losses: differences to the baseline with their uncertainty, and a verdict on each arm.

Runs of one seed share the order of their data and the initial weights outside the FFN, so arms are compared seed by seed: these
differences vary less than the losses do. p-values come from the two-sided paired t-test. They are adjusted over all arms and
sizes of a plan as in Holm 1979, which keeps the probability of even one false "better" or "worse" below `ALPHA`. An arm is
"equivalent" where two one-sided tests (Schuirmann 1987) show its difference to be smaller than the smallest effect of interest;
their p-values are a family of their own. The smallest detectable difference is the one that the t-test finds with probability
`POWER` at Holm's strictest step.

Each arm runs at the learning rate that its sweep chose, and may have missed its best one. What that costs
(`ablation/learning_rates.py`) is added to the standard error of each difference: more seeds do not make it smaller.

A verdict holds over seeds, for the held-out text of the plan. Where the losses of its documents are known, a second test adds
the standard error over documents (`ablation/documents.py`), and a verdict that passes it holds for other such text too. Its
p-values are adjusted likewise.

A diverged run stays in the comparison. It counts with the loss of an untrained model, and its arm is never called better.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from ablation.documents import TextScatter

ALPHA = 0.05
POWER = 0.8
SCATTER_RATIO = 2.0  # of two standard deviations, from which on a reader is told
FEWEST_SEEDS = 3  # two leave one degree of freedom: the 95% interval is 6.5 times as wide as with many seeds


class Verdict(str, enum.Enum):
    """The verdict on an arm, relative to the baseline."""

    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"  # the difference is shown to be smaller than the smallest effect of interest
    UNDECIDED = "undecided"
    BLOCKED = "blocked"


@dataclasses.dataclass(frozen=True)
class Scatter:
    """How an arm's and its baseline's losses scatter over seeds, and what of that a reader should know."""

    own: float = math.nan  # sample standard deviation (n - 1) of the arm's losses
    base: float = math.nan  # of the baseline's
    correlation: float = math.nan  # of the two over seeds: what pairing gains
    p_unpaired: float = math.nan  # of Welch's test, which does not pair
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class OverText:
    """What a comparison says about other held-out text."""

    scatter: TextScatter
    interval: tuple[float, float]  # 95% over documents, for the seeds that ran
    both: tuple[float, float]  # 95% over seeds and documents
    p_holm: float  # of no difference over seeds and documents, adjusted for all pairs
    holds: bool  # the verdict (better, worse or equivalent) stands over documents too


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm compared with the baseline. Losses in nats per token; a difference is arm minus baseline, so lower is better."""

    arm: str
    seeds: int  # that both have
    diverged: int  # of the arm's seeds
    difference: float  # mean over seeds
    deviation: float  # sample standard deviation (n - 1) of the per-seed differences
    regret: float  # part of the standard error: what both arms may lose by missing their best learning rates
    p: float  # of this test alone; nan with one seed
    p_holm: float  # adjusted for all pairs that are compared together
    p_equivalent: float  # of the two one-sided tests, adjusted likewise
    interval: tuple[float, float]  # 95%, from t, for this arm alone
    adjusted: tuple[float, float]  # the same at 95% for all pairs together (Bonferroni)
    detectable: float  # smallest detectable difference
    needed: float  # seeds that would find the smallest effect; infinite where the regret alone hides it
    scatter: Scatter
    text: OverText | None  # None: the losses of documents are not known, or a seed diverged
    verdict: Verdict
    reason: str  # why the verdict is not a plain better or worse; "" where it is

    @property
    def decided(self) -> bool:
        """Whether the verdict says something of the difference: better, worse or equivalent."""
        return self.verdict in (Verdict.BETTER, Verdict.WORSE, Verdict.EQUIVALENT)


@dataclasses.dataclass(frozen=True)
class Pair:
    """An arm and its baseline: losses by seed, not finite where a run diverged. A seed that one side lacks is left out."""

    arm: str
    own: Mapping[int, float]
    base: Mapping[int, float]
    ceiling: float = math.inf  # the loss that a diverged run counts as: ln(vocabulary size)
    blocked: str = ""  # why there can be no verdict
    regret: float = 0.0  # what both may lose by missing their best learning rates: `Comparison.regret`
    text: TextScatter | None = None  # of the difference over documents


def pairs_with(
    baseline: str,
    losses: Mapping[str, Mapping[int, float]],
    ceiling: float,
    blocked: Mapping[str, str] | None = None,
    regrets: Mapping[str, float] | None = None,
    texts: Mapping[str, TextScatter | None] | None = None,
) -> list[Pair]:
    """Return every arm's pair with the baseline.

    Args:
        losses: by arm and seed.
        blocked: the arms that get no verdict, with the reason. A reason for the baseline blocks all arms.
        regrets: by arm, `SweepResult.regret` of its learning rate; an arm that is not in it has missed nothing.
        texts: by arm, how its difference scatters over documents.

    Raises:
        ValueError: the baseline has no losses.
    """
    if baseline not in losses:
        raise ValueError(f"no losses of the baseline {baseline!r}")
    blocked, regrets, texts = blocked or {}, regrets or {}, texts or {}
    return [
        Pair(
            arm,
            own,
            losses[baseline],
            ceiling,
            blocked.get(arm, blocked.get(baseline, "")),
            math.hypot(regrets.get(arm, 0.0), regrets.get(baseline, 0.0)),
            texts.get(arm),
        )
        for arm, own in losses.items()
        if arm != baseline
    ]


def compare(pairs: Sequence[Pair], smallest_effect: float, margin: float = 0.0) -> list[Comparison]:
    """Compare every arm with its baseline, seed by seed. Holm's adjustment covers all pairs: those of every arm and size.

    A pair without common seeds counts in the adjustment.

    Args:
        smallest_effect: the difference worth finding, in nats per token: a smaller one makes an arm equivalent.
        margin: added to every difference. "better" then means better by more than the margin, "worse" not better by it.
    """
    tested = []
    for pair in pairs:
        seeds = sorted(pair.own.keys() & pair.base.keys())
        losses = [[_clipped(side[seed], pair.ceiling) for seed in seeds] for side in (pair.own, pair.base)]
        differences = np.array(losses[0]) - np.array(losses[1]) + margin
        diverged, diverged_baseline = (sum(not math.isfinite(side[s]) for s in seeds) for side in (pair.own, pair.base))
        test = _paired_test(differences, pair.regret)
        scatter = _scatter(np.array(losses[0]), np.array(losses[1]), test)
        text = None if diverged or diverged_baseline else pair.text
        tested.append(_TestedArm(pair.arm, diverged, diverged_baseline, test, pair.blocked, scatter, text))
    return _judge(tested, smallest_effect)


def at_every_size(by_size: Sequence[Sequence[Comparison]]) -> dict[str, Verdict]:
    """Return the arms that are better than the baseline at every size, and those that are worse, largest effect first.

    An intersection-union test (Berger 1982): the largest of an arm's p-values over the sizes counts, without an adjustment for
    their number. Those of the arms that every size has are adjusted as in Holm 1979. A blocked arm, or one whose differences
    have not one sign, is neither; one with a diverged seed is not better.
    """
    named = [{c.arm: c for c in comparisons} for comparisons in by_size]
    arms = [arm for arm in named[0] if all(arm in size for size in named)] if named else []
    found, p_values = [], []
    for arm in arms:
        comparisons = [size[arm] for size in named]
        worse = comparisons[0].difference > 0
        usable = all(
            c.verdict is not Verdict.BLOCKED and c.seeds >= FEWEST_SEEDS and (c.difference > 0) == worse
            for c in comparisons
        ) and (worse or not any(c.diverged for c in comparisons))
        found.append((arm, Verdict.WORSE if worse else Verdict.BETTER, min(abs(c.difference) for c in comparisons)))
        p_values.append(max(c.p for c in comparisons) if usable else math.nan)
    decided = [each for each, p in zip(found, holm(p_values), strict=True) if p < ALPHA]
    return {arm: verdict for arm, verdict, _ in sorted(decided, key=lambda each: -each[2])}


def compare_summaries(
    summaries: Mapping[str, tuple[float, float, int]], baseline: str, smallest_effect: float
) -> list[Comparison]:
    """Compare arms published as (mean, standard deviation, runs), by Welch's test: nothing is paired."""
    tested = [
        _TestedArm(arm, 0, 0, _welch_test(summary, summaries[baseline]))
        for arm, summary in summaries.items()
        if arm != baseline
    ]
    return _judge(tested, smallest_effect)


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


# ------------------------------------------------------------------------------------------------------------- the tests


@dataclasses.dataclass(frozen=True)
class _TTest:
    """A two-sided t-test of a mean difference; nan where fewer than two seeds leave it undefined."""

    seeds: int
    difference: float
    deviation: float = math.nan
    error: float = math.nan  # standard error of the difference
    freedom: float = math.nan
    p: float = math.nan
    regret: float = 0.0  # part of `error`


@dataclasses.dataclass(frozen=True)
class _TestedArm:
    arm: str
    diverged: int
    diverged_baseline: int
    test: _TTest
    blocked: str = ""
    scatter: Scatter = Scatter()
    text: TextScatter | None = None

    @property
    def over_text(self) -> _TTest:
        """The same test over seeds and documents; undefined where those are not known."""
        test, text = self.test, self.text
        if text is None or math.isnan(test.p):
            return _TTest(test.seeds, test.difference)
        error = math.hypot(test.error, text.error)
        if error == 0.0:
            return test
        freedom = error**4 / (test.error**4 / test.freedom + text.error**4 / text.freedom)  # Welch-Satterthwaite
        p = _two_sided_p(test.difference, error, freedom)
        return dataclasses.replace(test, error=error, freedom=freedom, p=p)


def _clipped(loss: float, ceiling: float) -> float:
    return min(loss, ceiling) if math.isfinite(loss) else ceiling


def _paired_test(differences: np.ndarray, regret: float) -> _TTest:
    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        return _TTest(n, mean)
    deviation = float(differences.std(ddof=1))
    error = math.hypot(deviation / math.sqrt(n), regret)
    if regret > 0:
        # The freedom of the seeds' part alone: that of both is higher.
        return _TTest(n, mean, deviation, error, n - 1, _two_sided_p(mean, error, n - 1), regret)
    if error == 0.0:  # the same difference in every seed, where t is undefined or infinite
        return _TTest(n, mean, deviation, error, n - 1, 1.0 if mean == 0.0 else 0.0)
    with (
        warnings.catch_warnings()
    ):  # SciPy warns where the differences are nearly equal; their spread is still the test's
        warnings.simplefilter("ignore", RuntimeWarning)
        result: Any = stats.ttest_1samp(differences, 0.0)  # SciPy has no types
    return _TTest(n, mean, deviation, error, n - 1, float(result.pvalue))


def _two_sided_p(difference: float, error: float, freedom: float) -> float:
    return 2 * float(stats.t.sf(abs(difference) / error, freedom))


def _welch_test(one: tuple[float, float, int], other: tuple[float, float, int]) -> _TTest:
    """Return Welch's test (Welch 1947) of two samples, each given as (mean, standard deviation, runs)."""
    (mean, deviation, runs), (mean0, deviation0, runs0) = one, other
    difference = mean - mean0
    if min(runs, runs0) < 2:
        return _TTest(min(runs, runs0), difference)
    # By hand: SciPy returns p alone, and the interval and the detectable difference need the error and its freedom.
    variances = [deviation**2 / runs, deviation0**2 / runs0]
    error = math.sqrt(sum(variances))
    spread = math.sqrt(deviation**2 + deviation0**2)
    if error == 0.0:
        return _TTest(min(runs, runs0), difference, spread, error, runs + runs0 - 2.0, float(difference == 0.0))
    freedom = sum(variances) ** 2 / sum(v**2 / (n - 1) for v, n in zip(variances, (runs, runs0), strict=True))
    p = float(stats.ttest_ind_from_stats(mean, deviation, runs, mean0, deviation0, runs0, equal_var=False).pvalue)
    return _TTest(min(runs, runs0), difference, spread, error, freedom, p)


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


def _equivalence(test: _TTest, smallest_effect: float) -> float:
    """Return the p-value of the two one-sided tests: that the difference is not within the smallest effect."""
    inside = smallest_effect - abs(test.difference)
    if math.isnan(test.p):
        return math.nan
    if test.error == 0.0:
        return 0.0 if inside > 0 else 1.0
    return float(stats.t.sf(inside / test.error, test.freedom))


def seeds_needed(deviation: float, regret: float, smallest_effect: float, pairs: int) -> float:
    """Return how many seeds find a difference with probability `POWER` at Holm's strictest step; infinite above 10,000.

    Args:
        deviation: of the per-seed differences, nats.
        regret: part of the standard error that more seeds do not reduce, nats.
        pairs: that are compared together.
    """
    few, many = FEWEST_SEEDS - 1, 10_000

    def finds(seeds: int) -> bool:
        error = math.hypot(deviation / math.sqrt(seeds), regret)
        return error * _detectable(seeds - 1, ALPHA / pairs, POWER) <= smallest_effect

    if math.isnan(deviation) or not finds(many):
        return math.inf
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if finds(middle) else (middle, many)
    return float(many)


def _scatter(own: np.ndarray, base: np.ndarray, test: _TTest) -> Scatter:
    if len(own) < 2:
        return Scatter()
    deviations = float(own.std(ddof=1)), float(base.std(ddof=1))
    correlation = float(np.corrcoef(own, base)[0, 1]) if min(deviations) > 0 else math.nan
    summaries = [(float(side.mean()), d, len(side)) for side, d in zip((own, base), deviations, strict=True)]
    unpaired = _welch_test(*summaries)
    p = unpaired.p
    if test.regret > 0:
        p = _two_sided_p(unpaired.difference, math.hypot(unpaired.error, test.regret), unpaired.freedom)
    notes = []
    if deviations[0] > SCATTER_RATIO * deviations[1] > 0:
        notes.append(f"its losses scatter {deviations[0] / deviations[1]:.2g} times as much as the baseline's")
    if deviations[1] > SCATTER_RATIO * deviations[0] > 0:
        notes.append(f"the baseline's losses scatter {deviations[1] / deviations[0]:.2g} times as much as its own")
    if len(own) >= FEWEST_SEEDS and abs(_skewness(own - base)) > _largest_skewness(len(own)):
        notes.append("its differences are skewed: one or two seeds decide")
    if test.p < ALPHA <= p:
        notes.append("unpaired, the difference is not significant: it rests on the pairing of seeds")
    return Scatter(*deviations, correlation, p, tuple(notes))


def _skewness(samples: np.ndarray) -> np.ndarray:
    """Return the skewness of each row of (..., seeds); 0 where all are equal."""
    centered = samples - samples.mean(-1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(-1))
    return (centered**3).mean(-1) / np.where(deviation > 0, deviation, 1.0) ** 3


@functools.cache
def _largest_skewness(seeds: int) -> float:
    """Return the absolute skewness that 1% of normal samples exceed, from 20,000 of them."""
    samples = np.random.default_rng(0).normal(size=(20_000, seeds))
    return float(np.quantile(np.abs(_skewness(samples)), 0.99))


# ------------------------------------------------------------------------------------------------------------- verdicts


def _judge(tested: list[_TestedArm], smallest_effect: float) -> list[Comparison]:
    of_seeds = _p_values([arm.test for arm in tested], smallest_effect)
    of_both = _p_values([arm.over_text for arm in tested], smallest_effect)
    return [_judge_arm(*each, len(tested), smallest_effect) for each in zip(tested, of_seeds, of_both, strict=True)]


def _p_values(tests: Sequence[_TTest], smallest_effect: float) -> list[tuple[float, float]]:
    """Return the adjusted p-values of no difference and of no equivalence, per test."""
    equivalence = holm([_equivalence(test, smallest_effect) for test in tests])
    return list(zip(holm([test.p for test in tests]), equivalence, strict=True))


def _judge_arm(
    tested: _TestedArm,
    of_seeds: tuple[float, float],
    of_both: tuple[float, float],
    pairs: int,
    smallest_effect: float,
) -> Comparison:
    test, (p_holm, p_equivalent) = tested.test, of_seeds
    detectable, interval, adjusted = math.inf, (math.nan, math.nan), (math.nan, math.nan)
    if not math.isnan(test.p):
        detectable = test.error * _detectable(test.freedom, ALPHA / pairs, POWER) if test.error else 0.0
        interval, adjusted = _interval(test, ALPHA), _interval(test, ALPHA / pairs)
    needed = seeds_needed(test.deviation, test.regret, smallest_effect, pairs)
    verdict, reason = _verdict(tested, p_holm, p_equivalent, detectable, needed, smallest_effect)
    if tested.blocked:
        verdict, reason = Verdict.BLOCKED, tested.blocked
    return Comparison(
        arm=tested.arm,
        seeds=test.seeds,
        diverged=tested.diverged,
        difference=test.difference,
        deviation=test.deviation,
        regret=test.regret,
        p=test.p,
        p_holm=p_holm,
        p_equivalent=p_equivalent,
        interval=interval,
        adjusted=adjusted,
        detectable=detectable,
        needed=needed,
        scatter=tested.scatter,
        text=_over_text(tested, of_both, verdict),
        verdict=verdict,
        reason=reason,
    )


def _over_text(tested: _TestedArm, of_both: tuple[float, float], verdict: Verdict) -> OverText | None:
    both, text = tested.over_text, tested.text
    if text is None or math.isnan(both.p):
        return None
    of_documents = dataclasses.replace(both, error=text.error, freedom=text.freedom)
    p_holm, p_equivalent = of_both
    decided = verdict in (Verdict.BETTER, Verdict.WORSE)
    holds = p_holm < ALPHA if decided else verdict is Verdict.EQUIVALENT and p_equivalent < ALPHA
    return OverText(text, _interval(of_documents, ALPHA), _interval(both, ALPHA), p_holm, holds)


def _interval(test: _TTest, alpha: float) -> tuple[float, float]:
    reach = test.error * float(stats.t.isf(alpha / 2, test.freedom))
    return test.difference - reach, test.difference + reach


def _verdict(
    tested: _TestedArm,
    p_holm: float,
    p_equivalent: float,
    detectable: float,
    needed: float,
    smallest_effect: float,
) -> tuple[Verdict, str]:
    test = tested.test
    diverged = f"{tested.diverged} of {test.seeds} seeds diverged" if tested.diverged else ""
    less = f"by less than the {smallest_effect:g} nats asked for" if abs(test.difference) < smallest_effect else ""
    if test.seeds < FEWEST_SEEDS:
        return Verdict.UNDECIDED, f"{test.seeds} seed(s): a verdict needs at least {FEWEST_SEEDS}"
    if p_holm < ALPHA and test.difference > 0:
        return Verdict.WORSE, diverged or less
    no_more_diverged = tested.diverged <= tested.diverged_baseline
    if p_holm < ALPHA and no_more_diverged:
        return Verdict.BETTER, less
    if p_equivalent < ALPHA and no_more_diverged:
        return Verdict.EQUIVALENT, f"the difference is smaller than {smallest_effect:g} nats"
    size = f"differences below {detectable:.3g} nats are not detectable here, {smallest_effect:g} was asked for"
    if detectable <= smallest_effect:
        size = f"a difference of {detectable:.2g} nats would have been found, but a smaller one is not ruled out"
    elif math.isfinite(needed):
        size += f", which takes about {needed:.0f} seeds"
    elif test.regret > 0:
        size += ", which takes a finer or repeated sweep"
    return Verdict.UNDECIDED, "; ".join(filter(None, (diverged, size)))
