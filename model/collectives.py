"""What tensor and context ranks say to each other inside the model, forward and backward.

A block of Megatron-LM's is column parallel in and row parallel out: one reduction forward and one backward (arXiv 1909.08053,
section 3). With sequence parallelism (arXiv 2205.05198, section 4.2.2) each all-reduce becomes a reduce-scatter and an
all-gather, and what lies between is computed on a share of the tokens, which are cut as one flat row (B x S), so that no
share has to be copied together. What the input of a column-parallel product needs again in backward is gathered while its own
gradient is computed; its gradient is reduced while the weight's is.

Shapes: N = B x S tokens, T tensor ranks, C context ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.parallel import Axis


class Pending(NamedTuple):
    """A tensor that is complete after `wait`."""

    tensor: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


def all_gather(x: Tensor, axis: Axis) -> Pending:
    """Begin to gather (n, ...) of every rank into (size x n, ...)."""
    whole = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    return Pending(whole, dist.all_gather_into_tensor(whole, x.contiguous(), group=axis.group, async_op=True))


def all_reduce(x: Tensor, axis: Axis) -> Pending:
    """Begin to add up x (...) over ranks, in place where x is contiguous."""
    x = x.contiguous()
    return Pending(x, dist.all_reduce(x, group=axis.group, async_op=True))


def reduce_scatter(x: Tensor, axis: Axis) -> Pending:
    """Begin to add up (size x n, ...) over ranks, of which each keeps its (n, ...)."""
    part = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    return Pending(part, dist.reduce_scatter_tensor(part, x.contiguous(), group=axis.group, async_op=True))


def gather(x: Tensor, axis: Axis, sequence: bool) -> Pending:
    """Begin to make the input of a column-parallel product whole: (N / T, D) -> (N, D) with `sequence`, else x."""
    return all_gather(x, axis) if sequence else Pending(x)


def reduce(x: Tensor, axis: Axis, sequence: bool) -> Pending:
    """Begin to add up a partial result (..., D): to (N / T, D) with `sequence`, else of the same shape."""
    if axis.size == 1:
        return Pending(x)
    return reduce_scatter(x.flatten(0, -2), axis) if sequence else all_reduce(x, axis)


def column_linear(x: Tensor, weight: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """x (..., D), or (N / T, D) with `sequence`, -> (..., rows), or (N, rows); the weight (rows, D) is cut along its rows."""
    return F.linear(x, weight) if axis.size == 1 else _ColumnLinear.apply(x, weight, axis, sequence)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, sequence: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.sequence = axis, sequence
        return F.linear(gather(x, axis, sequence).wait(), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        again = gather(x, ctx.axis, ctx.sequence)
        dx = reduce(dy @ weight, ctx.axis, ctx.sequence)
        dweight = dy.flatten(0, -2).T @ again.wait().flatten(0, -2)
        return dx.wait(), dweight, None, None


def reduced(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Add up a row-parallel product (..., D) over ranks; with `sequence` this rank keeps its tokens: (N / T, D)."""
    return x if axis.size == 1 else _Reduced.apply(x, axis, sequence)


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sequence: bool) -> Tensor:
        ctx.axis, ctx.sequence, ctx.shape = axis, sequence, x.shape
        if not sequence:
            ctx.mark_dirty(x)
        return reduce(x, axis, sequence).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return gather(dy, ctx.axis, ctx.sequence).wait().view(ctx.shape), None, None


def with_summed_gradient(weight: Tensor, axis: Axis) -> Tensor:
    """Return a weight that all ranks have, each for its own tokens or heads: its gradient is added up over them."""
    return weight if axis.size == 1 else _SummedGradient.apply(weight, axis)


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor, None]:
        return all_reduce(dweight.clone(), ctx.axis).wait(), None


def sequence_to_heads(x: Tensor, axis: Axis, kinds: tuple[int, ...]) -> Tensor:
    """Exchange (B, S / C, H, E) of all heads for (B, S, H / C, E) of whole sequences.

    Args:
        kinds: how many of the heads are queries, keys and values: each rank gets its share of every kind.
    """
    if axis.size == 1:
        return x
    by_kind = (heads.unflatten(2, (axis.size, -1)) for heads in x.split(kinds, 2))  # each B S/C C h E
    sent = torch.cat(tuple(by_kind), 3).permute(2, 0, 1, 3, 4)  # C B S/C H/C E
    received = _AllToAll.apply(sent.contiguous(), axis)  # by the rank that it is from, and so by part of the sequence
    return received.transpose(0, 1).flatten(1, 2)


def heads_to_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Exchange (B, S, H / C, E) back for (B, S / C, H, E)."""
    if axis.size == 1:
        return x
    sent = x.unflatten(1, (axis.size, -1)).transpose(0, 1)  # C B S/C H/C E
    received = _AllToAll.apply(sent.contiguous(), axis)  # by the rank that it is from, and so by heads
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Send x[i] to rank i; the result's [j] is from rank j. Its own inverse, and so its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=axis.group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        received = torch.empty_like(dy, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, dy.contiguous(), group=ctx.axis.group)
        return received, None


def whole_sequence(tokens: Tensor, axis: Axis) -> Tensor:
    """Gather tokens (B, S / C) of all context ranks into (B, S); without a gradient."""
    if axis.size == 1:
        return tokens
    parts = all_gather(tokens, axis).wait().view(axis.size, *tokens.shape)  # C B S/C
    return parts.transpose(0, 1).flatten(1)
