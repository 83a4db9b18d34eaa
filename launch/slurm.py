"""Train on a cluster: `python -m launch.slurm cluster=NAME nodes=8 ffn=swiglu model=llama3_8b`.

    cluster=NAME       a file of conf/cluster
    cluster.KEY=VALUE  overrides one of its keys
    nodes=1            number of nodes
    ranks_per_node=N   default: one per GPU of a node
    KEY=VALUE          for train.py
    dry_run=true       only print the script

Writes a script for sbatch into the run's folder, with a copy of the code and the configuration, and submits it. A corpus that
is not tokenized yet is prepared before, by a job on one node. The job checks its nodes and leaves out those that cannot train.
It saves before its time limit and when it is preempted, and is requeued to resume the run until it is complete; one that saved
nothing new is not requeued.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from conf.help import key_lines
from conf.keys import choices
from conf.load import load, to_yaml
from conf.overrides import check_overrides
from conf.validate import validate
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, explain_os_errors
from kernels.common.options import split_options
from kernels.common.text import command_text
from launch.corpus import unprepared
from launch.job_script import Job, command_of, doctor_of, render
from launch.sbatch import check, refuse_queued, submit

_OPTIONS = {"nodes": 1, "ranks_per_node": 0, "dry_run": False}


def usage() -> str:
    """Return the text of `--help`: the module's docstring, the clusters, and the keys of one."""
    clusters = f"clusters: {', '.join(choices('cluster'))}; add your own as a file in conf/cluster"
    return "\n".join([__doc__ or "", clusters, "", "keys of a cluster", *key_lines(ClusterConfig, "cluster.")])


def main(argv: list[str]) -> int:
    options, arguments = split_options(argv, _OPTIONS, {"nodes": 1, "ranks_per_node": 1})
    cluster, overrides = read_group("cluster", ClusterConfig, arguments, "cluster")
    check_overrides(overrides, _OPTIONS)
    job, configuration = plan(cluster, options["nodes"], options["ranks_per_node"], overrides, command_text(argv))
    in_container = cluster.container != "none"
    if options["dry_run"]:
        print(render(job, cluster), end="", flush=True)
        try:
            unprepared([] if in_container else [overrides])
        except UserError as error:
            print(f"warning: without dry_run=true this is refused: {error}", file=sys.stderr)
        return 0
    refuse_queued(job.folder)
    # Paths inside a container may be others than here: there the job that prepares the corpus checks it.
    corpora = [overrides] if in_container else unprepared([overrides])
    with explain_os_errors("write the job to", job.folder):
        (job.folder / "slurm").mkdir(parents=True, exist_ok=True)
        with atomic_write(job.folder / "slurm" / "config.yaml") as file:
            file.write(configuration)
    *before, number = submit([job], cluster, corpora)
    if before:
        print(f"job {before[0]} prepares the corpus on one node, and the next one starts after it")
    print(f"job {number} is submitted: {job.path}")
    print(f"squeue --job {number}             its state")
    print(f"tail -F {shlex.quote(f'{job.folder}/slurm/{number}.log')}   its output")
    print(f"scancel {number}                  cancels it; the same command again resumes the run")
    return 0


def plan(cluster: ClusterConfig, nodes: int, ranks_per_node: int, overrides: list[str], typed: str) -> tuple[Job, str]:
    """Return the job that trains with `overrides`, and its configuration as YAML.

    Args:
        ranks_per_node: 0: one per GPU, or one on a node without GPUs.
        typed: the arguments of `python -m launch.slurm`, to quote in the script.

    Raises:
        UserError: the cluster cannot satisfy the request, or the configuration cannot train on that many ranks.
    """
    ranks_per_node = ranks_per_node or max(1, cluster.gpus_per_node)
    check(cluster, ranks_per_node)
    config = load(overrides)
    try:
        validate(config, nodes * ranks_per_node)
    except UserError as error:
        raise UserError(f"on {nodes} x {ranks_per_node} ranks: {error}") from error
    folder = (Path(config.runs) / str(config.run)).resolve()
    name = str(config.run)
    # The name is fixed, so that a default that changes later cannot make it another run.
    if not any(override.startswith("run=") for override in overrides):
        overrides = [*overrides, f"run={name}"]
    run_folder, code = shlex.quote(str(folder)), folder / "slurm" / "code"
    job = Job(
        name=name,
        folder=folder,
        command=command_of(cluster, nodes, ranks_per_node, code, overrides),
        doctor=doctor_of(cluster, code, ranks_per_node, overrides),
        typed=f"python -m launch.slurm {typed}",
        saved=f"{run_folder}/checkpoints/*",
        stopped=f'grep -qs \'"status": "stopped"\' {run_folder}/summary.json',
        ending=folder / "ending.json",
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        per_node=ranks_per_node if cluster.tasks == "gpu" else 1,
    )
    return job, to_yaml(config)


if __name__ == "__main__":
    run_command(main, usage, needs_arguments=True)
