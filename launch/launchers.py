"""Whether the launcher that started this rank is still alive, whether it told the run to stop, and a port for its ranks.

`deepspeed` on one node forwards no signals (unless `calm_launchers` set the environment up): SIGTERM ends it alone, and its
child launch.py, which started the ranks, runs on.
Ranks of `srun` are not notified either when the daemon on their node dies. A rank therefore watches the launchers above it,
and stops when one is gone as if it had received the signal.

SLURM announces the end of a job by SIGUSR1, up to a minute early, perhaps while the ranks still start; the default action would
kill them. The signal is recorded instead, and the run stops after its first step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

import psutil

from kernels.common.errors import TryAgain, UserError
from launch.ranks import FIRST_PORT, PORTS, Ranks

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_NAMES = {
    "deepspeed",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
    "torchrun.py",  # of this project
}
_SET_BY = (("TORCHELASTIC_RUN_ID",), ("CROSS_RANK", "LOCAL_SIZE"))  # variables of torchrun's and DeepSpeed's ranks
_DEEPSPEED = "deepspeed.launcher.launch"  # starts the ranks of a node
_DEEPSPEED_PORT = "29500"  # unless --master_port is given


def stop_signals() -> list[signal.Signals]:
    """Return the signals that stop a run: without SIGHUP, of a lost terminal, where `nohup` has this process ignore it."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP)]


@contextlib.contextmanager
def on_stop_signals(handler: Callable[..., object]) -> Iterator[None]:
    """Call `handler` at a signal that stops a run, while it is entered; the handlers of before return after it."""
    previous = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class Launchers:
    """The chain of launcher processes above this one at construction: empty under plain `python`."""

    def __init__(self) -> None:
        self.warned = False  # by SIGUSR1, before the run installs its own handler
        self.pids: list[int] = []
        self._deepspeed: int | None = None  # the process that started the ranks of this node, if that is DeepSpeed's
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
            if not self.pids and Path(script).name == _DEEPSPEED:
                self._deepspeed = process.pid
            self.pids.append(process.pid)
        # Started by one that ended before this process looked for it, and now a child of init.
        self._orphan = not self.pids and os.getppid() == 1 and any(set(names) <= os.environ.keys() for names in _SET_BY)

    def listen(self) -> None:
        """Record SIGUSR1 from now on."""
        signal.signal(signal.SIGUSR1, self._record)

    def _record(self, *_: object) -> None:
        self.warned = True

    def choose_port(self, ranks: Ranks, environment: MutableMapping[str, str] = os.environ) -> None:
        """Give ranks that `deepspeed` started on this node alone a port of their own, instead of one port for every run."""
        alone = 1 < ranks.world_size == ranks.local_world_size
        if self._deepspeed and alone and environment.get("MASTER_PORT") == _DEEPSPEED_PORT:
            environment["MASTER_PORT"] = str(FIRST_PORT + self._deepspeed % PORTS)

    def gone(self) -> bool:
        """Return whether one of them has ended: its child then has another parent."""
        if self._orphan:
            return True
        child = os.getpid()
        for pid in self.pids:
            try:
                if psutil.Process(child).ppid() != pid:
                    return True
            except psutil.NoSuchProcess:
                return True
            child = pid
        return False


def refuse_unknown_master(ranks: Ranks, environment: MutableMapping[str, str] = os.environ) -> None:
    """Check that this node knows where rank 0 is. torch would ask for its name again until the timeout of collectives.

    Raises:
        TryAgain: the name of rank 0's node has no address.
    """
    address = environment.get("MASTER_ADDR")
    if ranks.world_size == 1 or not address:
        return
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise TryAgain(
            f"{socket.gethostname()} finds no address for {address}, the node of rank 0 ({error.strerror}): add it to DNS or "
            "/etc/hosts, or set MASTER_ADDR to an address that all nodes reach"
        ) from None


def refuse_taken_port(ranks: Ranks, environment: MutableMapping[str, str] = os.environ) -> None:
    """Check that rank 0 can listen where the others will look for it.

    Raises:
        TryAgain: another process uses the port now.
        UserError: it is not a port.
    """
    # torchrun listens itself, and its ranks are clients.
    if ranks.rank or ranks.world_size == 1 or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = environment["MASTER_PORT"]
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT={port} must be a port, from 1 to 65535")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(port)))
        except OSError as error:
            with socket.socket() as other:
                other.bind(("", 0))
                free = other.getsockname()[1]
            raise TryAgain(
                f"port {port} is taken ({error.strerror}), perhaps by another run: choose one, such as "
                f"deepspeed --master_port={free}, or MASTER_PORT={free} under srun and mpirun"
            ) from None
