"""Submit a plan as SLURM job arrays: `python -m ablation.run ablation=glu_variants cluster=NAME`.

The sweeps are one array, with a task per arm and size that trains its learning rates and seeds one after the other. The
compared seeds are a second array, with a task per run, which starts when the first array has ended. A plan with one learning
rate has only the second. Once all seeds of a plan have ended, the same command submits those that `until=decided` adds, look by
look. A task is a plain `ablation.run` of its part of the plan, so it can be stopped and continued in the
same way.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ablation import speed
from ablation.manifest import NAME
from ablation.outcomes import ENDED, QUEUED, RUNNING
from ablation.plan import Plan, swept_at
from ablation.progress import further_runs, outcome_of, sweep_progress
from ablation.results import read_results
from conf.cluster_schema import ClusterConfig
from conf.load import load
from conf.validate import total_steps
from kernels.common.errors import TryAgain, UserError
from kernels.common.json_files import digest
from launch.corpus import unprepared
from launch.job_script import Job, doctor_of, python_of, quote
from launch.local import ranks_of
from launch.sbatch import RUNS, check, queued, refuse_queued, submit


def task_name(size: str, arm: str, seed: int, rate_seeds: Sequence[int]) -> str:
    """Return the name of the task of a seed: a pattern that matches the folders of its runs, whatever their learning rates.

    A sweep is one task. If it has several seeds, its pattern matches all runs of the arm.
    """
    return f"{size}-{arm}-lr*-seed{'*' if seed in rate_seeds and len(rate_seeds) > 1 else seed}"


def refuse_unmeasured(folder: Path) -> None:
    """Refuse to measure step times for `budget=wallclock` on the machine that submits.

    Raises:
        UserError: the plan's folder has no step times yet.
    """
    if not (folder / speed.NAME).exists():
        raise UserError(
            f"budget=wallclock needs step times of the nodes that train, and {folder / speed.NAME} is missing: start this "
            "plan on one of them (srun, without cluster=), stop it once they are measured, and then submit it"
        )


def jobs(
    plan: Plan,
    folder: Path,
    cluster: ClusterConfig,
    ranks: int,
    max_concurrent: int,
    overrides: list[str],
    command_line: str,
) -> list[Job]:
    """Return the arrays that run what has not ended.

    Args:
        ranks: per run; 0: as many as it needs.
        max_concurrent: tasks at a time; 0: as many as the cluster has room for.
        overrides: the plan and its overrides, for the tasks.
        command_line: the whole command, shown in the script.

    Raises:
        UserError: a run needs more ranks than a node has, or arrays of this plan are still queued.
    """
    refuse_queued(folder)
    ranks_per_node = ranks or max(ranks_of(plan.arms[size][arm].config) for size, arm in plan.size_arm_pairs())
    check(cluster, ranks_per_node)
    folder = folder.resolve()
    code, quoted_folder = folder / "slurm" / "code", shlex.quote(str(folder))
    options = [f"folder={folder.parent}", "yes=true", *([f"ranks={ranks}"] if ranks else [])]
    command = [python_of(cluster), "-u", str(code / "launch" / "run_module.py"), "ablation.run", *overrides, *options]
    return [
        Job(
            name=f"{plan.config.name}-{stage}",
            folder=folder,
            command=f'{" ".join(map(quote, command))} "task=$task"',
            doctor=doctor_of(cluster, code, ranks_per_node, []),
            typed=f"python -m ablation.run {command_line}",
            saved=f"{quoted_folder}/runs/$task/{{checkpoints/*,summary.json}}",
            ranks_per_node=ranks_per_node,
            tasks=tuple(tasks),
            at_once=max_concurrent,
            script=f"{stage}.sh",
        )
        for stage, tasks in _open_tasks(plan, folder).items()
        if tasks
    ]


def _open_tasks(plan: Plan, folder: Path) -> dict[str, list[str]]:
    """Return the tasks that have runs left, by array."""
    sweeps, seeds = [], []
    for size, arm in plan.size_arm_pairs():
        progress = sweep_progress(plan, folder, size, arm)
        rate_seeds = plan.config.rate_seeds
        if progress.pending:
            if swept_at(plan.config, size) == size:
                sweeps.append(task_name(size, arm, rate_seeds[0], rate_seeds))
            seeds += [task_name(size, arm, seed, rate_seeds) for seed in plan.config.seeds]
        elif progress.best_lr is not None:  # else the arm diverged at every learning rate
            final_runs = plan.final_runs(size, arm, progress.best_lr)
            left = [planned for planned in final_runs if outcome_of(planned, folder).state not in ENDED]
            seeds += [task_name(size, arm, planned.seed, rate_seeds) for planned in left]
    if not sweeps and not seeds and (folder / NAME).exists():
        further = further_runs(read_results(folder))
        seeds = [task_name(run.size, run.arm, run.seed, plan.config.rate_seeds) for run in further]
    return {"sweep": sweeps, "seeds": seeds}


def task_states(folder: Path) -> dict[str, str]:
    """Return the state of the plan's tasks that are in SLURM's queue: RUNNING or QUEUED, by the task's name.

    None where SLURM does not answer: what the folders say of the runs is shown all the same.
    """
    states: dict[str, str] = {}
    try:
        jobs = queued(folder)
    except TryAgain:
        return states
    for job in jobs:
        stage = job.name.rpartition("-")[2]
        tasks = read_tasks(folder / "slurm" / f"{stage}.sh")
        if job.task is not None and job.task < len(tasks):
            states[tasks[job.task]] = RUNNING if job.state in RUNS else QUEUED
    return states


def read_tasks(script: Path) -> list[str]:
    """Return the names of an array's tasks from its script; none where there is no script."""
    try:
        text = script.read_text(encoding="utf-8")
    except OSError:
        return []
    lines = text.partition("tasks=(\n")[2].partition("\n)")[0].splitlines()
    return [shlex.split(line, comments=True)[0] for line in lines]


