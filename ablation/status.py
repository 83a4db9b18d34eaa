"""How the runs of a plan stand, at a glance: `python -m ablation.status ablations/glu_variants`.

    FOLDER       of a plan
    once=true    print it once; on a terminal it is kept up to date until every run has ended, or Ctrl-C

A row is an arm, a column a learning rate of the sweep or a seed. A cell is the final held-out loss in nats a token, the share
of its steps that a running run has done, or `stop`, `fail`, `div` (diverged), `q` for one in SLURM's queue, or `.` for a run
that waits. Rates beyond the plan's stand there once a sweep goes on past an edge. What runs hold is checked by
`ablation.results`, not here.
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
from rich.console import Console, Group
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
    outcome,
    read_metrics,
    run_folders,
)
from ablation.plan import PlannedRun
from ablation.slurm import name_of, states
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.options import read_positional

_OPTIONS = {"once": False}
_PAUSE = 2.0  # seconds between looks
_ASK_SLURM = 15.0  # seconds between questions to SLURM, which serves others too
_STYLES = {
    FINISHED: "green",
    RUNNING: "cyan",
    STOPPED: "yellow",
    FAILED: "red",
    DIVERGED: "magenta",
    WAITING: "dim",
    QUEUED: "dim",
}
_WORDS = {STOPPED: "stop", FAILED: "fail", DIVERGED: "div", WAITING: ".", QUEUED: "q"}
_FAILED_SHOWN = 4


def main(argv: list[str]) -> int:
    options, folders = read_positional(argv, _OPTIONS)
    if len(folders) != 1:
        raise UserError("expected the folder of one plan: python -m ablation.status ablations/NAME")
    watcher = Watcher(Path(folders[0]))
    console = Console(file=sys.stdout, highlight=False, markup=False)
    if options["once"] or not console.is_terminal:
        for part in show(watcher.look(), console.width):
            console.print(part, soft_wrap=isinstance(part, Text))  # a path stays in one piece
        return 0
    with contextlib.suppress(KeyboardInterrupt):  # that is how it is ended
        watch(watcher.look, console)
    return 0


# ------------------------------------------------------------------------------------------------------------ what is


@dataclasses.dataclass(frozen=True)
class Place:
    """A run that is there or is to come."""

    planned: PlannedRun  # a final one that waits has the rate nan
    outcome: Outcome
    steps: int  # that it has in all
    tokens: int
    flops_per_token: int
    tokens_per_second: float = math.nan  # of the last line, while it runs

    @property
    def share(self) -> float:
        """The share of its steps that are done."""
        return min(1.0, self.outcome.step / self.steps)

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return float(self.flops_per_token * self.tokens)


@dataclasses.dataclass(frozen=True)
class Grid:
    """All runs of a plan at one moment."""

    folder: Path
    manifest: Manifest
    places: list[Place]

    def count(self, *states: str) -> int:
        """Return how many runs are in one of these states."""
        return sum(place.outcome.state in states for place in self.places)

    @property
    def done(self) -> bool:
        """Whether every run has ended."""
        return self.count(*ENDED) == len(self.places)

    @property
    def tokens_per_second(self) -> float:
        """Of all runs that run and have said so."""
        return math.fsum(p.tokens_per_second for p in self.places if not math.isnan(p.tokens_per_second))

    @property
    def seconds_left(self) -> float:
        """Until all runs have ended, with as many at a time as run now, one if none does; nan while no speed is known.

        FLOP/s are those of runs that finished, with all their evaluations; before there are any, of those that run.
        """
        speeds = [
            place.flops / place.outcome.summary["wall_seconds"]
            for place in self.places
            if place.outcome.state == FINISHED and place.outcome.summary.get("wall_seconds")
        ] or [place.tokens_per_second * place.flops_per_token for place in self.places if place.tokens_per_second > 0]
        left = sum(place.flops * (1 - place.share) for place in self.places if place.outcome.state not in ENDED)
        return left * len(speeds) / math.fsum(speeds) / max(1, self.count(RUNNING)) if speeds else math.nan


class Watcher:
    """Looks at the folder of a plan, and at runs that have ended only once.

    Raises:
        UserError: it is no folder of a plan.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self._ended: dict[str, tuple[list[int], Outcome]] = {}
        self._queue: dict[str, str] = {}
        self._asked = -math.inf

    def look(self) -> Grid:
        """Return how all runs stand now."""
        if time.monotonic() - self._asked > _ASK_SLURM:
            self._queue, self._asked = states(self.folder), time.monotonic()
        found: dict[PlannedRun, Outcome] = {}
        for path in run_folders(self.folder):
            planned = self.manifest.planned_run(path.name)
            if planned is not None:
                found[planned] = self._outcome(path)
        planned_runs = _planned_runs(self.manifest, found)
        return Grid(self.folder, self.manifest, [self._place(planned, found.get(planned)) for planned in planned_runs])

    def _outcome(self, run: Path) -> Outcome:
        stamp = []
        for name in ("metrics.jsonl", "summary.json"):
            with contextlib.suppress(FileNotFoundError):
                stamp.append((run / name).stat().st_mtime_ns)
        before = self._ended.get(run.name)
        if before is not None and before[0] == stamp:
            return before[1]
        found = outcome(run)
        if found.state in ENDED:
            self._ended[run.name] = stamp, found
        return found

    def _place(self, planned: PlannedRun, found: Outcome | None) -> Place:
        cost, steps = (
            self.manifest.cost[planned.size][planned.arm],
            self.manifest.learned(planned.size, planned.arm)["steps"],
        )
        found = self._on_cluster(planned, found or Outcome(WAITING))
        speed = math.nan
        if found.state == RUNNING:
            lines, _ = read_metrics(self.folder / "runs" / planned.name)
            speed = next((line["tokens_per_second"] for line in reversed(lines) if line["kind"] == "train"), math.nan)
        return Place(planned, found, steps, cost["tokens"], cost["flops_per_token"], speed)

    def _on_cluster(self, planned: PlannedRun, found: Outcome) -> Outcome:
        """Return how a run stands that SLURM may know more of: a folder does not show that another node trains in it."""
        state = self._queue.get(name_of(planned.size, planned.arm, planned.seed))
        if state is None or found.state in (*ENDED, RUNNING):
            return found
        begun = found.state == STOPPED and not found.summary
        return dataclasses.replace(found, state=RUNNING if state == RUNNING and begun else QUEUED)


