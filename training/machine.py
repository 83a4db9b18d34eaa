"""The hardware: device, dtype to train in, threads, memory allocation and peak speed."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time

import psutil
import torch

from conf.schema import Config
from kernels.common.errors import UserError
from launch.ranks import Ranks

# Dense bf16 tensor-core peak in FLOP/s, from the vendors' data sheets, by a substring of the device's name. First match counts.
_PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}

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


def find_device(ranks: Ranks) -> torch.device:
    """Return this rank's GPU, or the CPU if there is none. `DS_ACCELERATOR=cpu` selects the CPU on a machine with GPUs.

    Raises:
        UserError: the node has fewer GPUs than ranks.
    """
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {ranks.rank} has local rank {ranks.local_rank}, but its node has {torch.cuda.device_count()} GPU(s)"
            )
        torch.cuda.set_device(ranks.local_rank)
        return torch.device("cuda", ranks.local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it guessed
    # torchrun always sets OMP_NUM_THREADS=1; without torchrun, a value is the user's choice.
    if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        torch.set_num_threads(max(1, _usable_cores() // ranks.local_world_size))
    # Denormal gradients (below 1e-38) would slow arithmetic down by an order of magnitude.
    torch.set_flush_denormal(True)
    return torch.device("cpu")


def find_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Resolve `precision=auto`: bf16 if the hardware multiplies bf16 and the ZeRO stage is not 0, else fp32."""
    if config.precision.name != "auto":
        return torch.bfloat16 if config.precision.name == "bf16" else torch.float32
    if config.zero.stage == 0:
        return torch.float32
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return (peak FLOP/s of this device, the source of that figure). MFU is relative to it.

    A GPU's peak is from its data sheet. A CPU's is measured: the best of 5 to 20 matmuls of 1024 x 1024, a tenth of a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for model, peak in _PEAK_BF16_FLOPS.items():
            if model in name:
                return peak, f"data sheet of {name}, dense bf16"
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < 5 or (len(seconds) < 20 and sum(seconds) < 0.1):
        start = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(seconds), f"measured, {str(dtype).removeprefix('torch.')} matmul of 1024 x 1024"


class PeakSpeed:
    """Peak FLOP/s of this rank's device, to which MFU is relative.

    Attributes:
        flops: FLOP/s. source: of that figure, for the console.
    """

    MEASUREMENTS = 5  # at most; each takes a tenth of a second

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype, self._left = device, dtype, self.MEASUREMENTS - 1
        self.flops, self.source = peak_flops(device, dtype)

    def mfu(self, flops_per_second: float) -> float | None:
        """Return the model FLOPs utilization of this rank; None if it is unknown.

        Beside other work a peak is measured too low. Above 100% it is measured again; what stays above is not plausible.
        """
        while flops_per_second > self.flops and self._left and self.source.startswith("measured"):
            self._left -= 1
            self.flops = max(self.flops, peak_flops(self._device, self._dtype)[0])
        return flops_per_second / self.flops if flops_per_second <= self.flops else None


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
