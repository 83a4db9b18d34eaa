"""Several runs from one command: `python train.py --multirun ffn=relu,swiglu optim.lr=1e-3,2e-3` trains all four in turn.

Values with commas between them, and Hydra's `choice(...)` and `range(...)`, are gone through, each run in a process and a
folder of its own. That is all: widths are not matched, seeds not paired, nothing is compared, and a run has one process. For
an answer take `python -m ablation.run`.
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from conf.load import load
from kernels.common.errors import UserError

FLAGS = ("--multirun", "-m")
_TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def expand(words: list[str]) -> list[list[str]]:
    """Return the overrides of every run, in the order in which Hydra's sweeper would take them.

    Raises:
        UserError: no value is a sweep; a run that cannot be read; two runs of one name.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, choices = OverridesParser.create(), []
    for word in words:
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            raise UserError(f"cannot read {word!r}: a bracket, a quote or a comma is not where it should be") from error
        swept = override.is_sweep_override()
        choices.append(
            [f"{override.input_line.partition('=')[0]}={v}" for v in override.sweep_string_iterator()]
            if swept
            else [word]
        )
    runs = [list(run) for run in itertools.product(*choices)]
    if len(runs) < 2:
        raise UserError("--multirun wants several values of a key, with commas between them: ffn=relu,swiglu")
    names = [load(run).run for run in runs]
    if len(set(names)) < len(names):
        raise UserError("--multirun would train several runs in one folder: leave run=NAME out")
    return runs


def multirun(words: list[str]) -> int:
    """Train one run after the other; return 0 if all ended well, else 1. A run that fails does not stop the next."""
    if "RANK" in os.environ:
        raise UserError(
            "--multirun starts its runs itself: python train.py --multirun ..., without deepspeed or torchrun"
        )
    runs, failed, stopped = expand(words), [], False

    def stop(*_: object) -> None:  # the run is told too, by the terminal or below
        nonlocal stopped
        stopped = True
        process.send_signal(signal.SIGTERM)

    for number, run in enumerate(runs, 1):
        print(f"run {number} of {len(runs)}: {shlex.join(run)}", flush=True)
        process = subprocess.Popen([sys.executable, str(_TRAIN), *run], start_new_session=True)
        before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
        if process.wait():
            failed.append(shlex.join(run))
        for each, handler in before.items():
            signal.signal(each, handler)
        if stopped:
            print("stopped; the same command goes on from here")
            return 1
    for run in failed:
        print(f"failed: {run}", file=sys.stderr)
    return 1 if failed else 0
