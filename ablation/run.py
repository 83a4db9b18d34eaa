"""Run a plan: `python -m ablation.run ablation=glu_variants`.

    ablation=NAME       a plan of conf/ablation
    ablation.KEY=VALUE  change a key of the plan
    KEY=VALUE           override of every run
    jobs=N              concurrent runs, each on its own GPU
    ranks=N             ranks per run; default: as many as it needs
    folder=ablations    parent of the plans' folders
    yes=true            start without asking
    cluster=NAME        submit the runs to SLURM
    cluster.KEY=VALUE   change a key of the cluster

Prints what the plan costs, asks for confirmation, and trains one run after the other, each a `train.py` process of its own.
It can be stopped at any time. The same command continues: runs that ended are left alone, an unfinished run resumes from its
checkpoint, and a diverged run stays diverged. On a cluster (conf/cluster) the runs become tasks of job arrays, `jobs` of them
at a time, and each task can be submitted again. Two runners of the same plan divide the remaining runs between them.

A plan may grow: with more arms, sizes, rates or seeds the same command trains what is new, and the manifest says what was added
and what had been seen by then.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ablation import slurm
from ablation.command import baselines_command, environment_of
from ablation.growth import continue_plan
from ablation.manifest import keep_earlier_rules, write_manifest
from ablation.outcomes import (
    DIVERGED,
    ENDED,
    FAILED,
    FINISHED,
    Outcome,
    is_running,
    log_path,
    read_outcome,
    run_folders,
)
from ablation.plan import Plan, PlannedRun, possible_seeds, read_plan, seeds_text
from ablation.power import power_lines
from ablation.progress import further_runs, outcome_of, sweep_progress
from ablation.resolve import resolve
from ablation.results import baselines_path, read_results, why_no_verdict
from ablation.speed import step_time
from conf.ablation_schema import AblationConfig
from conf.cluster_schema import ClusterConfig
from conf.help import key_lines
from conf.keys import choices
from conf.overrides import check_overrides
from conf.terminal import SafeConsole
from kernels.common.commands import run_command
from kernels.common.errors import TryAgain, UserError
from kernels.common.options import split_options
from kernels.common.streams import outlive_console
from kernels.common.text import command_text
from kernels.common.units import duration
from launch.launchers import on_stop_signals
from launch.local import ranks_of, train_command
from launch.ranks import without_launcher
from launch.sbatch import read_cluster

_OPTIONS = {"yes": False, "jobs": 0, "ranks": 0, "folder": "ablations", "task": ""}  # task: set by job arrays


def usage() -> str:
    """Return the text of `--help`: the module's docstring, the question of every plan, and the keys of a plan."""
    plans = [f"    {name:<30}{read_plan([f'ablation={name}'])[0].question}" for name in choices("ablation")]
    keys = [
        "",
        "keys of a plan, and of a cluster",
        *key_lines(AblationConfig, "ablation."),
        *key_lines(ClusterConfig, "cluster."),
    ]
    return "\n".join([__doc__ or "", *plans, *keys])


def main(argv: list[str]) -> int:
    options, arguments = split_options(argv, _OPTIONS, {"jobs": 1, "ranks": 0})
    ranks = options["ranks"]
    cluster, plan_arguments = read_cluster(arguments)
    config, overrides = read_plan(plan_arguments)
    check_overrides(overrides, (*_OPTIONS, "cluster", "ablation"))
    folder = Path(options["folder"]) / config.name
    config = keep_earlier_rules(config, plan_arguments, folder)
    timed = config.budget == "wallclock"
    if timed and cluster:
        slurm.refuse_unmeasured(folder)
    plan = resolve(config, overrides, step_time(config, overrides, folder, ranks) if timed else None)
    continued = continue_plan(plan, folder)
    plan = continued.plan
    console = SafeConsole(file=sys.stdout, highlight=False, markup=False)
    runner = Runner(plan, folder, max(1, options["jobs"]), ranks, console)
    if options["task"]:
        return runner.run_task(options["task"])
    show(plan, folder, console)
    for note in continued.notes:
        console.print(note, soft_wrap=True)
    arrays = []
    if cluster:
        arrays = slurm.jobs(plan, folder, cluster, ranks, options["jobs"], plan_arguments, command_text(argv))
    if not options["yes"] and not _confirmed():
        print("nothing was run")
        return 0
    if not continued.narrower:
        write_manifest(plan, folder, continued.amendment)
    if not cluster:
        print(f"python -m ablation.status {folder}   shows the runs as they train, in another terminal", flush=True)
    return slurm.submit_all(arrays, cluster, plan, folder) if cluster else runner.run_all()


