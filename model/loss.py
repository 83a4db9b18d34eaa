"""The output projection: cross-entropy without the full matrix of logits, and logits for generation.

The forward pass works chunk by chunk, and `kernels/cross_entropy/linear.py` has the loop over chunks.

Over tensor ranks the vocabulary is sharded. Each rank computes the logits of its own entries, and ranks exchange two numbers
per token: the log-sum-exp over a rank's entries, and the target's logit. Logits are never gathered in training.

Shapes: N tokens, D d_model, V vocabulary entries, T tensor ranks, c tokens of a chunk.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import FirstOrder, Link, link_to
from kernels.cross_entropy.cross_entropy import triton_kernels
from kernels.cross_entropy.linear import ChunkFunction, LossOptions, chunk_function_for, chunked_loss, softcap_
from kernels.tensors import on_gpu
from launch.estimate.counts import logits_rows
from model.collectives import all_gather, gather_tokens, reduce_partial
from model.parallel import Axis

_FIRST_ORDER = FirstOrder("linear_cross_entropy", "take torch.nn.functional.cross_entropy")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    tensor: Axis = Axis(),
    softcap: float = 0.0,
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
        softcap: c of the logits' c tanh(logits / c); 0: none.

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
    options = LossOptions(z_loss, ignore_index, softcap)
    return _LinearCrossEntropy.apply(hidden, weight, targets, options, differentiate, tensor, link_to(hidden, weight))


def gathered_logits(hidden: Tensor, weight: Tensor, tensor: Axis, softcap: float = 0.0) -> Tensor:
    """Return the logits of the full vocabulary on every rank. Not differentiable over several ranks.

    Args:
        hidden: (..., D), or with sequence parallelism (N / T, D).
        weight: (V / T, D), this rank's rows.
        softcap: see `linear_cross_entropy`.

    Returns:
        (..., V), or (N, V).
    """
    logits = F.linear(gather_tokens(hidden, tensor).wait(), weight)  # (..., V / T)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if tensor.size == 1:
        return logits
    by_rank = all_gather(logits, tensor).wait().view(tensor.size, *logits.shape)  # (T, ..., V / T)
    return by_rank.movedim(0, -2).flatten(-2)


def _vocab_parallel_plain_(
    logits: Tensor, targets: Tensor, differentiate: bool, options: LossOptions, buffer: Tensor, tensor: Axis
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.cross_entropy.linear.plain_cross_entropy_` over a sharded vocabulary.

    Args:
        logits: (c, V / T), of this rank's entries.
        targets: (c,) target token ids of the full vocabulary, or `ignore_index`.
    """
    ignored = (targets == options.ignore_index).unsqueeze(1)  # (c, 1)
    index = targets.unsqueeze(1) - tensor.rank * logits.shape[1]  # (c, 1), relative to this rank's first entry
    is_local = (index >= 0) & (index < logits.shape[1]) & ~ignored
    index = index.clamp(0, logits.shape[1] - 1)
    slope = softcap_(logits, options.softcap)
    p = torch.softmax(logits, -1, dtype=buffer.dtype, out=buffer[: logits.shape[0]])
    local_lse = logits.amax(-1, keepdim=True).to(p.dtype) - p.amax(-1, keepdim=True).log()  # (c, 1)
    target_logit = torch.where(is_local, logits.gather(1, index).to(p.dtype), 0)  # (c, 1)
    nats, lse = _over_ranks(local_lse, target_logit, ignored, tensor)
    if differentiate:
        scale = (local_lse - lse).exp()  # from the softmax of this rank's entries to that of all
        p *= scale * (1 + 2 * options.z_loss * lse) if options.z_loss else scale
        p.scatter_add_(1, index, -is_local.to(p.dtype))
        if slope is not None:
            p *= slope
        logits.copy_(p.masked_fill_(ignored, 0))
    return nats.squeeze(1), lse.squeeze(1)


def _vocab_parallel_fused_(
    logits: Tensor, targets: Tensor, differentiate: bool, options: LossOptions, kernels: Any, tensor: Axis
) -> tuple[Tensor, Tensor]:
    """Compute `_vocab_parallel_plain_` by the Triton kernels, without scratch space."""
    first = tensor.rank * logits.shape[1]  # this rank's first entry
    local_lse, target_logit = kernels.measure(logits, targets, first, options.ignore_index, options.softcap)
    ignored = (targets == options.ignore_index).unsqueeze(1)
    nats, lse = (x.squeeze(1) for x in _over_ranks(local_lse.unsqueeze(1), target_logit.unsqueeze(1), ignored, tensor))
    if differentiate:
        arguments = (first, options.ignore_index, options.z_loss, options.softcap)
        kernels.differentiate_(logits, targets, lse, *arguments)
    return nats, lse


def _over_ranks(local_lse: Tensor, target_logit: Tensor, ignored: Tensor, tensor: Axis) -> tuple[Tensor, Tensor]:
    """Return nats and log-sum-exp over the vocabulary of all ranks, 0 where ignored, from those of one; all (c, 1)."""
    stats = all_gather(torch.cat((local_lse, target_logit), 1), tensor).wait().view(tensor.size, -1, 2)  # (T, c, 2)
    lse = stats[..., 0].logsumexp(0).unsqueeze(1).masked_fill(ignored, 0)
    return (lse - stats[..., 1].sum(0).unsqueeze(1)).masked_fill(ignored, 0), lse


def _chunk_function(logits: Tensor, dtype: torch.dtype, options: LossOptions, tensor: Axis) -> ChunkFunction:
    """Return what computes a chunk of the vocabulary of one rank or of several.

    Args:
        logits: buffer (c, V / T) of the largest chunk.
        dtype: of the softmax.
    """
    if tensor.size == 1:
        return chunk_function_for(logits, dtype, options)
    kernels = triton_kernels(logits)
    if kernels is not None:
        return functools.partial(_vocab_parallel_fused_, options=options, kernels=kernels, tensor=tensor)
    buffer = torch.empty_like(logits, dtype=dtype)
    return functools.partial(_vocab_parallel_plain_, options=options, buffer=buffer, tensor=tensor)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        options: LossOptions,
        differentiate: bool,
        tensor: Axis,
        link: Link | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.link = link
        ctx.set_materialize_grads(False)
        states = gather_tokens(hidden, tensor).wait().flatten(0, -2)  # (N, D)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = (differentiate and need for need in ctx.needs_input_grad[:2])
        rows = logits_rows(len(states), len(weight), on_gpu(states))
        logits_buffer = states.new_empty(rows, len(weight))  # (c, V / T)
        nats, squares, token_nats, n_valid, grad_hidden, grad_weight = chunked_loss(
            states,
            weight,
            targets.flatten(),
            ignore_index=options.ignore_index,
            differentiate=differentiate,
            need=(need_hidden, need_weight),
            logits_buffer=logits_buffer,
            chunk_function=_chunk_function(logits_buffer, dtype, options, tensor),
        )
        if grad_hidden is not None:
            grad_hidden = reduce_partial(grad_hidden / n_valid, tensor).wait().view_as(hidden)
        if grad_weight is not None:
            grad_weight = grad_weight.div_(n_valid).to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        nats = nats / n_valid
        objective = nats + options.z_loss * (squares / n_valid)
        token_nats = token_nats.view(targets.shape)
        ctx.mark_non_differentiable(nats, token_nats)
        return objective, nats, token_nats

    @staticmethod
    @_FIRST_ORDER.once
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        if grad is None:
            return (None,) * 7
        grad_hidden, grad_weight = (
            None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None, None, None, None
