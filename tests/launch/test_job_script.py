"""What the script of a job does on its nodes, under a SLURM of shell scripts that records what it is asked."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from conf.cluster_schema import ClusterConfig
from conf.load import read_group
from launch.job_script import Job, render

# The commands of SLURM. `srun` runs what it is given, and `sleep` passes no time.
_SRUN = 'while [[ $1 == -* ]]; do shift; done; exec "$@"'
_SCONTROL = 'case "$*" in "show hostnames"*) echo gpu7;; "-o show job"*) echo "$state";; esac'
_VARIABLES = {"SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "gpu7", "SLURM_JOB_ID": "36"}
_TASK = {"SLURM_ARRAY_JOB_ID": "36", "SLURM_ARRAY_TASK_ID": "0"}  # the last task of an array has its number


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a script ended, what it printed, and the commands of SLURM that change something."""

    status: int
    said: str
    asked: list[str]


class FakeSlurm:
    """Programs in a folder that stand in for SLURM's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slurm = folder / "run" / "slurm"
        self.slurm.mkdir(parents=True)
        (folder / "bin").mkdir()
        self.program("srun", _SRUN)
        self.program("scontrol", _SCONTROL)
        self.program("sbatch", "")
        self.program("sleep", "")
        self.program("getent", "")

    def program(self, name: str, code: str) -> None:
        """Write a program; what changes jobs is recorded before."""
        record = (
            f'case "{name} $*" in *" show "*|srun*|sleep*|getent*) ;; *) echo "{name} $*" >> {self.folder}/asked;; esac'
        )
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{record}\n{code}\n")
        path.chmod(0o755)

    def run(self, command: str, doctor: str = "true", tasks: tuple[str, ...] = (), **changes: str) -> Ended:
        """Run the script of a job that trains by `command`; `changes` are variables of the environment."""
        job = Job("j", self.folder / "run", command, doctor, "typed", "x", tasks=tasks, per_node=2)
        (self.folder / "asked").unlink(missing_ok=True)
        path = f"{self.folder}/bin{os.pathsep}{os.environ['PATH']}"
        variables = {"state": "JobState=RUNNING ExcNodeList=(null)", "PATH": path} | _VARIABLES | changes
        if tasks:
            variables = _TASK | variables
        cluster, _ = read_group("cluster", ClusterConfig, ["cluster=cpu"], "cluster")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | variables
        done = subprocess.run(
            ["bash"], input=render(job, cluster), env=environment, capture_output=True, text=True, cwd=self.folder
        )
        asked = self.folder / "asked"
        said = (done.stdout + done.stderr).replace("task 0 and on: gpu7\n", "")
        return Ended(done.returncode, said, asked.read_text().splitlines() if asked.exists() else [])


@pytest.fixture
def slurm(tmp_path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def test_a_task_of_an_array_is_requeued_alone(slurm):
    """scontrol takes the number of an array, which is that of its last task too, for all of its tasks."""
    all_tasks = "ArrayTaskId=0 JobState=COMPLETING\\nArrayTaskId=1 JobState=RUNNING"
    of_one = '*"show job 36_0") echo "$state";; *"show job"*) printf "%b\\n" "$all";;'
    slurm.program("scontrol", f'case "$*" in "show hostnames"*) echo gpu7;; {of_one} esac')
    stopped = {"command": "bash -c 'exit 143'", "tasks": ("a", "b"), "all": all_tasks}
    ended = slurm.run(**stopped)
    assert ended.asked == ["scontrol requeue 36_0"]
    assert ended.said == "job 36_0 resumes from its last checkpoint\n"
    cancelled = slurm.run(state="ArrayTaskId=0 JobState=COMPLETING", **stopped)  # while the other task runs
    assert (cancelled.status, cancelled.asked) == (1, [])
    slurm.program("scontrol", f"{_SCONTROL}\n[[ $1 != requeue ]]")
    script = slurm.slurm / "job.sh"
    assert slurm.run(**stopped).asked == [
        "scontrol requeue 36_0",
        f"sbatch --dependency=afterany:36_0 --array=0 {script}",
    ]


def test_a_single_job_is_requeued_by_its_number(slurm):
    assert slurm.run("bash -c 'exit 143'").asked == ["scontrol requeue 36"]
    assert slurm.run("true").asked == []
