"""Submit the preparation of a corpus to SLURM, in parts. It is called by `python -m data.prepare cluster=NAME jobs=N`.

    python -m launch.prepare folder=FOLDER jobs=N cluster=NAME data=NAME ...

Three jobs on nodes without GPUs, with scripts in FOLDER/slurm; each starts when the one before has succeeded. The first plans
the parts, the second is an array with a task per part, and the third writes the index. What they run is in `data/prepare.py`.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from kernels.common.commands import run_command
from kernels.common.options import split_options
from kernels.common.text import command_text
from launch.job_script import Job, python_of, quote
from launch.sbatch import check, cpu_nodes, refuse_queued, submit

_REQUIRED = {"folder": "folder=FOLDER, for the scripts", "jobs": "jobs=N, the parts that the corpus is tokenized in"}


def jobs_of(folder: Path, cluster: ClusterConfig, count: int, overrides: list[str], typed: str) -> list[Job]:
    """Return the jobs that prepare a corpus.

    Args:
        folder: of their scripts; its name without .jobs is that of the prepared folder.
        count: of parts.
        overrides: of `python -m data.prepare`.
        typed: its arguments, to quote in the scripts.
    """
    folder = folder.resolve()
    module = str(folder / "slurm" / "code" / "launch" / "run_module.py")
    command = " ".join(map(quote, [python_of(cluster), "-u", module, "data.prepare", *overrides]))

    def job(name: str, arguments: str, tasks: tuple[str, ...] = ()) -> Job:
        return Job(
            name=f"{folder.name.removesuffix('.jobs')}-{name}",
            folder=folder,
            command=f"{command} {arguments}".rstrip(),
            doctor="",
            typed=f"python -m data.prepare {typed}",
            saved="",
            tasks=tasks,
            after="afterok",
            script=f"{name}.sh",
        )

    parts = tuple(f"{number}/{count}" for number in range(count))
    return [job("plan", "part=plan"), job("parts", '"part=$task"', parts), job("index", "")]


def main(argv: list[str]) -> int:
    """Submit the jobs, and print how to watch them and how to run one again."""
    options, arguments = split_options(argv, {"folder": "", "jobs": 0}, {"jobs": 1}, _REQUIRED)
    cluster, overrides = read_group("cluster", ClusterConfig, arguments, "cluster")
    check(cluster, 1)
    cluster = cpu_nodes(cluster, [word.partition("=")[0].removeprefix("cluster.") for word in arguments])
    typed = command_text([word for word in argv if not word.startswith("folder=")])
    jobs = jobs_of(Path(options["folder"]), cluster, options["jobs"], overrides, typed)
    refuse_queued(jobs[0].folder)
    plan, parts, index = submit(jobs, cluster)
    scripts = {job.script: shlex.quote(str(job.path)) for job in jobs}
    print(f"job {plan} plans the parts: {scripts['plan.sh']}")
    print(f"job array {parts} tokenizes them, {options['jobs']} task(s): {scripts['parts.sh']}")
    print(f"job {index} writes the index, if all of them succeed: {scripts['index.sh']}")
    print(f"squeue --job {plan},{parts},{index}   their state")
    print("If a task fails, this runs that one again and then writes the index:")
    again = f"$(sbatch --parsable --array=TASK {scripts['parts.sh']})"
    print(f"sbatch --dependency=afterok:{again} --kill-on-invalid-dep=yes {scripts['index.sh']}")
    return 0


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
