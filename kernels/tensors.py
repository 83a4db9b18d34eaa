"""Properties of a tensor that a kernel depends on: plain memory, device, layout of its rows."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read the tensor's memory.

    False while torch.compile traces or torch.func transforms, and for subclasses such as FakeTensor and DTensor.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return not is_functorch_wrapped_tensor(tensor)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which kernels launch on the GPU that holds x; on a CPU it has no effect."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def runs(x: Tensor) -> tuple[Tensor, int, int]:
    """Return (x or a contiguous copy, rows per run, elements between the beginnings of two runs).

    A run is a contiguous matrix of the last two dimensions, so that a slice of the heads of a packed tensor needs no copy.
    """
    if x.ndim < 2:
        return x.contiguous(), 1, 0
    rows, width = x.shape[-2:]
    shape, strides = x.shape[:-2], x.stride()[:-2]
    regular = all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(len(shape) - 1))
    if shape and regular and x.stride()[-2:] == (width, 1):
        return x, rows, strides[-1]
    return x.contiguous(), rows, rows * width
