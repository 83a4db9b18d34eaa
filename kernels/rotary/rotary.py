"""Rotary position embedding of queries and keys, in the half-split layout: channels i and i + E/2 form a pair.

Forward and backward are one pass over memory each: in C on a CPU (`rotary.c`), in Triton on an NVIDIA GPU (`triton.py`), with
fp32 inside and one rounding at each store. Other tensors take plain PyTorch. The angles are the caller's.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..c import library as c
from ..tensors import is_plain, on_gpu

# (x, cos, sin, direction) -> x rotated; `direction` is 1, or -1 for the inverse rotation.
Backend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k with every pair (a, b) of channels (i, i + E/2) rotated to (a cos - b sin, b cos + a sin).

    Su 2021, arXiv 2104.09864. Differentiable in q and k.

    >>> import torch
    >>> q, k = torch.randn(2, 10, 8, 64), torch.randn(2, 10, 4, 64)
    >>> angles = torch.outer(torch.arange(10.0), 10000 ** (-torch.arange(0, 64, 2) / 64))
    >>> q, k = rotate(q, k, angles.cos(), angles.sin())
    >>> q.shape, k.shape
    (torch.Size([2, 10, 8, 64]), torch.Size([2, 10, 4, 64]))

    Args:
        q, k: (B, S, heads, E) of any strides, such as slices of a packed tensor; their numbers of heads may differ.
        cos, sin: (S, E/2) of the angles, in fp32, or in fp64 for fp64 q and k.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    fits = q.ndim == k.ndim == 4 and q.shape[3] % 2 == 0
    if fits:
        length, width = q.shape[1::2]
        table = torch.Size((length, width // 2)), torch.promote_types(q.dtype, torch.float32), q.device
        fits = all((t.shape, t.dtype, t.device) == table for t in (cos, sin))
        fits = fits and (k.shape[1], k.shape[3], k.dtype, k.device) == (length, width, q.dtype, q.device)
    if not fits:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (q, k, cos, sin))
        raise ValueError(f"q, k, cos and sin of a rotation do not fit together: {given}")
    if not all(map(is_plain, (q, k, cos, sin))):
        return _plain(q, cos, sin, 1), _plain(k, cos, sin, 1)
    return _Rotate.apply(_backend(q), q, k, cos, sin, 1)


def _backend(x: Tensor) -> Backend:
    """Return the backend for tensors like x."""
    if on_gpu(x):
        from ..triton import runtime

        if runtime.serves(x):
            from . import triton as rotary_triton

            return rotary_triton.rotate
    return _c if c.serves(x) and _library() else _plain


# ---------------------------------------------------------------------------------------------------------- plain PyTorch


def _plain(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    along = torch.cat((cos, cos), -1).to(x.dtype).unsqueeze(1)  # (S, 1, E)
    across = torch.cat((-sin, sin), -1).to(x.dtype).unsqueeze(1)
    return (x * along).addcmul_(x.roll(x.shape[-1] // 2, -1), across, value=direction)


# ---------------------------------------------------------------------------------------------------------------------- C


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    return c.load_file(
        Path(__file__).with_suffix(".c"), {"rotate": [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 7 + [ctypes.c_float]}
    )


def _c(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    addresses = (tensor.data_ptr() for tensor in (x, y, cos.contiguous(), sin.contiguous()))
    rotated = getattr(_library(), f"rotate_{c.NAMES[x.dtype]}")
    rotated(*addresses, *x.shape[:3], x.shape[3] // 2, *x.stride()[:3], direction)
    return y


# ------------------------------------------------------------------------------------------------------------- the function


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the inverse rotation, which has a gradient in turn."""

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, direction: int
    ) -> tuple[Tensor, Tensor]:
        ctx.backend, ctx.direction = backend, direction
        ctx.save_for_backward(cos, sin)
        return backend(q, cos, sin, direction), backend(k, cos, sin, direction)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        ctx: Any, dq: Tensor, dk: Tensor
    ) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, *_Rotate.apply(ctx.backend, dq, dk, cos, sin, -ctx.direction), None, None, None
