"""A rank sees that a launcher above it has ended, and takes nothing else for a launcher."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from launch.launchers import Launchers

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


def test_without_a_launcher_there_is_nothing_to_watch(chain):
    assert Launchers().gone() is False
    _, pids = chain("wrapper")
    assert pids == []


def test_a_wrapper_ends_the_line(chain):
    _, pids = chain("deepspeed", "wrapper", "torchrun")
    assert len(pids) == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_the_end_of_any_launcher_is_seen(chain, victim):
    process, pids = chain("deepspeed", "torchrun")
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
