"""Reductions over d_ff (`formula/reductions.py`) in passes over whole tensors, whose partial results tensor ranks exchange.

A backend computes the partial results of its channels; this module combines those of all ranks. On one rank the C and Triton
kernels compute all passes of a row at once instead, and read it once.

Shapes: N rows (tokens), F channels of this rank, T ranks. The numbers of a row that are kept for backward, `reduced`, are
(N, K) in the order of `Reductions.names`; the adjoints are (N, R), one for each reduction. Both are fp32 or wider. Partial
results of a pass are (N, k), in the order of its reductions:

    mean, sum    the sum
    rms          the sum of squares
    std          the mean of this rank's channels, and the sum of squares about it
    max          the largest, and the first channel that attains it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..formula.compiled import Compiled
from ..formula.reductions import Reduction


class WidthRanks(NamedTuple):
    """The tensor ranks that share d_ff, in equal and consecutive parts.

    Attributes:
        rank, size: this rank, and how many there are.
        gather: starts to gather (N, k) of every rank, and returns a function that waits for the result (T, N, k), in the
            order of the ranks.
    """

    rank: int
    size: int
    gather: Callable[[Tensor], Callable[[], Tensor]]


ONE = WidthRanks(0, 1, lambda partial: lambda: partial.unsqueeze(0))


class Reducer(Protocol):
    """The functions of a backend that this module calls."""

    def reduce(
        self, compiled: Compiled, step: int, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor, /
    ) -> Tensor:
        """Return the partial results of pass `step` of `Reductions.forward`; `reduced` holds those of the passes before."""
        ...

    def reduce_gradients(
        self, compiled: Compiled, step: int, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], reduced: Tensor,
        adjoints: Tensor, with_h: bool, /,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return the sums of pass `step` of `Reductions.backward`, one for each reduction of it, and h if `with_h`."""
        ...


def reduce_over(
    backend: Reducer, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], ranks: WidthRanks = ONE
) -> Tensor:
    """Return the numbers of every row that `forward` and `backward` need, over the channels of all ranks."""
    reductions = compiled.reductions
    reduced = new_numbers(pre, _rows(compiled, pre), len(reductions.names))
    if not pre.numel():
        return reduced.zero_()
    for step, each in enumerate(reductions.forward):
        gathered = _widest(ranks.gather(backend.reduce(compiled, step, pre, learned, reduced))())
        column = 0
        for reduction in each.reductions:
            count, at = len(reduction.names), reductions.offset(reduction)
            partial = gathered[..., column : column + count]
            reduced[:, at : at + count] = _combined(reduction, partial, pre.shape[-1], ranks.rank)
            column += count
    return reduced


def begin_adjoints(
    backend: Reducer, compiled: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], reduced: Tensor,
    with_h: bool, ranks: WidthRanks = ONE,
) -> tuple[Tensor | None, Callable[[], Tensor]]:  # fmt: skip
    """Return h if `with_h`, and a function that returns the adjoints; the first exchange is in flight before that is called."""
    reductions = compiled.reductions
    adjoints = new_numbers(pre, len(reduced), len(reductions.all))
    if not dh.numel():
        return torch.empty_like(dh) if with_h else None, adjoints.zero_

    def sums(step: int, with_h: bool) -> tuple[Callable[[], Tensor], Tensor | None]:
        partial, h = backend.reduce_gradients(compiled, step, pre, dh, learned, reduced, adjoints, with_h)
        return ranks.gather(partial), h

    wait, h = sums(0, with_h)

    def finish() -> Tensor:
        gathered = wait()
        for step, each in enumerate(reductions.backward):
            total = _widest(gathered if step == 0 else sums(step, False)[0]()).sum(0)  # (N, reductions of the pass)
            for column, reduction in enumerate(each.reductions):
                value = reduced[:, reductions.offset(reduction)]
                adjoints[:, reduction.number] = _shared(reduction, total[:, column], value, pre.shape[-1] * ranks.size)
        return adjoints

    return h, finish


def _widest(partial: Tensor) -> Tensor:
    """Return partial results in the dtype in which they are combined: Apple's GPUs have no float64."""
    return partial if partial.device.type == "mps" else partial.double()


def new_numbers(like: Tensor, rows: int, count: int) -> Tensor:
    """Return uninitialised numbers (N, count) on the device of `like`, in its dtype or fp32 if that is narrower."""
    return torch.empty((rows, count), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _rows(compiled: Compiled, pre: Tensor) -> int:
    return pre.shape[: -1 - compiled.formula.gated].numel()


def _combined(reduction: Reduction, partial: Tensor, width: int, rank: int) -> Tensor:
    """Return the numbers (N, count) of a reduction.

    Args:
        partial: the partial results (T, N, count) of all ranks, of `width` channels each.
        rank: this one.
    """
    total = width * len(partial)
    if reduction.kind == "max":
        values, channels = partial.unbind(-1)
        winner = values.max(0).indices  # NaN if there is one, and the first rank if several attain it
        channel = torch.where(winner == rank, channels[rank], -1)  # another rank's channel is none of this one
        return torch.stack([values.gather(0, winner.unsqueeze(0))[0], channel], -1)
    if reduction.kind != "std":
        summed = partial.sum(0)
        if reduction.kind == "sum":
            return summed
        return summed / total if reduction.kind == "mean" else (summed / total + reduction.epsilon).sqrt()
    means, squares = partial.unbind(-1)
    mean = means.mean(0)
    # Chan, Golub and LeVeque 1983: the squares about each rank's mean, moved to the mean of all.
    variance = (squares + width * (means - mean).square()).sum(0) / total
    return torch.stack([(variance + reduction.epsilon).sqrt(), mean], -1)


def _shared(reduction: Reduction, total: Tensor, value: Tensor, width: int) -> Tensor:
    """Return the adjoint from the sum S over all channels."""
    if reduction.kind in ("sum", "max"):
        return total
    mean = total / width
    return mean if reduction.kind == "mean" else torch.where(value == 0, torch.zeros_like(mean), mean / value)
