"""Benchmark all-reduce over the ranks of a launcher for two seconds, for `launch.doctor`: `torchrun ... -m launch.collective`.

Rank 0 prints the result of `measure` as a line of JSON.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import time
from typing import Any

import torch
import torch.distributed as dist

from launch.installed import installed_versions
from launch.ranks import find_ranks, gpu_index, installed_gpus

_SECONDS, _BYTES = 2.0, 64 * 2**20


def measure(seconds: float = _SECONDS) -> dict[str, Any]:
    """Initialise the process group from the environment, benchmark all-reduce, and return the result.

    Args:
        seconds: to repeat it for.

    Returns:
        `bytes_per_second` sent per rank, 2 (p - 1) / p per byte reduced; `bytes` of the tensor; `backend`; `world_size`;
        the `hosts` and `versions` of all ranks, and the `matmul_seconds` of their slowest device; and the `clock_skew`
        between them, in seconds.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(gpu_index(find_ranks(), torch.cuda.device_count(), installed_gpus()))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=2))
    try:
        world, device = dist.get_world_size(), "cuda" if cuda else "cpu"
        tensor = torch.ones(_BYTES // 4, device=device)

        def reduce_once() -> float:
            tensor.fill_(1)
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        reduce_once()  # sets up connections
        times = torch.tensor([reduce_once() for _ in range(3)], device=device).max()
        dist.all_reduce(times, op=dist.ReduceOp.MAX)  # so that all ranks repeat it equally often
        count = max(1, min(1000, int(seconds / float(times))))
        best = min(reduce_once() for _ in range(count))
        assert float(tensor[0]) == world
        gathered: list[Any] = [None] * world
        dist.barrier()
        matmul = _matmul_seconds(cuda)
        dist.barrier()
        dist.all_gather_object(gathered, (time.time(), _node(), _versions(), matmul))
        clocks = [clock for clock, _, _, _ in gathered]
        return {
            "bytes_per_second": 2 * (world - 1) / world * _BYTES / best,
            "bytes": _BYTES,
            "backend": dist.get_backend(),
            "world_size": world,
            "hosts": [host for _, host, _, _ in gathered],
            "versions": [version for _, _, version, _ in gathered],
            "matmul_seconds": [took for _, _, _, took in gathered],
            "clock_skew": max(clocks) - min(clocks),
        }
    finally:
        dist.destroy_process_group()


def _node() -> str:
    """Return the name of this node, as SLURM calls it if there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _matmul_seconds(cuda: bool) -> float:
    """Return the seconds of a matmul on the slowest device of this node: the best of three."""
    size, slowest = (8192 if cuda else 512), 0.0
    for device in [f"cuda:{i}" for i in range(torch.cuda.device_count())] if cuda else ["cpu"]:
        a, best = torch.ones(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32), float("inf")
        for _ in range(4):  # the first one loads the kernel
            start = time.perf_counter()
            (a @ a)[0, 0].item()
            best = min(best, time.perf_counter() - start)
        slowest = max(slowest, best)
    return slowest


def _versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes."""
    packages = installed_versions("torch", "deepspeed", "triton", "numpy")
    return {"python": platform.python_version(), **packages}


if __name__ == "__main__":
    result = measure()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result), flush=True)
