"""The Triton kernel of `rotary.py`: a Triton program rotates a tile of the heads of one token.

This module requires Triton, so it is imported on first use.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import on_device_of

_TILE = 1024  # pairs of channels per program


@triton.jit(do_not_specialize=["length", "direction"])
def rotate_kernel(
    x, y, cos, sin, length, heads, half, batch_stride, token_stride, head_stride, direction,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    position = (token % length).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    start = x + (token // length).to(tl.int64) * batch_stride + position * token_stride
    place = start + head.to(tl.int64)[:, None] * head_stride + pair[None, :]
    a = tl.load(place, mask=inside).to(tl.float32)
    b = tl.load(place + half, mask=inside).to(tl.float32)
    along = tl.load(cos + position * half + pair, mask=pair < half)[None, :]
    across = tl.load(sin + position * half + pair, mask=pair < half)[None, :] * direction
    place = y + token.to(tl.int64) * heads * half * 2 + head[:, None] * half * 2 + pair[None, :]
    tl.store(place, a * along - b * across, mask=inside)
    tl.store(place + half, b * along + a * across, mask=inside)


def tile_of(heads: int, half: int) -> tuple[int, int, int]:
    """Return the heads and pairs of a tile, both powers of two, and the warps of a program: 8 pairs per thread."""
    pairs = 1 << (half - 1).bit_length()
    tall = max(1, min(_TILE // pairs, 1 << (heads - 1).bit_length()))
    return tall, pairs, min(8, max(1, tall * pairs // 256))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """See `rotary.Backend`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        batch, length, heads, width = x.shape
        tall, pairs, warps = tile_of(heads, width // 2)
        with on_device_of(x):
            launch: Any = rotate_kernel[(batch * length, -(-heads // tall))]  # typed as the kernel, without `num_warps`
            launch(
                x, y, cos.contiguous(), sin.contiguous(), length, heads, width // 2, *x.stride()[:3], float(direction),
                HEADS=tall, PAIRS=pairs, num_warps=warps,
            )  # fmt: skip
    return y
