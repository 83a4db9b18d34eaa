"""The reference backend: interprets a formula's programs with plain torch operations, in any floating dtype, on any device.

It computes in fp32 or wider and rounds once, as the fused backends do. In float64 it is the ground truth of their tests.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..formula.compiled import OUTPUT, Compiled
from ..formula.functions import REGISTRY, implementation
from ..formula.program import Program, run
from ..formula.reductions import COLUMN, Kind
from ..rounding import fp8_rows
from .reductions import Reducer, begin_adjoints, reduce_over
from .telemetry import STORED, BatchStats, stats_program

_BLOCK = 1 << 16  # elements; the intermediate results of a block fit a core's cache


def forward(compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None) -> Tensor:
    """Return h (..., d_ff) of pre (..., d_ff), or (..., 2, d_ff) if gated.

    Args:
        learned: the parameters that are tensors in the formula's order (`Formula.tensors`), (1,) or (d_ff,) each.
        reduced: the reductions (`reductions.py`); None: over the channels at hand.
    """
    names = compiled.formula.pre_activations
    rows = _rows(pre, len(names))
    reduced = _reduced(compiled, pre, learned) if reduced is None else reduced
    h = torch.empty((rows.shape[0], rows.shape[-1]), dtype=pre.dtype, device=pre.device)
    for block in _blocks(rows):
        h[block] = _run(compiled.forward, compiled, rows[block], learned, reduced[block])["h"]
    return h.view(_h_shape(pre, len(names)))


def forward_with_stats(
    compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
) -> tuple[Tensor, BatchStats]:
    """Return h, and the statistics of it and of the slopes (`telemetry.py`)."""
    reduced = _reduced(compiled, pre, learned) if reduced is None else reduced
    h = forward(compiled, pre, learned, reduced)
    return h, stats_of(compiled, pre, h, learned, reduced)


def forward_fp8(
    compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return h in FP8, rounded once from fp32, and its scales: see `Activation.forward_fp8`."""
    return fp8_rows(forward(compiled, pre.float(), learned, reduced))


def stats_of(
    compiled: Compiled, pre: Tensor, h: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
) -> BatchStats:
    """Return the statistics of an h that was computed before."""
    rows = _rows(pre, len(compiled.formula.pre_activations))
    reduced = _reduced(compiled, pre, learned) if reduced is None else reduced
    flat = h.reshape(rows.shape[0], rows.shape[-1])
    wide, program = _wide(pre.dtype), stats_program(compiled)
    sums = torch.zeros(len(program.outputs) - 2, dtype=wide, device=pre.device)
    peak, active = sums.new_zeros(()), sums.new_zeros(pre.shape[-1])
    for block in _blocks(rows) if h.numel() else ():
        results = _run(program, compiled, rows[block], learned, reduced[block], **{STORED: flat[block]})
        *added, peaks, actives = (torch.broadcast_to(value, flat[block].shape) for value in results.values())
        sums += torch.stack([values.sum() for values in added])
        peak = torch.maximum(peak, peaks.max())
        active += actives.sum(0)
    return BatchStats(sums, peak, active, h.numel())


