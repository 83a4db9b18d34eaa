"""Show the state of a plan's runs: `python -m ablation.status ablations/glu_variants`.

    FOLDER       of a plan
    once=true    print once; otherwise a terminal is refreshed until every run has ended, or Ctrl-C

A row is an arm, a column a learning rate of the sweep or a seed. A cell shows the final held-out loss in nats per token (for a
sweep of several seeds their mean), the percentage of its steps that a running run has done, or `stop`, `fail`, `div`
(diverged), `q` (in SLURM's queue), or `.` (waiting). A sweep that extends past an edge adds columns, and so do the seeds of
`ablation.until=decided`. Only what decides those is checked; `ablation.results` checks all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ablation.manifest import Manifest, read_manifest
from ablation.outcomes import (
    DIVERGED,
    ENDED,
    FAILED,
    FINISHED,
    QUEUED,
    RUNNING,
    STOPPED,
    WAITING,
    Outcome,
    log_path,
    read_metrics,
    read_outcome,
    run_folders,
)
from ablation.plan import PlannedRun, swept_at
from ablation.progress import further_runs
from ablation.results import read_results
from ablation.slurm import task_name, task_states
from conf.terminal import SafeConsole
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.options import read_positional
from kernels.common.units import duration

_OPTIONS = {"once": False}
_REFRESH = 2.0  # seconds between refreshes
_QUERY_SLURM = 15.0  # seconds between queries of SLURM, which serves others too
_STYLES = {  # of the runs in one cell, the first of these is shown
    FAILED: "red",
    DIVERGED: "magenta",
    STOPPED: "yellow",
    RUNNING: "cyan",
    QUEUED: "dim",
    WAITING: "dim",
    FINISHED: "green",
}
_LABELS = {STOPPED: "stop", FAILED: "fail", DIVERGED: "div", WAITING: ".", QUEUED: "q"}
_FAILED_SHOWN = 4


def main(argv: list[str]) -> int:
    options, folders = read_positional(argv, _OPTIONS)
    if len(folders) != 1:
        raise UserError("expected the folder of one plan: python -m ablation.status ablations/NAME")
    watcher = Watcher(Path(folders[0]))
    console = SafeConsole(file=sys.stdout, highlight=False, markup=False)
    if options["once"] or not console.is_terminal:
        for part in show(watcher.snapshot(), console.width):
            console.print(part, soft_wrap=isinstance(part, Text))  # a path is not broken over lines
        return 0
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to end it
        watch(watcher.snapshot, console)
    return 0


# ---------------------------------------------------------------------------------------------------------- the state


@dataclasses.dataclass(frozen=True)
class RunState:
    """A run of the plan, started or not, and its progress."""

    planned: PlannedRun  # the learning rate is nan for a final run that has not started
    outcome: Outcome
    steps: int  # of the whole run
    tokens: int
    flops_per_token: int
    tokens_per_second: float = math.nan  # from the last line, while it runs

    @property
    def done(self) -> float:
        """Fraction of its steps that are done."""
        return min(1.0, self.outcome.step / self.steps)

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return float(self.flops_per_token * self.tokens)


@dataclasses.dataclass(frozen=True)
class Grid:
    """All runs of a plan at one moment."""

    folder: Path
    manifest: Manifest
    runs: list[RunState]

    def count(self, *states: str) -> int:
        """Return how many runs are in one of these states."""
        return sum(run.outcome.state in states for run in self.runs)

    @property
    def done(self) -> bool:
        """Whether every run has ended."""
        return self.count(*ENDED) == len(self.runs)

    @property
    def tokens_per_second(self) -> float:
        """Sum over the running runs that have logged a speed."""
        return math.fsum(run.tokens_per_second for run in self.runs if not math.isnan(run.tokens_per_second))

    @property
    def seconds_left(self) -> float:
        """Estimated seconds until all runs have ended; nan while no speed is known.

        Assumes as many concurrent runs as now, and at least one. FLOP/s come from finished runs, evaluations included; before
        any has finished, from the running ones.
        """
        speeds = [
            run.flops / run.outcome.summary["wall_seconds"]
            for run in self.runs
            if run.outcome.state == FINISHED and run.outcome.summary.get("wall_seconds")
        ] or [run.tokens_per_second * run.flops_per_token for run in self.runs if run.tokens_per_second > 0]
        left = sum(run.flops * (1 - run.done) for run in self.runs if run.outcome.state not in ENDED)
        return left * len(speeds) / math.fsum(speeds) / max(1, self.count(RUNNING)) if speeds else math.nan


class Watcher:
    """Read the state of a plan's folder again and again; a run that has ended is read only once.

    Raises:
        UserError: the folder is not that of a plan.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._ended: dict[str, tuple[list[int], Outcome]] = {}  # by run: time stamps of its files, and the outcome
        self._queue: dict[str, str] = {}
        self._queried_slurm = -math.inf

    def snapshot(self) -> Grid:
        """Return the state of all runs."""
        if time.monotonic() - self._queried_slurm > _QUERY_SLURM:
            self._queue, self._queried_slurm = task_states(self.folder), time.monotonic()
        outcomes: dict[PlannedRun, Outcome] = {}
        for path in run_folders(self.folder):
            planned = self.manifest.planned_run(path.name)
            if planned is not None:
                outcomes[planned] = self._outcome(path)
        runs = [self._state(planned, outcomes.get(planned)) for planned in _all_runs(self.manifest, outcomes)]
        grid = Grid(self.folder, self.manifest, runs)
        if grid.done and self.manifest.plan.until == "decided":  # the verdicts decide which seeds come next
            grid.runs.extend(self._state(planned, None) for planned in further_runs(read_results(self.folder)))
        return grid

    def _outcome(self, run: Path) -> Outcome:
        stamps = []
        for name in ("metrics.jsonl", "summary.json"):
            with contextlib.suppress(FileNotFoundError):
                stamps.append((run / name).stat().st_mtime_ns)
        cached = self._ended.get(run.name)
        if cached is not None and cached[0] == stamps:
            return cached[1]
        outcome = read_outcome(run)
        if outcome.state in ENDED:
            self._ended[run.name] = stamps, outcome
        return outcome

    def _state(self, planned: PlannedRun, outcome: Outcome | None) -> RunState:
        cost = self.manifest.cost[planned.size][planned.arm]
        steps = self.manifest.learned(planned.size, planned.arm)["steps"]
        outcome = self._with_queue(planned, outcome or read_outcome(self.folder / "runs" / planned.name))
        speed = math.nan
        if outcome.state == RUNNING:
            lines, _ = read_metrics(self.folder / "runs" / planned.name)
            speeds = (line.get("tokens_per_second") for line in reversed(lines) if line["kind"] == "train")
            speed = next((speed for speed in speeds if speed is not None), math.nan)
        return RunState(planned, outcome, steps, cost["tokens"], cost["flops_per_token"], speed)

    def _with_queue(self, planned: PlannedRun, outcome: Outcome) -> Outcome:
        """Refine an outcome by SLURM's queue: a folder does not show that another node is training in it."""
        rate_seeds = self.manifest.plan.rate_seeds
        state = self._queue.get(task_name(planned.size, planned.arm, planned.seed, rate_seeds))
        if state is None or outcome.state in (*ENDED, RUNNING):
            return outcome
        started = outcome.state == STOPPED and not outcome.summary
        return dataclasses.replace(outcome, state=RUNNING if state == RUNNING and started else QUEUED)