# -------------------------------------------------------------------------------------------------- before it starts


def show(plan: Plan, folder: Path, console: SafeConsole) -> None:
    """Print the plan and what it costs."""
    config = plan.config
    console.print(f"{config.name}: {config.question}  (hash {plan.hash})", soft_wrap=True)
    for size, arms in ((size, plan.arms[size]) for size in plan.sizes):
        baseline = arms[config.baseline]
        rates = " ".join(f"{lr:g}" for lr in plan.learning_rates(size, config.baseline))
        console.print(f"{size}: {baseline.batch.tokens:,} tokens per run, learning rates {rates}", soft_wrap=True)
        table = Table("arm", "d_ff", "FFN parameters", "mismatch", "FLOPs per run", box=box.SIMPLE)
        for name, arm in arms.items():
            table.add_row(
                f"{name} (baseline)" if name == config.baseline else name,
                f"{arm.width.d_ff}",
                f"{arm.width.parameters:,}",
                f"{arm.width.mismatch:+.2%}",
                f"{arm.flops:.3g}",
            )
        console.print(table)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    further = len(possible_seeds(config)) - len(config.seeds)
    arms_and_sizes = f"{len(next(iter(plan.arms.values())))} arms x {len(plan.sizes)} size(s)"
    if len(config.horizons) > 1:
        arms_and_sizes += f" x {len(config.horizons)} horizons"
    per_arm = f"{len(config.seeds)} seeds"
    if len(config.rates) > 1:
        at = f" at {config.sweep_at}" if config.sweep_at else ""
        per_arm = f"({len(config.rates)} learning rates with {seeds_text(config.rate_seeds)}{at} + {per_arm})"
    console.print(
        f"{plan.count_runs()} runs: {arms_and_sizes} x {per_arm}, equal in {config.budget}; {plan.flops():.3g} FLOPs; "
        f"{_duration(plan, folder)}",
        soft_wrap=True,
    )
    if further:
        console.print(
            f"then up to {further} further seeds of each arm without a verdict, and of the baseline", soft_wrap=True
        )
    reasons = why_no_verdict(plan)
    for line in [f"no verdict: {reason}" for reason in reasons] or power_lines(plan, folder):
        console.print(line, soft_wrap=True)
    ended = sum(read_outcome(path).state in ENDED for path in run_folders(folder))
    if ended:
        console.print(f"{ended} of them have ended already, in {folder}", soft_wrap=True)


def _duration(plan: Plan, folder: Path) -> str:
    """Return how long the plan takes, estimated from finished runs: of this plan, or else of others beside it."""
    nearby = (*folder.parent.glob("*/runs/*/config.yaml"), *Path("runs").glob("*/config.yaml"))
    for source, runs in (("this plan", run_folders(folder)), ("other runs", [path.parent for path in nearby])):
        speeds = []
        for run in runs:
            summary = read_outcome(run, []).summary
            numbers = [summary.get(key) or 0 for key in ("flops_per_token", "tokens", "wall_seconds")]
            if summary.get("status") == FINISHED and all(numbers):
                flops_per_token, tokens, seconds = numbers
                speeds.append(flops_per_token * tokens / seconds)
        if speeds:
            speed = statistics.median(speeds)
            return f"about {duration(plan.flops() / speed)}, one run after the other, at the {speed:.3g} FLOP/s of {source}"
    return "the duration is known after the first run"


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask for confirmation: add yes=true")
    return input("run it? [y/N] ").strip().lower() in ("y", "yes")


