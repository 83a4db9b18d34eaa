"""The rank of this process, whichever launcher started it.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE and LOCAL_RANK; `srun` and `mpirun` set variables of their own; plain `python`
sets nothing and is rank 0 of 1. All other code reads `Ranks`, or the standard variables that `export` sets.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import NoReturn

from kernels.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank of this process: `rank` of `world_size`, and `local_rank` of `local_world_size` on its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


# The variables of each launcher: rank, world size, local rank, processes on this node. The first complete set counts.
_OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "mpirun": _OPEN_MPI,
    "a hand": ("RANK", "WORLD_SIZE", "LOCAL_RANK", None),  # set by the user, with one process per node
}


def take_local_rank(argv: list[str]) -> tuple[list[str], int | None]:
    """Split off the `--local_rank=N` that the `deepspeed` launcher inserts, which Hydra would refuse.

    Returns:
        The other arguments, and N (None if it was not given).
    """
    rest, local_rank = [], None
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name in ("--local_rank", "--local-rank") and equals:
            if not value.isdigit():
                raise UserError(f"{argument}: the launcher's local rank must be a number")
            local_rank = int(value)
        else:
            rest.append(argument)
    return rest, local_rank


def find_ranks(environment: MutableMapping[str, str] = os.environ, local_rank: int | None = None) -> Ranks:
    """Read the launcher's variables.

    Args:
        environment: the process's environment.
        local_rank: the value of `--local_rank`, which must agree.

    Raises:
        UserError: the variables contradict each other.
    """
    for launcher, (rank, world, local, per_node) in _LAUNCHERS.items():
        # Inside `sbatch` or `salloc`, but not under `srun`, SLURM_NTASKS is set although there is a single process.
        if launcher == "srun" and "SLURM_STEP_ID" not in environment:
            continue
        if not all(name in environment for name in (rank, world, local, per_node) if name):
            continue
        local_size = environment[per_node].split("(")[0].split(",")[0] if per_node else "1"  # SLURM writes "4(x2),3"
        try:
            ranks = Ranks(int(environment[rank]), int(environment[world]), int(environment[local]), int(local_size))
        except ValueError as error:
            names = ", ".join(filter(None, (rank, world, local, per_node)))
            raise UserError(f"{launcher} set one of {names} to something other than a number") from error
        if not 0 <= ranks.rank < ranks.world_size or not ranks.local_rank >= 0:
            raise UserError(f"{rank}={ranks.rank} does not fit {world}={ranks.world_size}")
        if local_rank is not None and local_rank != ranks.local_rank:
            raise UserError(f"--local_rank={local_rank} contradicts {local}={ranks.local_rank} of the environment")
        if launcher != "srun" and "SLURM_STEP_ID" in environment:
            _check_against_slurm(ranks, rank, world, environment)
        return ranks
    if local_rank:
        raise UserError(f"--local_rank={local_rank} was given, but no launcher set RANK and WORLD_SIZE")
    return Ranks()


def _check_against_slurm(ranks: Ranks, rank: str, world: str, environment: MutableMapping[str, str]) -> None:
    """Refuse variables that no launcher inside an srun task can have set: they are left over from the shell."""
    tasks, task = environment.get("SLURM_NTASKS", "1"), environment.get("SLURM_PROCID", "0")
    if not (tasks.isdigit() and task.isdigit()):
        return
    if ranks.world_size < int(tasks):
        raise UserError(
            f"{world}={ranks.world_size} contradicts SLURM_NTASKS={tasks}: unset {rank} and {world} before srun"
        )
    if ranks.world_size == int(tasks) and ranks.rank != int(task):
        raise UserError(f"{rank}={ranks.rank} contradicts SLURM_PROCID={task}: unset {rank} and {world} before srun")


def installed_gpus() -> int:
    """Return the number of NVIDIA GPUs of the driver, without torch."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def leave(status: int) -> NoReturn:
    """End this process at once, so that nothing during interpreter shutdown can change its status.

    Where DeepSpeed or torch.distributed.nn hold a process group, destroying it leaves its threads running. A thread that frees
    its last tensor during shutdown can no longer take the GIL, and aborts a successful run with status 134.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def export(ranks: Ranks, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the standard variables that torch.distributed and DeepSpeed read."""
    environment.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank))
    environment.setdefault("LOCAL_SIZE", str(ranks.local_world_size))
    environment.setdefault("LOCAL_WORLD_SIZE", str(ranks.local_world_size))
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_node(environment)
    # SLURM's job number makes a port that two jobs on one node do not share.
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "9500")) % 20000))


def _first_node(environment: MutableMapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes or environment.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return listed.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"scontrol cannot list the nodes of {nodes}: set MASTER_ADDR to the first one") from error