def _all_runs(manifest: Manifest, outcomes: dict[PlannedRun, Outcome]) -> Iterator[PlannedRun]:
    """Yield every run of a plan: those of the sweeps, extensions that have started included, and those of the seeds.

    A seed whose run has not started has the learning rate nan. An arm that diverged at every rate of its plan has no seeds.
    """
    for size, arms in manifest.arms.items():
        for arm in sorted(arms, key=lambda arm: arm != manifest.plan.baseline):
            rates = manifest.learning_rates(size, arm)
            own_sweep = len(rates) > 1 and swept_at(manifest.plan, size) == size
            seeds = manifest.plan.rate_seeds if own_sweep else []
            sweep = [PlannedRun("sweep", size, arm, lr, seed) for lr in rates for seed in seeds]
            started = [planned for planned in outcomes if (planned.size, planned.arm) == (size, arm)]
            swept = {(run.lr, run.seed): run for run in (*sweep, *started) if run.stage == "sweep"}
            yield from (swept[key] for key in sorted(swept))
            by_seed = {planned.seed: planned for planned in started if planned.stage == "final"}
            diverged = {run.lr for run in sweep if run in outcomes and outcomes[run].state == DIVERGED}
            hopeless = bool(sweep) and diverged >= {run.lr for run in sweep}
            for seed in dict.fromkeys((*manifest.plan.seeds, *sorted(by_seed))):  # those that `until=decided` added too
                if seed in by_seed or not hopeless:
                    yield by_seed.get(seed, PlannedRun("final", size, arm, math.nan, seed))


# -------------------------------------------------------------------------------------------------------- the display


