"""The Triton kernels of `norm.py`: a Triton program processes tiles of complete rows, with all sums in registers.

Rows are contiguous in runs of `run` rows; run i of a tensor begins at i * stride (`tensors.runs`). The gradient of the weight
is summed in an order that depends on the shape alone. This module requires Triton, so it is imported on first use.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import on_device_of, runs

WIDEST = 8192  # widest row whose backward pass fits the registers of 16 warps
_TILE = 2048  # least elements of a tile, where a run has as many
_PROGRAMS = 512  # most programs of backward: their partial sums are small compared with what they read


@triton.jit(do_not_specialize=["tiles"])
def forward_kernel(
    x, residual, weight, y, s, rstd, tiles, run, stride, width, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    first = (tl.program_id(0) // tiles).to(tl.int64)  # the run
    row = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < run)[:, None] & (column < width)[None, :]
    within = row[:, None] * width + column[None, :]
    place = first * run * width + within
    v = tl.load(x + first * stride + within, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        rounded = (v + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)).to(s.dtype.element_ty)
        tl.store(s + place, rounded, mask=inside)
        v = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(v * v, 1) / width + eps)
    tl.store(rstd + first * run + row, scale, mask=row < run)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(y + place, v * scale[:, None] * w[None, :], mask=inside)


@triton.jit(do_not_specialize=["tiles", "all_tiles", "tiles_per_program"])
def backward_kernel(
    dy, ds, s, weight, rstd, dx, sums, tiles, all_tiles, tiles_per_program, run, dy_stride, s_stride, width,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    tile = tl.program_id(0) * tiles_per_program
    last = tl.minimum(tile + tiles_per_program, all_tiles)
    while tile < last:  # the interpreter has no `range` over runtime values
        first = (tile // tiles).to(tl.int64)
        row = (tile % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < run)[:, None] & (column < width)[None, :]
        within = row[:, None] * width + column[None, :]
        place = first * run * width + within
        v = tl.load(s + first * s_stride + within, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + first * dy_stride + within, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + first * run + row, mask=row < run, other=0.0)
        if ADD:  # loaded early, to hide the latency
            more = tl.load(ds + place, mask=inside, other=0.0)
        g *= scale[:, None]
        dw += g * v
        g *= w[None, :]
        d = g - v * (tl.sum(g * v, 1) / width * scale * scale)[:, None]
        if ADD:
            d += more.to(tl.float32)
        tl.store(dx + place, d, mask=inside)
        tile += 1
    tl.store(sums + tl.program_id(0) * width + column, tl.sum(dw, 0), mask=column < width)


def tile_of(run: int, width: int) -> tuple[int, int, int]:
    """Return the rows and columns of a tile, both powers of two, and the warps of a program: at most 16 elements per thread."""
    columns = 1 << (width - 1).bit_length()
    rows = max(1, min(_TILE // columns, 1 << (run - 1).bit_length()))
    return rows, columns, min(16, max(4, rows * columns // 512))


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `norm.Backend`."""
    x, run, stride = runs(x if residual is None else x.contiguous())
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    s, residual = (x, x) if residual is None else (torch.empty_like(y), residual.contiguous())
    if x.numel():
        rows, columns, warps = tile_of(run, x.shape[-1])
        tiles = math.ceil(run / rows)
        with on_device_of(x):
            launch: Any = forward_kernel[(rstd.numel() // run * tiles,)]  # typed as the kernel, without `num_warps`
            launch(
                x, residual, weight.contiguous(), y, s, rstd, tiles, run, stride, x.shape[-1], eps,
                ADD=s is not x, ROWS=rows, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
    return y, s, rstd


def backward(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """See `norm.Backend`."""
    (dy, run, dy_stride), (s, _, s_stride) = runs(dy), runs(s)
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    if not s.numel():
        return dx, torch.zeros(weight.shape, dtype=torch.float32, device=s.device)
    rows, columns, warps = tile_of(run, s.shape[-1])
    tiles = math.ceil(run / rows)
    all_tiles = rstd.numel() // run * tiles
    tiles_per_program = math.ceil(all_tiles / _PROGRAMS)
    programs = math.ceil(all_tiles / tiles_per_program)
    sums = torch.empty((programs, s.shape[-1]), dtype=torch.float32, device=s.device)
    with on_device_of(s):
        launch: Any = backward_kernel[(programs,)]  # typed as the kernel, without `num_warps`
        launch(
            dy, dy if ds is None else ds.contiguous(), s, weight.contiguous(), rstd, dx, sums,
            tiles, all_tiles, tiles_per_program, run, dy_stride, s_stride, s.shape[-1],
            ADD=ds is not None, ROWS=rows, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
    return dx, sums.sum(0)
