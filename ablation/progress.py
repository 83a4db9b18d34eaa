"""Decide how far the sweeps of a plan are: the runs that come next, and then the best learning rate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ablation.learning_rates import next_learning_rate, sweep_result
from ablation.outcomes import ENDED, Outcome, read_outcome
from ablation.plan import Plan, PlannedRun


@dataclasses.dataclass(frozen=True)
class SweepProgress:
    """The state of an arm's sweep."""

    pending: list[PlannedRun]  # runs that have not ended; none once the sweep is complete
    best_lr: float | None  # None while runs are pending, or if every learning rate diverged


def outcome_of(planned: PlannedRun, folder: Path) -> Outcome:
    """Return the outcome of a planned run in a plan's folder."""
    return read_outcome(folder / "runs" / planned.name)


def sweep_progress(plan: Plan, folder: Path, size: str, arm: str) -> SweepProgress:
    """Return the state of an arm's sweep, which extends where its optimum lies beyond the learning rates tried."""
    runs = plan.sweep_runs(size, arm)
    if not runs:
        return SweepProgress([], plan.learning_rates(size, arm)[0])
    extensions = 0
    while True:
        outcomes = {planned: outcome_of(planned, folder) for planned in runs}
        if pending := [planned for planned in runs if outcomes[planned].state not in ENDED]:
            return SweepProgress(pending, None)
        losses: dict[float, dict[int, float]] = {}
        for planned, outcome in outcomes.items():
            losses.setdefault(planned.lr, {})[planned.seed] = outcome.loss
        try:
            result = sweep_result(losses, plan.config.rate_choice == "vertex")
        except ValueError:  # every learning rate diverged
            return SweepProgress([], None)
        if not result.edge or extensions == plan.config.rate_extensions:
            return SweepProgress([], result.best_lr)
        lr = next_learning_rate(losses, result.best_lr, result.edge)
        runs += [dataclasses.replace(runs[0], lr=lr, seed=seed) for seed in plan.config.rate_seeds]
        extensions += 1
