"""Compare the losses of arms at equal time and equal memory.

Curves are held-out losses within runs. The learning rate is still decaying there, so the loss in the middle of a run is higher
than that of a run planned to end there. These metrics therefore show how arms compare, not what a shorter run would reach
(multipliers.py does); the verdict rests on final losses alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ablation.multipliers import sizes_by_recipe
from ablation.results import Results, Run


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """The efficiency of an arm at a size; nan where it is undefined."""

    tokens_per_second: float  # median over the compared runs
    memory_gib: float  # maximum over the compared runs
    loss_at_equal_time: float  # on all held-out text, at the time when the fastest arm ends; nats per token
    loss_at_equal_memory: float  # at the baseline's memory, interpolated between the arm's model sizes; nats per token


@dataclasses.dataclass(frozen=True)
class LossCurve:
    """Held-out loss over tokens of an arm's compared runs. Evaluations within a run may use a part of the held-out text."""

    tokens: np.ndarray  # (points,)
    losses: np.ndarray  # (seeds, points)
    final: float  # final loss on all held-out text, mean over seeds
    tokens_per_second: float

    @property
    def mean(self) -> np.ndarray:
        """Mean over seeds (points,)."""
        return self.losses.mean(0)

    @property
    def seconds(self) -> np.ndarray:
        """Time of each point at the arm's median speed (points,), without interruptions and evaluations."""
        return self.tokens / self.tokens_per_second


def curve(results: Results, size: str, arm: str) -> LossCurve | None:
    """Return the curve of an arm over the seeds that did not diverge, at their common tokens; None if there are none."""
    runs = [run for run in results.final_runs(size, arm) if math.isfinite(run.outcome.loss)]
    tokens, losses = align([run.curve() for run in runs])
    if not len(tokens):
        return None
    final = float(np.mean([run.outcome.loss for run in runs]))
    return LossCurve(tokens, losses, final, float(np.median([run.tokens_per_second for run in runs])))


def loss_at(positions: ArrayLike, losses: ArrayLike, position: float) -> float:
    """Return the loss of a curve at a position (seconds, bytes), interpolated linearly; nan outside the curve."""
    positions = np.asarray(positions, dtype=float)
    if len(positions) == 0 or not positions[0] <= position <= positions[-1]:
        return math.nan
    return float(np.interp(position, positions, np.asarray(losses, dtype=float)))


def align(series: Sequence[Mapping[int, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that all {tokens: value} have in common (points,), and the values there (series, points, ...)."""
    common = sorted(set.intersection(*map(set, series))) if series else []
    return np.array(common), np.array([[values[tokens] for tokens in common] for values in series])


def efficiency(results: Results, size: str) -> dict[str, Efficiency]:
    """Return the efficiency of every arm of a size that has a compared run."""
    curves = {arm: found for arm in results.arms(size) if (found := curve(results, size, arm)) is not None}
    ends = [float(c.seconds[-1]) for c in curves.values() if math.isfinite(c.tokens_per_second)]
    by_arm = {}
    for arm, own in curves.items():
        last = float(own.mean[-1])
        by_arm[arm] = Efficiency(
            own.tokens_per_second,
            _memory(results.final_runs(size, arm)),
            own.final + loss_at(own.seconds, own.mean, min(ends)) - last if ends else math.nan,
            _loss_at_equal_memory(results, size, arm),
        )
    return by_arm


def _loss_at_equal_memory(results: Results, size: str, arm: str) -> float:
    """Return the mean final loss of an arm at the baseline's memory, interpolated between sizes of one recipe and length."""
    points, cost = [], results.manifest.cost
    for other in next(sizes for sizes in sizes_by_recipe(results) if size in sizes):
        if arm not in cost[other] or cost[other][arm]["tokens"] != cost[size][arm]["tokens"]:
            continue
        if runs := results.final_runs(other, arm):
            points.append((_memory(runs), float(np.mean([run.outcome.loss for run in runs]))))
    points = sorted(point for point in points if all(map(math.isfinite, point)))
    memory = _memory(results.final_runs(size, results.baseline))
    if len(points) < 2 or not math.isfinite(memory):
        return math.nan
    return loss_at([gib for gib, _ in points], [loss for _, loss in points], memory)


def _memory(runs: list[Run]) -> float:
    return max((run.memory_gib for run in runs if math.isfinite(run.memory_gib)), default=math.nan)
