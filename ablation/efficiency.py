"""What an arm's loss costs beside the baseline's: compute, seconds, memory.

Curves are held-out losses within runs, whose learning rate still falls on the way: a loss in the middle of a run is higher than
that of a run that was planned to end there. So these figures say how arms compare, not what a shorter run would reach; the
verdict rests on final losses alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ablation.results import Results, Run
from ablation.statistics import SpeedUp, effective_speed_up, loss_at


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Of an arm at a size. What cannot be known is nan."""

    tokens_per_second: float  # median over its compared runs
    memory_gib: float  # the most that one of them needed
    per_flop: SpeedUp  # compute of the baseline that reaches the arm's loss, over the arm's
    per_second: SpeedUp  # the same in seconds, each arm at its own speed
    loss_at_equal_time: float  # on all held-out text, when the fastest arm ends; nats a token
    loss_at_equal_memory: float  # at the baseline's memory, between the arm's sizes; nats a token


@dataclasses.dataclass(frozen=True)
class Curve:
    """Held-out loss over tokens, of the compared runs of an arm; evaluations within a run may be on a part of the text."""

    tokens: np.ndarray  # (points,)
    losses: np.ndarray  # (seeds, points)
    final: float  # loss on all of the text at the end, mean over seeds
    tokens_per_second: float

    @property
    def mean(self) -> np.ndarray:
        """Over seeds."""
        return self.losses.mean(0)

    @property
    def seconds(self) -> np.ndarray:
        """When each point was reached, at the arm's median speed: neither interruptions nor evaluations count."""
        return self.tokens / self.tokens_per_second


def curve(results: Results, size: str, arm: str) -> Curve | None:
    """Return the curve of an arm, of seeds that did not diverge, at the tokens that all have; None without one."""
    runs = [run for run in results.finals(size, arm) if math.isfinite(run.outcome.loss)]
    tokens, losses = aligned([run.curve() for run in runs])
    if not len(tokens):
        return None
    final = float(np.mean([run.outcome.loss for run in runs]))
    return Curve(tokens, losses, final, float(np.median([run.tokens_per_second for run in runs])))


def aligned(series: Sequence[Mapping[int, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens (points,) at which all of several {tokens: value} have one, and the values (series, points, ...)."""
    common = sorted(set.intersection(*map(set, series))) if series else []
    return np.array(common), np.array([[of_one[at] for at in common] for of_one in series])


def efficiency(results: Results, size: str) -> dict[str, Efficiency]:
    """Return it for every arm of a size that has a compared run."""
    curves = {arm: found for arm in results.arms(size) if (found := curve(results, size, arm)) is not None}
    base = curves.get(results.baseline)
    ends = [float(c.seconds[-1]) for c in curves.values() if math.isfinite(c.tokens_per_second)]
    found = {}
    for arm, own in curves.items():
        runs = results.finals(size, arm)
        flops = {a: results.manifest.cost[size][a]["flops_per_token"] for a in (arm, results.baseline)}
        per_flop = per_second = SpeedUp(math.nan, False)
        last = float(own.mean[-1])
        if base is not None:
            compute = base.tokens * flops[results.baseline]
            per_flop = effective_speed_up(compute, base.mean, last, float(own.tokens[-1]) * flops[arm])
            per_second = effective_speed_up(base.seconds, base.mean, last, float(own.seconds[-1]))
        found[arm] = Efficiency(
            own.tokens_per_second,
            _memory(runs),
            per_flop,
            per_second,
            own.final + loss_at(own.seconds, own.mean, min(ends)) - last if ends else math.nan,
            _at_equal_memory(results, size, arm),
        )
    return found


def _at_equal_memory(results: Results, size: str, arm: str) -> float:
    """Return the mean final loss that an arm would have with the baseline's memory, interpolated between sizes."""
    points = []
    for other in results.sizes:
        if arm in results.manifest.arms[other] and (runs := results.finals(other, arm)):
            points.append((_memory(runs), float(np.mean([run.outcome.loss for run in runs]))))
    points = sorted(point for point in points if all(map(math.isfinite, point)))
    memory = _memory(results.finals(size, results.baseline))
    if len(points) < 2 or not math.isfinite(memory):
        return math.nan
    return loss_at([place for place, _ in points], [loss for _, loss in points], memory)


def _memory(runs: list[Run]) -> float:
    return max((run.memory_gib for run in runs if math.isfinite(run.memory_gib)), default=math.nan)
