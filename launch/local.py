"""The command that trains a run on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

from conf.schema import Config

_TRAIN = Path(__file__).resolve().parents[1] / "train.py"
_TORCHRUN = Path(__file__).resolve().with_name("torchrun.py")


def ranks_of(config: Config) -> int:
    """Return the smallest number of ranks that can train a configuration."""
    return config.parallel.tensor * config.parallel.context


def train_command(overrides: list[str], ranks: int) -> list[str]:
    """Return the command line that trains on that many ranks of this machine."""
    return [*launcher(ranks), str(_TRAIN), *overrides]


def launcher(ranks: int) -> list[str]:
    """Return the part of the command before train.py: the interpreter, or torchrun for several ranks of this machine."""
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, str(_TORCHRUN), "--standalone", f"--nproc-per-node={ranks}"]
