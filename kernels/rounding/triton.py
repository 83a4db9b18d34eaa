"""The Triton kernels of `rounding.py`: a matrix to FP8, its rows contiguous or its columns.

    rows      a Triton program reads a row for its largest magnitude and again, from a cache, to write it
    scaled    tiles, by scales that are known; a matrix whose columns are contiguous is transposed on the way

This module requires Triton, so it is imported on first use.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..tensors import on_device_of
from ..triton import primitives as fn

_TILE = 1024  # columns of a row at once
_SIDE = 64  # of a tile that is transposed


@triton.jit
def rows_kernel(x, out, scales, width, stride, LARGEST: tl.constexpr, TINY: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((TILE,), tl.float32)
    start = 0
    while start < width:
        column = start + tl.arange(0, TILE)
        v = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
        largest = fn.maximum(largest, tl.abs(v))
        start += TILE
    # The sum is NaN where a number is not finite, which `tl.max` would ignore, and so is all of the row's product.
    scale = tl.maximum(tl.max(largest), TINY) / LARGEST + tl.sum(largest * 0.0)
    tl.store(scales + row, scale)
    start = 0
    while start < width:
        column = start + tl.arange(0, TILE)
        v = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
        scaled = fn.minimum(fn.maximum(v / scale, -LARGEST), LARGEST)
        tl.store(out + row * width + column, scaled.to(out.dtype.element_ty), mask=column < width)
        start += TILE


@triton.jit
def scaled_kernel(
    x, out, scales, rows, width, row_stride, column_stride,
    LARGEST: tl.constexpr, ONE_SCALE: tl.constexpr, TRANSPOSED: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    if TRANSPOSED:  # neighbours in memory are neighbours in the column
        places = row[None, :] * row_stride + column[:, None] * column_stride
        v = tl.trans(tl.load(x + places, mask=tl.trans(inside), other=0.0).to(tl.float32))
    else:
        v = tl.load(x + row[:, None] * row_stride + column[None, :] * column_stride, mask=inside, other=0.0).to(
            tl.float32
        )
    if ONE_SCALE:
        v = v / tl.load(scales)
    else:
        v = v / tl.load(scales + row, mask=row < rows, other=1.0)[:, None]
    scaled = fn.minimum(fn.maximum(v, -LARGEST), LARGEST)
    tl.store(out + row[:, None] * width + column[None, :], scaled.to(out.dtype.element_ty), mask=inside)


def round_rows(x: Tensor, out: Tensor, scale: Tensor, largest: float, tiny: float) -> None:
    """Write x (R, K), whose rows are contiguous, to `out` in FP8 with a scale (R, 1) of each row."""
    with on_device_of(x):
        launch: Any = rows_kernel[(len(x),)]  # typed as the kernel, without `num_warps`
        launch(x, out, scale, x.shape[1], x.stride(0), LARGEST=largest, TINY=tiny, TILE=_TILE, num_warps=4)


def round_scaled(x: Tensor, out: Tensor, scale: Tensor, largest: float) -> None:
    """Write x / scale (R, K) to `out` in FP8; the scale is (R, 1) or (1, 1), and any strides will do."""
    grid = (triton.cdiv(x.shape[0], _SIDE), triton.cdiv(x.shape[1], _SIDE))
    with on_device_of(x):
        launch: Any = scaled_kernel[grid]  # typed as the kernel, without `num_warps`
        launch(
            x, out, scale, *x.shape, *x.stride(), LARGEST=largest, ONE_SCALE=scale.numel() == 1,
            TRANSPOSED=x.stride(0) < x.stride(1), SIDE=_SIDE, num_warps=4,
        )  # fmt: skip
