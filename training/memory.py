"""Out of memory, as one sentence: what a run needs, what there is, and what to change.

The need is the estimate of `launch/estimate/counts.py`. A run whose weights, gradients and optimizer state alone exceed the
memory is refused before anything is built; any other allocation that fails is explained when it does.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from conf.schema import Config
from conf.shape import Shape, shape_of
from conf.validate import Batch
from kernels.common.errors import UserError
from launch.estimate.counts import CHECKPOINTING, peak_bytes, state_bytes
from launch.ranks import Ranks

# What a failed allocation says: PyTorch on CPUs and GPUs, the C++ library, cuBLAS, a thread, a library that is loaded.
_SIGNS = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "bad_alloc",
    "ALLOC_FAILED",
    "can't start new thread",
    "failed to map segment",
)
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class MemoryBudget:
    """What a run needs per rank, and what there is for a rank.

    Args:
        bf16: whether it trains in bf16; else fp32.
    """

    def __init__(
        self, config: Config, batch: Batch, shape: Shape, ranks: Ranks, device: torch.device, bf16: bool
    ) -> None:
        self.config, self.batch, self.shape, self.bf16 = config, batch, shape, bf16
        self.on_gpu, self._local_ranks, self._device = device.type == "cuda", ranks.local_world_size, device
        self._dp_cp = batch.data_parallel * config.parallel.context

    def check(self) -> None:
        """Refuse a run whose weights, gradients and optimizer state do not fit.

        Raises:
            UserError: what they need, what there is, and what to change.
        """
        zero, offload = self.config.zero, self.config.zero.offload_optimizer and self.on_gpu
        arguments = (self.config.parallel.tensor, self._dp_cp, zero.stage, self.bf16, self.batch.accumulation, offload)
        states = state_bytes(self.shape, *arguments, optimizer=self.config.optim.name)
        if zero.offload_parameters and self.on_gpu:
            states["weights"] = 0.0
        there, what = self.available()
        if sum(states.values()) > there:
            raise UserError(
                f"not enough memory to train: {_parts(states)} take {_gib(sum(states.values()))} per rank, "
                f"and there are {_gib(there)} ({what}): {self._remedy(there)}"
            )

    def available(self) -> tuple[float, str]:
        """Return the bytes that a rank may allocate from now on, and what bounds them."""
        if self.on_gpu:
            free, total = torch.cuda.mem_get_info(self._device)
            own = torch.cuda.memory_reserved(self._device)
            return free + own, f"free of the {_gib(total)} of {torch.cuda.get_device_name(self._device)}"
        bounds = [(psutil.virtual_memory().total + psutil.swap_memory().total, "RAM and swap of this machine")]
        for path in _CGROUP_LIMITS:
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                bounds.append((int(Path(path).read_text()), "the memory limit of this job or container"))
        node, what = min(bounds)
        shared = "" if self._local_ranks == 1 else f", over {self._local_ranks} ranks"
        there = [(node / self._local_ranks, what + shared)]
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            used = 0 if sys.platform == "darwin" else psutil.Process().memory_info().vms
            there.append((max(0.0, limit - used), f"left of the limit on address space, ulimit -v {limit // 1024}"))
        return min(there)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Convert a failed allocation inside to a sentence.

        Raises:
            UserError: what the run needs by the estimate, what there is, and what to change.
        """
        there, what = self.available()
        try:
            yield
        except (RuntimeError, MemoryError, ImportError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            needs = self._peak(self.config, self.batch.micro_batch)
            raise UserError(
                f"out of memory: this run needs about {_gib(sum(needs.values()))} per rank ({_parts(needs)}), "
                f"and there were {_gib(there)} ({what}): {self._remedy(min(there, 0.9 * sum(needs.values())))}"
            ) from error

    def _peak(self, config: Config, micro_batch: int) -> dict[str, float]:
        accumulation = self.batch.micro_batch * self.batch.accumulation // micro_batch
        shape = shape_of(config, self.shape.vocab_size)  # what its layers save depends on the checkpointing
        return peak_bytes(config, shape, self._dp_cp, micro_batch, accumulation, self.bf16, self.on_gpu)

    def _remedy(self, there: float) -> str:
        """Return the mildest change after which the run fits into `there` bytes by the estimate."""
        changed, keys, micro = copy.deepcopy(self.config), {}, self.batch.micro_batch
        while micro > 1:
            micro = max(n for n in range(1, micro) if self.batch.micro_batch % n == 0)
            if sum(self._peak(changed, micro).values()) <= there:
                return f"set micro_batch_size={micro}"
        if self.batch.micro_batch > 1:
            keys["micro_batch_size"] = 1
        model, zero = changed.model, changed.zero
        further = CHECKPOINTING[CHECKPOINTING.index(model.activation_checkpointing) + 1 :]
        settings = (
            *(("model.activation_checkpointing", model, "activation_checkpointing", value, True) for value in further),
            ("zero", zero, "stage", 3, self._dp_cp > 1),
            ("zero.offload_optimizer", zero, "offload_optimizer", True, self.on_gpu and zero.stage > 0),
        )
        for key, group, name, value, possible in settings:
            if possible and getattr(group, name) != value:
                setattr(group, name, value)
                keys[key] = str(value).lower()
                if sum(self._peak(changed, micro).values()) <= there:
                    return "set " + " ".join(f"{key}={value}" for key, value in keys.items())
        return "take a smaller model, or more ranks with zero=3 or parallel.tensor (python -m launch.estimate finds a layout)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be allocated."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return any(sign in str(error) for sign in _SIGNS)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def _parts(sizes: dict[str, float]) -> str:
    """Return the sizes that count, largest first: `optimizer 24.2 GiB + weights 12.1 GiB`."""
    shown = sorted(((size, name) for name, size in sizes.items() if size >= 0.05 * max(sizes.values())), reverse=True)
    return " + ".join(f"{name} {_gib(size)}" for size, name in shown)
