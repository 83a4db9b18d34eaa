"""Whether the launcher that started this rank is still alive, and whether it has signalled the run to stop.

`deepspeed` on one node forwards no signals: SIGTERM ends it alone, and its child launch.py, which started the ranks, runs on.
Ranks of `srun` are not notified either when the daemon on their node dies. A rank therefore watches the launchers above it,
and stops when one is gone as if it had received the signal.

SLURM announces the end of a job by SIGUSR1, up to a minute early, perhaps while the ranks still start; the default action would
kill them. The signal is recorded instead, and the run stops after its first step.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

_NAMES = {"deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run"}


class Launchers:
    """The chain of launcher processes above this one at construction: empty under plain `python`."""

    def __init__(self) -> None:
        self.warned = False  # by SIGUSR1, before the run installs its own handler
        self.pids: list[int] = []
        for process in psutil.Process().parents():
            try:
                arguments, name = process.cmdline(), process.name()
            except psutil.Error:
                break
            if name == "slurmstepd":  # of `srun`, on this node
                self.pids.append(process.pid)
                break
            # `python .../deepspeed ...` or `python -u -m deepspeed.launcher.launch ...`, not `timeout 5h deepspeed ...`
            script = next((argument for argument in arguments[1:] if not argument.startswith("-")), "")
            if not Path(arguments[0] if arguments else "").name.startswith("python") or Path(script).name not in _NAMES:
                break
            self.pids.append(process.pid)

    def listen(self) -> None:
        """Record SIGUSR1 from now on."""
        signal.signal(signal.SIGUSR1, self._record)

    def _record(self, *_: object) -> None:
        self.warned = True

    def gone(self) -> bool:
        """Return whether one of them has ended since: its child then has another parent."""
        child = os.getpid()
        for pid in self.pids:
            try:
                if psutil.Process(child).ppid() != pid:
                    return True
            except psutil.NoSuchProcess:
                return True
            child = pid
        return False
