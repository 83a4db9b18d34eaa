"""The hardware: device, dtype to train in, threads and memory allocation."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import psutil
import torch

from conf.schema import Config
from conf.validate import trains_in_bf16
from launch.ranks import Ranks, gpu_index, installed_gpus

# Parameters of glibc's mallopt (<malloc.h>): (number, value).
_MALLOPT = (
    (-4, 0),  # M_MMAP_MAX: allocate every block on the heap, whatever its size
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: never return the top of the heap to the kernel
    (-2, 256 * 2**20),  # M_TOP_PAD: grow the heap in large steps
    (-8, 1),  # M_ARENA_MAX: all threads share one heap, whose pages are already mapped
)


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for later allocations. Call it before the first tensor is allocated.

    By default glibc maps each large block anew and unmaps it when it is freed, so every training step on a CPU pays a page
    fault and a zeroed page per 4 KiB of activations. On the heap the pages stay mapped. `mallopt` works under any launcher,
    unlike environment variables. bench/LOG.md has the measured effect.

    Returns:
        Whether every parameter was accepted. False if the C library has no mallopt (musl, macOS); never raises.
    """
    # Huge pages (2 MiB) for tensors larger than one; torch reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return sum(mallopt(parameter, value) == 1 for parameter, value in _MALLOPT) == len(_MALLOPT)


def uses_gpu() -> bool:
    """Whether ranks train on GPUs here. `DS_ACCELERATOR=cpu` selects the CPU on a machine with GPUs."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def find_device(ranks: Ranks) -> torch.device:
    """Return this rank's GPU, or the CPU if there is none, and share the cores of the node between its ranks.

    Raises:
        UserError: the node has fewer GPUs than ranks.
    """
    # torchrun always sets OMP_NUM_THREADS=1; without torchrun, a value is the user's choice. On a GPU the threads compute what
    # is offloaded to the host.
    if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        torch.set_num_threads(max(1, _usable_cores() // ranks.local_world_size))
    if uses_gpu():
        index = gpu_index(ranks, torch.cuda.device_count(), installed_gpus())
        torch.cuda.set_device(index)
        # DeepSpeed takes its local rank for the number of a GPU, and compares it with Open MPI's.
        os.environ["LOCAL_RANK"] = str(index)
        if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
            os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)
        return torch.device("cuda", index)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it guessed
    # Denormal gradients (below 1e-38) would slow arithmetic down by an order of magnitude.
    torch.set_flush_denormal(True)
    return torch.device("cpu")


def find_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Resolve `precision=auto`: bf16 if the hardware multiplies bf16 and the ZeRO stage is not 0, else fp32."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if trains_in_bf16(config.precision.name, config.zero.stage, fast) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that `precision` has for a dtype to train in."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def describe(device: torch.device) -> str:
    """Return a short description of the device for the console."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def memory_gib(device: torch.device) -> float:
    """Return this rank's peak memory so far: of the device on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB; in bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _usable_cores() -> int:
    """Return the number of physical cores, or of CPUs that this process may run on if they are fewer."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return min(len(os.sched_getaffinity(0)), physical) if hasattr(os, "sched_getaffinity") else physical


def _cpu_has_bf16() -> bool:
    # Without these instructions bf16 matmuls are emulated, and slower than fp32.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