def _planned_runs(manifest: Manifest, found: dict[PlannedRun, Outcome]) -> Iterator[PlannedRun]:
    """Yield every run of a plan: those of the sweeps, as far as they have gone past an edge, and of the seeds.

    Seeds of which no run is there have the rate nan; an arm that diverged at every rate of its plan has none.
    """
    for size, arms in manifest.arms.items():
        for arm in sorted(arms, key=lambda arm: arm != manifest.plan.baseline):
            rates = manifest.rates(size, arm)
            planned_runs = [planned for planned in found if (planned.size, planned.arm) == (size, arm)]
            first = (
                []
                if len(rates) < 2
                else [PlannedRun("sweep", size, arm, rate, manifest.plan.rate_seed) for rate in rates]
            )
            swept = {planned.rate: planned for planned in (*first, *planned_runs) if planned.stage == "sweep"}
            yield from (swept[rate] for rate in sorted(swept))
            of_seed = {planned.seed: planned for planned in planned_runs if planned.stage == "final"}
            hopeless = bool(first) and all(planned in found and found[planned].state == DIVERGED for planned in first)
            for seed in manifest.plan.seeds:
                if seed in of_seed or not hopeless:
                    yield of_seed.get(seed, PlannedRun("final", size, arm, math.nan, seed))


# ------------------------------------------------------------------------------------------------------- how it looks


