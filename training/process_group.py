"""The process groups of a run. Starting them does not import DeepSpeed, which takes seconds: ranks agree before they build."""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from kernels.common.errors import TryAgain
from launch.heartbeats import flights_of
from launch.ranks import Ranks


def start_process_group(ranks: Ranks, device: torch.device, timeout_minutes: float) -> None:
    """Initialise torch.distributed: NCCL on GPUs, gloo on CPUs. A single rank needs no port.

    Args:
        timeout_minutes: of a collective, in this group and in all that are created later, by DeepSpeed too.

    Raises:
        TryAgain: another process has taken the port since it was found free.
    """
    # DeepSpeed, and torch before 2.13, have only the old names of two collectives.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    set_default_timeout(timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if ranks.world_size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # public, but missing in torch's __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    elif store := restart_store(ranks, timeout):
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
    else:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
                raise
            port = os.environ.get("MASTER_PORT")
            raise TryAgain(f"port {port} was taken while the ranks started: run the same command again") from error


def record_collectives(run: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let NCCL's flight recorder write its last collectives to the run's `stacks` after a timeout, unless the user decides.

    Call it before the process group is started. `torchfrtrace` reads the files.
    """
    environment.setdefault("TORCH_FR_BUFFER_SIZE", environment.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"))
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    prefix = environment.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(flights_of(run)))
    environment.setdefault("TORCH_FR_DUMP_TEMP_FILE", prefix)
    with contextlib.suppress(OSError):
        Path(environment["TORCH_FR_DUMP_TEMP_FILE"]).parent.mkdir(parents=True, exist_ok=True)


def set_default_timeout(timeout: datetime.timedelta) -> None:
    """Set the timeout of every group that is created without one.

    DeepSpeed's `new_group` takes none, and torch's own default is 10 minutes for NCCL and 30 for gloo.
    """
    distributed_c10d.default_pg_timeout = timeout
    setattr(distributed_c10d, "default_pg_nccl_timeout", timeout)  # noqa: B010  # missing in torch's __all__


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
