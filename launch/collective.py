"""Five seconds of all-reduce over the ranks of a launcher, for `launch.doctor`: `torchrun ... -m launch.collective`.

Rank 0 prints a line of JSON: what `measure` returns.
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
    """Join the ranks that the environment names, and return what they reached.

    Returns:
        `bytes_per_second` that a rank sends, 2 (p - 1) / p bytes of each byte reduced; `bytes` of the tensor; `backend`;
        `world_size`; of every rank its `hosts` and `versions`; and the `clock_skew` between them, in seconds.
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

        reduce_once()  # connections are made
        times = torch.tensor([reduce_once() for _ in range(3)], device=device).max()
        dist.all_reduce(times, op=dist.ReduceOp.MAX)  # so that all take as many
        count = max(1, min(1000, int(_SECONDS / float(times))))
        best = min(reduce_once() for _ in range(count))
        assert float(tensor[0]) == world
        told: list[Any] = [None] * world
        dist.barrier()
        dist.all_gather_object(told, (time.time(), socket.gethostname(), _versions()))
        clocks = [clock for clock, _, _ in told]
        return {
            "bytes_per_second": 2 * (world - 1) / world * _BYTES / best,
            "bytes": _BYTES,
            "backend": dist.get_backend(),
            "world_size": world,
            "hosts": [host for _, host, _ in told],
            "versions": [version for _, _, version in told],
            "clock_skew": max(clocks) - min(clocks),
        }
    finally:
        dist.destroy_process_group()


def _versions() -> dict[str, str]:
    """Return what has to be the same on all nodes."""
    packages = installed_versions("torch", "deepspeed", "triton", "numpy")
    return {"python": platform.python_version(), **packages}


if __name__ == "__main__":
    told = measure()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(told), flush=True)
