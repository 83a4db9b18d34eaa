"""Decide one criterion of a claim by the runs of a plan: its metric in the arms that it names, seed by seed.

A test compares as `ablation/statistics.py` does, with Holm's adjustment over all pairs of the criterion. `claims.py` makes
the claims of these.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

from ablation.budget import REFUSE
from ablation.measures import NEED_WINDOW, WINDOW, BySeed, by_seed, edge, log_spread, multiplier_over_horizons
from ablation.multipliers import beyond_seeds
from ablation.results import Results, Run
from ablation.statistics import Comparison, Pair, Verdict, compare
from conf.arms import catalogue
from conf.load import flatten
from kernels.common.text import listed

SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "not settled"
_ARM_KEYS = ("ffn.", "model.d_ff", "optim.lr")  # two arms that are compared may differ in these alone
_catalogue = functools.cache(catalogue)


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One test of a claim. Its fields are the keys of claims.yaml."""

    metric: str
    less: dict[str, str | float] = dataclasses.field(default_factory=dict)
    more: dict[str, str | float] = dataclasses.field(default_factory=dict)
    by: float | None = None
    scale: str = "linear"
    within: float = 0.0
    at_least: int = 0
    # Of `edge`: the arm and the one that it is compared with.
    of: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def pairs(self) -> dict[str, str | float]:
        """The arms, each with the arm or number it is compared with."""
        return self.less or self.more

    @property
    def arms(self) -> list[str]:
        """All arms that it names."""
        pairs = self.of if self.compares_sizes else self.pairs
        return list(dict.fromkeys(str(a) for pair in pairs.items() for a in pair if isinstance(a, str)))

    @property
    def compares_sizes(self) -> bool:
        """Whether it compares the widest size of a plan with the narrowest."""
        return self.metric in ("spread", "edge")

    @property
    def required(self) -> int:
        """The number of pairs that must hold."""
        return self.at_least or len(self.pairs)


