"""Who this process is under each launcher, what is contradictory, and what is exported for torch.distributed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kernels.common.errors import UserError
from launch.ranks import Ranks, export, find_ranks, take_local_rank, without_launcher

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
LAUNCHERS = {"torchrun": TORCHRUN, "deepspeed": DEEPSPEED, "srun": SRUN, "mpirun": MPIRUN}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_launcher_is_understood(launcher):
    assert find_ranks(dict(LAUNCHERS[launcher])) == Ranks(5, 8, 1, 4)
    assert find_ranks(dict(LAUNCHERS[launcher]), local_rank=1) == Ranks(5, 8, 1, 4)


@pytest.mark.parametrize(
    ("package", "file", "variables"),
    [
        ("deepspeed", "launcher/launch.py", DEEPSPEED),
        ("torch", "distributed/elastic/agent/server/local_elastic_agent.py", TORCHRUN),
    ],
)
def test_the_launchers_that_are_installed_set_these_variables(package, file, variables):
    """Read from their sources, so that a release which renames one is noticed."""
    source = Path(find_spec(package).origin).parent / file
    text = source.read_text(encoding="utf-8")
    assert [name for name in variables if f'"{name}"' not in text] == []


def test_plain_python_is_rank_0_of_1():
    assert find_ranks({}) == Ranks(0, 1, 0, 1)
    assert find_ranks({"WORLD_SIZE": "2"}) == Ranks()
    assert find_ranks({}, local_rank=0) == Ranks()


def test_variables_set_by_hand_are_one_process_a_node():
    assert find_ranks({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}) == Ranks(1, 2, 0, 1)


def test_a_script_of_sbatch_without_srun_is_one_process():
    batch_script = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert find_ranks(batch_script) == Ranks()


@pytest.mark.parametrize(
    ("written", "node", "here"),
    [
        ("4", "0", 4),
        ("4(x2)", "1", 4),
        ("4(x2),3", "", 4),
        ("4(x2),3", "2", 3),
        ("2,1(x3)", "0", 2),
        ("2,1(x3)", "3", 1),
    ],
)
def test_slurms_way_to_write_tasks_per_node(written, node, here):
    found = find_ranks(SRUN | {"SLURM_STEP_TASKS_PER_NODE": written, "SLURM_NODEID": node})
    assert found.local_world_size == here


# The shell that `salloc -n4` opens at sites with use_interactive_step: a step of one task in an allocation of four.
INTERACTIVE = SRUN | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}


def test_an_interactive_step_is_one_process_where_any_launcher_works():
    assert find_ranks(INTERACTIVE) == Ranks()
    assert find_ranks(INTERACTIVE | DEEPSPEED | {"RANK": "3"}) == Ranks(3, 8, 1, 4)
    assert find_ranks(INTERACTIVE | MPIRUN) == Ranks(5, 8, 1, 4)
    one = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
    assert find_ranks(INTERACTIVE | one) == Ranks()
    older = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NUM_TASKS"}
    assert find_ranks(older) == Ranks(5, 8, 1, 4)


def test_torchrun_may_number_the_nodes_in_another_order_than_srun():
    assert find_ranks(SRUN | TORCHRUN | {"RANK": "3", "TORCHELASTIC_RUN_ID": "1"}).rank == 3


@pytest.mark.parametrize(
    "name", ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_NODES", "MASTER_ADDR", "MASTER_PORT"]
)
def test_an_empty_variable_is_one_that_is_not_set(name):
    environment = {name: ""}
    export(find_ranks(environment), environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", "29500")


def test_a_child_that_is_no_rank_inherits_no_launcher():
    own = {"PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/slurm.conf", "OMP_NUM_THREADS": "1"}
    inherited = SRUN | TORCHRUN | DEEPSPEED | MPIRUN | {"MASTER_ADDR": "gpu07", "TORCHELASTIC_RUN_ID": "1"} | own
    assert without_launcher(inherited) == own


def test_a_launcher_inside_slurm_counts_before_slurm():
    assert find_ranks(SRUN | TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}) == Ranks(5, 8, 1, 4)
    assert find_ranks(SRUN | TORCHRUN) == Ranks(5, 8, 1, 4)  # a launcher of one process, in each task


@pytest.mark.parametrize(
    ("environment", "local_rank", "sentence"),
    [
        (TORCHRUN | {"RANK": "8"}, None, "RANK=8 does not fit WORLD_SIZE=8"),
        (TORCHRUN | {"RANK": "-1"}, None, "RANK=-1 does not fit WORLD_SIZE=8"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, None, "RANK=5 does not fit WORLD_SIZE=0"),
        (
            TORCHRUN | {"RANK": "one"},
            None,
            "torchrun set one of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE to something other than a number",
        ),
        (DEEPSPEED | {"LOCAL_SIZE": ""}, None, "deepspeed set one of"),
        (SRUN | {"SLURM_PROCID": ""}, None, "srun set one of SLURM_PROCID, SLURM_STEP_NUM_TASKS"),
        (MPIRUN | {"OMPI_COMM_WORLD_RANK": "9"}, None, "OMPI_COMM_WORLD_RANK=9 does not fit OMPI_COMM_WORLD_SIZE=8"),
        (SRUN | TORCHRUN | {"RANK": "3"}, None, "RANK=3 contradicts SLURM_PROCID=5: unset RANK and WORLD_SIZE"),
        (
            SRUN | dict.fromkeys(DEEPSPEED, "0") | {"WORLD_SIZE": "1"},
            None,
            "WORLD_SIZE=1 contradicts SLURM_STEP_NUM_TASKS=8",
        ),
        (TORCHRUN, 2, "--local_rank=2 contradicts LOCAL_RANK=1 of the environment"),
        (SRUN, 0, "--local_rank=0 contradicts SLURM_LOCALID=1"),
        ({}, 1, "--local_rank=1 was given, but no launcher set RANK and WORLD_SIZE"),
    ],
)
def test_what_contradicts_itself_is_refused(environment, local_rank, sentence):
    with pytest.raises(UserError) as caught:
        find_ranks(dict(environment), local_rank)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "rest", "local_rank"),
    [
        ([], [], None),
        (["ffn=relu", "steps=3"], ["ffn=relu", "steps=3"], None),
        (["--local_rank=3", "ffn=relu"], ["ffn=relu"], 3),
        (["--local-rank=0", "ffn=relu"], ["ffn=relu"], 0),
        (["ffn=relu", "--local_rank=12"], ["ffn=relu"], 12),
        (["run=--local_rank=1"], ["run=--local_rank=1"], None),
        (["--local_ranks=1"], ["--local_ranks=1"], None),
    ],
)
def test_the_local_rank_is_taken_off_in_both_spellings(argv, rest, local_rank):
    assert take_local_rank(argv) == (rest, local_rank)


@pytest.mark.parametrize("word", ["--local_rank=", "--local-rank=x", "--local_rank=-1"])
def test_a_local_rank_that_is_no_number_is_refused(word):
    with pytest.raises(UserError, match=f"{word}: the launcher's local rank must be a number"):
        take_local_rank([word])


def test_what_torch_distributed_reads_is_exported():
    environment: dict[str, str] = {}
    export(Ranks(5, 8, 1, 4), environment)
    assert environment == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    assert find_ranks(environment) == Ranks(5, 8, 1, 4)


def test_what_the_launcher_has_chosen_stays():
    environment = TORCHRUN | {"MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
    export(find_ranks(environment), environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node7", "1234")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_child_processes_find_the_same_ranks(launcher):
    environment = dict(LAUNCHERS[launcher])
    ranks = find_ranks(environment)
    export(ranks, environment)
    assert find_ranks(environment) == ranks


def test_jobs_of_slurm_have_ports_of_their_own():
    ports = set()
    for job, step in (("139999", "0"), ("123457", "0"), ("9500", "0"), ("9500", "1"), ("9500", "4294967290")):
        environment = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
        export(Ranks(), environment)
        ports.add(int(environment["MASTER_PORT"]))
    assert len(ports) == 5
    assert all(1024 < port < 32768 for port in ports)  # from there on a connection of any program may have it


def put_scontrol(folder, monkeypatch, script: str) -> None:
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


NODES = SRUN | {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_NUM_NODES": "2"}


def test_the_first_node_of_the_step_is_the_master(tmp_path, monkeypatch):
    put_scontrol(tmp_path, monkeypatch, '[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"')
    environment = dict(NODES)
    export(find_ranks(environment), environment)
    assert environment["MASTER_ADDR"] == "gpu07"


def test_one_node_needs_no_scontrol(tmp_path, monkeypatch):
    put_scontrol(tmp_path, monkeypatch, "exit 1")
    environment = NODES | {"SLURM_STEP_NODELIST": "gpu07", "SLURM_STEP_NUM_NODES": "1"}
    export(find_ranks(environment), environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("script", ["exit 1", "exit 0"])
def test_nodes_that_scontrol_does_not_tell_are_refused_with_what_to_do(tmp_path, monkeypatch, script):
    put_scontrol(tmp_path, monkeypatch, script)
    with pytest.raises(UserError, match=r"gpu\[07-08\]: set MASTER_ADDR"):
        export(Ranks(), dict(NODES))
    environment = NODES | {"MASTER_ADDR": "gpu07"}
    export(Ranks(), environment)
    assert environment["MASTER_ADDR"] == "gpu07"


def test_leaving_runs_nothing_more_and_loses_no_output():
    code = "import atexit, os; from launch.ranks import leave; atexit.register(os._exit, 134); print('told', end=''); leave(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "told", "")
