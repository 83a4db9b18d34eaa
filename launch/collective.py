"""Benchmark all-reduce over the ranks of a launcher for five seconds, for `launch.doctor`: `torchrun ... -m launch.collective`.

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

_SECONDS, _BYTES = 5.0, 64 * 2**20


def measure() -> dict[str, Any]:
    """Initialise the process group from the environment, benchmark all-reduce, and return the result.

    Returns:
        `bytes_per_second` sent per rank, 2 (p - 1) / p per byte reduced; `bytes` of the tensor; `backend`; `world_size`;
        the `hosts` and `versions` of all ranks; and the `clock_skew` between them, in seconds.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
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
        count = max(1, min(1000, int(_SECONDS / float(times))))
        best = min(reduce_once() for _ in range(count))
        assert float(tensor[0]) == world
        gathered: list[Any] = [None] * world
        dist.barrier()
        dist.all_gather_object(gathered, (time.time(), socket.gethostname(), _versions()))
        clocks = [clock for clock, _, _ in gathered]
        return {
            "bytes_per_second": 2 * (world - 1) / world * _BYTES / best,
            "bytes": _BYTES,
            "backend": dist.get_backend(),
            "world_size": world,
            "hosts": [host for _, host, _ in gathered],
            "versions": [version for _, _, version in gathered],
            "clock_skew": max(clocks) - min(clocks),
        }
    finally:
        dist.destroy_process_group()


def _versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes."""
    packages = installed_versions("torch", "deepspeed", "triton", "numpy")
    return {"python": platform.python_version(), **packages}


if __name__ == "__main__":
    result = measure()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result), flush=True)
