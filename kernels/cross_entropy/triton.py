"""The Triton kernel of `cross_entropy.py`: a program processes one row, which it reads twice, then from the L2 cache.

Over tensor ranks the vocabulary is sharded, and a row is complete only once the ranks have exchanged two numbers: a first
launch measures (`measure`), a second one differentiates (`differentiate_`). On one rank one launch does both.
This module requires Triton, so it is imported on first use.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import on_device_of
from ..triton import primitives

COLUMNS = 4096  # of a row that a program holds at once: 16 for each of 256 threads
WARPS = 8


@triton.jit
def capped(x, cap, CAPPED: tl.constexpr):
    """Return the logits after the soft cap, and the cap's derivative there."""
    if CAPPED:
        t = primitives.tanh(x / cap, True)
        y, slope = t * cap, primitives.sech2(t, x / cap, True)
    else:
        y, slope = x, 1.0
    return y, slope


@triton.jit(do_not_specialize=["first"])
def cross_entropy_kernel(
    logits, targets, nats, lse, width, first, ignore, z_loss, cap,
    MEASURE: tl.constexpr, DIFFERENTIATE: tl.constexpr, SHARDED: tl.constexpr, CAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """MEASURE a row, or take its `lse` as given; then, to DIFFERENTIATE, overwrite it with its gradient.

    SHARDED: the row has the entries from `first` on, and `nats` gets the target's logit, or 0 where another rank has it.
    """
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width
    column = tl.arange(0, COLUMNS)
    target = tl.load(targets + row)
    ignored = target == ignore
    own = target - first
    here = (own >= 0) & (own < width) & (ignored == 0)
    if MEASURE:
        top, total, at = -float("inf"), 0.0, 0
        while at < width:
            x = tl.load(start + at + column, mask=at + column < width, other=-float("inf")).to(tl.float32)
            y, slope = capped(x, cap, CAPPED)  # pyright: ignore[reportGeneralTypeIssues]  # typed as raising
            y = tl.where(at + column < width, y, -float("inf"))
            higher = tl.maximum(top, tl.max(y, 0))
            safe = tl.where(higher == -float("inf"), 0.0, higher)  # nothing but -inf so far
            total = total * tl.exp(top - safe) + tl.sum(tl.exp(y - safe), 0)
            top = higher
            at += COLUMNS
        z = tl.where(ignored, 0.0, top + tl.log(total))
        raw = tl.load(start + own, mask=here, other=0.0).to(tl.float32)
        logit, _ = capped(raw, cap, CAPPED)  # pyright: ignore[reportGeneralTypeIssues]  # as above
        if SHARDED:
            result = tl.where(here, logit, 0.0)
        else:
            result = tl.where(ignored, 0.0, tl.where(here, z - logit, float("nan")))
        tl.store(nats + row, result)
        tl.store(lse + row, z)
    else:
        z = tl.load(lse + row)
    if DIFFERENTIATE:
        weight = tl.where(ignored, 0.0, 1.0 + 2.0 * z_loss * z)
        at = 0
        while at < width:
            inside = at + column < width
            x = tl.load(start + at + column, mask=inside, other=0.0).to(tl.float32)
            y, slope = capped(x, cap, CAPPED)  # pyright: ignore[reportGeneralTypeIssues]  # typed as raising
            d = tl.exp(y - z) * weight
            d = tl.where(here & (at + column == own), d - 1.0, d) * slope
            tl.store(start + at + column, tl.where(ignored, 0.0, d), mask=inside)
            at += COLUMNS


def cross_entropy_(
    logits: Tensor, targets: Tensor, z_loss: float, differentiate: bool, ignore_index: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """See `cross_entropy.cross_entropy_`."""
    nats, lse = (torch.empty((len(logits),), dtype=torch.float32, device=logits.device) for _ in range(2))
    _launch(logits, targets, nats, lse, 0, ignore_index, z_loss, softcap, True, differentiate, False)
    return nats, lse


def measure(logits: Tensor, targets: Tensor, first: int, ignore_index: int, softcap: float) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each row over this rank's entries, and the target's logit, 0 where another rank has it.

    Args:
        logits: (rows, entries of this rank), contiguous.
        targets: (rows,), of the full vocabulary, or `ignore_index`: then both results are 0.
        first: this rank's first entry.
    """
    target_logits, lse = (torch.empty((len(logits),), dtype=torch.float32, device=logits.device) for _ in range(2))
    _launch(logits, targets, target_logits, lse, first, ignore_index, 0.0, softcap, True, False, True)
    return lse, target_logits


def differentiate_(
    logits: Tensor, targets: Tensor, lse: Tensor, first: int, ignore_index: int, z_loss: float, softcap: float
) -> None:
    """Overwrite the logits that `measure` has seen with their gradient, given the log-sum-exp over the whole vocabulary."""
    _launch(logits, targets, lse, lse, first, ignore_index, z_loss, softcap, False, True, True)


def _launch(
    logits: Tensor,
    targets: Tensor,
    nats: Tensor,
    lse: Tensor,
    first: int,
    ignore_index: int,
    z_loss: float,
    softcap: float,
    measured: bool,
    differentiate: bool,
    sharded: bool,
) -> None:
    rows, width = logits.shape
    if not rows:
        return
    columns = min(COLUMNS, max(128, 1 << (width - 1).bit_length()))
    with on_device_of(logits):
        launch: Any = cross_entropy_kernel[(rows,)]  # typed as the kernel, without `num_warps`
        launch(
            logits, targets.contiguous(), nats, lse, width, first, ignore_index, z_loss, softcap,
            MEASURE=measured, DIFFERENTIATE=differentiate, SHARDED=sharded, CAPPED=softcap > 0, COLUMNS=columns,
            num_warps=WARPS if columns == COLUMNS else 4,
        )  # fmt: skip
