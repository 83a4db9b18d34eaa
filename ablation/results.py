"""What the runs of a plan showed, read from their folders: losses, curves, and the comparison of every size.

Everything that is read is checked first: the manifest against its hashes, every run's `config.yaml` against the manifest, and
the order of the data among runs of one seed. What is missing, unfinished or cut short is told in `notes`, and the rest stands.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ablation.budget import REFUSE
from ablation.manifest import Manifest, read_manifest
from ablation.outcomes import DIVERGED, ENDED, FINISHED, Outcome, is_finite, outcome, read_metrics, run_folders
from ablation.plan import PlannedRun
from ablation.statistics import Comparison, RateSweep, compare, sweep
from conf.load import values_of
from kernels.common.errors import UserError

FEWEST_RATES = 3  # tried, for a verdict


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run of a plan."""

    planned: PlannedRun
    folder: Path
    outcome: Outcome
    lines: list[dict[str, Any]]  # of its metrics

    def kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def tokens_per_second(self) -> float:
        """Median over the lines but the first, in which kernels are compiled; nan without lines."""
        speeds = [line["tokens_per_second"] for line in self.kind("train")]
        return float(np.median(speeds[1:] or speeds)) if speeds else math.nan

    @property
    def memory_gib(self) -> float:
        """The most that it needed; nan without lines."""
        return max((line["memory_gib"] for line in self.kind("train") if line.get("memory_gib")), default=math.nan)

    def curve(self) -> dict[int, float]:
        """Return the held-out loss by tokens trained on, every point on the same text: a run's last evaluation is on more."""
        lines = [line for line in self.kind("eval") if is_finite(line.get("loss"))]
        fewest = min((line["held_out_tokens"] for line in lines), default=0)
        return {line["tokens"]: line["loss"] for line in lines if line["held_out_tokens"] == fewest}


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The runs of a plan, and what they say."""

    folder: Path
    manifest: Manifest
    runs: dict[str, Run]  # by the name of the folder
    notes: tuple[str, ...]  # sentences on what is missing, unfinished or cut short

    @property
    def baseline(self) -> str:
        return self.manifest.plan.baseline

    @property
    def sizes(self) -> list[str]:
        return list(self.manifest.arms)

    def arms(self, size: str) -> list[str]:
        """Return the arms of a size, the baseline first."""
        return sorted(self.manifest.arms[size], key=lambda arm: arm != self.baseline)

    def place(self, size: str, arm: str, stage: str | None = None) -> list[Run]:
        """Return the runs of an arm at a size, of one stage or of both, by rate and seed."""
        found = (run for run in self.runs.values() if (run.planned.size, run.planned.arm) == (size, arm))
        return sorted(
            (run for run in found if stage in (None, run.planned.stage)),
            key=lambda run: (run.planned.rate, run.planned.seed),
        )

    def rate_losses(self, size: str, arm: str) -> dict[float, float]:
        """Return the final loss by learning rate of the sweep, of runs that ended."""
        return {r.planned.rate: r.outcome.loss for r in self.place(size, arm, "sweep") if r.outcome.state in ENDED}

    def swept(self, size: str, arm: str) -> RateSweep | None:
        """Return what the sweep showed; None before any of its runs has a loss."""
        losses = self.rate_losses(size, arm)
        return sweep(losses) if any(map(math.isfinite, losses.values())) else None

    def best_rate(self, size: str, arm: str) -> float | None:
        """Return the learning rate at which seeds are compared; None while it is not known, or if all diverged."""
        rates = self.manifest.rates(size, arm)
        if len(rates) == 1:
            return rates[0]
        found = self.swept(size, arm)
        return found.best if found and set(rates) <= self.rate_losses(size, arm).keys() else None

    def finals(self, size: str, arm: str) -> list[Run]:
        """Return the runs that are compared, as far as they ended, by seed."""
        rate = self.best_rate(size, arm)
        return [r for r in self.place(size, arm, "final") if r.planned.rate == rate and r.outcome.state in ENDED]

    def losses(self, size: str) -> dict[str, dict[int, float]]:
        """Return the final loss by arm and seed; nan where the run diverged."""
        return {arm: {r.planned.seed: r.outcome.loss for r in self.finals(size, arm)} for arm in self.arms(size)}

    def ceiling(self, size: str) -> float:
        """Return the loss of a model that knows nothing, ln(vocabulary), nats a token."""
        sizes = [
            run.outcome.summary["vocab_size"]
            for run in self.runs.values()
            if run.planned.size == size and run.outcome.summary.get("vocab_size")
        ]
        return math.log(max(sizes)) if sizes else math.inf

    def blocked(self, size: str) -> dict[str, str]:
        """Return why arms have no verdict, whatever their losses."""
        reasons = {}
        for arm in self.arms(size):
            found, rates = self.swept(size, arm), self.rate_losses(size, arm)
            off = self.manifest.cost[size][arm]["mismatch"]
            if self.manifest.plan.budget != "none" and abs(off) > REFUSE:  # whatever the plan allowed
                reasons[arm] = f"its {self.manifest.plan.budget} are off by {off:+.1%}"
            elif len(self.manifest.rates(size, arm)) < FEWEST_RATES:
                reasons[arm] = f"a verdict takes {FEWEST_RATES} learning rates an arm, the plan has fewer"
            elif rates and found is None:
                reasons[arm] = "every learning rate diverged"
            elif found is not None and self.best_rate(size, arm) and found.edge:
                reasons[arm] = f"its best learning rate, {found.best:g}, is the {found.edge} that was tried"
        return reasons

    def comparisons(self, size: str) -> list[Comparison]:
        """Compare the arms of a size with the baseline; empty before the baseline has a loss."""
        return self._compared[size]

    @functools.cached_property
    def _compared(self) -> dict[str, list[Comparison]]:
        return {size: self._compare(size) for size in self.sizes}

    def _compare(self, size: str) -> list[Comparison]:
        losses, blocked = self.losses(size), self.blocked(size)
        if not losses[self.baseline]:
            return []
        if self.baseline in blocked:
            blocked[self.baseline] = f"the baseline: {blocked[self.baseline]}"
        return compare(losses, self.baseline, self.manifest.plan.smallest_effect, self.ceiling(size), blocked)


def read_results(folder: Path) -> Results:
    """Read the folder of a plan.

    Raises:
        UserError: it is none; or something in it is not of this plan, and what.
    """
    manifest = read_manifest(folder)
    notes: list[str] = []
    runs: dict[str, Run] = {}
    for path in run_folders(folder):
        config, (lines, broken) = values_of(path / "config.yaml"), read_metrics(path)
        run = Run(_planned_run(manifest, path, config), path, outcome(path, lines), lines)
        _check(manifest, run, config)
        runs[path.name] = run
        if broken:
            notes.append(f"{path.name}: {broken} broken line(s) of metrics.jsonl were left out")
        if run.outcome.state == DIVERGED:
            notes.append(f"{path.name} diverged")
        elif run.outcome.state not in ENDED:
            notes.append(f"{path.name} is {run.outcome.state} at step {run.outcome.step}")
    check_data_order(runs)
    results = Results(folder, manifest, runs, ())
    missing = [planned.name for planned in expected(results) if planned.name not in runs]
    if missing:
        some = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
        notes.append(f"{len(missing)} run(s) have not begun: {some}")
    return dataclasses.replace(results, notes=tuple(notes))


def expected(results: Results) -> Iterator[PlannedRun]:
    """Yield the runs that the plan has, as far as they are known: final ones after the sweep of their arm."""
    plan = results.manifest.plan
    for size in results.sizes:
        for arm in results.arms(size):
            rates = results.manifest.rates(size, arm)
            if len(rates) > 1:
                yield from (PlannedRun("sweep", size, arm, rate, plan.rate_seed) for rate in rates)
            best = results.best_rate(size, arm)
            if best is not None:
                yield from (PlannedRun("final", size, arm, best, seed) for seed in plan.seeds)


def check_data_order(runs: dict[str, Run]) -> None:
    """Check that runs of one size and seed saw the same data in the same order.

    Raises:
        UserError: two that did not.
    """
    first: dict[tuple[str, int], tuple[str, str]] = {}
    for name, run in runs.items():
        found = run.outcome.summary.get("data_order_hash")
        if run.outcome.state != FINISHED or not found:
            continue
        other, expected = first.setdefault((run.planned.size, run.planned.seed), (name, found))
        if found != expected:
            raise UserError(f"{name} saw other data than {other}: data_order_hash {found} and {expected}")


def _planned_run(manifest: Manifest, path: Path, config: dict[str, Any]) -> PlannedRun:
    """Return which planned a run is, from its name and its learning rate."""
    plan, found = manifest.plan, manifest.planned_run(path.name)
    no_run = f"{path} is no run of the plan {plan.name}"
    if found is None:
        raise UserError(f"{no_run}: its name has no size and arm of the manifest")
    if found.seed not in (*plan.seeds, plan.rate_seed):
        raise UserError(f"{no_run}: seed={found.seed} is none of its seeds")
    planned = dataclasses.replace(found, rate=config.get("optim.lr", math.nan))
    if planned.name != path.name:
        raise UserError(f"{no_run}: its optim.lr is {planned.rate}")
    return planned


def _check(manifest: Manifest, run: Run, config: dict[str, Any]) -> None:
    """Compare what a run learned from with what the manifest says.

    Raises:
        UserError: what differs.
    """
    planned = run.planned
    expected = manifest.learned(planned.size, planned.arm)
    expected |= {"optim.lr": planned.rate, "seed": planned.seed, "data_seed": planned.seed}
    if run.outcome.state == FINISHED:
        config = config | {"steps": run.outcome.summary.get("steps")}
    else:
        del expected["steps"]
    for name, value in expected.items():
        if config.get(name) != value:
            what = f"{name} is {config.get(name)}, the plan has {value}"
            raise UserError(f"{run.folder} is no run of the plan {manifest.plan.name}: {what}")
