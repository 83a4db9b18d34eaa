"""Run a plan: `python -m ablation.run ablation=glu_variants`.

    ablation=NAME            a plan of conf/ablation        folder=ablations   where plans have their folders
    ablation.KEY=VALUE       another value of the plan      jobs=N             runs at a time, each on a GPU of its own
    KEY=VALUE                an override of every run       ranks=N            ranks a run; as many as it needs if not said
    cluster=NAME             submit the runs to SLURM       yes=true           do not ask before it begins
    cluster.KEY=VALUE        another value of the cluster

Prints what the plan costs, asks, and trains run after run, each a `train.py` of its own. Stop it at any moment and type the
same again: runs that ended are left alone, a half-finished one goes on, one that diverged stays diverged. On a cluster
(conf/cluster) the runs become tasks of job arrays, `jobs` of them at a time, which may be resubmitted one by one.
Typed twice at once, the two share the runs that are left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ablation import slurm
from ablation.command import environment_of, ranks_of, train_command
from ablation.manifest import check_manifest, write_manifest
from ablation.outcomes import DIVERGED, ENDED, FAILED, FINISHED, Outcome, is_running, outcome, run_folders
from ablation.plan import Plan, PlannedRun, next_rate, read_plan, resolve
from ablation.speed import step_time
from ablation.statistics import sweep
from conf.keys import choices
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.options import split_options
from launch.sbatch import read_cluster

_OPTIONS = {"yes": False, "jobs": 0, "ranks": 0, "folder": "ablations", "task": ""}  # task: what a job array starts


def usage() -> str:
    """Return the text of `--help`: the module's docstring, and the question of every plan."""
    plans = [f"    {name:<16}{read_plan([f'ablation={name}'])[0].question}" for name in choices("ablation")]
    return "\n".join([__doc__ or "", *plans])


def main(argv: list[str]) -> int:
    options, overrides = split_options(argv, _OPTIONS, {"jobs": 1, "ranks": 0})
    cluster, words = read_cluster(overrides)
    config, others = read_plan(words)
    folder = Path(options["folder"]) / config.name
    timed = config.budget == "wallclock"
    if timed and cluster:
        slurm.refuse_unmeasured(folder)
    plan = resolve(config, others, step_time(config, others, folder, options["ranks"]) if timed else None)
    check_manifest(plan, folder)
    console = Console(file=sys.stdout, highlight=False, markup=False)
    runner = Runner(plan, folder, max(1, options["jobs"]), options["ranks"], console)
    if options["task"]:
        return runner.task(options["task"])
    show(plan, folder, console)
    if cluster:
        jobs = slurm.jobs(plan, folder, cluster, runner, options["jobs"], words, shlex.join(argv))
    if not options["yes"] and not _agreed():
        print("nothing was run")
        return 0
    write_manifest(plan, folder)
    return slurm.submit_all(jobs, cluster, folder) if cluster else runner.go()


# ------------------------------------------------------------------------------------------------- before it begins


def show(plan: Plan, folder: Path, console: Console) -> None:
    """Print the plan and what it costs."""
    config = plan.config
    console.print(f"{config.name}: {config.question}  (hash {plan.hash})", soft_wrap=True)
    for size, arms in plan.arms.items():
        baseline = arms[config.baseline]
        rates = " ".join(f"{rate:g}" for rate in plan.rates(size, config.baseline))
        console.print(f"{size}: {baseline.batch.tokens:,} tokens a run, learning rates {rates}", soft_wrap=True)
        table = Table("arm", "d_ff", "FFN parameters", "off by", "FLOPs a run", box=box.SIMPLE)
        for arm, of_arm in arms.items():
            width = of_arm.width
            name = arm + (" (baseline)" if arm == config.baseline else "")
            table.add_row(
                name, f"{width.d_ff}", f"{width.parameters:,}", f"{width.mismatch:+.2%}", f"{of_arm.flops:.3g}"
            )
        console.print(table)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    arms_and_sizes = f"{len(next(iter(plan.arms.values())))} arms x {len(plan.arms)} size(s)"
    swept = len(config.rates) if len(config.rates) > 1 else 0
    runs, done = plan.runs(), [path for path in run_folders(folder) if outcome(path).state in ENDED]
    console.print(
        f"{runs} runs: {arms_and_sizes} x ({swept} rates with seed {config.rate_seed} + {len(config.seeds)} seeds), "
        f"equal in {config.budget}; {plan.flops():.3g} FLOPs; {_hours(plan, folder)}",
        soft_wrap=True,
    )
    if done:
        console.print(f"{len(done)} of them have ended already, in {folder}", soft_wrap=True)