def submit_all(arrays: list[Job], cluster: ClusterConfig, plan: Plan, folder: Path) -> int:
    """Submit the arrays, after a job that prepares their corpora if need be, print how to watch them, and return 0.

    Raises:
        UserError: the files of a corpus or of a tokenizer are missing or do not fit, or a run would repeat its corpus too
            often.
    """
    if not arrays:
        print(f"every run has ended; python -m ablation.report {shlex.quote(str(folder))}   writes the report")
        return 0
    runs = _longest_on_each_corpus(plan, folder)
    corpora = runs if cluster.container != "none" else unprepared(runs)
    numbers = submit(arrays, cluster, corpora)
    if corpora:
        print(f"job {numbers[0]} prepares the corpus on one node, and the arrays start after it")
    for job, number in zip(arrays, numbers[-len(arrays) :], strict=True):
        print(f"job array {number} is submitted, {len(job.tasks)} task(s): {job.path}")
        print(f"sbatch --array=TASK {shlex.quote(str(job.path))}   runs a single task again, if it failed")
    print(f"python -m ablation.status {shlex.quote(str(folder))}   shows their state")
    return 0


def _longest_on_each_corpus(plan: Plan, folder: Path) -> list[list[str]]:
    """Return the overrides of the run with the most tokens on each corpus of a plan."""
    longest: dict[str, tuple[int, list[str]]] = {}
    for size, arm in plan.size_arm_pairs():
        overrides = plan.overrides(
            plan.final_runs(size, arm, plan.learning_rates(size, arm)[0])[0], str(folder / "runs")
        )
        config = load(overrides)
        corpus = digest([asdict(config.data), asdict(config.tokenizer), config.sequence_length])
        tokens = (total_steps(config) or 0) * config.global_batch_size * config.sequence_length
        longest[corpus] = max(longest.get(corpus, (-1, [])), (tokens, overrides))
    return [overrides for _, overrides in longest.values()]
