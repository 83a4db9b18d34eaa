"""Build the command that trains a run on this machine, and its environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from conf.schema import Config
from launch.corpus import RUN_MODULE
from launch.ranks import installed_gpus, without_launcher

_TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def ranks_of(config: Config) -> int:
    """Return the smallest number of ranks that can train a configuration."""
    return config.parallel.tensor * config.parallel.context


def train_command(overrides: list[str], ranks: int) -> list[str]:
    """Return the command line that trains on that many ranks of this machine."""
    return [*launcher(ranks), str(_TRAIN), *overrides]


def baselines_command(overrides: list[str], to: Path) -> list[str]:
    """Return the command line that measures the models that are no neural networks for a run, and writes them to a file."""
    return [sys.executable, str(RUN_MODULE), "data.baselines", f"to={to.absolute()}", *overrides]


def launcher(ranks: int) -> list[str]:
    """Return the part of the command before train.py: the interpreter, or torchrun for several ranks of this machine."""
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def environment_of(slot: int, jobs: int, ranks: int) -> dict[str, str]:
    """Return the environment of one of `jobs` concurrent runs: a GPU for each of its ranks, or its fraction of the cores.

    Args:
        slot: number of this run among the concurrent ones, from 0.
    """
    environment = without_launcher(os.environ)  # a run is not a rank of what started the plan
    for name in ("WANDB_RUN_ID", "WANDB_NAME"):  # of one run: all runs of the plan would share them
        environment.pop(name, None)
    gpus = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] or [
        str(i) for i in range(installed_gpus())
    ]
    if gpus:
        assigned = (gpus[(slot * ranks + i) % len(gpus)] for i in range(ranks))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(assigned))
    elif jobs * ranks > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (jobs * ranks))))
    return environment
