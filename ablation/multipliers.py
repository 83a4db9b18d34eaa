"""How much compute the baseline needs to be as good as an arm: the compute multiplier, from runs planned to end at each point.

A plan with `ablation.horizons` trains every arm for several fractions of the tokens, each with a schedule of its own, and one
with several sizes gives points of another kind. Through the mean losses of each arm goes L = E + A C^-a, over its compute C in
FLOPs: once with E = 0, and once with the E, shared by all arms since it is the text's, that fits best. Where the two disagree,
the curve's form decides the answer.

The multiplier compares two points at one loss: the higher of the two final ones, which the other arm reaches within its runs.
So nothing is extrapolated past the longest run, and a loss below the shortest one's compute is refused. The interval is that of
t over seeds, each of which gives a curve per arm, with what missed learning rates cost and the scatter over documents added to
its standard error, in the unit of log compute.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np
from scipy import optimize

from ablation.results import Results
from ablation.ttest import ALPHA, FEWEST_SEEDS, TTest, paired_test

FREE_POINTS = 3  # that a curve with an asymptote of its own needs
# Keys in which sizes on one curve may differ: the model, and what is set by its size.
_SCALED = re.compile(r"model\..*|steps|optim\.lr|sequence_length|global_batch_size")


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """The compute that the baseline needs for an arm's loss, over the arm's compute."""

    factor: float  # nan where it is refused
    interval: tuple[float, float]  # 95%; nan where it is refused
    asymptote: float  # E, nats per token
    reason: str  # why it is refused, or what is to be known about it; "" if nothing


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of all arms over compute: of one size at its horizons, or of sizes at their full length."""

    name: str
    places: list[str]  # ascending in compute
    compute: dict[str, np.ndarray]  # by arm (points,), FLOPs of a run
    losses: dict[str, dict[int, np.ndarray]]  # by arm and seed (points,), nats per token

    @property
    def arms(self) -> list[str]:
        """The arms that have a seed at every point, and none that diverged."""
        return [arm for arm, by_seed in self.losses.items() if by_seed]

    def mean(self, arm: str, seeds: Iterable[int] | None = None) -> np.ndarray:
        """Return the mean loss of an arm over some seeds, or all of them (points,)."""
        return np.mean([self.losses[arm][seed] for seed in (self.losses[arm] if seeds is None else seeds)], 0)


def comparable_places(results: Results) -> list[list[str]]:
    """Return what orders of arms can be compared over, two places at least, the largest last.

    These are the horizons of a size, sizes of one recipe, and a size of each recipe, such as two optimizers: the largest of
    equal compute, or each recipe's largest where no compute is common to all.
    """
    by_recipe = sizes_by_recipe(results)
    by_compute = [{_baseline_compute(results, size): size for size in sizes} for sizes in by_recipe]
    common = set.intersection(*map(set, by_compute)) if by_compute else set()
    of_each = sorted(max(item for item in sizes.items() if not common or item[0] in common) for sizes in by_compute)
    places = [*_horizons(results).values(), *by_recipe, [size for _, size in of_each]]
    return [each for each in places if len(each) > 1]


def series(results: Results) -> list[Series]:
    """Return the series of a plan, of two points at least: the horizons of a size, and sizes of one recipe.

    Sizes of equal compute differ in something else, such as the model's depth: no curve goes through them.
    """
    by_recipe = sizes_by_recipe(results)
    names = ["all sizes"] if len(by_recipe) == 1 else [", ".join(sizes) for sizes in by_recipe]
    found = []
    for name, places in [*_horizons(results).items(), *zip(names, by_recipe, strict=True)]:
        if 1 < len(places) == len({_baseline_compute(results, place) for place in places}):
            found.append(_series(results, name, places))
    return found


def _horizons(results: Results) -> dict[str, list[str]]:
    return {f"{size}, over its horizons": list(results.manifest.at_horizons(size).values()) for size in results.sizes}


