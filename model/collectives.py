"""Communication of tensor and context ranks inside the model, forward and backward.

A Megatron-LM block is column parallel, then row parallel: one all-reduce forward and one backward (arXiv 1909.08053, section
3). With sequence parallelism (arXiv 2205.05198, section 4.2.2) each all-reduce becomes a reduce-scatter and an all-gather, and
the operations between them run on a token shard. Tokens are sharded in flat order (B x S), so every shard is contiguous.

Communication overlaps compute in the backward of a column-parallel product: its input is gathered while the input's gradient
is computed, and the input's gradient is reduced while the weight's gradient is computed.

`Axis.sequence_parallel` decides which collective runs. N / T below stands for the token shard that it implies; without it a
tensor rank has all N tokens, in a tensor (B, S, ...).

Shapes: N = B x S tokens, T tensor ranks, C context ranks, D d_model, H heads, E head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import FirstOrder
from model.parallel import Axis
from model.products import PLAIN, Products

_FIRST_ORDER = FirstOrder("a layer over several ranks", "compute on one rank")


class Pending(NamedTuple):
    """The result of a collective in flight; `tensor` may be read after `wait`."""

    tensor: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """Wait for the collective, and return the tensor."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


def all_gather(x: Tensor, axis: Axis) -> Pending:
    """Start an all-gather of (n, ...) from every rank into (size x n, ...)."""
    gathered = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    return Pending(gathered, dist.all_gather_into_tensor(gathered, x.contiguous(), group=axis.group, async_op=True))


def all_reduce(x: Tensor, axis: Axis) -> Pending:
    """Start an all-reduce (sum) of x (...), in place if x is contiguous."""
    x = x.contiguous()
    return Pending(x, dist.all_reduce(x, group=axis.group, async_op=True))


def reduce_scatter(x: Tensor, axis: Axis) -> Pending:
    """Start a reduce-scatter (sum) of (size x n, ...): each rank gets its (n, ...)."""
    shard = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    return Pending(shard, dist.reduce_scatter_tensor(shard, x.contiguous(), group=axis.group, async_op=True))


def gather_tokens(x: Tensor, axis: Axis) -> Pending:
    """Start to gather the input of a column-parallel product: (N / T, D) -> (N, D); without sequence parallelism return x."""
    return all_gather(x, axis) if axis.sequence_parallel else Pending(x)


def reduce_partial(x: Tensor, axis: Axis) -> Pending:
    """Start to sum every rank's partial result (..., D): to (N / T, D), or without sequence parallelism to (..., D)."""
    if axis.size == 1:
        return Pending(x)
    return reduce_scatter(x.flatten(0, -2), axis) if axis.sequence_parallel else all_reduce(x, axis)


def column_parallel_linear(x: Tensor, weight: Tensor, axis: Axis, products: Products = PLAIN) -> Tensor:
    """Multiply by a weight (rows, D) that is sharded along its rows; over an axis of one rank, by any weight.

    Args:
        x: (N / T, D), or without sequence parallelism (..., D).
        products: which compute it, and its backward.

    Returns:
        (N, rows / T), or (..., rows / T).
    """
    if axis.size == 1 and products is PLAIN:
        return F.linear(x, weight)
    return _ColumnParallelLinear.apply(x, weight, axis, products)


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, products: Products) -> Tensor:
        ctx.save_for_backward(x, weight)  # the token shard; gathered again in backward
        ctx.axis, ctx.products = axis, products
        return products.forward(gather_tokens(x, axis).wait(), weight)

    @staticmethod
    @_FIRST_ORDER.once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        x, weight = ctx.saved_tensors
        gathered = gather_tokens(x, ctx.axis)
        dx = reduce_partial(ctx.products.input_gradient(dy, weight), ctx.axis)  # (N, D) -> (N / T, D)
        dweight = ctx.products.weight_gradient(dy.flatten(0, -2), gathered.wait().flatten(0, -2))  # (rows / T, D)
        return dx.wait(), dweight, None, None


def reduce_output(x: Tensor, axis: Axis) -> Tensor:
    """Sum a row-parallel product (..., D) over ranks: to this rank's tokens (N / T, D), or to (..., D). May overwrite x."""
    return x if axis.size == 1 else _ReduceOutput.apply(x, axis)


class _ReduceOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.shape = axis, x.shape
        if not axis.sequence_parallel:
            ctx.mark_dirty(x)  # the all-reduce is in place
        return reduce_partial(x, axis).wait()

    @staticmethod
    @_FIRST_ORDER.once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        return gather_tokens(dy, ctx.axis).wait().view(ctx.shape), None


def with_summed_gradient(weight: Tensor, axis: Axis) -> Tensor:
    """Return a replicated weight whose gradient is summed over ranks, each of which applies it to other tokens or heads."""
    return weight if axis.size == 1 else _SummedGradient.apply(weight, axis)


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return weight.view_as(weight)

    @staticmethod
    @_FIRST_ORDER.once
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        return all_reduce(dweight.clone(), ctx.axis).wait(), None


def sequence_to_heads(x: Tensor, axis: Axis, head_counts: tuple[int, ...]) -> Tensor:
    """Exchange sequence shards for head shards: (B, S / C, H, E) -> (B, S, H / C, E).

    Args:
        head_counts: how many of the H heads are queries, keys and values. Each kind is sharded by itself.
    """
    if axis.size == 1:
        return x
    by_kind = (heads.unflatten(2, (axis.size, -1)) for heads in x.split(head_counts, 2))  # each (B, S / C, C, h / C, E)
    sent = torch.cat(tuple(by_kind), 3).permute(2, 0, 1, 3, 4)  # (C, B, S / C, H / C, E), by destination
    received = _AllToAll.apply(sent.contiguous(), axis)  # by source rank, which is by sequence shard
    return received.transpose(0, 1).flatten(1, 2)


def heads_to_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Exchange head shards for sequence shards: (B, S, H / C, E) -> (B, S / C, H, E)."""
    if axis.size == 1:
        return x
    sent = x.unflatten(1, (axis.size, -1)).transpose(0, 1)  # (C, B, S / C, H / C, E), by destination
    received = _AllToAll.apply(sent.contiguous(), axis)  # by source rank, which is by head shard
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Send x[i] to rank i and receive result[j] from rank j. It is its own inverse, and so its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=axis.group)
        return received

    @staticmethod
    @_FIRST_ORDER.once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        received = torch.empty_like(dy, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, dy.contiguous(), group=ctx.axis.group)
        return received, None


def gather_sequence(tokens: Tensor, axis: Axis) -> Tensor:
    """Gather token ids (B, S / C) of all context ranks into (B, S). Not differentiable."""
    if axis.size == 1:
        return tokens
    shards = all_gather(tokens, axis).wait().view(axis.size, *tokens.shape)  # (C, B, S / C)
    return shards.transpose(0, 1).flatten(1)
