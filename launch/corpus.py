"""Check the corpus and the tokenizer of a run before its job is submitted.

In a process of its own, because `launch` and `data` do not import each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kernels.common.errors import UserError
from launch.ranks import without_launcher

_ROOT = Path(__file__).resolve().parents[1]
_CHECK = """
from conf.load import load
from data.prepare import INDEX, folder_of
from kernels.common.commands import run_command

def main(argv):
    config = load(argv)
    print((folder_of(config.data, config.tokenizer) / INDEX).is_file())

run_command(main)
"""


def is_prepared(overrides: list[str]) -> bool:
    """Return whether the corpus of a run is tokenized already.

    Raises:
        UserError: its files, or those of the tokenizer, are missing or do not fit each other.
    """
    environment = without_launcher(os.environ) | {"PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-c", _CHECK, *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(lines[-1].removeprefix("error: "))
    return done.stdout.strip() == "True"
