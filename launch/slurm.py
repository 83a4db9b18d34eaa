"""Train on a cluster: `python -m launch.slurm cluster=NAME nodes=8 ffn=swiglu model=llama3_8b`.

    cluster=NAME            a machine of conf/cluster      nodes=1              how many
    cluster.KEY=VALUE       another value of it            ranks_per_node=N     one for each GPU of a node if not said
    KEY=VALUE               for train.py                   dry_run=true         print the script and do no more

Writes a script for sbatch into the run's folder, with a copy of the code and the configuration, and submits it. The job saves
before its time is up or when it is preempted, and goes on by itself as the same run until its tokens are done; one that saves
nothing new is not started again.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from conf.keys import choices
from conf.load import load, read_group, to_yaml
from conf.schema import ClusterConfig
from conf.validate import validate
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, say_why
from kernels.common.options import split_options
from launch.sbatch import Job, check, command_of, doctor_of, refuse_queued, render, submit

_OPTIONS = {"nodes": 1, "ranks_per_node": 0, "dry_run": False}


def usage() -> str:
    """Return the text of `--help`: the module's docstring and the clusters."""
    return f"{__doc__}\nclusters: {', '.join(choices('cluster'))}; add your own as a file in conf/cluster"


def main(argv: list[str]) -> int:
    options, arguments = split_options(argv, _OPTIONS, {"nodes": 1, "ranks_per_node": 1})
    cluster, overrides = read_group("cluster", ClusterConfig, arguments, "cluster")
    job, configuration = plan(cluster, options["nodes"], options["ranks_per_node"], overrides, shlex.join(argv))
    if options["dry_run"]:
        print(render(job, cluster), end="")
        return 0
    refuse_queued(job.folder)
    with say_why("write the job to", job.folder):
        (job.folder / "slurm").mkdir(parents=True, exist_ok=True)
        with atomic_write(job.folder / "slurm" / "config.yaml") as file:
            file.write(configuration)
    [number] = submit([job], cluster)
    print(f"job {number} is submitted: {job.path}")
    print(f"squeue --job {number}             whether it waits or runs")
    print(f"tail -F {job.folder}/slurm/{number}.log   what it says")
    print(f"scancel {number}                  ends it; the same command again goes on where it saved last")
    return 0


def plan(cluster: ClusterConfig, nodes: int, ranks_per_node: int, words: list[str], typed: str) -> tuple[Job, str]:
    """Return the job that trains with `words`, and its configuration as YAML.

    Args:
        ranks_per_node: 0: one for each GPU, or one on a node without.
        typed: what was typed behind `python -m launch.slurm`.

    Raises:
        UserError: the cluster does not have what is asked for, or the configuration cannot train on that many ranks.
    """
    ranks_per_node = ranks_per_node or max(1, cluster.gpus_per_node)
    check(cluster, ranks_per_node)
    config = load(words)
    try:
        validate(config, nodes * ranks_per_node)
    except UserError as error:
        raise UserError(f"on {nodes} x {ranks_per_node} ranks: {error}") from error
    folder = (Path(config.runs) / str(config.run)).resolve()
    name = str(config.run)
    # By its name, so that a default that changes later does not make another run of it.
    words = [*words, *(() if any(word.startswith("run=") for word in words) else (f"run={name}",))]
    inside, code = shlex.quote(str(folder)), folder / "slurm" / "code"
    job = Job(
        name=name,
        folder=folder,
        command=command_of(cluster, nodes, ranks_per_node, code, words),
        doctor=doctor_of(cluster, code, words),
        typed=f"python -m launch.slurm {typed}",
        saved=f"{inside}/checkpoints/*",
        stopped=f'grep -qs \'"status": "stopped"\' {inside}/summary.json',
        hopeless=f'grep -qs \'"event": "diverged"\' {inside}/metrics.jsonl',
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        per_node=ranks_per_node if cluster.tasks == "gpu" else 1,
    )
    return job, to_yaml(config)


if __name__ == "__main__":
    run_command(main, usage, needs_arguments=True)
