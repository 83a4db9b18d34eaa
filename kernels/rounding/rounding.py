"""Matrices in low precision: FP8, MXFP8 and NVFP4, by operations of torch on any device; FP8 on a GPU by kernels (`triton.py`).

    fp8     E4M3 or E5M2 (Micikevicius 2022, arXiv 2209.05433), one scale per row or per matrix, from its present maximum
    mxfp8   E4M3, 32 numbers of a row share a power of two (OCP Microscaling Formats 1.0, section 5.2)
    nvfp4   E2M1, 16 numbers of a row share a scale in E4M3 and the matrix one in fp32 (NVIDIA 2025, arXiv 2509.25149)

Shapes: R rows, K columns.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensors import is_plain, on_gpu
from ..triton.runtime import interpreted, serves

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TINY = 1e-30  # keeps the scale of zeros finite
_MX_BLOCK, _NV_BLOCK = 32, 16
_E2M1_MAX = 6.0


class Rounded(NamedTuple):
    """A matrix (R, K) in low precision: values times scale, where the scale is (R, 1) or (1, 1)."""

    values: Tensor
    scale: Tensor | None = None  # None: 1


def round_fp8(x: Tensor, dtype: torch.dtype, rowwise: bool) -> Rounded:
    """Round (R, K) to FP8 so that the largest magnitude, of each row or of the whole, becomes the largest of the format.

    What is not finite makes its scale NaN or its values, and so every product.
    """
    largest = torch.finfo(dtype).max
    kernels = _kernels(x)
    if kernels is not None and rowwise and x.stride(1) == 1:
        values, scale = torch.empty(x.shape, dtype=dtype, device=x.device), x.new_empty(len(x), 1, dtype=torch.float32)
        kernels.round_rows(x, values, scale, largest, TINY)
        return Rounded(values, scale)
    # One pass, which writes no magnitudes.
    amax = torch.linalg.vector_norm(x, math.inf, dim=1 if rowwise else None, keepdim=True)
    scale = amax.float().clamp_(min=TINY).div_(largest)
    if kernels is not None:
        values = torch.empty(x.shape, dtype=dtype, device=x.device)
        kernels.round_scaled(x, values, scale, largest)
        return Rounded(values, scale)
    return Rounded((x / scale).clamp_(-largest, largest).to(dtype).contiguous(), scale)


def fp8_rows(h: Tensor) -> tuple[Tensor, Tensor]:
    """Round (..., d_ff) to E4M3 with a scale per row: the values, of the same shape, and the scales (..., 1)."""
    values, scale = round_fp8(h.reshape(h.shape[:-1].numel(), h.shape[-1]), E4M3, rowwise=True)
    assert scale is not None  # FP8 has one
    return values.view(h.shape), scale.view(*h.shape[:-1], 1)


def _kernels(x: Tensor) -> ModuleType | None:
    """Return the module of Triton kernels, if they serve this matrix."""
    if not (on_gpu(x) or interpreted()) or not is_plain(x) or not serves(x) or not x.numel():
        return None
    from . import triton

    return triton


def round_mxfp8(x: Tensor) -> Rounded:
    """Round (R, K) to MXFP8: the result holds values times their blocks' scales, which is exact in fp32."""
    blocks, width = _blocks(x, _MX_BLOCK)
    _, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True))  # of m 2^e with m in [0.5, 1)
    # The largest power of two of E4M3 is 2^8; the shared exponent has 8 bits.
    scale = torch.exp2((exponent - 1 - 8).clamp_(-127, 127).float())
    largest = torch.finfo(E4M3).max
    rounded = (blocks / scale).clamp_(-largest, largest).to(E4M3).float()
    return Rounded((rounded * scale).flatten(1)[:, :width])


def round_nvfp4(x: Tensor) -> Rounded:
    """Round (R, K) to NVFP4: the result holds values times their blocks' scales, and the tensor's scale apart."""
    blocks, width = _blocks(x, _NV_BLOCK)
    amax = blocks.abs().amax(-1, keepdim=True)
    whole = amax.amax().clamp_(min=TINY) / (torch.finfo(E4M3).max * _E2M1_MAX)
    scale = (amax / (_E2M1_MAX * whole)).to(E4M3).float()  # of a block, relative to the tensor's
    scaled = torch.where(scale > 0, blocks / (scale * whole), 0.0)
    return Rounded((round_e2m1(scaled) * scale).flatten(1)[:, :width], whole.view(1, 1))


def round_e2m1(x: Tensor) -> Tensor:
    """Round fp32 numbers to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, to even where two are as near; saturating."""
    x = x.clamp(-_E2M1_MAX, _E2M1_MAX)
    _, exponent = torch.frexp(x)
    step = torch.exp2((exponent - 1).clamp_(min=0).float() - 1)  # of the binade; 0.5 below 1 too
    return torch.round(x / step) * step


def _blocks(x: Tensor, size: int) -> tuple[Tensor, int]:
    """Return (R, K) as fp32 blocks (R, ceil(K / size), size), the last one filled with zeros, and K."""
    width = x.shape[1]
    return F.pad(x.float(), (0, -width % size)).unflatten(1, (-1, size)), width
