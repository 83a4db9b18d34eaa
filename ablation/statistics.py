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
the standard error over documents (`ablation/text_scatter.py`), and a verdict that passes it holds for other such text too. Its
p-values are adjusted likewise.

Where verdicts are made more than once, as seeds are added, each look is paid for (`ablation/looks.py`): p-values are those of
all looks together, intervals cover the difference at all of them, and between looks verdicts are withheld.

A diverged run stays in the comparison. It counts with the loss of an untrained model, and its arm is never called better. Two
arms of which either has one are not called equivalent: where both diverged nothing was compared.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ablation.looks import Looks
from ablation.metrics import LOSS, Metric
from ablation.text_scatter import TextScatter
from ablation.ttest import (
    ALPHA,
    FEWEST_SEEDS,
    MOST_SEEDS,
    TTest,
    holm,
    largest_skewness,
    paired_test,
    seeds_needed,
    skewness,
    two_sided_p,
    welch_test,
)

SCATTER_RATIO = 2.0  # of two standard deviations, from which on a reader is told


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
    """An arm compared with the baseline, in the unit of the plan's metric; a difference is arm minus baseline."""

    arm: str
    seeds: int  # that both have, up to the last look that they have reached
    diverged: int  # of the arm's seeds
    difference: float  # mean over seeds
    deviation: float  # sample standard deviation (n - 1) of the per-seed differences
    regret: float  # part of the standard error: what both arms may lose by missing their best learning rates
    p: float  # of this arm alone, at all looks together; nan with one seed, and where the verdict is withheld
    p_holm: float  # adjusted for all pairs that are compared together
    p_equivalent: float  # of the two one-sided tests, adjusted likewise
    interval: tuple[float, float]  # 95%, from t, for this arm alone, at all looks together
    adjusted: tuple[float, float]  # the same at 95% for all pairs together (Bonferroni)
    detectable: float  # smallest detectable difference
    needed: float  # seeds, at a look, that would find the smallest effect; infinite where the regret alone hides it
    scatter: Scatter
    text: OverText | None  # None: the losses of documents are not known, or a seed diverged
    verdict: Verdict
    reason: str  # why the verdict is not a plain better or worse; "" where it is
    withheld: bool  # until the seeds of a look have ended
    worse: bool  # the difference is to the arm's disadvantage, shown or not

    @property
    def decided(self) -> bool:
        """Whether the verdict says something of the difference: better, worse or equivalent."""
        return self.verdict in (Verdict.BETTER, Verdict.WORSE, Verdict.EQUIVALENT)


@dataclasses.dataclass(frozen=True)
class Pair:
    """An arm and its baseline: values by seed, not finite where a run diverged. A seed that one side lacks is left out."""

    arm: str
    own: Mapping[int, float]
    base: Mapping[int, float]
    ceiling: float = math.inf  # what a diverged run counts as: of losses, ln(vocabulary size)
    blocked: str = ""  # why there can be no verdict
    regret: float = 0.0  # what both may lose by missing their best learning rates: `Comparison.regret`
    text: TextScatter | None = None  # of the difference over documents

    def seeds(self, looks: Looks | None) -> list[int]:
        """Return the seeds that are compared: those that both have, up to the last look reached, if there is one."""
        common = self.own.keys() & self.base.keys()
        if looks is None:
            return sorted(common)
        common_in_order = [seed for seed in looks.seeds if seed in common]
        return common_in_order[: looks.reached(len(common)) or None]


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


def compare(
    pairs: Sequence[Pair],
    smallest_effect: float,
    margin: float = 0.0,
    looks: Looks | None = None,
    metric: Metric = LOSS,
) -> list[Comparison]:
    """Compare every arm with its baseline, seed by seed. Holm's adjustment covers all pairs: those of every arm and size.

    A pair without common seeds counts in the adjustment.

    Args:
        smallest_effect: the difference worth finding, in the metric's unit: a smaller one makes an arm equivalent.
        margin: added to every difference. Of losses, "better" then means by more than the margin, "worse" not by it.
        looks: when verdicts are made; None: once.
        metric: of the pairs.
    """
    tested = []
    for pair in pairs:
        seeds = pair.seeds(looks)
        losses = [[_clipped(side[seed], pair.ceiling, metric) for seed in seeds] for side in (pair.own, pair.base)]
        differences = np.array(losses[0]) - np.array(losses[1]) + margin
        diverged, diverged_baseline = (sum(not math.isfinite(side[s]) for s in seeds) for side in (pair.own, pair.base))
        test = paired_test(differences, pair.regret)
        scatter = _scatter(np.array(losses[0]), np.array(losses[1]), test)
        text = None if diverged or diverged_baseline else pair.text
        tested.append(
            _TestedArm(pair.arm, diverged, diverged_baseline, test, pair.blocked, scatter, text, looks, metric)
        )
    return _judge(tested, smallest_effect)


