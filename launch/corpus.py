"""Check the corpora and the tokenizers of runs before their jobs are submitted.

In a process of its own, because `launch` and `data` do not import each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kernels.common.errors import UserError
from launch.ranks import without_launcher

RUN_MODULE = Path(__file__).with_name("run_module.py")


def unprepared(runs: Sequence[list[str]]) -> list[list[str]]:
    """Return those of some runs, each given by its overrides, whose corpus is not tokenized yet.

    Raises:
        UserError: the files of a corpus or of a tokenizer are missing or do not fit each other, or a run would go through its
            corpus more often than data.max_epochs.
    """
    if not runs:  # of a container: the command prints its usage without one
        return []
    command = [sys.executable, str(RUN_MODULE), *arguments_of(runs)]
    done = subprocess.run(command, env=without_launcher(os.environ), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(lines[-1].removeprefix("error: "))
    return [run for run, line in zip(runs, done.stdout.splitlines(), strict=True) if line != "ready"]


def arguments_of(runs: Sequence[list[str]], *options: str) -> list[str]:
    """Return the arguments of `run_module.py` that look at the corpora of runs."""
    separated = [word for run in runs for word in ("--", *run)]
    return ["data.ready", *options, *separated[1:]]
