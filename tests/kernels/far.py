"""What tests of offsets beyond 32 bits need, in the interpreter's process: large tensors that hold no memory."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor


def far_tensors(count: int, *shape: int) -> list[Tensor]:
    """Return fp32 tensors of zeros that hold memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    size = 4 * math.prod(shape)
    return [torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float32).view(shape) for _ in range(count)]


@contextlib.contextmanager
def last_program() -> Iterator[None]:
    """While it is entered, the interpreter runs of each dimension of a grid the last program alone."""
    from triton.runtime import interpreter

    interpreter.range = lambda count: range(count - 1, count)
    try:
        yield
    finally:
        del interpreter.range