def at_every_size(by_size: Sequence[Sequence[Comparison]]) -> dict[str, Verdict]:
    """Return the arms that are better than the baseline at every size, and those that are worse, largest effect first.

    An intersection-union test (Berger 1982): the largest of an arm's p-values over the sizes counts, without an adjustment for
    their number. Those of the arms that every size has are adjusted as in Holm 1979. An arm that is blocked or withheld at a
    size, or whose differences have not one sign, is neither; one with a diverged seed is not better.
    """
    named = [{c.arm: c for c in comparisons} for comparisons in by_size]
    arms = [arm for arm in named[0] if all(arm in size for size in named)] if named else []
    found, p_values = [], []
    for arm in arms:
        comparisons = [size[arm] for size in named]
        worse = comparisons[0].worse
        usable = all(
            c.verdict is not Verdict.BLOCKED and not c.withheld and c.seeds >= FEWEST_SEEDS and c.worse == worse
            for c in comparisons
        ) and (worse or not any(c.diverged for c in comparisons))
        found.append((arm, Verdict.WORSE if worse else Verdict.BETTER, min(abs(c.difference) for c in comparisons)))
        p_values.append(max(c.p for c in comparisons) if usable else math.nan)
    decided = [each for each, p in zip(found, holm(p_values), strict=True) if p < ALPHA]
    return {arm: verdict for arm, verdict, _ in sorted(decided, key=lambda each: -each[2])}


# ------------------------------------------------------------------------------------------------------------- the tests


@dataclasses.dataclass(frozen=True)
class _TestedArm:
    arm: str
    diverged: int
    diverged_baseline: int
    test: TTest
    blocked: str = ""
    scatter: Scatter = Scatter()
    text: TextScatter | None = None
    looks: Looks | None = None
    metric: Metric = LOSS

    @property
    def over_text(self) -> TTest:
        """The same test over seeds and documents; undefined where those are not known."""
        test, text = self.test, self.text
        if text is None or math.isnan(test.p):
            return TTest(test.seeds, test.difference)
        error = math.hypot(test.error, text.error)
        if error == 0.0:
            return test
        freedom = error**4 / (test.error**4 / test.freedom + text.error**4 / text.freedom)  # Welch-Satterthwaite
        p = two_sided_p(test.difference, error, freedom)
        return dataclasses.replace(test, error=error, freedom=freedom, p=p)

    @property
    def withheld(self) -> str:
        """Why there is no verdict yet; "" where a look has been reached."""
        if self.looks is None or self.looks.reached(self.test.seeds):
            return ""
        return f"withheld until {self.looks.counts[0]} seeds have ended: {self.test.seeds} have"

    @property
    def spent(self) -> bool:
        """Whether earlier looks have spent all that a verdict may use."""
        return self.looks is not None and not self.withheld and self.looks.level(ALPHA, self.test.seeds) == 0.0

    def paid(self, p: float) -> float:
        """Return a p-value of all looks together; nan while it is withheld."""
        if self.looks is None:
            return p
        return math.nan if self.withheld else self.looks.paid(p, self.test.seeds)

    def level(self, alpha: float) -> float:
        """Return the level of a test or interval now, so that those of all looks err with probability alpha."""
        if self.looks is None or self.withheld:
            return alpha
        return self.looks.level(alpha, self.test.seeds)

    def p_equivalent(self, test: TTest, smallest_effect: float) -> float:
        """Return the p-value of equivalence at all looks together."""
        p = test.equivalence(smallest_effect)
        if self.looks is None:
            return p
        return self.paid(min(1.0, 2 * p)) / 2  # looks are paid for on two sides, and this is one

    @property
    def worse(self) -> bool:
        """Whether the difference is to the arm's disadvantage."""
        return (self.test.difference > 0) != self.metric.higher_is_better


def _clipped(value: float, worst: float, metric: Metric) -> float:
    if not math.isfinite(value):
        return worst
    return max(value, worst) if metric.higher_is_better else min(value, worst)


def _scatter(own: np.ndarray, base: np.ndarray, test: TTest) -> Scatter:
    if len(own) < 2:
        return Scatter()
    deviations = float(own.std(ddof=1)), float(base.std(ddof=1))
    correlation = float(np.corrcoef(own, base)[0, 1]) if min(deviations) > 0 else math.nan
    summaries = [(float(side.mean()), d, len(side)) for side, d in zip((own, base), deviations, strict=True)]
    unpaired = welch_test(*summaries)
    p = unpaired.p
    if test.regret > 0:
        p = two_sided_p(unpaired.difference, math.hypot(unpaired.error, test.regret), unpaired.freedom)
    notes = []
    if deviations[0] > SCATTER_RATIO * deviations[1] > 0:
        notes.append(f"its losses scatter {deviations[0] / deviations[1]:.2g} times as much as the baseline's")
    if deviations[1] > SCATTER_RATIO * deviations[0] > 0:
        notes.append(f"the baseline's losses scatter {deviations[1] / deviations[0]:.2g} times as much as its own")
    if len(own) >= FEWEST_SEEDS and abs(skewness(own - base)) > largest_skewness(len(own)):
        notes.append("its differences are skewed: one or two seeds decide")
    if test.p < ALPHA <= p:
        notes.append("unpaired, the difference is not significant: it rests on the pairing of seeds")
    return Scatter(*deviations, correlation, p, tuple(notes))


