"""Several runs from one command: `python train.py --multirun ffn=relu,swiglu optim.lr=1e-3,2e-3` trains all four in sequence.

Comma-separated values, and Hydra's `choice(...)` and `range(...)`, are expanded; each run has its own process and folder. A run
has a single process, widths are not matched, seeds are not paired, and nothing is compared: `python -m ablation.run` does that.
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
from launch.ranks import find_ranks, without_launcher

FLAGS = ("--multirun", "-m")
_TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def expand(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of every run, in the order in which Hydra's sweeper would take them.

    Raises:
        UserError: no override has several values, a run is invalid, or two runs have one name.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    choices: list[list[str]] = []  # of every override
    for override in overrides:
        try:
            parsed = parser.parse_override(override)
        except HydraException as error:
            raise UserError(f"cannot parse {override!r}: a bracket, quote or comma is misplaced") from error
        if parsed.is_sweep_override():
            key = override.partition("=")[0]
            choices.append([f"{key}={value}" for value in parsed.sweep_string_iterator()])
        else:
            choices.append([override])
    runs = [list(run) for run in itertools.product(*choices)]
    if len(runs) < 2:
        raise UserError("--multirun needs several comma-separated values of a key: ffn=relu,swiglu")
    names = [load(run).run for run in runs]
    if len(set(names)) < len(names):
        raise UserError("--multirun would train several runs in one folder: leave run=NAME out")
    return runs


def multirun(overrides: list[str]) -> int:
    """Train the runs in sequence; return 0 if all succeeded, else 1. A failed run does not stop the next one."""
    if "RANK" in os.environ or find_ranks().world_size > 1:
        raise UserError(
            "--multirun starts its runs itself: python train.py --multirun ..., without deepspeed, torchrun or srun"
        )
    runs, failed, stopped = expand(overrides), [], False

    def stop(*_: object) -> None:  # the run is signalled too
        nonlocal stopped
        stopped = True
        process.send_signal(signal.SIGTERM)

    for number, run in enumerate(runs, 1):
        print(f"run {number} of {len(runs)}: {shlex.join(run)}", flush=True)
        process = subprocess.Popen(
            [sys.executable, str(_TRAIN), *run], env=without_launcher(os.environ), start_new_session=True
        )
        before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
        if process.wait():
            failed.append(shlex.join(run))
        for each, handler in before.items():
            signal.signal(each, handler)
        if stopped:
            print("stopped; the same command resumes here")
            return 1
    for run in failed:
        print(f"failed: {run}", file=sys.stderr)
    return 1 if failed else 0