def backward(
    compiled: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool, reduced: Tensor | None = None,
    adjoints: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Return the gradient of pre, h if `with_h`, and the gradients of the learned parameters (fp32 or wider).

    Args:
        reduced, adjoints: of the reductions (`reductions.py`); None: over the channels at hand.
    """
    names = compiled.formula.pre_activations
    reduced = _reduced(compiled, pre, learned) if reduced is None else reduced
    adjoints = _adjoints(compiled, pre, dh, learned, reduced) if adjoints is None else adjoints
    rows = _rows(pre, len(names))
    dh = dh.reshape(rows.shape[0], rows.shape[-1])  # no -1: a width may be 0
    dpre = torch.empty(rows.shape, dtype=pre.dtype, device=pre.device)
    h = torch.empty_like(dh) if with_h else None
    wide, widest = _wide(pre.dtype), _widest(pre)
    trained = learned[: len(compiled.formula.learned)]  # without the scheduled ones
    dlearned = [torch.zeros(tensor.shape, dtype=widest, device=pre.device) for tensor in trained]
    program = compiled.backward_with_h if with_h else compiled.backward
    for block in _blocks(rows):
        results = _run(program, compiled, rows[block], learned, reduced[block], adjoints[block], dh=dh[block])
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
        results = run(compiled.from_output, _operations(h, wide), values)
        dpre.view(rows.shape)[block] = results[f"d{OUTPUT}"]
    return dpre


def reduce(compiled: Compiled, step: int, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor) -> Tensor:
    """Return the partial results of a pass: see `reductions.Reducer`."""
    rows, each = _rows(pre, len(compiled.formula.pre_activations)), compiled.reductions.forward[step]
    widest = _widest(pre)
    count = sum(len(reduction.names) for reduction in each.reductions)
    partial = torch.empty((len(rows), count), dtype=widest, device=pre.device)
    for block in _blocks(rows):
        results = _run(each.program, compiled, rows[block], learned, reduced[block])
        shape = rows[block].shape[::2]
        arguments = [torch.broadcast_to(results[r.value], shape).to(widest) for r in each.reductions]
        partial[block] = torch.cat([_partial(r.kind, e) for r, e in zip(each.reductions, arguments, strict=True)], -1)
    return partial


def _partial(kind: Kind, e: Tensor) -> Tensor:
    """Return the partial results (N, 1 or 2) of one reduction of e (N, F)."""
    if kind in ("mean", "sum"):
        return e.sum(-1, keepdim=True)
    if kind == "rms":
        return e.square().sum(-1, keepdim=True)
    if kind == "std":
        mean = e.mean(-1, keepdim=True)
        return torch.cat([mean, (e - mean).square().sum(-1, keepdim=True)], -1)
    channel = e.argmax(-1, keepdim=True)  # the first of equals, or of NaNs
    return torch.cat([e.gather(-1, channel), channel.to(e.dtype)], -1)


def reduce_gradients(
    compiled: Compiled, step: int, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], reduced: Tensor,
    adjoints: Tensor, with_h: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the sums of a pass of backward, and h if `with_h`: see `reductions.Reducer`."""
    rows, each = _rows(pre, len(compiled.formula.pre_activations)), compiled.reductions.backward[step]
    gradients = dh.reshape(rows.shape[0], rows.shape[-1])
    sums = torch.empty((len(rows), len(each.reductions)), dtype=_widest(pre), device=pre.device)
    for block in _blocks(rows):
        numbers = reduced[block], adjoints[block]
        results = _run(each.program, compiled, rows[block], learned, *numbers, dh=gradients[block])
        shape = rows[block].shape[::2]
        terms = [torch.broadcast_to(results[r.adjoint], shape).sum(-1, dtype=sums.dtype) for r in each.reductions]
        sums[block] = torch.stack(terms, -1)
    return sums, forward(compiled, pre, learned, reduced) if with_h else None


def _reduced(compiled: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> Tensor:
    return reduce_over(_THIS, compiled, pre, learned)


def _adjoints(compiled: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], reduced: Tensor) -> Tensor:
    if not compiled.reductions.all:
        return reduced
    return begin_adjoints(_THIS, compiled, pre, dh, learned, reduced, with_h=False)[1]()


def _run(
    program: Program,
    compiled: Compiled,
    rows: Tensor,
    learned: Sequence[Tensor],
    reduced: Tensor,
    adjoints: Tensor | None = None,
    **more: Tensor,
) -> dict[str, Tensor]:
    # Sums of fp32 that cancel in backward would show the roundings of each term.
    reductions = compiled.reductions
    wide = _widest(rows) if reductions.all else _wide(rows.dtype)
    values: dict[str, Any] = {
        name: rows.select(1, i).to(wide) for i, name in enumerate(compiled.formula.pre_activations)
    }
    values |= {name: tensor.to(wide) for name, tensor in zip(compiled.formula.tensors, learned, strict=True)}
    values |= {name: value.to(wide) for name, value in more.items()}
    values |= {name: reduced[:, i, None].to(wide) for i, name in enumerate(reductions.names)}
    if adjoints is not None:
        values |= {name: adjoints[:, i, None].to(wide) for i, name in enumerate(reductions.adjoints)}
    if COLUMN in program.used:
        values[COLUMN] = torch.arange(rows.shape[-1], dtype=wide, device=rows.device)
    return run(program, _operations(rows, wide), values)


def _operations(like: Tensor, dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """Return the operations of a program over tensors of a dtype on the device of `like`."""

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=like.device)

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


def _widest(like: Tensor) -> torch.dtype:
    """Return the dtype in which sums are accumulated: Apple's GPUs have no float64."""
    return _wide(like.dtype) if like.device.type == "mps" else torch.float64


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
_THIS = cast("Reducer", sys.modules[__name__])