def watch(look: Callable[[], Grid], console: Console, pause: float = _PAUSE) -> None:
    """Show the grid on a terminal and keep it up to date until every run has ended."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            grid = look()
            parts = show(grid, console.width)
            if len(console.render_lines(Group(*parts))) > console.height:
                parts.sort(key=lambda part: not isinstance(part, Text))  # what does not fit is the last grid
            live.update(Group(*parts), refresh=True)
            if grid.done:
                return
            time.sleep(pause)


def show(grid: Grid, width: int) -> list[Text | Table]:
    """Return what is printed: the question, the grids of all sizes, the counts, and where failed runs say why."""
    plan = grid.manifest.plan
    grids = [table for size in grid.manifest.arms for table in _tables(grid, size, width)]
    return [Text(f"{plan.name}: {plan.question}"), *grids, *_totals(grid)]


def _tables(grid: Grid, size: str, width: int) -> list[Table]:
    """Return the grid of a size, in as many tables as it takes to fit a width."""
    places = [place for place in grid.places if place.planned.size == size]
    arms = list(dict.fromkeys(place.planned.arm for place in places))
    own = {arm: grid.manifest.learned(size, arm)["optim.lr"] for arm in arms}
    found = {(place.planned.arm, _column(place.planned, own)): place for place in places}
    columns = sorted({column for _, column in found})
    rate = next(iter(own.values())) if len(set(own.values())) == 1 else None
    heads = {column: _head(column, rate) for column in columns}
    name_width, head_width = max(len(size), *map(len, arms)), max(map(len, heads.values()))
    taken = {digits: 1 + max(head_width, digits + 2) for digits in (3, 4)}  # columns of a cell
    digits = 4 if name_width + taken[4] * len(columns) <= width else 3
    fitting = max(1, (width - name_width) // taken[digits])
    tables = []
    for first in range(0, len(columns), fitting):
        part = columns[first : first + fitting]
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
        table.add_column(size, no_wrap=True)
        for column in part:
            table.add_column(heads[column], justify="right", no_wrap=True)
        for arm in arms:
            table.add_row(arm, *(_shown(found.get((arm, column)), digits) for column in part))
        tables.append(table)
    return tables


def _column(planned: PlannedRun, own: dict[str, float]) -> tuple[int, float]:
    """Return where a run stands: rates as times of the arm's own, then seeds."""
    return (0, float(f"{planned.rate / own[planned.arm]:.3g}")) if planned.stage == "sweep" else (1, planned.seed)


def _head(column: tuple[int, float], own: float | None) -> str:
    kind, value = column
    if kind:
        return f"s{value:g}"
    return f"x{value:g}" if own is None else f"{value * own:.2g}".replace("e-0", "e-")


def _shown(place: Place | None, digits: int) -> Text:
    if place is None:
        return Text("")
    state = place.outcome.state
    if state == FINISHED:
        word = f"{place.outcome.loss:.{digits}f}"
    elif state == RUNNING:
        word = f"{math.floor(100 * place.share)}%"
    else:
        word = _WORDS[state]
    return Text(word, style=_STYLES[state])


def _totals(grid: Grid) -> list[Text]:
    counts = [
        f"{grid.count(state)} {state}"
        for state in (FINISHED, DIVERGED, RUNNING, QUEUED, STOPPED, FAILED, WAITING)
        if grid.count(state)
    ]
    line = f"{len(grid.places)} runs: {', '.join(counts)}"
    if grid.tokens_per_second:
        line += f"; {grid.tokens_per_second:,.0f} tokens/s"
    if grid.done:
        line += f"; python -m ablation.report {grid.folder} says what they show"
    elif math.isnan(grid.seconds_left):
        line += "; the time left is known when a run has a speed"
    else:
        line += f"; about {_duration(grid.seconds_left)} left"
        line += "" if grid.count(RUNNING) else ", one at a time, once they run"
    failed = [place.planned.name for place in grid.places if place.outcome.state == FAILED]
    lines = [f"{grid.folder / 'logs' / name}.log says why it failed" for name in failed[:_FAILED_SHOWN]]
    if len(failed) > _FAILED_SHOWN:
        lines.append(f"and so for {len(failed) - _FAILED_SHOWN} more: {grid.folder / 'logs'}/RUN.log")
    return [Text(line), *(Text(line, style=_STYLES[FAILED]) for line in lines)]


def _duration(seconds: float) -> str:
    minutes = max(1, math.ceil(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
