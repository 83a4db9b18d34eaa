"""A plan as job arrays of SLURM: `python -m ablation.run ablation=glu_variants cluster=NAME`.

The sweeps are one array, a task an arm and size, which tries its learning rates one after the other; the seeds are a second, a
task a run, which begins when the first has ended. A plan with one learning rate has only the second. A task is a plain
`ablation.run` of its part, so that it can be stopped and gone on with like one.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ablation import speed
from ablation.command import ranks_of
from ablation.outcomes import ENDED, QUEUED, RUNNING
from ablation.plan import Plan
from conf.schema import ClusterConfig
from kernels.common.errors import UserError
from launch.sbatch import RUNS, Job, check, doctor_of, python_of, queued, refuse_queued, submit

if TYPE_CHECKING:
    from ablation.run import Runner


def name_of(size: str, arm: str, seed: int) -> str:
    """Return what a task is called: a pattern of the folders of its runs, whatever their learning rates."""
    return f"{size}-{arm}-lr*-seed{seed}"


def refuse_unmeasured(folder: Path) -> None:
    """Refuse to measure step times for `budget=wallclock` on the machine that submits."""
    if not (folder / speed.NAME).exists():
        raise UserError(
            f"budget=wallclock needs step times of the nodes that train, and {folder / speed.NAME} is not there: "
            "begin this plan on one of them (srun, without cluster=), stop it when they are measured, and submit it then"
        )


def jobs(
    plan: Plan, folder: Path, cluster: ClusterConfig, runner: Runner, at_once: int, words: list[str], typed: str
) -> list[Job]:
    """Return the arrays that run what has not ended.

    Args:
        at_once: tasks at a time; 0: as many as there is room for.
        words: the plan and its overrides, for the tasks; typed: the whole command, for the reader of the script.

    Raises:
        UserError: a run needs more ranks than a node has; the arrays of this plan are still queued.
    """
    refuse_queued(folder)
    ranks = runner.ranks or max(ranks_of(plan.arms[size][arm].config) for size, arm in plan.places())
    check(cluster, ranks)
    open_sweeps, finals = [], []
    for place in plan.places():
        left, rate = runner.swept(*place)
        if left:
            open_sweeps.append(place)
        if not left and rate is None:
            continue  # it diverged at every rate
        ended = [] if left else [c.seed for c in plan.final(*place, rate) if runner.outcome(c).state in ENDED]
        finals += [name_of(*place, seed) for seed in plan.config.seeds if seed not in ended]
    stages = {"sweep": [name_of(*place, plan.config.rate_seed) for place in open_sweeps], "seeds": finals}
    folder = folder.resolve()
    code, inside = folder / "slurm" / "code", shlex.quote(str(folder))
    own = [f"folder={folder.parent}", "yes=true", *([f"ranks={runner.ranks}"] if runner.ranks else [])]
    command = [python_of(cluster), "-u", str(code / "launch" / "run_module.py"), "ablation.run", *words, *own]
    return [
        Job(
            name=f"{plan.config.name}-{stage}",
            folder=folder,
            command=f'{shlex.join(command)} "task=$task"',
            doctor=doctor_of(cluster, code, []),
            typed=f"python -m ablation.run {typed}",
            saved=f"{inside}/runs/$task/{{checkpoints/*,summary.json}}",
            ranks_per_node=ranks,
            tasks=tuple(tasks),
            at_once=at_once,
            script=f"{stage}.sh",
        )
        for stage, tasks in stages.items()
        if tasks
    ]


def states(folder: Path) -> dict[str, str]:
    """Return how the tasks of a plan's arrays stand in SLURM's queue: RUNNING or QUEUED by the task's name."""
    found = {}
    for job in queued(folder):
        stage = job.name.rpartition("-")[2]
        tasks = _tasks(folder / "slurm" / f"{stage}.sh")
        if job.task is not None and job.task < len(tasks):
            found[tasks[job.task]] = RUNNING if job.state in RUNS else QUEUED
    return found


def _tasks(script: Path) -> list[str]:
    """Return the names of an array's tasks, from its script."""
    try:
        text = script.read_text(encoding="utf-8")
    except OSError:
        return []
    return [
        shlex.split(line, comments=True)[0] for line in text.partition("tasks=(\n")[2].partition("\n)")[0].splitlines()
    ]


def submit_all(todo: list[Job], cluster: ClusterConfig, folder: Path) -> int:
    """Submit the arrays, and say how to watch them; return the exit status."""
    if not todo:
        print(f"every run has ended; python -m ablation.report {folder}   shows what they say")
        return 0
    for job, number in zip(todo, submit(todo, cluster), strict=True):
        print(f"job array {number} is submitted, {len(job.tasks)} task(s): {job.path}")
        print(f"sbatch --array=TASK {job.path}   runs a task that failed again, alone")
    print(f"python -m ablation.status {folder}   shows how they stand")
    return 0