def sizes_by_recipe(results: Results) -> list[list[str]]:
    """Group the sizes that differ in nothing but what `_SCALED` matches, each group ascending in compute."""
    groups: dict[str, list[str]] = {}
    for size in sorted(results.sizes, key=lambda size: _baseline_compute(results, size)):
        learned = results.manifest.learned(size, results.baseline)
        recipe = {key: value for key, value in learned.items() if not _SCALED.fullmatch(key)}
        groups.setdefault(repr(sorted(recipe.items())), []).append(size)
    return list(groups.values())


def _baseline_compute(results: Results, place: str) -> float:
    return compute_of(results, place, results.baseline)


def _series(results: Results, name: str, places: list[str]) -> Series:
    compute: dict[str, np.ndarray] = {}
    losses: dict[str, dict[int, np.ndarray]] = {}
    by_place = {place: results.losses(place) for place in places}
    for arm in results.arms(places[-1]):
        compute[arm] = np.array([compute_of(results, place, arm) for place in places])
        of_arm = [by_place[place][arm] for place in places]
        seeds = sorted(set.intersection(*(set(of_place) for of_place in of_arm)))
        by_seed = {seed: np.array([of_place[seed] for of_place in of_arm]) for seed in seeds}
        diverged = any(not math.isfinite(loss) for of_place in of_arm for loss in of_place.values())
        losses[arm] = {} if diverged else by_seed
    return Series(name, places, compute, losses)


def compute_of(results: Results, place: str, arm: str) -> float:
    """Return the FLOPs of a run of an arm, at a size and horizon."""
    cost = results.manifest.cost[place][arm]
    return float(cost["flops_per_token"]) * cost["tokens"]


def multipliers(results: Results, of: Series) -> dict[str, tuple[Multiplier, Multiplier]]:
    """Return each arm's multiplier with E = 0, and with the E that fits all arms best."""
    base, last = results.baseline, of.places[-1]
    if base not in of.arms:
        return {}
    shared, why_not = _asymptote(of)
    blocked = results.blocked(last)
    found = {}
    for arm in of.arms:
        if arm == base:
            continue
        reason = blocked.get(arm) or blocked.get(base, "")
        if reason:
            refused = Multiplier(math.nan, (math.nan, math.nan), math.nan, reason)
            found[arm] = refused, refused
            continue
        more = beyond_seeds(results, last, arm, base)
        fixed = _multiplier(of, arm, base, 0.0, more)
        free = Multiplier(math.nan, (math.nan, math.nan), math.nan, why_not)
        found[arm] = fixed, free if why_not else _multiplier(of, arm, base, shared, more)
    return found


def beyond_seeds(results: Results, size: str, arm: str, other: str) -> float:
    """Return the standard error of two arms' difference, nats, by missed learning rates and, to the baseline, by documents."""
    regrets, text = results.known_regrets(size), None
    if results.baseline in (arm, other):
        text = results.text_scatters(size).get(other if arm == results.baseline else arm)
    return math.hypot(regrets.get(arm, 0.0), regrets.get(other, 0.0), text.error if text else 0.0)


@dataclasses.dataclass(frozen=True)
class Law:
    """L = E + A C^-a, with log(L - E) fitted over log C by least squares."""

    asymptote: float  # E
    slope: float  # a
    level: float  # log A

    def losses(self, log_compute: np.ndarray) -> np.ndarray:
        """Return the losses at some compute (points,)."""
        return self.asymptote + np.exp(self.level - self.slope * log_compute)

    def log_compute(self, loss: float) -> float:
        """Return the log of the compute that a loss takes; nan where none does."""
        if not self.slope > 0 or not loss > self.asymptote:
            return math.nan
        return (self.level - math.log(loss - self.asymptote)) / self.slope


def fit(log_compute: np.ndarray, losses: np.ndarray, asymptote: float = 0.0) -> Law:
    """Return the law with an asymptote that fits losses (points,) best."""
    logs, centered = np.log(losses - asymptote), log_compute - log_compute.mean()
    slope = -float(centered @ logs / (centered @ centered))
    return Law(asymptote, slope, float(logs.mean() + slope * log_compute.mean()))


