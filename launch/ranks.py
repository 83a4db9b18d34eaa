"""The rank of this process, whichever launcher started it.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE and LOCAL_RANK; `srun` and `mpirun` set variables of their own; plain `python`
sets nothing and is rank 0 of 1. All other code reads `Ranks`, or the standard variables that `export` sets.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import NoReturn

from kernels.common.errors import UserError

FIRST_PORT, PORTS = 20000, 12000  # ports of rank 0: below 32768, from where Linux takes those of connections


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank of this process: `rank` of `world_size`, and `local_rank` of `local_world_size` on its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


# The variables of each launcher: rank, world size, local rank, processes on this node. The first complete set counts:
# srun's comes after those that a launcher inside an srun task sets.
_OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    "mpirun": _OPEN_MPI,
    # The step's tasks: SLURM_NTASKS is the allocation's in the shell that `salloc` opens as a step of a single task.
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "a hand": ("RANK", "WORLD_SIZE", "LOCAL_RANK", None),  # set by the user, with one process per node
}
# What only the processes of a launcher have: names, and beginnings of names.
_NAMES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_TASK_PID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEPID"),
}
_BEGINNINGS = ("SLURM_STEP_", "SLURM_CPU_BIND", "SLURM_SRUN_", "OMPI_COMM_WORLD_", "TORCHELASTIC_", "PMI_", "PMIX_")


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


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of launchers, for a child process that is not one of their ranks."""
    return {
        name: value for name, value in environment.items() if name not in _NAMES and not name.startswith(_BEGINNINGS)
    }


def find_ranks(environment: Mapping[str, str] = os.environ, local_rank: int | None = None) -> Ranks:
    """Read the launcher's variables.

    Args:
        environment: the process's environment.
        local_rank: the value of `--local_rank`, which must agree.

    Raises:
        UserError: the variables contradict each other.
    """
    in_step = bool(environment.get("SLURM_STEP_ID"))
    for launcher, (rank, world, local, per_node) in _LAUNCHERS.items():
        # Inside `sbatch` or `salloc`, but not under `srun`, some variables of tasks are set although there is a single process.
        if launcher == "srun" and not in_step:
            continue
        if launcher == "srun" and not environment.get(world):
            world = "SLURM_NTASKS"  # of a SLURM that sets no SLURM_STEP_NUM_TASKS
        names = [name for name in (rank, world, local, per_node) if name]
        if not all(name in environment for name in names):
            continue
        try:
            local_size = _on_this_node(environment, per_node) if per_node else 1
            ranks = Ranks(int(environment[rank]), int(environment[world]), int(environment[local]), local_size)
        except ValueError as error:
            raise UserError(f"{launcher} set one of {', '.join(names)} to something other than a number") from error
        if not 0 <= ranks.rank < ranks.world_size or not ranks.local_rank >= 0:
            raise UserError(f"{rank}={ranks.rank} does not fit {world}={ranks.world_size}")
        if local_rank is not None and local_rank != ranks.local_rank:
            raise UserError(f"--local_rank={local_rank} contradicts {local}={ranks.local_rank} of the environment")
        # torchrun says that it set them, and numbers the ranks as nodes arrive, in another order than srun.
        if rank == "RANK" and in_step and "TORCHELASTIC_RUN_ID" not in environment:
            _check_against_slurm(ranks, environment)
        return ranks
    if local_rank:
        raise UserError(f"--local_rank={local_rank} was given, but no launcher set RANK and WORLD_SIZE")
    return Ranks()


def _on_this_node(environment: Mapping[str, str], per_node: str) -> int:
    """Return the number of processes on this node; SLURM writes those of all nodes as "4(x2),3".

    Raises:
        ValueError: the variable is not written that way.
    """
    counts: list[int] = []
    for part in environment[per_node].split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    node = environment.get("SLURM_NODEID", "")
    return counts[int(node)] if len(counts) > 1 and node.isdigit() and int(node) < len(counts) else counts[0]


def _check_against_slurm(ranks: Ranks, environment: Mapping[str, str]) -> None:
    """Refuse variables that no launcher inside an srun task can have set: they are left over from the shell."""
    name = "SLURM_STEP_NUM_TASKS" if environment.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    tasks, task = environment.get(name, "1"), environment.get("SLURM_PROCID", "0")
    if not (tasks.isdigit() and task.isdigit()):
        return
    if ranks.world_size < int(tasks):
        text = f"WORLD_SIZE={ranks.world_size} contradicts {name}={tasks}"
    elif ranks.world_size == int(tasks) and ranks.rank != int(task):
        text = f"RANK={ranks.rank} contradicts SLURM_PROCID={task}"
    else:
        return
    raise UserError(f"{text}: unset RANK and WORLD_SIZE before srun")


def gpu_index(ranks: Ranks, visible: int, installed: int) -> int:
    """Return the number of this rank's GPU among those that its process sees.

    Args:
        visible: GPUs that the process sees.
        installed: GPUs of the node.

    Raises:
        UserError: the node has fewer GPUs than ranks, or the process does not see its own.
    """
    if ranks.local_rank < visible:
        return ranks.local_rank
    if visible == 1 and installed >= ranks.local_world_size:  # one is bound to each task, as by srun --gpus-per-task=1
        return 0
    seen = "" if visible == installed else f", of which this process sees {visible} (CUDA_VISIBLE_DEVICES)"
    raise UserError(
        f"rank {ranks.rank} has local rank {ranks.local_rank}, but its node has {max(visible, installed)} GPU(s){seen}"
    )


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


def leave_after(program: Callable[[], object]) -> NoReturn:
    """Run a program and leave with its status: that of its SystemExit, or 1 after the traceback of any other exception."""
    try:
        program()
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


def export(ranks: Ranks, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the standard variables that torch.distributed and DeepSpeed read."""
    environment.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank))
    environment.setdefault("LOCAL_SIZE", str(ranks.local_world_size))
    environment.setdefault("LOCAL_WORLD_SIZE", str(ranks.local_world_size))
    if not environment.get("MASTER_ADDR"):
        environment["MASTER_ADDR"] = _first_node(environment)
    if not environment.get("MASTER_PORT"):
        environment["MASTER_PORT"] = str(_port(environment))


def _port(environment: Mapping[str, str]) -> int:
    """Return a port that jobs on one node do not share, nor steps of a job: from SLURM's numbers, else 29500."""
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
    if not job.isdigit():
        return 29500
    return FIRST_PORT + (int(job) + 101 * int(step if step.isdigit() else 0)) % PORTS


def _first_node(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes or (environment.get("SLURM_STEP_NUM_NODES") or "1") == "1":
        return "127.0.0.1"
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return listed.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"scontrol cannot list the nodes of {nodes}: set MASTER_ADDR to the first one") from error
