"""Properties of a tensor that a kernel depends on: plain memory, device, layout of its rows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .autograd import is_dual

_traced_gpu: tuple[int, int] | None = None  # see `meta_as_gpu`


@contextlib.contextmanager
def meta_as_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Take tensors on the meta device for those of a GPU while it is entered, so that a trace runs what a GPU would run.

    Kernels are chosen as on a GPU of this compute capability, and must not be launched: who traces replaces the launcher.
    """
    global _traced_gpu
    before, _traced_gpu = _traced_gpu, capability
    try:
        yield
    finally:
        _traced_gpu = before


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU."""
    return tensor.is_cuda or (_traced_gpu is not None and tensor.is_meta)


def capability_of(tensor: Tensor) -> tuple[int, int]:
    """Return the compute capability of the GPU that holds a tensor, as (9, 0) for sm_90."""
    if _traced_gpu is not None and tensor.is_meta:
        return _traced_gpu
    return _capability(tensor.device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read the tensor's memory.

    False while torch.compile traces or torch.func transforms, for a tensor with a tangent of forward mode, and for subclasses
    such as FakeTensor and DTensor.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return not is_functorch_wrapped_tensor(tensor) and not is_dual(tensor)


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of torch.func wraps a tensor in eager mode."""
    return not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(tensor)


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