# ------------------------------------------------------------------------------------------------------------- verdicts


def _judge(tested: list[_TestedArm], smallest_effect: float) -> list[Comparison]:
    of_seeds = _p_values([(arm, arm.test) for arm in tested], smallest_effect)
    of_both = _p_values([(arm, arm.over_text) for arm in tested], smallest_effect)
    return [_judge_arm(*each, len(tested), smallest_effect) for each in zip(tested, of_seeds, of_both, strict=True)]


def _p_values(tests: Sequence[tuple[_TestedArm, TTest]], smallest_effect: float) -> list[tuple[float, float]]:
    """Return the adjusted p-values of no difference and of no equivalence, per test."""
    differences = holm([arm.paid(test.p) for arm, test in tests])
    return list(zip(differences, holm([arm.p_equivalent(test, smallest_effect) for arm, test in tests]), strict=True))


def _judge_arm(
    tested: _TestedArm,
    of_seeds: tuple[float, float],
    of_both: tuple[float, float],
    pairs: int,
    smallest_effect: float,
) -> Comparison:
    test, (p_holm, p_equivalent) = tested.test, of_seeds
    level, strictest = tested.level(ALPHA), tested.level(ALPHA / pairs)
    detectable = test.detectable(strictest) if strictest else math.inf
    needed = _seeds_needed(tested, smallest_effect, pairs, detectable)
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
        p=tested.paid(test.p),
        p_holm=p_holm,
        p_equivalent=p_equivalent,
        interval=test.interval(level),
        adjusted=test.interval(strictest),
        detectable=detectable,
        needed=needed,
        scatter=tested.scatter,
        text=_over_text(tested, of_both, verdict),
        verdict=verdict,
        reason=reason,
        withheld=bool(tested.withheld),
        worse=tested.worse,
    )


def _seeds_needed(tested: _TestedArm, smallest_effect: float, pairs: int, detectable: float) -> float:
    test, looks = tested.test, tested.looks
    if looks is None:
        return seeds_needed(test.deviation, test.regret, smallest_effect, lambda _: ALPHA / pairs)
    reached = looks.reached(test.seeds)
    found = seeds_needed(
        test.deviation,
        test.regret,
        smallest_effect,
        lambda seeds: looks.level_to_come(ALPHA / pairs, seeds, reached),
        reached if reached and detectable <= smallest_effect else MOST_SEEDS,
    )
    return float(looks.at_least(int(found))) if math.isfinite(found) else found


def _over_text(tested: _TestedArm, of_both: tuple[float, float], verdict: Verdict) -> OverText | None:
    both, text = tested.over_text, tested.text
    if text is None or math.isnan(both.p):
        return None
    of_documents = dataclasses.replace(both, error=text.error, freedom=text.freedom)
    p_holm, p_equivalent = of_both
    decided = verdict in (Verdict.BETTER, Verdict.WORSE)
    holds = p_holm < ALPHA if decided else verdict is Verdict.EQUIVALENT and p_equivalent < ALPHA
    return OverText(text, of_documents.interval(ALPHA), both.interval(tested.level(ALPHA)), p_holm, holds)


def _verdict(
    tested: _TestedArm,
    p_holm: float,
    p_equivalent: float,
    detectable: float,
    needed: float,
    smallest_effect: float,
) -> tuple[Verdict, str]:
    test, unit = tested.test, tested.metric.short
    diverged = f"{tested.diverged} of {test.seeds} seeds diverged" if tested.diverged else ""
    less = f"by less than the {smallest_effect:g} {unit} asked for" if abs(test.difference) < smallest_effect else ""
    if tested.withheld:
        return Verdict.UNDECIDED, tested.withheld
    if test.seeds < FEWEST_SEEDS:
        return Verdict.UNDECIDED, f"{test.seeds} seed(s): a verdict needs at least {FEWEST_SEEDS}"
    if tested.spent:
        return Verdict.UNDECIDED, "its earlier verdicts spent the whole error probability (ablation.reserve=0)"
    if p_holm < ALPHA and tested.worse:
        return Verdict.WORSE, diverged or less
    if p_holm < ALPHA and not tested.diverged:
        return Verdict.BETTER, less
    if p_equivalent < ALPHA and not tested.diverged and not tested.diverged_baseline:
        return Verdict.EQUIVALENT, f"the difference is smaller than {smallest_effect:g} {unit}"
    if min(p_holm, p_equivalent) < ALPHA:
        baseline = f"{tested.diverged_baseline} of the baseline's {test.seeds} seeds diverged"
        return Verdict.UNDECIDED, diverged or baseline
    size = f"differences below {detectable:.3g} {unit} are not detectable here, {smallest_effect:g} was asked for"
    if detectable <= smallest_effect:
        size = f"a difference of {detectable:.2g} {unit} would have been found, but a smaller one is not ruled out"
    elif math.isfinite(needed):
        size += f", which takes about {needed:.0f} seeds"
    elif test.regret > 0:
        size += ", which takes a finer or repeated sweep"
    return Verdict.UNDECIDED, "; ".join(filter(None, (diverged, size)))
