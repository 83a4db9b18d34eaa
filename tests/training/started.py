"""Commands that are started, read line by line, and interrupted."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterator

import psutil

from tests.training import warm
from tests.training.tiny import PATIENCE, ROOT, Result, environment, free_port


class Started:
    """A command whose output is read line by line. It cannot get far ahead: its pipe holds one page."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        words, env = [str(word) for word in arguments], environment(**variables)
        if warm.can_fork(words, env):
            self.process = warm.Process(words, env, ROOT, session=True)
        else:
            self.process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                bufsize=0,
            )
        # About 40 lines of steps: the run blocks well before the last of 60.
        fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        self.out = b""

    def until(self, text: str) -> None:
        """Read up to the line that starts with `text`."""
        while True:
            line = self.process.stdout.readline()
            self.out += line
            assert line, self.process.stderr.read().decode()
            if line.startswith(text.encode()):
                return

    def end(self) -> Result:
        """Read the rest and wait."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return Result(self.process.returncode, (self.out + out).decode(), err.decode())


def launched(launcher: str) -> list[str]:
    """Return the words that start two ranks under a launcher."""
    count = "--num_gpus" if launcher == "deepspeed" else "--nproc_per_node"
    return [launcher, count, "2", f"--master_port={free_port()}"]


def members(started: Started) -> Iterator[psutil.Process]:
    """Yield the launcher and every process below it."""
    launcher = psutil.Process(started.process.pid)
    yield launcher
    yield from launcher.children(recursive=True)
