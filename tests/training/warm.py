"""Processes of Python that begin with torch and DeepSpeed imported: forks of one interpreter that has done nothing else.

Importing them takes seconds of a core, more than most tests need for the rest. A forked process has its own arguments,
environment, folder, files and session; nothing of this project is imported before the fork.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

IMPORTED = (
    "torch", "torch._dynamo", "torch.profiler", "deepspeed", "deepspeed.ops", "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3", "filelock", "hydra._internal.hydra", "hydra.core.config_store",
    "numpy.polynomial", "omegaconf", "psutil", "rich.console", "safetensors.torch", "sentencepiece", "sympy.tensor.tensor",
    "tokenizers",
)  # fmt: skip
# What decides how the modules are imported; a process for which one of these differs is a new interpreter.
USUAL = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
         "DS_ACCELERATOR": "cpu"}  # fmt: skip


class Process:
    """A forked process, with those parts of `subprocess.Popen` that tests use; its streams are unbuffered pipes."""

    def __init__(self, words: list[str], env: dict[str, str], cwd: Path, stdin: bool = False, session: bool = False):
        ours, theirs = [], []
        for is_input in (True, False, False):
            read, write = os.pipe() if stdin or not is_input else (os.open(os.devnull, os.O_RDONLY), None)
            theirs.append(read if is_input else write)
            ours.append(write if is_input else read)
        self._report, report = socket.socketpair()
        request = {"words": words, "env": env, "cwd": str(cwd), "session": session}
        socket.send_fds(_server(env), [json.dumps(request).encode()], [*theirs, report.fileno()])
        for number in theirs:
            os.close(number)
        report.close()
        self.stdin = os.fdopen(ours[0], "wb", 0) if stdin else None
        self.stdout, self.stderr = (os.fdopen(number, "rb", 0) for number in ours[1:])
        self.pid, self.returncode = int(self._report.recv(16)), None

    def poll(self) -> int | None:
        """Return the status, or None of a process that runs."""
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._report.recv(16)))
            self._report.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the status: the negative number of a signal that ended the process."""
        if self.returncode is None and not select.select([self._report], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def communicate(self, timeout: float) -> tuple[bytes, bytes]:
        """Read both streams to their ends, wait, and return what they held."""
        read, until = {self.stdout: b"", self.stderr: b""}, time.monotonic() + timeout
        left = list(read)
        while left:
            ready, _, _ = select.select(left, [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self.kill()
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            for stream in ready:
                part = stream.read(1 << 16)
                read[stream] += part
                if not part:
                    left.remove(stream)
                    stream.close()
        self.wait(max(1.0, until - time.monotonic()))
        return tuple(read.values())

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)


_servers: list[socket.socket] = []


def _server(env: dict[str, str]) -> socket.socket:
    """Return the connection to the interpreter that forks, which starts with its first process."""
    if not _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, __file__, str(theirs.fileno())]
        process = subprocess.Popen(
            words, env=env | USUAL, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        _servers.append(ours)
        atexit.register(lambda: (ours.close(), process.wait()))
    return _servers[0]


def can_fork(words: list[str], env: dict[str, str]) -> bool:
    """Return whether a command is one of Python's with a script or `-m`, and imports what the forked processes have."""
    if not hasattr(socket, "SOCK_SEQPACKET") or sys.platform != "linux":
        return False
    is_python = words[0] == sys.executable and (words[1] == "-m" or words[1].endswith(".py"))
    same_libraries = env.get("LD_PRELOAD") == os.environ.get("LD_PRELOAD")
    return is_python and same_libraries and env.items() >= USUAL.items()


def serve(channel: socket.socket) -> dict[str, Any]:
    """Fork a process per request until the tests end; return, in a forked process alone, its request."""
    children: dict[int, int] = {}
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([channel, awake], [], [])
        if awake in ready:
            os.read(awake, 4096)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            report = children.pop(pid)
            os.write(report, str(status).encode())
            os.close(report)
        if channel not in ready:
            continue
        message, files, _, _ = socket.recv_fds(channel, 1 << 20, 4)
        if not message:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for target, file in enumerate(files[:3]):
                os.dup2(file, target)
            for file in (*files, *children.values(), awake, wake, channel.detach()):
                os.close(file)
            return json.loads(message)
        os.write(files[3], str(pid).encode())
        children[pid] = files[3]
        for file in files[:3]:
            os.close(file)


def run(request: dict[str, Any]) -> None:
    """Do what `python SCRIPT ...` or `python -m MODULE ...` does."""
    if request["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.orig_argv = request["words"]
    sys.argv = request["words"][1:]
    if sys.argv[0] == "-m":
        sys.argv, sys.path[0] = sys.argv[1:], request["cwd"]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).absolute().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018  # it looks for compilers when it is first read
    gc.collect()
    gc.freeze()
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