def watch(snapshot: Callable[[], Grid], console: SafeConsole, refresh: float = _REFRESH) -> None:
    """Show the grid on a terminal and refresh it until every run has ended."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            grid = snapshot()
            parts = show(grid, console.width)
            if len(console.render_lines(Group(*parts))) > console.height:
                parts.sort(key=lambda part: not isinstance(part, Text))  # what must be cut off is the last grid
            live.update(Group(*parts), refresh=True)
            if grid.done:
                return
            time.sleep(refresh)


def show(grid: Grid, width: int) -> list[Text | Table]:
    """Return what is printed: the question, the grids of all sizes, the counts, and the logs of failed runs."""
    plan = grid.manifest.plan
    grids = [table for size in grid.manifest.arms for table in _tables(grid, size, width)]
    return [Text(f"{plan.name}: {plan.question}"), *grids, *_totals(grid)]


def _tables(grid: Grid, size: str, width: int) -> list[Table]:
    """Return the grid of a size, in as many tables as the width requires."""
    runs = [run for run in grid.runs if run.planned.size == size]
    arms = list(dict.fromkeys(run.planned.arm for run in runs))
    configured_lr = {arm: grid.manifest.learned(size, arm)["optim.lr"] for arm in arms}
    by_cell: dict[tuple[str, tuple[int, float]], list[RunState]] = {}
    for run in runs:
        by_cell.setdefault((run.planned.arm, _column(run.planned, configured_lr)), []).append(run)
    columns = sorted({column for _, column in by_cell})
    common_lr = next(iter(configured_lr.values())) if len(set(configured_lr.values())) == 1 else None
    heads = {column: _head(column, common_lr) for column in columns}
    name_width, head_width = max(len(size), *map(len, arms)), max(map(len, heads.values()))
    cell_width = {digits: 1 + max(head_width, digits + 2) for digits in (3, 4)}
    digits = 4 if name_width + cell_width[4] * len(columns) <= width else 3
    columns_per_table = max(1, (width - name_width) // cell_width[digits])
    tables = []
    for first in range(0, len(columns), columns_per_table):
        shown = columns[first : first + columns_per_table]
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
        table.add_column(size, no_wrap=True)
        for column in shown:
            table.add_column(heads[column], justify="right", no_wrap=True)
        for arm in arms:
            table.add_row(arm, *(_cell(by_cell.get((arm, column), []), digits) for column in shown))
        tables.append(table)
    return tables


def _column(planned: PlannedRun, configured_lr: dict[str, float]) -> tuple[int, float]:
    """Return the sort key of a column: first learning rates, as factors of the arm's configured one, then seeds."""
    if planned.stage == "sweep":
        return 0, float(f"{planned.lr / configured_lr[planned.arm]:.3g}")
    return 1, planned.seed


def _head(column: tuple[int, float], common_lr: float | None) -> str:
    kind, value = column
    if kind:
        return f"s{value:g}"
    return f"x{value:g}" if common_lr is None else f"{value * common_lr:.2g}".replace("e-0", "e-")


def _cell(runs: list[RunState], digits: int) -> Text:
    """Return the cell of a run, or of the runs of a learning rate: the state of the one that needs attention first."""
    if not runs:
        return Text("")
    state = min((run.outcome.state for run in runs), key=list(_STYLES).index)
    if state == FINISHED:
        text = f"{math.fsum(run.outcome.loss for run in runs) / len(runs):.{digits}f}"
    elif state == RUNNING:
        text = f"{math.floor(100 * math.fsum(run.done for run in runs) / len(runs))}%"
    else:
        text = _LABELS[state]
    return Text(text, style=_STYLES[state])


def _totals(grid: Grid) -> list[Text]:
    counts = [
        f"{grid.count(state)} {state}"
        for state in (FINISHED, DIVERGED, RUNNING, QUEUED, STOPPED, FAILED, WAITING)
        if grid.count(state)
    ]
    line = f"{len(grid.runs)} runs: {', '.join(counts)}"
    if grid.tokens_per_second:
        line += f"; {grid.tokens_per_second:,.0f} tokens/s"
    if grid.done:
        line += f"; python -m ablation.report {grid.folder} writes the report"
    elif math.isnan(grid.seconds_left):
        line += "; the time left is known once a run has logged a speed"
    else:
        line += f"; about {duration(grid.seconds_left)} left"
        line += "" if grid.count(RUNNING) else ", one at a time, once they run"
    failed = [run.planned.name for run in grid.runs if run.outcome.state == FAILED]
    lines = [f"failed: see {log_path(grid.folder / 'runs' / name)}" for name in failed[:_FAILED_SHOWN]]
    if len(failed) > _FAILED_SHOWN:
        lines.append(f"{len(failed) - _FAILED_SHOWN} more failed: see {grid.folder / 'logs'}/RUN.log")
    return [Text(line), *(Text(line, style=_STYLES[FAILED]) for line in lines)]


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
