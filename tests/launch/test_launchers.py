"""A rank sees that a launcher above it has ended, and takes nothing else for a launcher."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from kernels.common.errors import TryAgain, UserError
from launch import launchers
from launch.launchers import Launchers, refuse_taken_port, refuse_unknown_master
from launch.ranks import Ranks

# Each process starts the next one and waits for it; the last answers a question a line.
RANK = """
import sys
from launch.launchers import Launchers
launchers = Launchers()
print(*launchers.pids, flush=True)
for _ in sys.stdin:
    print(launchers.gone(), flush=True)
"""
PARENT = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"


@pytest.fixture
def chain(tmp_path):
    """Return a function that starts a line of processes, named as asked, above a rank; gives the rank's pipe and launchers."""
    started = []

    def start(*names: str) -> tuple[subprocess.Popen, list[int]]:
        words = [sys.executable, "-c", RANK]
        for name in reversed(names):
            (tmp_path / name).write_text(PARENT)
            words = [sys.executable, str(tmp_path / name), *words]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append((process, psutil.Process(process.pid)))
        return process, [int(pid) for pid in process.stdout.readline().split()]

    yield start
    for process, top in started:
        for child in top.children(recursive=True) if top.is_running() else ():
            child.kill()
        process.kill()
        process.communicate()


def gone(process: subprocess.Popen) -> bool:
    process.stdin.write("?\n")
    process.stdin.flush()
    return {"True\n": True, "False\n": False}[process.stdout.readline()]


@pytest.mark.parametrize(
    ("variables", "parent", "orphan"),
    [
        ({"TORCHELASTIC_RUN_ID": "a"}, 1, True),
        ({"CROSS_RANK": "0", "LOCAL_SIZE": "2"}, 1, True),
        ({"TORCHELASTIC_RUN_ID": "a"}, 2, False),  # started by a launcher of another name
        ({"RANK": "0"}, 1, False),  # by a hand, with nohup
    ],
)
def test_a_rank_whose_launcher_ended_before_it_looked(monkeypatch, variables, parent, orphan):
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(psutil.Process, "parents", lambda _: [])
    monkeypatch.setattr(os, "getppid", lambda: parent)
    assert Launchers().gone() is orphan


def test_without_a_launcher_there_is_nothing_to_watch(chain):
    assert Launchers().gone() is False
    _, pids = chain("wrapper")
    assert pids == []


def test_a_wrapper_ends_the_line(chain):
    _, pids = chain("deepspeed", "wrapper", "torchrun")
    assert len(pids) == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_the_end_of_any_launcher_is_seen(chain, victim):
    process, pids = chain("deepspeed", "torchrun.py")
    assert len(pids) == 2
    assert pids[1] == process.pid
    assert not gone(process)
    launcher = psutil.Process(pids[victim])
    launcher.kill()
    if victim == 1:  # even before its parent has asked for its status
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    else:
        launcher.wait()
    assert gone(process)


def test_ranks_of_deepspeed_on_one_node_have_a_port_of_their_own(monkeypatch):
    launchers = Launchers()
    monkeypatch.setattr(launchers, "_deepspeed", 4321)

    def chosen(ranks: Ranks, port: str) -> str:
        environment = {"MASTER_PORT": port}
        launchers.choose_port(ranks, environment)
        return environment["MASTER_PORT"]

    first, second = (chosen(Ranks(rank, 2, rank, 2), "29500") for rank in range(2))
    assert first == second != "29500"
    assert chosen(Ranks(0, 2, 0, 2), "29777") == "29777"  # --master_port
    assert chosen(Ranks(0, 4, 0, 2), "29500") == "29500"  # the ranks of other nodes cannot know it
    monkeypatch.setattr(launchers, "_deepspeed", None)
    assert chosen(Ranks(0, 2, 0, 2), "29500") == "29500"


def test_deepspeeds_launcher_is_found_above_a_rank(tmp_path):
    code = "from launch.launchers import Launchers; import os; print(Launchers()._deepspeed == os.getppid())"
    (tmp_path / "deepspeed.launcher.launch").write_text(PARENT)
    words = [sys.executable, tmp_path / "deepspeed.launcher.launch", sys.executable, "-c", code]
    assert subprocess.run(words, capture_output=True, text=True).stdout == "True\n"


def test_a_node_that_cannot_resolve_the_name_of_rank_0_says_so(monkeypatch):
    def resolve(name: str, _port: None) -> list:
        assert name == "node1"
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(launchers, "socket", SimpleNamespace(gethostname=lambda: "node2", getaddrinfo=resolve))
    two, alone = Ranks(1, 2, 0, 1), Ranks()
    said = r"^node2 finds no address for node1, the node of rank 0 \(Name or service not known\): add it to DNS"
    with pytest.raises(TryAgain, match=said):
        refuse_unknown_master(two, {"MASTER_ADDR": "node1"})
    refuse_unknown_master(alone, {"MASTER_ADDR": "node1"})
    monkeypatch.undo()
    refuse_unknown_master(two, {"MASTER_ADDR": "127.0.0.1"})


def test_a_taken_port_is_a_sentence_that_names_a_free_one():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        environment = {"MASTER_PORT": str(port)}
        with pytest.raises(TryAgain, match=rf"port {port} is taken \(Address already in use\)") as caught:
            refuse_taken_port(Ranks(0, 2, 0, 2), environment)
        free = int(re.search(r"deepspeed --master_port=(\d+)", str(caught.value))[1])
        refuse_taken_port(Ranks(1, 2, 1, 2), environment)
        refuse_taken_port(Ranks(), environment)
        refuse_taken_port(Ranks(0, 2, 0, 2), environment | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    refuse_taken_port(Ranks(0, 2, 0, 2), {"MASTER_PORT": str(free)})
    with pytest.raises(UserError, match="MASTER_PORT=x must be a port"):
        refuse_taken_port(Ranks(0, 2, 0, 2), {"MASTER_PORT": "x"})
