"""What the script of a job does on its nodes, under a SLURM of shell scripts that records what it is asked."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from conf.cluster_schema import ClusterConfig
from conf.group import read_group
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


def failing(*nodes: str) -> str:
    """Return the command of a check that finds nodes at fault."""
    return f"bash -c \"printf '%s\\n' {' '.join(nodes)} >> $failed; exit 1\""


def test_a_job_trains_only_on_nodes_that_pass(slurm):
    assert slurm.run("echo trained") == Ended(0, "trained\n", [])
    failed = slurm.run("echo trained", "false")  # not the node's fault
    assert (failed.status, failed.asked) == (1, [])
    assert failed.said == "job 36 cannot train here, for the reasons in red: it is not queued again\n"
    for bad, excluded in (("gpu7", "gpu7"), ("gpu3", "gpu3,gpu7")):
        ended = slurm.run("echo trained", failing(bad))
        assert (ended.status, ended.said) == (0, f"job 36 is queued again without {excluded}\n")
        # The number remains that other jobs wait for; nodes can be excluded only while the job is queued.
        assert ended.asked == ["scontrol requeue 36", f"scontrol update JobId=36 ExcNodeList={excluded}"]


def test_every_task_of_an_array_may_find_the_same_node_at_fault(slurm):
    for _ in range(18):
        ended = slurm.run("echo trained", failing("gpu7"), tasks=("a", "b"))
        assert ended.said == "job 36_0 is queued again without gpu7\n"
    many = [f"gpu{number}" for number in range(17)]
    assert "is queued again" in slurm.run("echo trained", failing(*many[:16])).said
    assert "it is not queued again" in slurm.run("echo trained", failing(many[16])).said


def test_nodes_that_a_job_was_submitted_without_stay_excluded(slurm):
    hosts = 'echo "$3" | sed "s/\\[7-8\\]/7\\nn8/"'
    slurm.program("scontrol", f'if [ "$1" = show ]; then {hosts}; else {_SCONTROL}; fi')
    state = "JobState=RUNNING ExcNodeList=n[7-8] NodeList=gpu7"
    ended = slurm.run("echo trained", failing("gpu7"), state=state)
    assert ended.asked[-1] == "scontrol update JobId=36 ExcNodeList=gpu7,n7,n8"


@pytest.mark.parametrize(
    ("passed", "excluded"), [("gpu1 gpu2", "gpu3"), ("gpu1", ""), ("", ""), ("gpu1 gpu2 gpu3", "")]
)
def test_a_node_that_could_not_check_itself_is_left_out_where_most_could(slurm, passed, excluded):
    """A doctor that cannot start, or crashes, names no node. What is wrong on most nodes is no fault of theirs."""
    slurm.program(
        "scontrol", f'if [ "$2" = hostnames ]; then printf "gpu%d\\n" 1 2 3; fi; {_SCONTROL}'.replace("echo gpu7", ":")
    )
    check = f'bash -c "for n in {passed}; do touch $failed.ok.\\$n; done; exit 1"'
    ended = slurm.run("echo trained", check, SLURM_NNODES="3")
    assert ended.asked[1:] == ([f"scontrol update JobId=36 ExcNodeList={excluded}"] if excluded else [])
    assert ended.status == (0 if excluded else 1)
    kept = sorted(path.name for path in slurm.slurm.iterdir())
    assert (kept == ["excluded"]) == bool(excluded), kept


def test_a_task_is_queued_again_without_a_node_and_its_siblings_run_on(slurm):
    ended = slurm.run("echo trained", failing("gpu7"), tasks=("a", "b"))
    assert ended.asked == ["scontrol requeue 36_0", "scontrol update JobId=36_0 ExcNodeList=gpu7"]


@pytest.mark.parametrize("refused", ["requeue", "update"])
def test_where_slurm_does_not_requeue_another_job_leaves_the_node_out(slurm, refused):
    slurm.program("scontrol", f"{_SCONTROL}\n[[ $1 != {refused} ]]")
    slurm.program("scancel", "")
    *before, last = slurm.run("echo trained", failing("gpu7"), tasks=("a", "b")).asked
    assert last == f"sbatch --exclude=gpu7 --dependency=afterany:36_0 --array=0 {slurm.slurm}/job.sh"
    assert before[-1].split()[:2] == {"requeue": ["scontrol", "requeue"], "update": ["scancel", "36_0"]}[refused]


def test_the_signal_by_which_slurm_requeues_does_not_end_the_script_before_the_node_is_excluded(slurm):
    slurm.program("scontrol", f"{_SCONTROL}\n[[ $1 != requeue ]] || kill -TERM $PPID")
    assert len(slurm.run("echo trained", failing("gpu7")).asked) == 2


def test_a_job_that_is_requeued_takes_another_port_and_none_of_a_connection(slurm):
    ports = [slurm.run("bash -c 'echo $MASTER_PORT'", SLURM_JOB_ID="11999", **count).said.strip()
             for count in ({}, {"SLURM_RESTART_COUNT": "1"})]  # fmt: skip
    assert ports == ["31999", "20100"]


def test_a_controller_that_does_not_answer_cancels_no_job(slurm):
    count = slurm.folder / "count"
    seldom = (
        f'[[ $* == "-o show job"* ]] && {{ echo >> {count}; [ "$(wc -l < {count})" -gt 3 ] || exit 1; }}\n{_SCONTROL}'
    )
    slurm.program("scontrol", seldom)
    assert slurm.run("bash -c 'exit 143'").asked == ["scontrol requeue 36"]
    count.unlink()
    assert slurm.run("bash -c 'exit 143'", state="JobState=COMPLETING").asked == []  # what it is during scancel
    slurm.program("scontrol", f'[ "$2" != show ] || exit 1\n{_SCONTROL}')
    assert slurm.run("bash -c 'exit 143'").asked == ["scontrol requeue 36"]


def test_tries_are_counted_across_the_numbers_of_a_job(slurm):
    slurm.program("scontrol", f"{_SCONTROL}\n[[ $1 != requeue ]]")
    asked = [slurm.run("bash -c 'exit 4'", SLURM_JOB_ID=str(number)).asked for number in range(40, 45)]
    again = [f"sbatch --dependency=afterany:{number} {slurm.slurm}/job.sh" for number in range(40, 45)]
    assert [words[-1:] for words in asked] == [again[:1], again[1:2], again[2:3], [], again[4:]]  # by hand, once more
    (task,) = slurm.run("bash -c 'exit 4'", tasks=("a", "b"), SLURM_ARRAY_TASK_ID="1").asked[-1:]
    assert "--array=1" in task  # whose tries are its own


@pytest.mark.parametrize("then", ["", "; exit 1", "; echo gpu7 >> $failed; exit 1"])
@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_signal_during_the_check_of_the_nodes_requeues_the_job(slurm, signal, then):
    ended = slurm.run("echo trained", f"bash -c 'kill -{signal} $PPID{then}'".replace("$failed", "'$failed'"))
    assert ended.asked == ["scontrol requeue 36"]
    assert ended.said == "job 36 resumes from its last checkpoint\n"


def test_a_signal_reaches_the_ranks(slurm):
    ended = slurm.run("""bash -c 'trap "echo told; exit" USR1; kill -USR1 $PPID; for _ in {1..1000000}; do :; done'""")
    assert (ended.status, ended.said, ended.asked) == (0, "told\n", [])
