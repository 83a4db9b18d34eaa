"""The output projection: cross-entropy without the full matrix of logits, and logits for generation.

The forward pass works chunk by chunk, and `kernels/cross_entropy/linear.py` has the loop over chunks.

Over tensor ranks the vocabulary is sharded. Each rank computes the logits of its own entries, and ranks exchange two numbers
per token: the log-sum-exp over a rank's entries, and the target's logit. Logits are never gathered in training.

Shapes: N tokens, D d_model, V vocabulary entries, T tensor ranks, c tokens of a chunk.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy.linear import ChunkFunction, chunk_function_for, chunked_loss
from launch.estimate.counts import logits_rows
from model.collectives import all_gather, gather_tokens, reduce_partial
from model.parallel import Axis


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    tensor: Axis = Axis(),
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean cross-entropy of `softmax(hidden @ weight.T)` against `targets`.

    Matrix products run in the dtype of the inputs; the softmax and the sums are fp32 (fp64 for fp64 inputs). Outside `no_grad`
    the forward pass computes the gradients. No Python branch depends on a tensor's value, so a GPU is never synchronised.

    Args:
        hidden: (..., D) hidden states, of any floating dtype; with sequence parallelism (N / T, D), this rank's tokens.
        weight: (V, D) output projection of the same dtype; over tensor ranks (V / T, D), this rank's rows.
        targets: (...) int64 token ids below V, or `ignore_index`; with sequence parallelism those of all N tokens.
        z_loss: coefficient of the mean of `logsumexp(logits) ** 2`, which is added to the objective.
        ignore_index: the target of tokens that are ignored.
        tensor: the ranks that shard the vocabulary; each gets the same result.

    Returns:
        The objective to differentiate, and the mean nats per valid token, both fp32 scalars: equal if `z_loss` is 0, and 0 if
        no token is valid. Then the nats of each token, fp32 in the shape of `targets`, 0 where they are ignored. Only the first
        is differentiable.

    Raises:
        ValueError: the shapes do not match.
    """
    if tensor.sequence_parallel:
        fits = targets.numel() == len(hidden) * tensor.size
    else:
        fits = targets.shape == hidden.shape[:-1]
    if not fits or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, targets))
        raise ValueError(f"shapes of hidden, weight and targets do not match: {shapes}")
    differentiate = torch.is_grad_enabled()  # always off inside Function.forward
    options = _Options(z_loss, ignore_index, differentiate, tensor)
    return _LinearCrossEntropy.apply(hidden, weight, targets, options)


def gathered_logits(hidden: Tensor, weight: Tensor, tensor: Axis) -> Tensor:
    """Return the logits of the full vocabulary on every rank. Not differentiable over several ranks.

    Args:
        hidden: (..., D), or with sequence parallelism (N / T, D).
        weight: (V / T, D), this rank's rows.

    Returns:
        (..., V), or (N, V).
    """
    logits = F.linear(gather_tokens(hidden, tensor).wait(), weight)  # (..., V / T)
    if tensor.size == 1:
        return logits
    by_rank = all_gather(logits, tensor).wait().view(tensor.size, *logits.shape)  # (T, ..., V / T)
    return by_rank.movedim(0, -2).flatten(-2)


def _vocab_parallel_cross_entropy_(
    logits: Tensor, index: Tensor, z_loss: float, differentiate: bool, buffer: Tensor, tensor: Axis
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.cross_entropy.linear.plain_cross_entropy_` over a sharded vocabulary.

    Args:
        logits: (c, V / T), of this rank's entries.
        index: (c,) target token ids of the full vocabulary.
    """
    index = index.unsqueeze(1) - tensor.rank * logits.shape[1]  # (c, 1), relative to this rank's first entry
    is_local = (index >= 0) & (index < logits.shape[1])
    index = index.clamp(0, logits.shape[1] - 1)
    p = torch.softmax(logits, -1, dtype=buffer.dtype, out=buffer[: logits.shape[0]])
    local_lse = logits.amax(-1, keepdim=True).to(p.dtype) - p.amax(-1, keepdim=True).log()  # (c, 1)
    target_logit = torch.where(is_local, logits.gather(1, index).to(p.dtype), 0)  # (c, 1)
    stats = all_gather(torch.cat((local_lse, target_logit), 1), tensor).wait().view(tensor.size, -1, 2)  # (T, c, 2)
    lse = stats[..., 0].logsumexp(0).unsqueeze(1)  # (c, 1)
    nats = lse - stats[..., 1].sum(0).unsqueeze(1)
    if differentiate:
        scale = (local_lse - lse).exp()  # from the softmax of this rank's entries to that of all
        p *= scale * (1 + 2 * z_loss * lse) if z_loss else scale
        p.scatter_add_(1, index, -is_local.to(p.dtype))
        logits.copy_(p)
    return nats.squeeze(1), lse.squeeze(1)


class _Options(NamedTuple):
    """The arguments of the autograd function that are no tensors."""

    z_loss: float
    ignore_index: int
    differentiate: bool
    tensor: Axis


def _chunk_function(logits: Tensor, dtype: torch.dtype, tensor: Axis) -> ChunkFunction:
    """Return what computes a chunk: the vocabulary-parallel function, the fused kernel, or plain PyTorch.

    Args:
        logits: buffer (c, V / T) of the largest chunk.
        dtype: of the softmax.
    """
    if tensor.size == 1:
        return chunk_function_for(logits, dtype)
    buffer = torch.empty_like(logits, dtype=dtype)
    return functools.partial(_vocab_parallel_cross_entropy_, buffer=buffer, tensor=tensor)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        z_loss, ignore_index, differentiate, tensor = options
        states = gather_tokens(hidden, tensor).wait().flatten(0, -2)  # (N, D)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = (differentiate and need for need in ctx.needs_input_grad[:2])
        logits_buffer = states.new_empty(logits_rows(len(states), len(weight)), len(weight))  # (c, V / T)
        nats, squares, token_nats, n_valid, grad_hidden, grad_weight = chunked_loss(
            states,
            weight,
            targets.flatten(),
            z_loss=z_loss,
            ignore_index=ignore_index,
            differentiate=differentiate,
            need=(need_hidden, need_weight),
            logits_buffer=logits_buffer,
            chunk_function=_chunk_function(logits_buffer, dtype, tensor),
        )
        if grad_hidden is not None:
            grad_hidden = reduce_partial(grad_hidden / n_valid, tensor).wait().view_as(hidden)
        if grad_weight is not None:
            grad_weight = grad_weight.div_(n_valid).to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        nats = nats / n_valid
        objective = nats + z_loss * (squares / n_valid)
        token_nats = token_nats.view(targets.shape)
        ctx.mark_non_differentiable(nats, token_nats)
        return objective, nats, token_nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        if grad is None:
            return None, None, None, None
        grad_hidden, grad_weight = (
            None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None
