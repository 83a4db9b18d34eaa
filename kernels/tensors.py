"""What a kernel has to know of a tensor before it reads the tensor's memory."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has data of its own here and now.

    Not while torch.compile traces or torch.func transforms, and no FakeTensor or DTensor.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Enter it to launch a kernel on the GPU that holds x; on a CPU it does nothing."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def runs(x: Tensor) -> tuple[Tensor, int, int]:
    """Return x, or a copy, as rows that follow each other in runs: (x, rows of a run, distance of two runs in elements).

    A run is a matrix of the last two dimensions, so that a slice of the heads of a packed tensor needs no copy.
    """
    if x.ndim < 2:
        return x.contiguous(), 1, 0
    rows, width = x.shape[-2:]
    shape, strides = x.shape[:-2], x.stride()[:-2]
    apart = all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(len(shape) - 1))
    if shape and apart and x.stride()[-2:] == (width, 1):
        return x, rows, strides[-1]
    return x.contiguous(), rows, rows * width
