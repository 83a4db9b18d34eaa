"""Whether the launcher that started this rank is still there.

`deepspeed` on one node passes no signal on: a SIGTERM ends it alone, and its child launch.py, which started the ranks, goes on
without it. Nor does anyone tell the ranks of `srun` when the daemon that watches them on their node dies. A rank that knows the
launchers above it can see that itself, and stop as if it had got the signal.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_NAMES = {"deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run"}


class Launchers:
    """The unbroken line of launcher processes above this one, as it is now: none under plain `python`."""

    def __init__(self) -> None:
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