@dataclasses.dataclass(frozen=True)
class CriterionResult:
    """The result of one criterion."""

    state: str
    why: str  # as `Evidence.why`
    details: list[str]
    runs: list[str]


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A metric of two arms by seed; both empty where the plan lacks these arms, or has no runs of them yet."""

    arm: str
    other: str | float
    own: BySeed
    others: BySeed
    blocked: str  # why it can have no verdict
    runs: list[str]
    regret: float = 0.0  # part of the standard error that is not of seeds, in the unit of the metric


def decide(criterion: Criterion, results: Results, sizes: tuple[str, ...]) -> CriterionResult:
    """Return what a plan's runs show about a criterion.

    Args:
        sizes: one size of the plan, or the narrowest and the widest of a criterion that compares sizes.
    """
    if criterion.metric == "ffn_parameters":
        return _decide_by_cost(criterion, results, sizes[0])
    pairs = {arm: _pair(criterion, results, sizes, arm, other) for arm, other in criterion.pairs.items()}
    ceiling = results.ceiling(sizes[0]) if criterion.metric == "final_eval_loss" else math.inf
    effect = _effect(criterion, results.manifest.plan.smallest_effect)
    sides = {arm: (p.own, p.others) if criterion.less else (p.others, p.own) for arm, p in pairs.items()}
    tested = [Pair(arm, *sides[arm], ceiling, pair.blocked, pair.regret) for arm, pair in pairs.items()]

    def compare_with(margin: float) -> list[Comparison]:
        return compare(tested, effect, margin, results.manifest.looks)

    comparisons = compare_with(-criterion.within)
    states = {c.arm: _state(c, at, effect) for c, at in zip(comparisons, compare_with(effect), strict=True)}
    details = [_detail(criterion, pairs[c.arm], c) for c in compare_with(0.0) if c.seeds]
    runs = [run for pair in pairs.values() for run in pair.runs]
    held, failed = (list(states.values()).count(state) for state in (SUPPORTED, CONTRADICTED))
    if held >= criterion.required:
        return CriterionResult(SUPPORTED, "", details, runs)
    if failed > len(states) - criterion.required:
        worse = any(c.verdict is Verdict.WORSE for c in comparisons)
        return CriterionResult(CONTRADICTED, "" if worse else _ruled_out(criterion, effect), details, runs)
    unsettled = [c for c in comparisons if states[c.arm] == OPEN]
    first = min(unsettled, key=lambda c: not c.seeds)  # one that has runs, if any
    return CriterionResult(OPEN, _why(criterion, first), details, runs)


def _decide_by_cost(criterion: Criterion, results: Results, size: str) -> CriterionResult:
    """Decide by the costs in the manifest, which depend on no seed."""
    [(arm, other)] = criterion.pairs.items()
    assert criterion.by is not None  # claims.yaml gives it for metrics of the manifest
    if renamed := _not_of_catalogue(results, size, criterion.arms):
        return CriterionResult(OPEN, renamed, [], [])
    cost = results.manifest.cost[size]
    ratio = cost[arm][criterion.metric] / cost[str(other)][criterion.metric]
    widths = " and ".join(str(results.manifest.learned(size, a)["model.d_ff"]) for a in (arm, str(other)))
    detail = f"{criterion.metric}: {arm} x{ratio:.4f} relative to {other}, at d_ff {widths}"
    return CriterionResult(SUPPORTED if ratio > criterion.by else CONTRADICTED, "", [detail], [])


def _effect(criterion: Criterion, plan_effect: float) -> float:
    """Return the difference that matters, in the unit in which the test is made; 0 where none is given."""
    if criterion.by is not None:
        return math.log(criterion.by) if criterion.scale == "log" else criterion.by
    compares_losses = criterion.metric == "final_eval_loss" and all(
        isinstance(o, str) for o in criterion.pairs.values()
    )
    return plan_effect if compares_losses and not criterion.within else 0.0


def _state(comparison: Comparison, at_effect: Comparison, effect: float) -> str:
    if comparison.verdict is Verdict.BETTER:
        return SUPPORTED
    ruled_out = effect > 0 and at_effect.verdict is Verdict.WORSE
    return CONTRADICTED if comparison.verdict is Verdict.WORSE or ruled_out else OPEN


def _ruled_out(criterion: Criterion, effect: float) -> str:
    size = f"by a factor of {math.exp(effect):.3g}" if criterion.scale == "log" else f"of {effect:g}"
    return f"a difference {size} in {criterion.metric} is ruled out"


def _why(criterion: Criterion, c: Comparison) -> str:
    other = criterion.pairs[c.arm]
    arms = f"{c.arm} and {other}" if isinstance(other, str) else c.arm
    if c.verdict is Verdict.BLOCKED:
        return c.reason
    if not c.seeds and criterion.metric in NEED_WINDOW:
        return f"not seen: activity was sampled over fewer than {WINDOW:,} tokens (telemetry_every, telemetry_window)"
    if not c.seeds:
        return f"no seed has {criterion.metric} of {arms}"
    if c.withheld:
        return f"{criterion.metric} of {arms} is {c.reason}"
    return f"{c.verdict.value}: {criterion.metric} of {arms}, {c.seeds} seed(s)"


def _detail(criterion: Criterion, pair: _Measured, c: Comparison) -> str:
    """Return a pair's difference or ratio, or the arm's own value where it is compared with a number, and its interval."""
    low, high = c.interval
    values = [c.difference, low, high] if criterion.less else [-c.difference, -high, -low]
    if criterion.scale == "log":
        texts = [f"x{math.exp(value):.3g}" for value in values]
    elif isinstance(pair.other, str):
        texts = [f"{value:+.3g}" for value in values]
    else:
        texts = [f"{value + pair.other:.3g}" for value in values]
    interval = "" if math.isnan(low) else f" (95% interval {texts[1]} to {texts[2]}, {c.seeds} seeds)"
    return f"{criterion.metric}: {pair.arm} {texts[0]} relative to {pair.other}{interval}"


def has_arms(results: Results, size: str, arm: str, other: str | float) -> bool:
    """Return whether a size of a plan has an arm, and the one that it is compared with where that is no number."""
    arms = results.manifest.arms[size]
    return arm in arms and (other in arms or not isinstance(other, str))


def _pair(criterion: Criterion, results: Results, sizes: tuple[str, ...], arm: str, other: str | float) -> _Measured:
    if criterion.metric == "spread":
        narrow, wide = sizes
        blocked = next(filter(None, (_blocked(results, size, []) for size in sizes)), "")
        runs = [run for size in sizes for a in results.arms(size) for run in results.final_runs(size, a)]
        return _Measured(arm, other, log_spread(results, wide), log_spread(results, narrow), blocked, _names(runs))
    if criterion.metric == "edge":
        narrow, wide = sizes
        arms = [arm for pair in criterion.of.items() for arm in pair]
        blocked = next(filter(None, (_blocked(results, size, arms) for size in sizes)), "")
        runs = [run for size in sizes for a in arms for run in results.final_runs(size, a)]
        own, others = (edge(results, size, arms[0], arms[1]) for size in (wide, narrow))
        regret = math.hypot(*(results.known_regrets(size).get(a, 0.0) for size in sizes for a in arms))
        return _Measured(arm, other, own, others, blocked, _names(runs), regret)
    [size] = sizes
    if not has_arms(results, size, arm, other):
        return _Measured(arm, other, {}, {}, f"the plan does not have both {arm} and {other}", [])
    own, log = results.final_runs(size, arm), criterion.scale == "log"
    if not isinstance(other, str):
        values, blocked = by_seed(criterion.metric, own, log), _blocked(results, size, [arm])
        return _Measured(arm, other, values, dict.fromkeys(values, other), blocked, _names(own))
    others, blocked = results.final_runs(size, other), _blocked(results, size, [arm, other])
    names = _names([*own, *others])
    if criterion.metric == "multiplier":
        found = multiplier_over_horizons(results, size, arm, other)
        zeros = dict.fromkeys(found.by_seed, 0.0)
        more = beyond_seeds(results, size, arm, other) * found.per_nat
        return _Measured(arm, other, found.by_seed, zeros, blocked or found.refused, names, more)
    values, regret = by_seed(criterion.metric, own, log), 0.0
    if criterion.metric == "final_eval_loss":
        regrets = results.known_regrets(size)
        regret = math.hypot(regrets.get(arm, 0.0), regrets.get(other, 0.0))
    return _Measured(arm, other, values, by_seed(criterion.metric, others, log), blocked, names, regret)


def _not_of_catalogue(results: Results, size: str, arms: list[str]) -> str:
    """Return which of these arms differs from the one of that name in conf/ffn, or ""."""
    for arm in arms:
        entry = _catalogue()[arm]
        stored = {key: entry[key] for key in ("formula", "parameters", "init_scale")} | {"per_layer": {}}
        learned = results.manifest.learned(size, arm)
        if any(learned.get(name) != value for name, value in flatten(stored, "ffn.").items()):
            return f"blocked: {arm} is not the arm of that name in conf/ffn"
    return ""


def _names(runs: Iterable[Run]) -> list[str]:
    return [run.folder.name for run in runs]


def _blocked(results: Results, size: str, arms: list[str]) -> str:
    """Return why these arms, or all arms of the plan if none is named, cannot be compared for a claim, or ""."""
    learned = {arm: results.manifest.learned(size, arm) for arm in arms or results.arms(size)}
    blocked, cost = results.blocked(size), results.manifest.cost[size]
    for arm in learned:
        if arm in blocked:
            return f"blocked: {arm}: {blocked[arm]}"
        if abs(cost[arm]["mismatch"]) > REFUSE:  # in a plan that matches no budget
            return f"blocked: {arm} has {cost[arm]['mismatch']:+.1%} parameters in its feed-forward layers"
    if renamed := _not_of_catalogue(results, size, arms):
        return renamed
    for name in sorted(set().union(*learned.values())):
        if not name.startswith(_ARM_KEYS) and len({repr(values.get(name)) for values in learned.values()}) > 1:
            return f"blocked: {listed(learned)} differ in {name}"
    return ""
