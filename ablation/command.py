"""The command that trains a run on this machine, and its environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from conf.schema import Config
from launch.ranks import installed_gpus

_TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def ranks_of(config: Config) -> int:
    """Return the fewest ranks that a configuration can be trained on."""
    return config.parallel.tensor * config.parallel.context


def train_command(words: list[str], ranks: int) -> list[str]:
    """Return the command line that trains on that many ranks of this machine."""
    return [*launcher(ranks), str(_TRAIN), *words]


def launcher(ranks: int) -> list[str]:
    """Return what stands before train.py so that it runs on that many ranks of this machine."""
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def environment_of(place: int, jobs: int, ranks: int) -> dict[str, str]:
    """Return the environment of a run, one of `jobs` at a time: a GPU for each of its ranks, or its share of the cores."""
    environment = dict(os.environ)
    gpus = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] or [
        str(i) for i in range(installed_gpus())
    ]
    if gpus:
        own = (gpus[(place * ranks + i) % len(gpus)] for i in range(ranks))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(own))
    elif jobs * ranks > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (jobs * ranks))))
    return environment
