"""Several runs from one command: `python train.py --multirun ffn=relu,swiglu optim.lr=1e-3,2e-3` trains all four in sequence.

Values are separated by commas, or given as Hydra's `choice(...)`, `range(...)` or `glob(...)`, and are read as for a single
run. Each run has its own process and folder. A run has a single process, widths are not matched, seeds are not paired, and
nothing is compared: `python -m ablation.run` does that.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from conf.load import NOT_IN_NAME, load
from conf.overrides import sweep, within
from kernels.common.errors import UserError
from launch.launchers import on_stop_signals
from launch.ranks import find_ranks, without_launcher

FLAGS = ("--multirun", "-m")
_TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def expand(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of every run, the last key varying fastest.

    Runs that differ only in keys which name no run, such as `zero`, get a `run=` of their own.

    Raises:
        UserError: no override has several values, a run is invalid, or two runs have one folder.
    """
    swept = [sweep(override) for override in overrides]
    runs = [list(run) for run in itertools.product(*swept)]
    if len(runs) < 2:
        raise UserError("--multirun needs several comma-separated values of a key: ffn=relu,swiglu")
    configs = [load(run) for run in runs]
    if len({(config.runs, config.run) for config in configs}) == len(runs):
        return runs
    if "run" in map(_key, overrides):
        raise UserError("--multirun would train several runs in one folder: leave run=NAME out")
    unnamed = [i for i, values in enumerate(swept) if len(values) > 1 and within(_key(values[0]), NOT_IN_NAME)]
    names = [
        "-".join([str(config.run), *(_label(run[i]) for i in unnamed)])
        for config, run in zip(configs, runs, strict=True)
    ]
    if len(set(names)) < len(names):
        raise UserError("--multirun would train the same run twice: a value is listed twice")
    return [[*run, f"run={name}"] for run, name in zip(runs, names, strict=True)]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _label(override: str) -> str:
    """Return a value as a part of a name: zero=2 is zero2."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", _key(override).rpartition(".")[2] + override.partition("=")[2])


def multirun(overrides: list[str]) -> int:
    """Train the runs in sequence; return 0 if all succeeded, else 1. A failed run does not stop the next one."""
    if "RANK" in os.environ or find_ranks().world_size > 1:
        raise UserError(
            "--multirun starts its runs itself: python train.py --multirun ..., without deepspeed, torchrun or srun"
        )
    runs, failed, stopped = expand(overrides), [], False
    process: subprocess.Popen[bytes] | None = None

    def stop(*_: object) -> None:  # the run is signalled too
        nonlocal stopped
        stopped = True
        if process is not None:
            process.send_signal(signal.SIGTERM)

    with on_stop_signals(stop):
        for number, run in enumerate(runs, 1):
            print(f"run {number} of {len(runs)}: {shlex.join(run)}", flush=True)
            command = [sys.executable, str(_TRAIN), *run]
            process = subprocess.Popen(command, env=without_launcher(os.environ), start_new_session=True)
            if stopped:  # between the fork and here
                process.send_signal(signal.SIGTERM)
            if process.wait():
                failed.append(shlex.join(run))
            if stopped:
                print("stopped; the same command resumes here")
                return 1
    for run in failed:
        print(f"failed: {run}", file=sys.stderr)
    return 1 if failed else 0