def _hours(plan: Plan, folder: Path) -> str:
    """Say how long the plan takes, from runs that have finished: of this plan, or else of others beside it."""
    nearby = (*folder.parent.glob("*/runs/*/config.yaml"), *Path("runs").glob("*/config.yaml"))
    for where, runs in (("this plan", run_folders(folder)), ("other runs", [path.parent for path in nearby])):
        rates = []
        for run in runs:
            summary = outcome(run, []).summary
            if summary.get("status") == FINISHED and summary.get("wall_seconds"):
                rates.append(summary["flops_per_token"] * summary["tokens"] / summary["wall_seconds"])
        if rates:
            speed = statistics.median(rates)
            hours = plan.flops() / speed / 3600
            return f"about {hours:.1f} hours, one run after the other, at the {speed:.3g} FLOP/s of {where}"
    return "how long that takes is known after the first run"


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UserError("there is nobody to ask here: say yes=true")
    return input("run it? [y/N] ").strip().lower() in ("y", "yes")


# ------------------------------------------------------------------------------------------------------------- runs


class Runner:
    """Trains the planned runs of a plan that have not ended, `jobs` at a time: the sweeps first, then seed after seed."""

    def __init__(self, plan: Plan, folder: Path, jobs: int, ranks: int, console: Console) -> None:
        self.plan, self.folder, self.jobs, self.ranks, self.console = plan, folder, jobs, ranks, console
        self._processes: set[subprocess.Popen] = set()
        self._places: queue.Queue[int] = queue.Queue()
        for place in range(jobs):
            self._places.put(place)
        self._stopping = False

    def go(self) -> int:
        """Run what is left; return the exit status: 0 when every run ended, 1 when one failed or was stopped."""
        (self.folder / "logs").mkdir(exist_ok=True)
        with self._stopped_by_signals():
            complete = self._sweeps(list(self.plan.places()))
            if complete:
                best = {place: self.swept(*place)[1] for place in self.plan.places()}
                finals = [self.plan.final(*place, rate) for place, rate in best.items() if rate is not None]
                complete = self._train([planned for of_seed in zip(*finals, strict=True) for planned in of_seed])
        outcomes = [outcome(run) for run in run_folders(self.folder)]
        ended, diverged = (sum(found.state in states for found in outcomes) for states in (ENDED, (DIVERGED,)))
        self.console.print(f"{ended} runs have ended in {self.folder}, {diverged} of them diverged", soft_wrap=True)
        if self._stopping:
            self.console.print("stopped; the same command goes on from here")
        self.console.print(f"python -m ablation.report {self.folder}   shows what they say", soft_wrap=True)
        return 0 if complete and not self._stopping else 1

    def task(self, name: str) -> int:
        """Run what a task of a job array is to run; return the exit status, as `go` does.

        Raises:
            UserError: it is no task of this plan, or one for which a sweep has to end first.
        """
        (self.folder / "logs").mkdir(exist_ok=True)
        found = [
            (place, seed)
            for place in self.plan.places()
            for seed in (self.plan.config.rate_seed, *self.plan.config.seeds)
            if slurm.name_of(*place, seed) == name
        ]
        if not found:
            raise UserError(f"task={name} is no task of {self.plan.config.name}")
        [(place, seed)] = found
        with self._stopped_by_signals():
            if seed == self.plan.config.rate_seed:
                complete = self._sweeps([place])
            else:
                left, rate = self.swept(*place)
                if left:
                    raise UserError(
                        f"the sweep of {place[1]} at {place[0]} has not ended: {left[0].name} is {self.outcome(left[0]).state}"
                    )
                complete = rate is None or self._train(
                    [planned for planned in self.plan.final(*place, rate) if planned.seed == seed]
                )
        return 0 if complete and not self._stopping else 1

    def _sweeps(self, places: list[tuple[str, str]]) -> bool:
        """Try learning rates, at first all of the plan, then beyond an edge; return whether all have ended."""
        while left := [planned for place in places for planned in self.swept(*place)[0]]:
            if not self._train(left):
                return False
        return True

    def swept(self, size: str, arm: str) -> tuple[list[PlannedRun], float | None]:
        """Return the runs by which the sweep of an arm goes on now, none if it has ended, and the best rate then.

        The rate is None where every one diverged.
        """
        planned_runs = self.plan.sweep(size, arm)
        if not planned_runs:
            return [], self.plan.rates(size, arm)[0]
        for extension in range(self.plan.config.rate_extensions + 1):
            found = {planned: self.outcome(planned) for planned in planned_runs}
            if left := [planned for planned in planned_runs if found[planned].state not in ENDED]:
                return left, None
            losses = {planned.rate: found[planned].loss for planned in planned_runs}
            try:
                tried = sweep(losses)
            except ValueError:
                return [], None  # every rate diverged
            if not tried.edge or extension == self.plan.config.rate_extensions:
                break
            planned_runs.append(dataclasses.replace(planned_runs[0], rate=next_rate(list(losses), tried.edge)))
        return [], tried.best

    def outcome(self, planned: PlannedRun) -> Outcome:
        """Return how a run of this plan stands."""
        return outcome(self.folder / "runs" / planned.name)

    def _train(self, planned_runs: list[PlannedRun]) -> bool:
        """Train those that have not ended; return whether all have, then."""
        left = [planned for planned in planned_runs if self.outcome(planned).state not in ENDED]
        with ThreadPoolExecutor(self.jobs) as pool:
            for future in as_completed([pool.submit(self._one, planned) for planned in left]):
                future.result()
        return all(self.outcome(planned).state in ENDED for planned in planned_runs)

    def _one(self, planned: PlannedRun) -> None:
        run, taken = self.folder / "runs" / planned.name, True
        while taken:  # by another runner, in the moment that we began it too
            self._wait_for_another(run)
            if self._stopping or self.outcome(planned).state in ENDED:
                return
            place = self._places.get()  # there are as many as workers
            try:
                status = self._run(planned, place)
            finally:
                self._places.put(place)
            taken = status > 0 and is_running(run)
        self._tell(planned, status)

    def _run(self, planned: PlannedRun, place: int) -> int:
        """Train a run in a process of its own; return the status of that."""
        words = self.plan.words(planned, str(self.folder / "runs"))
        ranks = self.ranks or ranks_of(self.plan.arms[planned.size][planned.arm].config)
        with open(self._log(planned), "ab") as log:
            process = subprocess.Popen(
                train_command(words, ranks),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=environment_of(place, self.jobs, ranks),
                start_new_session=True,  # a Ctrl-C reaches it once, as our SIGTERM
            )  # fmt: skip
        self._processes.add(process)
        if self._stopping:
            process.send_signal(signal.SIGTERM)
        process.wait()
        self._processes.discard(process)
        return process.returncode

    def _tell(self, planned: PlannedRun, status: int) -> None:
        """Say how a run ended whose process ended with a status."""
        ended = self.outcome(planned)
        how = ended.state
        if how == FINISHED:
            how = f"finished, {ended.loss:.4f} nats a token"
        elif how == FAILED or (how not in ENDED and status > 0):
            how = f"failed: {self._log(planned)} says why"
        self.console.print(f"{planned.stage}  {planned.name}  {how}", soft_wrap=True)

    def _log(self, planned: PlannedRun) -> Path:
        return self.folder / "logs" / f"{planned.name}.log"

    def _wait_for_another(self, run: Path) -> None:
        """Wait for a process that trains there: one of ours that was killed leaves its runs behind, and they go on."""
        while is_running(run) and not self._stopping:
            time.sleep(0.2)

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """Let a signal stop the runs, which save and end, and no more begin."""

        def stop(*_: Any) -> None:
            self._stopping = True
            for process in list(self._processes):
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)

        before = {
            number: signal.signal(number, stop)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


if __name__ == "__main__":
    run_command(main, usage, needs_arguments=True)
