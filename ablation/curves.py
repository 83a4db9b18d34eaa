"""Read curves within runs, and the order of arms at several sizes: neither decides a verdict."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclasses.dataclass(frozen=True)
class SpeedUp:
    """Compute that the baseline needs to reach an arm's loss, divided by the arm's own compute."""

    factor: float  # nan where the baseline's curve does not determine it
    extrapolated: bool  # the baseline never reached that loss


def effective_speed_up(compute: Iterable[float], losses: Iterable[float], loss: float, spent: float) -> SpeedUp:
    """Return how many times the arm's compute the baseline needs to reach the arm's loss.

    Within the baseline's curve, log compute is interpolated over the loss. Below the curve's last loss, a line fitted to its
    later half extrapolates, to at most four times the compute.

    Args:
        compute: of the baseline (FLOPs or seconds), increasing.
        losses: of the baseline at these points.
        loss: the arm's final loss.
        spent: the arm's compute, in the unit of `compute`.
    """
    curve = [(math.log(c), v) for c, v in zip(compute, losses, strict=True) if c > 0 and math.isfinite(v)]
    falling: list[tuple[float, float]] = []
    for point in curve:  # keep the first point that reaches each loss
        if not falling or point[1] < falling[-1][1]:
            falling.append(point)
    if len(falling) < 2 or not math.isfinite(loss) or loss > falling[0][1] or not spent > 0:
        return SpeedUp(math.nan, False)
    logs, values = (np.array(side) for side in zip(*falling, strict=True))
    if loss >= values[-1]:
        return SpeedUp(math.exp(float(np.interp(-loss, -values, logs))) / spent, False)
    later = slice(len(logs) // 2 if len(logs) >= 4 else 0, None)
    slope, _ = np.polyfit(logs[later], values[later], 1)
    reached = logs[-1] + (loss - values[-1]) / slope if slope < 0 else math.inf
    return SpeedUp(math.exp(reached) / spent if reached <= logs[-1] + math.log(4) else math.nan, True)


def loss_at(positions: ArrayLike, losses: ArrayLike, position: float) -> float:
    """Return the loss of a curve at a position (seconds, FLOPs, bytes), interpolated linearly; nan outside the curve."""
    positions = np.asarray(positions, dtype=float)
    if len(positions) == 0 or not positions[0] <= position <= positions[-1]:
        return math.nan
    return float(np.interp(position, positions, np.asarray(losses, dtype=float)))


@dataclasses.dataclass(frozen=True)
class RankStability:
    """How far the arms keep their order from one size to another."""

    tau: float  # Kendall's: 1 for the same order, -1 for the reverse; nan with fewer than two arms
    swapped: list[tuple[str, str]]  # pairs whose order changes; the first arm was ahead


def rank_stability(smaller: Mapping[str, float], larger: Mapping[str, float]) -> RankStability:
    """Compare the order of the arms' mean losses at two sizes, over the arms that both have."""
    arms = [arm for arm in smaller if arm in larger]
    swapped = []
    for one, other in itertools.combinations(arms, 2):
        first, second = sorted((one, other), key=smaller.__getitem__)
        if larger[first] > larger[second]:
            swapped.append((first, second))
    if len(arms) < 2:
        return RankStability(math.nan, swapped)
    kendall: Any = stats.kendalltau([smaller[arm] for arm in arms], [larger[arm] for arm in arms])  # SciPy has no types
    return RankStability(float(kendall.statistic), swapped)
