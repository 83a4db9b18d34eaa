"""Decide which runs of a plan come next: of its sweeps, until each has a best learning rate, and of further seeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ablation.learning_rates import next_learning_rate, sweep_result
from ablation.outcomes import ENDED, Outcome, read_outcome
from ablation.plan import Plan, PlannedRun, swept_at
from ablation.results import Results
from ablation.statistics import Verdict


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
    swept = swept_at(plan.config, size)
    if swept != size and len(plan.config.rates) > 1:
        progress = sweep_progress(plan, folder, swept, arm)
        best = progress.best_lr
        return dataclasses.replace(progress, best_lr=None if best is None else plan.transferred(size, arm, best))
    runs = plan.sweep_runs(size, arm)
    if not runs:
        return SweepProgress([], plan.learning_rates(size, arm)[0])
    extensions = 0
    while True:
        outcomes = {planned: outcome_of(planned, folder) for planned in runs}
        if pending := [planned for planned in runs if outcomes[planned].state not in ENDED]:
            return SweepProgress(pending, None)
        if (size, arm) in plan.chosen:
            return SweepProgress([], plan.chosen[size, arm].lr)
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


def further_runs(results: Results) -> list[PlannedRun]:
    """Return the runs that take the arms without a verdict to their next look; none where the plan adds no seeds.

    All runs of the plan's seeds have ended.
    """
    looks, further = results.manifest.looks, []
    if results.manifest.plan.until != "decided":
        return []
    for size in results.sizes:
        undecided = {
            c.arm: looks.next(c.seeds) for c in results.comparisons(size) if c.verdict is Verdict.UNDECIDED and c.seeds
        }
        to = {arm: count for arm, count in undecided.items() if count}
        if to:
            to[results.baseline] = max(to.values())
        for arm, count in to.items():
            lr, ran = results.best_lr(size, arm), {run.planned.seed for run in results.final_runs(size, arm)}
            if lr is not None:
                further += [PlannedRun("final", size, arm, lr, seed) for seed in looks.seeds[:count] if seed not in ran]
    return sorted(further, key=lambda planned: looks.seeds.index(planned.seed))
