"""Whether the launcher that started this rank is still there, and whether it has said to stop already.

`deepspeed` on one node passes no signal on: a SIGTERM ends it alone, and its child launch.py, which started the ranks, goes on
without it. Nor does anyone tell the ranks of `srun` when the daemon that watches them on their node dies. A rank that knows
the launchers above it can see that itself, and stop as if it had got the signal.

SLURM warns a job of its end by SIGUSR1, as much as a minute early, and so perhaps while the ranks still start: by itself it
would end them then. It is noted instead, and the run stops after its first step.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

_NAMES = {"deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run"}


class Launchers:
    """The unbroken line of launcher processes above this one, as it is now: none under plain `python`."""

    def __init__(self) -> None:
        self.warned = False  # by SIGUSR1, before the run took the signal over
        self.pids: list[int] = []
        for process in psutil.Process().parents():
            try:
                words, name = process.cmdline(), process.name()
            except psutil.Error:
                break
            if name == "slurmstepd":  # of `srun`, on this node
                self.pids.append(process.pid)
                break
            # `python .../deepspeed ...` or `python -u -m deepspeed.launcher.launch ...`, not `timeout 5h deepspeed ...`
            script = next((word for word in words[1:] if not word.startswith("-")), "")
            if not Path(words[0] if words else "").name.startswith("python") or Path(script).name not in _NAMES:
                break
            self.pids.append(process.pid)

    def listen(self) -> None:
        """Note SIGUSR1 from now on."""
        signal.signal(signal.SIGUSR1, self._note)

    def _note(self, *_: object) -> None:
        self.warned = True

    def gone(self) -> bool:
        """Tell whether one of them has ended since: its child has another parent then."""
        child = os.getpid()
        for pid in self.pids:
            try:
                if psutil.Process(child).ppid() != pid:
                    return True
            except psutil.NoSuchProcess:
                return True
            child = pid
        return False
