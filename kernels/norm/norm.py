"""RMSNorm over the last dimension, fused with the preceding addition to the residual stream.

Forward and backward are one pass over memory each: in C on a CPU (`norm.c`), in Triton on an NVIDIA GPU (`triton.py`), with
fp32 inside and one rounding at each store. Other tensors take plain PyTorch. The layer that holds the weight is the caller's.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import FirstOrder
from ..c import library as c
from ..tensors import is_plain, on_gpu, runs

_FIRST_ORDER = FirstOrder("a fused RMSNorm", "take torch.nn.functional.rms_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return y = s / sqrt(mean(s^2) + eps) * weight and s = x + residual; without a residual, s is x.

    Zhang and Sennrich 2019, arXiv 1910.07467. Differentiable once, in x, weight and residual, from both results.

    >>> import torch
    >>> x, weight = torch.randn(2, 10, 64), torch.ones(64)
    >>> y, s = rms_norm(x, weight, eps=1e-5, residual=torch.randn(2, 10, 64))
    >>> y.shape, s.shape
    (torch.Size([2, 10, 64]), torch.Size([2, 10, 64]))

    Args:
        x: (..., d) of any floating dtype.
        weight: (d,).
        eps: added to the mean square.
        residual: of the shape, dtype and device of x.

    Raises:
        ValueError: shapes or devices do not match, or the dtypes of x and residual differ.
    """
    fits = residual is None or (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
    if not fits or not x.ndim or weight.shape != x.shape[-1:] or weight.device != x.device:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (x, weight, residual) if t is not None)
        raise ValueError(f"x, weight and residual of a norm do not fit together: {given}")
    backend = _backend(x) if all(is_plain(t) for t in (x, weight, residual) if t is not None) else None
    if backend is None:
        s = x if residual is None else x + residual
        return F.rms_norm(s, weight.shape, weight, eps), s
    if residual is None:
        return _RMSNorm.apply(backend, x, None, weight, eps), x
    return _RMSNorm.apply(backend, x, residual, weight, eps)


class Backend(NamedTuple):
    """An implementation of RMSNorm.

    Attributes:
        forward: (x, residual, weight, eps) -> (y, s, rstd), with rstd = 1 / sqrt(mean(s^2) + eps) of each row.
        backward: (dy, ds, s, weight, rstd) -> (gradient of s, which is that of x and of residual; gradient of the weight).
    """

    forward: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _backend(x: Tensor) -> Backend | None:
    """Return the backend for tensors like x; None: PyTorch's own function, which compiles, and is one kernel on a GPU."""
    if not is_plain(x):
        return None
    if on_gpu(x):
        from ..triton import runtime

        if not runtime.serves(x):
            return None
        from . import triton as norm_triton

        return Backend(norm_triton.forward, norm_triton.backward) if x.shape[-1] <= norm_triton.WIDEST else None
    return C if c.serves(x) and _library() else PLAIN


# ---------------------------------------------------------------------------------------------------------- plain PyTorch


def _plain_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend`; the mean square is accumulated in fp32, the products are in the dtype of x."""
    s = x if residual is None else x + residual
    precise = torch.promote_types(s.dtype, torch.float32)
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True, dtype=precise)
    rstd = norm.square_().div_(s.shape[-1]).add_(eps).rsqrt_().to(s.dtype)  # (..., 1)
    return (s * rstd).mul_(weight), s, rstd


def _plain_backward(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    # With g = dy and r = rstd: dx = r w g - s r^3 mean(w g s) and dw = sum over rows of r g s. Both reduce g s, by matrix
    # products.
    precise = torch.promote_types(s.dtype, torch.float32)
    product = (dy * s).flatten(0, -2)
    dweight = torch.mm(rstd.view(1, -1), product).flatten()
    mean = torch.mm(product, weight.unsqueeze(1)).view_as(rstd).to(precise) / s.shape[-1]
    coefficient = (mean * rstd.to(precise) ** 3).to(s.dtype)
    dx = (dy * weight).mul_(rstd).addcmul_(s, coefficient, value=-1)
    return dx if ds is None else dx.add_(ds), dweight


PLAIN = Backend(_plain_forward, _plain_backward)

# ---------------------------------------------------------------------------------------------------------------------- C


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    signatures = {"forward": [pointer] * 6 + [number] * 4 + [ctypes.c_float], "backward": [pointer] * 7 + [number] * 5}
    return c.load_file(Path(__file__).with_suffix(".c"), signatures)


def _c_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, run, stride = runs(x if residual is None else x.contiguous())
    y, s = torch.empty(x.shape, dtype=x.dtype, device=x.device), x
    if residual is not None:
        residual, s = residual.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _call("forward", x, (x, residual, weight.float().contiguous(), y, s, rstd), run, stride, eps)
    return y, s, rstd


def _c_backward(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    (dy, run, dy_stride), (s, _, s_stride) = runs(dy), runs(s)
    ds = None if ds is None else ds.contiguous()
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=s.device)
    _call("backward", s, (dy, ds, s, weight.float().contiguous(), rstd, dx, dweight), run, dy_stride, s_stride)
    return dx, dweight


def _call(name: str, like: Tensor, tensors: tuple[Tensor | None, ...], *numbers: float) -> None:
    """Call a C kernel for the rows of `like`."""
    if not like.numel():
        return
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    rows = like.numel() // like.shape[-1]
    if getattr(_library(), f"{name}_{c.NAMES[like.dtype]}")(*addresses, rows, like.shape[-1], *numbers):
        raise MemoryError("cannot allocate the partial sums of the gradient of a norm's weight")


C = Backend(_c_forward, _c_backward)


# ------------------------------------------------------------------------------------------------------------- the function


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: Backend, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, s, rstd = backend.forward(x, residual, weight, eps)
        ctx.backend = backend
        # Without a residual s is x, or a copy of it, which the refusal of second derivatives would not find.
        ctx.save_for_backward(x if residual is None else s, weight, rstd)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, s)

    @staticmethod
    @_FIRST_ORDER.once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        ctx: Any, dy: Tensor | None, ds: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, ds, ds, None, None
        s, weight, rstd = ctx.saved_tensors
        dx, dweight = ctx.backend.backward(dy, ds, s, weight, rstd)
        return None, dx, dx if ctx.needs_input_grad[2] else None, dweight.to(weight.dtype), None
