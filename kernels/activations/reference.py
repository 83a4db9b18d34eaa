"""The reference backend: interprets a formula's programs with plain torch operations, in any floating dtype, on any device.

It computes in fp32 or wider and rounds once, as the fused backends do. In float64 it is the ground truth of their tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..formula.functions import REGISTRY, implementation
from ..formula.program import Program, run
from ..formula.symbolic import OUTPUT, Compiled
from ..rounding import fp8_rows
from .telemetry import STORED, BatchStats, stats_program

_BLOCK = 1 << 16  # elements; the intermediate results of a block fit a core's cache


def forward(compiled: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> Tensor:
    """Return h (..., d_ff) of pre (..., d_ff), or (..., 2, d_ff) if gated.

    `learned` holds the parameters that are tensors in the formula's order (`Formula.tensors`), (1,) or (d_ff,) each.
    """
    names = compiled.formula.pre_activations
    rows = _rows(pre, len(names))
    h = torch.empty((rows.shape[0], rows.shape[-1]), dtype=pre.dtype, device=pre.device)
    for block in _blocks(rows):
        h[block] = _run(compiled.forward, compiled, rows[block], learned)["h"]
    return h.view(_h_shape(pre, len(names)))


def forward_with_stats(compiled: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> tuple[Tensor, BatchStats]:
    """Return h, and the statistics of it and of the slopes (`telemetry.py`)."""
    h = forward(compiled, pre, learned)
    return h, stats_of(compiled, pre, h, learned)


def forward_fp8(compiled: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return h in FP8, rounded once from fp32, and its scales: see `Activation.forward_fp8`."""
    return fp8_rows(forward(compiled, pre.float(), learned))


def stats_of(compiled: Compiled, pre: Tensor, h: Tensor, learned: Sequence[Tensor]) -> BatchStats:
    """Return the statistics of an h that was computed before."""
    rows = _rows(pre, len(compiled.formula.pre_activations))
    flat = h.reshape(rows.shape[0], rows.shape[-1])
    wide, program = _wide(pre.dtype), stats_program(compiled)
    sums = torch.zeros(len(program.outputs) - 2, dtype=wide, device=pre.device)
    peak, active = sums.new_zeros(()), sums.new_zeros(pre.shape[-1])
    for block in _blocks(rows) if h.numel() else ():
        results = _run(program, compiled, rows[block], learned, **{STORED: flat[block].to(wide)})
        *added, peaks, actives = (torch.broadcast_to(value, flat[block].shape) for value in results.values())
        sums += torch.stack([values.sum() for values in added])
        peak = torch.maximum(peak, peaks.max())
        active += actives.sum(0)
    return BatchStats(sums, peak, active, h.numel())


def backward(
    compiled: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return the gradient of pre, h if `with_h`, and the gradients of the learned parameters (fp32 or wider)."""
    names = compiled.formula.pre_activations
    rows = _rows(pre, len(names))
    dh = dh.reshape(rows.shape[0], rows.shape[-1])  # no -1: a width may be 0
    dpre = torch.empty(rows.shape, dtype=pre.dtype, device=pre.device)
    h = torch.empty_like(dh) if with_h else None
    wide = _wide(pre.dtype)
    widest = wide if pre.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    trained = learned[: len(compiled.formula.learned)]  # without the scheduled ones
    dlearned = [torch.zeros(tensor.shape, dtype=widest, device=pre.device) for tensor in trained]
    program = compiled.backward_with_h if with_h else compiled.backward
    for block in _blocks(rows):
        results = _run(program, compiled, rows[block], learned, dh=dh[block].to(wide))
        for i, name in enumerate(names):
            dpre[block].select(1, i).copy_(results[f"d{name}"])
        if h is not None:
            h[block] = results["h"]
        for total, name in zip(dlearned, compiled.formula.learned, strict=True):
            partial = torch.broadcast_to(results[f"d{name}"], dh[block].shape)
            total += partial.sum(0, dtype=widest) if total.numel() > 1 else partial.sum(dtype=widest)
    dlearned = [total.to(wide) for total in dlearned]
    return dpre.view(pre.shape), None if h is None else h.view(_h_shape(pre, len(names))), dlearned


def backward_from_output(compiled: Compiled, h: Tensor, dh: Tensor) -> Tensor:
    """Return the gradient of the pre-activation of an ungated formula from its output (`Compiled.from_output`)."""
    assert compiled.from_output is not None
    wide = _wide(h.dtype)
    rows, gradients, dpre = h.reshape(-1, h.shape[-1]), dh.reshape(-1, dh.shape[-1]), torch.empty_like(h)
    for block in _blocks(rows):
        values = {OUTPUT: rows[block].to(wide), "dh": gradients[block].to(wide)}
        results = run(compiled.from_output, _operations(h), values)
        dpre.view(rows.shape)[block] = results[f"d{OUTPUT}"]
    return dpre


def _run(
    program: Program, compiled: Compiled, rows: Tensor, learned: Sequence[Tensor], **more: Tensor
) -> dict[str, Tensor]:
    wide = _wide(rows.dtype)
    values: dict[str, Any] = {
        name: rows.select(1, i).to(wide) for i, name in enumerate(compiled.formula.pre_activations)
    }
    values |= {name: tensor.to(wide) for name, tensor in zip(compiled.formula.tensors, learned, strict=True)} | more
    return run(program, _operations(rows), values)


def _operations(like: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Return the operations of a program over tensors on the device of `like`, in its dtype or fp32 if that is narrower."""

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=_wide(like.dtype), device=like.device)

    return {**_OPERATIONS, "number": number}


def _rows(pre: Tensor, count: int) -> Tensor:
    """View pre as (rows, pre-activations, d_ff)."""
    return pre.reshape(math.prod(pre.shape[: -1 if count == 1 else -2]), count, pre.shape[-1])


def _blocks(rows: Tensor) -> list[slice]:
    """Return slices of the rows: blocks that fit the cache on a CPU, one block on other devices."""
    count = rows.shape[0]
    size = max(1, _BLOCK // max(1, rows.shape[-1])) if rows.device.type == "cpu" else max(1, count)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _h_shape(pre: Tensor, count: int) -> torch.Size:
    return pre.shape if count == 1 else pre.shape[:-2] + pre.shape[-1:]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "gt": torch.gt,
    "ge": torch.ge,
    "select": torch.where,
    "keep_nan": lambda value, source: torch.where(torch.isnan(source), source, value),
    **{name: implementation(f.torch, torch) for name, f in REGISTRY.items() if f.torch is not None},
}