def log_by_seed(of: Series, arm: str, base: str, asymptote: float = 0.0) -> dict[int, float]:
    """Return the log multiplier of an arm for each seed that it and the baseline have; nan where a seed determines none."""
    seeds = sorted(of.losses[arm].keys() & of.losses[base].keys())
    logs = {side: np.log(of.compute[side]) for side in (arm, base)}
    finals = {side: fit(logs[side], of.mean(side, seeds), asymptote).losses(logs[side])[-1] for side in (arm, base)}
    ahead, behind = (arm, base) if finals[arm] <= finals[base] else (base, arm)
    by_seed = {}
    for seed in seeds:
        front, back = (fit(logs[side], of.losses[side][seed], asymptote) for side in (ahead, behind))
        # Both are compared at the final loss of the side that is behind.
        gain = float(logs[behind][-1]) - front.log_compute(float(back.losses(logs[behind])[-1]))
        by_seed[seed] = gain if ahead == arm else -gain
    return by_seed


@dataclasses.dataclass(frozen=True)
class LogMultiplier:
    """The log multiplier of an arm, seed by seed, before any test."""

    by_seed: dict[int, float]  # nan where a seed determines none
    per_nat: float = 0.0  # log compute per nat of loss, where the arms are compared
    refused: str = ""  # why it stands for nothing


def log_multiplier(of: Series, arm: str, base: str, asymptote: float = 0.0) -> LogMultiplier:
    """Return the log of the compute that `base` needs for an arm's loss, over the arm's, and whether it stands for anything."""
    by_seed = log_by_seed(of, arm, base, asymptote)
    values = np.array(list(by_seed.values()))
    if len(values) < FEWEST_SEEDS:
        return LogMultiplier(by_seed, refused=f"{len(values)} seed(s) at every point: {FEWEST_SEEDS} are needed")
    if not np.isfinite(values).all():
        return LogMultiplier(by_seed, refused="the loss does not fall with compute for every seed")
    mean = float(values.mean())
    behind = base if mean >= 0 else arm  # its final loss is what both are compared at
    ahead = arm if mean >= 0 else base
    reached = float(np.log(of.compute[behind][-1])) - abs(mean)
    if reached < math.log(of.compute[ahead][0]):
        why = f"{ahead} is as good as {behind} with less compute than its shortest run: add a shorter horizon"
        return LogMultiplier(by_seed, refused=why)
    target = float(of.mean(behind, by_seed)[-1])
    slope = fit(np.log(of.compute[ahead]), of.mean(ahead, by_seed), asymptote).slope
    return LogMultiplier(by_seed, 1 / (slope * (target - asymptote)))


def _multiplier(of: Series, arm: str, base: str, asymptote: float, more: float) -> Multiplier:
    found = log_multiplier(of, arm, base, asymptote)
    if found.refused:
        return Multiplier(math.nan, (math.nan, math.nan), asymptote, found.refused)
    test: TTest = paired_test(np.array(list(found.by_seed.values())), more * found.per_nat)
    low, high = test.interval(ALPHA)
    reason = "the interval covers 1" if low <= 0 <= high else ""
    return Multiplier(math.exp(test.difference), (math.exp(low), math.exp(high)), asymptote, reason)


def _asymptote(of: Series) -> tuple[float, str]:
    """Return the E with which curves of all arms fit their mean losses best, and "", or why there is none."""
    if len(of.places) < FREE_POINTS:
        return math.nan, f"an asymptote needs {FREE_POINTS} points, there are {len(of.places)}"
    curves = [(np.log(of.compute[arm]), of.mean(arm)) for arm in of.arms]
    lowest = min(float(losses.min()) for _, losses in curves)

    def misfit(asymptote: float) -> float:
        """Return the sum of squares, in nats, that curves with this asymptote leave."""
        return sum(float(np.sum((losses - fit(logs, losses, asymptote).losses(logs)) ** 2)) for logs, losses in curves)

    found = optimize.minimize_scalar(
        misfit, bounds=(0.0, lowest * (1 - 1e-6)), method="bounded", options={"xatol": 1e-6}
    )
    at = float(found.x)
    if at > 0.99 * lowest:
        return math.nan, "no asymptote below the losses fits"
    return (at, "") if misfit(at) < misfit(0.0) else (0.0, "")
