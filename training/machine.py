"""What this machine is: its device, the dtype to train in, threads, memory allocation, and its peak speed."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time

import psutil
import torch

from conf.errors import UserError
from conf.schema import Config
from launch.ranks import Ranks

# Dense bf16 tensor-core peak of data-center GPUs in FLOP/s, from their makers' data sheets, by a part of the device's name.
_PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}
_PEAK_BF16 |= {"B200": 2250e12, "GB200": 2500e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12}


# Settings of <malloc.h> (glibc), as (number, value).
_MALLOC = (
    (-4, 0),  # M_MMAP_MAX: take every block from the heap, whatever its size
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: never give the top of the heap back
    (-2, 256 * 2**20),  # M_TOP_PAD: grow the heap in large steps
    (-8, 1),  # M_ARENA_MAX: all threads share the one heap that is warm
)


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next allocation; call it before torch is imported.

    glibc takes each large block from the kernel and gives it back when it is freed, so that every step of a loop on a CPU
    pays a page fault and a zeroed page for each 4 KiB of its activations. Kept on the heap, they stay the process's own. The
    settings are made from inside, so it does not matter which launcher started the process. bench/LOG.md has the effect.

    Returns:
        Whether every setting was taken. False where the C library has none (musl, macOS); never raises.
    """
    # Pages of 2 MiB for tensors that are larger than that; torch reads it at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return sum(mallopt(setting, value) == 1 for setting, value in _MALLOC) == len(_MALLOC)


def find_device(ranks: Ranks) -> torch.device:
    """Return this rank's GPU, or the CPU where there is none. `DS_ACCELERATOR=cpu` chooses the CPU beside a GPU."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {ranks.rank} is number {ranks.local_rank} on its node, which has {torch.cuda.device_count()} GPU(s)"
            )
        torch.cuda.set_device(ranks.local_rank)
        return torch.device("cuda", ranks.local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it had to guess
    # torchrun sets OMP_NUM_THREADS=1 for everybody; anyone else who set it meant it.
    if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 10**6, _physical_cores())
        torch.set_num_threads(max(1, cores // ranks.local_world_size))
    # Gradients that fade below 1e-38 would otherwise slow the arithmetic down by an order of magnitude.
    torch.set_flush_denormal(True)
    return torch.device("cpu")


def find_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Resolve `precision=auto`: bf16 where the hardware multiplies bf16, else fp32; fp32 for ZeRO stage 0."""
    if config.precision.name != "auto":
        return torch.bfloat16 if config.precision.name == "bf16" else torch.float32
    if config.zero.stage == 0:
        return torch.float32
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return (FLOP/s, where the figure is from) against which MFU is quoted.

    A GPU's is its data sheet's. A CPU's is measured: the best of 20 products of 1024 x 1024 matrices, a tenth of a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in _PEAK_BF16.items():
            if part in name:
                return peak, f"{name}, dense bf16 of its data sheet"
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best, f"measured, {str(dtype).removeprefix('torch.')} product of 1024 x 1024 matrices"


def describe(device: torch.device) -> str:
    """Return a few words for the summary."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of this rank so far: of the device on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _physical_cores() -> int:
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _cpu_has_bf16() -> bool:
    # Without these instructions bf16 products are emulated, and slower than fp32.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