# ------------------------------------------------------------------------------------------------------------- runs


class Runner:
    """Train the runs of a plan that have not ended, `jobs` at a time: first the sweeps, then seed by seed."""

    def __init__(self, plan: Plan, folder: Path, jobs: int, ranks: int, console: SafeConsole) -> None:
        self.plan = plan
        self.folder = folder
        self.jobs = jobs
        self.ranks = ranks  # per run; 0: as many as it needs
        self.console = console
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._slots: queue.Queue[int] = queue.Queue()  # of concurrent runs; each has its own GPUs
        for slot in range(jobs):
            self._slots.put(slot)
        self._stopping = False

    def run_all(self) -> int:
        """Train what is left; return the exit status: 0 when every run ended, 1 when one failed or was stopped."""
        (self.folder / "logs").mkdir(exist_ok=True)
        pairs = list(self.plan.size_arm_pairs())
        with self._stopped_by_signals():
            self._measure_baselines(self.plan.sizes)
            complete = self._train_sweeps(pairs)
            if complete:
                best = {pair: sweep_progress(self.plan, self.folder, *pair).best_lr for pair in pairs}
                finals = [self.plan.final_runs(*pair, lr) for pair, lr in best.items() if lr is not None]
                complete = self._train([planned for of_seed in zip(*finals, strict=True) for planned in of_seed])
                while complete and (further := self._further_runs()):
                    complete = self._train(further)
        outcomes = [read_outcome(run) for run in run_folders(self.folder)]
        ended = sum(outcome.state in ENDED for outcome in outcomes)
        diverged = sum(outcome.state == DIVERGED for outcome in outcomes)
        self.console.print(f"{ended} runs have ended in {self.folder}, {diverged} of them diverged", soft_wrap=True)
        if self._stopping:
            self.console.print("stopped; the same command continues from here")
        self.console.print(f"python -m ablation.report {self.folder}   writes the report", soft_wrap=True)
        return 0 if complete and not self._stopping else 1

    def run_task(self, name: str) -> int:
        """Train the runs of one task of a job array; return the exit status as `run_all` does.

        Raises:
            UserError: the plan has no such task, or the sweep that it depends on has failed.
            TryAgain: that sweep has not ended yet.
        """
        (self.folder / "logs").mkdir(exist_ok=True)
        config = self.plan.config
        tasks = {
            slurm.task_name(size, arm, seed, config.rate_seeds): (size, arm, seed)
            for size, arm in self.plan.size_arm_pairs()
            for seed in (*config.rate_seeds, *possible_seeds(config))
        }
        if name not in tasks:
            raise UserError(f"task={name} is not a task of {config.name}")
        size, arm, seed = tasks[name]
        with self._stopped_by_signals():
            self._measure_baselines({size} & set(self.plan.sizes))
            if seed in config.rate_seeds:
                complete = self._train_sweeps([(size, arm)])
            else:
                progress = sweep_progress(self.plan, self.folder, size, arm)
                if progress.pending:
                    first = progress.pending[0]
                    state = self.outcome(first).state
                    # It may be queued again, under another number than the one that this task has waited for.
                    kind = UserError if state == FAILED else TryAgain
                    raise kind(f"the sweep of {arm} at {size} has not ended: {first.name} is {state}")
                complete = True  # if the arm diverged at every learning rate, there is nothing to run
                if progress.best_lr is not None:
                    complete = self._train([PlannedRun("final", size, arm, progress.best_lr, seed)])
        return 0 if complete and not self._stopping else 1

    def outcome(self, planned: PlannedRun) -> Outcome:
        """Return the outcome of a run of this plan."""
        return outcome_of(planned, self.folder)

    def _measure_baselines(self, sizes: Iterable[str]) -> None:
        """Measure the models that are no neural networks, unless that is done. No run depends on it: a failure is reported."""
        config = self.plan.config
        for size in sizes:
            to = baselines_path(self.folder, size)
            if to.exists() or self._stopping:
                continue
            lr = self.plan.learning_rates(size, config.baseline)[0]
            first = self.plan.final_runs(size, config.baseline, lr)[0]
            command = baselines_command(self.plan.overrides(first, str(self.folder / "runs")), to)
            if self._run_logged(command, f"baselines-{size}", without_launcher(os.environ)) > 0:
                log = self.folder / "logs" / f"baselines-{size}.log"
                self.console.print(f"warning: no bigram model to compare with at {size}: see {log}", soft_wrap=True)

    def _further_runs(self) -> list[PlannedRun]:
        """Return the runs of the seeds that the plan adds next, once all before them have ended."""
        return further_runs(read_results(self.folder)) if self.plan.config.until == "decided" else []

    def _train_sweeps(self, pairs: list[tuple[str, str]]) -> bool:
        """Train the sweeps of these (size, arm), extensions included; return whether all of them ended."""
        while pending := [p for pair in pairs for p in sweep_progress(self.plan, self.folder, *pair).pending]:
            if not self._train(list(dict.fromkeys(pending))):  # sizes may share a sweep
                return False
        return True

    def _train(self, runs: list[PlannedRun]) -> bool:
        """Train the runs that have not ended; return whether all have ended then."""
        left = [planned for planned in runs if self.outcome(planned).state not in ENDED]
        with ThreadPoolExecutor(self.jobs) as pool:
            for future in as_completed([pool.submit(self._train_one, planned) for planned in left]):
                future.result()
        return all(self.outcome(planned).state in ENDED for planned in runs)

    def _train_one(self, planned: PlannedRun) -> None:
        """Train a run unless it has ended. While another runner trains it, wait."""
        run = self.folder / "runs" / planned.name
        while True:
            self._wait_for_other_process(run)
            if self._stopping or self.outcome(planned).state in ENDED:
                return
            slot = self._slots.get()  # never blocks: there are as many slots as workers
            try:
                status = self._train_in_process(planned, slot)
            finally:
                self._slots.put(slot)
            lost_race = status > 0 and is_running(run)  # another runner started it at the same moment
            if not lost_race:
                break
        self._report(planned, status)

    def _train_in_process(self, planned: PlannedRun, slot: int) -> int:
        """Train a run in a process of its own; return the exit status of that process."""
        ranks = self.ranks or ranks_of(self.plan.arms[planned.size][planned.arm].config)
        command = train_command(self.plan.overrides(planned, str(self.folder / "runs")), ranks)
        return self._run_logged(command, planned.name, environment_of(slot, self.jobs, ranks))

    def _run_logged(self, command: list[str], name: str, environment: dict[str, str]) -> int:
        """Run a command whose output goes to logs/NAME.log; return its exit status."""
        with open(self.folder / "logs" / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C reaches it once, as the SIGTERM that the runner sends
            )
        self._processes.add(process)
        if self._stopping:
            process.send_signal(signal.SIGTERM)
        process.wait()
        self._processes.discard(process)
        return process.returncode

    def _report(self, planned: PlannedRun, status: int) -> None:
        """Print how a run ended, given the exit status of its process."""
        outcome = self.outcome(planned)
        result = outcome.state
        if outcome.state == FINISHED:
            result = f"finished, {outcome.loss:.4f} nats per token"
        elif outcome.state == FAILED or (outcome.state not in ENDED and status > 0):
            result = f"failed: see {self._log(planned)}"
        self.console.print(f"{planned.stage}  {planned.name}  {result}", soft_wrap=True)

    def _log(self, planned: PlannedRun) -> Path:
        return log_path(self.folder / "runs" / planned.name)

    def _wait_for_other_process(self, run: Path) -> None:
        """Wait while another process trains in a folder. A killed runner leaves such processes behind; they continue."""
        while is_running(run) and not self._stopping:
            time.sleep(0.2)

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """Let a signal stop the runs: those in progress save and end, and no other starts."""

        def stop(*_: Any) -> None:
            self._stopping = True
            for process in list(self._processes):
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)

        with on_stop_signals(stop):
            yield


if __name__ == "__main__":
    outlive_console()
    run_command(main, usage, needs_arguments=True)
