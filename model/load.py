"""Deprecated alias of `python -m model.import_hf`."""

import sys

from kernels.common.commands import run_command
from model import import_hf

if __name__ == "__main__":
    print("warning: `python -m model.load` is now called `python -m model.import_hf`", file=sys.stderr)
    run_command(import_hf.main, import_hf.__doc__, needs_arguments=True)
