"""Calm `deepspeed` and `torchrun`: `python -m launch.calm_launchers` sets this environment up.

Left alone, `deepspeed` answers Ctrl-C with a traceback while its ranks still save. The process between it and the ranks ends
every descendant of a rank, W&B's service among them, and kills what is left after 30 seconds. `torchrun` kills after 30 seconds
too, and also ends in a traceback. Set up, both pass the signal on to their children, wait, and exit with the status of the
ranks. A third signal is the launcher's own to answer, so that a run that hangs can still be interrupted. `deepspeed` also
leaves out its INFO lines, unless `--log_level` asks for them. `torchrun` ends with the status of the rank that failed first,
where it would print a traceback of its own and end with 1.

A .pth file in site-packages, which Python reads at every start, loads this file in launchers and nowhere else.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

# By the first argument that is not an option: a script's name or a module. The value: whether it also answers signals that it
# has installed a handler for; on several nodes `deepspeed` ends its remote processes in one.
LAUNCHERS = {
    "deepspeed": True,
    "deepspeed.launcher.runner": True,
    "deepspeed.launcher.launch": False,
    "torchrun": False,
    "torch.distributed.run": False,
    "torch.distributed.launch": False,
}
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PTH = "formula_ffn_launchers.pth"
_LINE = (
    "import os, sys; next((os.path.basename(a) for a in sys.orig_argv[1:] if a[:1] != '-'), '') in {names} and "
    "os.path.exists({path}) and exec(compile(open({path}).read(), {path}, 'exec'), {{'__name__': 'calm_launchers'}})\n"
)


class SignalsToChildren:
    """Pass SIGINT, SIGTERM, SIGUSR1 and SIGHUP on to this process's children; under `nohup` SIGHUP stays ignored.

    Args:
        keeps_own: leave handlers that the program installs later to it.
    """

    def __init__(self, keeps_own: bool) -> None:
        self._install = signal.signal
        self._own: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
        self._received: list[float] = []  # times, of signals more than a second apart
        for number in _SIGNALS:
            if number != signal.SIGHUP or self._own[number] != signal.SIG_IGN:
                self._install(number, self._pass_on)
        if not keeps_own:
            signal.signal = self._remember  # pyright: ignore[reportAttributeAccessIssue]

    def _remember(self, number: int, handler: Callable[[int, FrameType | None], Any] | int | None) -> Any:
        """Stand in for `signal.signal`: keep the program's handler for a third signal."""
        if number not in self._own:
            return self._install(number, handler)
        before, self._own[number] = self._own[number], handler
        return before

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        # One key press reaches every process of the terminal, and a launcher above this one passes it on as well.
        now = time.monotonic()
        if not self._received or now - self._received[-1] > 1.0:
            self._received.append(now)
        if len(self._received) > 2:
            self._answer(number, frame)
            return
        import psutil

        for child in psutil.Process().children():
            try:
                child.send_signal(number)
            except psutil.Error:
                continue

    def _answer(self, number: int, frame: FrameType | None) -> None:
        """Do what the launcher does by itself."""
        own = self._own[number]
        if callable(own):
            own(number, frame)
        elif own == signal.SIG_DFL:
            self._install(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def quieten_deepspeed(argv: list[str]) -> None:
    """Print errors alone: change the arguments in place, of which the last one that sets the level counts."""
    argv[1:1] = ["--log_level=error"]
    # Said while DeepSpeed is imported, before it reads its arguments.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def end_as_the_first_rank(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Stand in for `sys.excepthook`: where ranks have failed, say which was the first, and exit with its status."""
    if kind.__name__ != "ChildFailedError":
        sys.__excepthook__(kind, error, trace)
        return
    rank, failure = error.get_first_failure()  # pyright: ignore[reportAttributeAccessIssue]
    code = failure.exitcode
    if code < 0:  # a rank that ends by itself says why
        print(f"error: rank {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr)
    raise SystemExit(code if code > 0 else 128 - code)


def quieten_torchrun() -> None:
    """Leave out torchrun's report of ranks that failed, and end with the status of the first one."""
    sys.excepthook = end_as_the_first_rank
    told = ("closing signal", "failed (exitcode: ")
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    logger.addFilter(lambda record: not any(text in record.getMessage() for text in told))


def pth_line() -> str:
    """Return the line of the .pth file."""
    return _LINE.format(names=set(LAUNCHERS), path=repr(str(Path(__file__).resolve())))


def _program() -> str:
    """Return the script or the module that this process runs."""
    return next((argument for argument in sys.orig_argv[1:] if argument[:1] != "-"), "")


def _installed(program: str) -> bool:
    """Return whether it is a module, or a script of this environment: another's arguments are its own."""
    folder = os.path.dirname(program)
    return not folder or os.path.realpath(folder) == os.path.realpath(os.path.dirname(sys.executable))


def main(argv: list[str]) -> None:
    """Write the .pth file into this environment."""
    from kernels.common.options import read_options  # launchers load this file without the project on their path

    read_options(argv, {})
    path = Path(sysconfig.get_path("purelib"), _PTH)
    path.write_text(pth_line(), encoding="utf-8")
    print(
        f"{path}: deepspeed and torchrun of this environment wait for their ranks after Ctrl-C, without lines of their own"
    )


def _calm(program: str) -> None:
    launcher = os.path.basename(program)
    if getattr(signal.getsignal(signal.SIGINT), "__qualname__", "") == SignalsToChildren._pass_on.__qualname__:
        return  # Python reads the .pth files of a virtual environment twice
    SignalsToChildren(keeps_own=LAUNCHERS[launcher])
    if launcher.startswith("deepspeed") and _installed(program):
        quieten_deepspeed(sys.argv)
    elif not launcher.startswith("deepspeed"):
        quieten_torchrun()


if __name__ == "calm_launchers":
    _calm(_program())
elif __name__ == "__main__":
    from kernels.common.commands import run_command

    run_command(main, __doc__)
