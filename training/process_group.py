"""The process group of a run. Starting it does not import DeepSpeed, which takes seconds: ranks agree before they build."""

from __future__ import annotations

import datetime
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from launch.ranks import Ranks


def start_process_group(ranks: Ranks, device: torch.device, timeout_minutes: float) -> None:
    """Initialise torch.distributed: NCCL on GPUs, gloo on CPUs. A single rank needs no port."""
    # DeepSpeed, and torch before 2.13, have only the old names of two collectives.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if ranks.world_size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # public, but missing in torch's __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    elif store := restart_store(ranks, timeout):
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def restart_store(ranks: Ranks, timeout: datetime.timedelta) -> Any:
    """Return the store of ranks that `torchrun --max-restarts` started again, without the addresses of those that failed.

    None where there are no such ranks: torch makes the store then.

    torchrun keeps its store across restarts, and so do the old ranks' addresses in it, which nobody answers. On several nodes
    the number of restarts differs between nodes, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has the same effect.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or restarts == "0" or ranks.world_size != ranks.local_world_size:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Public, but missing in torch's __all__.
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
    return dist.PrefixStore(f"restart {restarts}", store)  # pyright: ignore[reportPrivateImportUsage]
