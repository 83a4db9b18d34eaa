"""Build the command that measures baselines on this machine, and the environment of a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch.corpus import RUN_MODULE
from launch.ranks import installed_gpus, without_launcher


def baselines_command(overrides: list[str], to: Path) -> list[str]:
    """Return the command line that measures the models that are no neural networks for a run, and writes them to a file."""
    return [sys.executable, str(RUN_MODULE), "data.baselines", f"to={to.absolute()}", *overrides]


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
