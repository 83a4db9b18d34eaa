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

import numpy as np
from scipy import optimize

from ablation.results import Results
from ablation.ttest import ALPHA, FEWEST_SEEDS, TTest, paired_test

FREE_POINTS = 3  # that a curve with an asymptote of its own needs


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """The compute that the baseline needs for an arm's loss, over the arm's compute."""

    factor: float  # nan where it is refused
    interval: tuple[float, float]  # 95%; nan where it is refused
    asymptote: float  # E, nats per token
    reason: str  # why it is refused, or what is to be known about it; "" if nothing


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of all arms over compute: of one size at its horizons, or of all sizes at their full length."""

    name: str
    places: list[str]  # ascending in compute
    compute: dict[str, np.ndarray]  # by arm (points,), FLOPs of a run
    losses: dict[str, dict[int, np.ndarray]]  # by arm and seed (points,), nats per token

    @property
    def arms(self) -> list[str]:
        """The arms that have a seed at every point, and none that diverged."""
        return [arm for arm, by_seed in self.losses.items() if by_seed]


def series(results: Results) -> list[Series]:
    """Return the series of a plan that have two points at least."""
    places = {f"{size}, over its horizons": list(results.manifest.at_horizons(size).values()) for size in results.sizes}
    places["all sizes"] = sorted(results.sizes, key=lambda size: compute_of(results, size, results.baseline))
    return [_series(results, name, of_series) for name, of_series in places.items() if len(of_series) > 1]


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
    regrets, texts = results.known_regrets(last), results.text_scatters(last)
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
        text = texts.get(arm)
        more = math.hypot(regrets.get(arm, 0.0), regrets.get(base, 0.0), text.error if text else 0.0)
        fixed = _multiplier(of, arm, base, 0.0, more)
        free = Multiplier(math.nan, (math.nan, math.nan), math.nan, why_not)
        found[arm] = fixed, free if why_not else _multiplier(of, arm, base, shared, more)
    return found


def log_by_seed(of: Series, arm: str, base: str, asymptote: float = 0.0) -> dict[int, float]:
    """Return the log multiplier of an arm for each seed that it and the baseline have; nan where a seed determines none."""
    seeds = sorted(of.losses[arm].keys() & of.losses[base].keys())
    own, other = (np.log(of.compute[side]) for side in (arm, base))
    means = [np.mean([of.losses[side][seed] for seed in seeds], 0) for side in (arm, base)]
    ahead = _final(own, means[0], asymptote) <= _final(other, means[1], asymptote)
    by_seed = {}
    for seed in seeds:
        curves = (own, of.losses[arm][seed]), (other, of.losses[base][seed])
        by_seed[seed] = _log_multiplier(curves[0], curves[1], asymptote, ahead)
    return by_seed


def _multiplier(of: Series, arm: str, base: str, asymptote: float, more: float) -> Multiplier:
    by_seed = log_by_seed(of, arm, base, asymptote)
    values = np.array(list(by_seed.values()))
    refused = Multiplier(math.nan, (math.nan, math.nan), asymptote, "")
    if len(values) < FEWEST_SEEDS:
        return dataclasses.replace(refused, reason=f"{len(values)} seed(s) at every point: {FEWEST_SEEDS} are needed")
    if not np.isfinite(values).all():
        return dataclasses.replace(refused, reason="the loss does not fall with compute for every seed")
    mean = float(values.mean())
    behind = base if mean >= 0 else arm  # its final loss is what both are compared at
    ahead = arm if mean >= 0 else base
    reached = float(np.log(of.compute[ahead][-1])) - abs(mean)
    if reached < math.log(of.compute[ahead][0]):
        reason = f"{ahead} is as good as {behind} with less compute than its shortest run: add a shorter horizon"
        return dataclasses.replace(refused, reason=reason)
    target = float(np.mean([of.losses[behind][seed][-1] for seed in by_seed]))
    slope = _slope(np.log(of.compute[ahead]), np.mean([of.losses[ahead][seed] for seed in by_seed], 0), asymptote)
    per_nat = 1 / (slope * (target - asymptote))  # log compute per nat, at the loss that is compared
    test: TTest = paired_test(values, more * per_nat)
    low, high = test.interval(ALPHA)
    reason = "the interval covers 1" if low <= 0 <= high else ""
    return Multiplier(math.exp(mean), (math.exp(low), math.exp(high)), asymptote, reason)


def _log_multiplier(
    own: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray], asymptote: float, ahead: bool
) -> float:
    """Return log C of the baseline less log C of the arm at one loss: the final one of the side that is behind."""
    front, back = (own, base) if ahead else (base, own)
    loss = _final(*back, asymptote)
    slope = _slope(*front, asymptote)
    if not slope > 0 or not loss > asymptote:
        return math.nan
    level = float(np.mean(np.log(front[1] - asymptote)) + slope * np.mean(front[0]))
    reached = (level - math.log(loss - asymptote)) / slope
    gain = float(back[0][-1]) - reached
    return gain if ahead else -gain


def _final(log_compute: np.ndarray, losses: np.ndarray, asymptote: float) -> float:
    """Return the fitted loss at the last point."""
    slope, middle = _slope(log_compute, losses, asymptote), float(np.mean(np.log(losses - asymptote)))
    return asymptote + math.exp(middle - slope * float(log_compute[-1] - np.mean(log_compute)))


def _slope(log_compute: np.ndarray, losses: np.ndarray, asymptote: float) -> float:
    """Return a of L = E + A C^-a, by least squares of log(L - E) over log C."""
    centered = log_compute - log_compute.mean()
    return -float(centered @ np.log(losses - asymptote) / (centered @ centered))


def _asymptote(of: Series) -> tuple[float, str]:
    """Return the E with which curves of all arms fit their mean losses best, and "", or why there is none."""
    if len(of.places) < FREE_POINTS:
        return math.nan, f"an asymptote needs {FREE_POINTS} points, there are {len(of.places)}"
    curves = [(np.log(of.compute[arm]), np.mean(list(of.losses[arm].values()), 0)) for arm in of.arms]
    lowest = min(float(losses.min()) for _, losses in curves)

    def misfit(asymptote: float) -> float:
        return sum(_misfit(log_compute, losses, asymptote) for log_compute, losses in curves)

    found = optimize.minimize_scalar(
        misfit, bounds=(0.0, lowest * (1 - 1e-6)), method="bounded", options={"xatol": 1e-6}
    )
    at = float(found.x)
    if at > 0.99 * lowest:
        return math.nan, "no asymptote below the losses fits"
    return (at, "") if misfit(at) < misfit(0.0) else (0.0, "")


def _misfit(log_compute: np.ndarray, losses: np.ndarray, asymptote: float) -> float:
    """Return the sum of squares, in nats, that a curve with this asymptote leaves."""
    slope = _slope(log_compute, losses, asymptote)
    middle = float(np.mean(np.log(losses - asymptote)))
    fitted = asymptote + np.exp(middle - slope * (log_compute - log_compute.mean()))
    return float(np.sum((losses - fitted) ** 2))
