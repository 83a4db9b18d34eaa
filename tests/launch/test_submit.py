"""Jobs are submitted all or not at all, and only where SLURM says that none of them is queued."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest

from ablation.slurm import task_states
from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from kernels.common.errors import TryAgain, UserError
from launch import sbatch
from launch.job_script import Job, render
from launch.sbatch import _sbatch, cpu_nodes, prepare_job, queued, refuse_queued, submit
from tests.launch.test_sbatch import options

GREETING = "---- Welcome to the cluster\\n\\n"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that writes a program of SLURM, the only ones that are found."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def write(name: str, code: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{code}\n")
        path.chmod(0o755)

    return write


@pytest.fixture
def jobs(tmp_path, monkeypatch) -> list[Job]:
    """Two jobs, the second of which waits for the first."""
    monkeypatch.setattr(sbatch, "_keep_code", lambda _: None)
    first = Job("first", tmp_path / "run", "true", "true", "typed", "x", script="first.sh")
    return [first, dataclasses.replace(first, name="second", script="second.sh")]


CLUSTER = read_group("cluster", ClusterConfig, ["cluster=h100", "cluster.partition=gpus"], "cluster")[0]


def test_only_a_missing_squeue_means_that_nothing_is_queued(program, tmp_path):
    assert queued(tmp_path) == []
    program("squeue", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(
        TryAgain, match=r"^squeue does not say whether jobs of .*: slurm_load_jobs error: Unable to contact"
    ):
        refuse_queued(tmp_path)
    assert task_states(tmp_path) == {}  # the folders still tell of the runs
    for answer in ("", "echo squeue: fatal: Could not establish a configuration source >&2; exit 1"):  # of no cluster
        program("squeue", answer)
        refuse_queued(tmp_path)


@pytest.mark.parametrize("printed", ["4701\\n", "4701;cluster\\n", f"{GREETING}4701\\n"])
def test_the_number_of_a_job_is_read_whatever_is_printed_before_it(program, printed):
    program("sbatch", f"printf -- '{printed}'")
    assert _sbatch(["job.sh"]) == "4701"


@pytest.mark.parametrize("printed", ["", GREETING])
def test_no_number_is_not_a_number(program, printed):
    program("sbatch", f"printf -- '{printed}'")
    with pytest.raises(
        UserError, match=r"^sbatch printed no job number but '.*': whether it took job\.sh is shown by  squeue"
    ):
        _sbatch(["job.sh"])


@pytest.mark.parametrize("cancels", [True, False])
def test_a_job_is_taken_back_when_the_next_one_is_rejected(program, jobs, tmp_path, cancels):
    reject = "echo sbatch: error: Batch job submission failed: Invalid job array specification >&2; exit 1"
    program("sbatch", f'case "$*" in *second.sh) {reject};; *) echo 4701;; esac')
    program("scancel", f"echo $* > {tmp_path}/cancelled; exit {0 if cancels else 1}")
    end = (
        "what was submitted before it is cancelled: 4701$"
        if cancels
        else "before the next attempt run  scancel 4701  for"
    )
    with pytest.raises(UserError, match=rf"^SLURM rejected the job: .*Invalid job array specification.*; {end}"):
        submit(jobs, CLUSTER)
    assert (tmp_path / "cancelled").read_text() == "4701\n"
    (tmp_path / "cancelled").unlink()
    program("sbatch", reject)
    with pytest.raises(UserError, match=r"in \S+first\.sh$"):
        submit(jobs, CLUSTER)
    assert not (tmp_path / "cancelled").exists()


def test_what_is_asked_of_the_nodes_with_gpus_is_not_asked_of_others(jobs):
    of = dataclasses.replace(CLUSTER, constraint="h100", qos="gpuq", memory="1500G", sbatch=["--reservation=gpus"])
    found = options(render(*prepare_job(jobs[0], dataclasses.replace(of, cpu_partition="cpus"), [])))
    assert {"--constraint", "--qos", "--reservation", "--cpus-per-task"}.isdisjoint(found)
    assert (found["--partition"], found["--mem"]) == ("cpus", "0")
    assert "--exclusive" in found  # as nobody knows its cores
    text = render(*prepare_job(jobs[0], dataclasses.replace(of, cpu_partition="cpus"), []))
    assert "srun --nodes=1 --ntasks=1 --cpus-per-task=$SLURM_CPUS_ON_NODE " in text
    assert "export OMP_NUM_THREADS=$SLURM_CPUS_ON_NODE\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    same = options(render(*prepare_job(jobs[0], of, [])))
    assert (same["--constraint"], same["--qos"], same["--partition"]) == ("h100", "gpuq", "gpus")
    typed = cpu_nodes(dataclasses.replace(of, cpu_partition="cpus"), ["qos", "cpus_per_node"])
    assert (typed.qos, typed.cpus_per_node, typed.constraint, typed.sbatch) == ("gpuq", 96, None, [])
