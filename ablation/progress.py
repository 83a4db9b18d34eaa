"""Decide how far the sweeps of a plan are: the runs that come next, and then the best learning rate."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from ablation.outcomes import ENDED, Outcome, read_outcome
from ablation.plan import Plan, PlannedRun, next_learning_rate
from ablation.statistics import sweep_result


@dataclasses.dataclass(frozen=True)
class SweepProgress:
    """The state of an arm's sweep."""

    pending: list[PlannedRun]  # runs that have not ended; none once the sweep is complete
    best_lr: float | None  # None while runs are pending, or if every learning rate diverged


def outcome_of(planned: PlannedRun, folder: Path) -> Outcome:
    """Return the outcome of a planned run in a plan's folder."""
    return read_outcome(folder / "runs" / planned.name)


def sweep_progress(plan: Plan, folder: Path, size: str, arm: str) -> SweepProgress:
    """Return the state of an arm's sweep, which extends past an edge where its best learning rate lies there."""
    runs = plan.sweep_runs(size, arm)
    if not runs:
        return SweepProgress([], plan.learning_rates(size, arm)[0])
    extensions = 0
    while True:
        outcomes = {planned: outcome_of(planned, folder) for planned in runs}
        if pending := [planned for planned in runs if outcomes[planned].state not in ENDED]:
            return SweepProgress(pending, None)
        losses = {planned.lr: outcomes[planned].loss for planned in runs}
        if not any(map(math.isfinite, losses.values())):
            return SweepProgress([], None)  # every learning rate diverged
        result = sweep_result(losses)
        if not result.edge or extensions == plan.config.rate_extensions:
            return SweepProgress([], result.best_lr)
        runs.append(dataclasses.replace(runs[0], lr=next_learning_rate(list(losses), result.edge)))
        extensions += 1
