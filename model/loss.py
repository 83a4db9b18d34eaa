"""The output projection: cross-entropy without the full matrix of logits, and logits for generation.

A batch of N tokens over a vocabulary of V entries has N x V logits, the largest tensor of a small model. The gradient of the
loss is known as soon as the softmax is. So the forward pass works chunk by chunk: it computes a chunk of logits, turns it into
its gradient, reduces that to the (small) gradients of the hidden states and of the weight, and drops the chunk.

Over tensor ranks the vocabulary is sharded. Each rank computes the logits of its own entries, and ranks exchange two numbers
per token: the log-sum-exp over a rank's entries, and the target's logit. Logits are never gathered in training.

Shapes: N tokens, D d_model, V vocabulary entries, T tensor ranks, c tokens of a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy import cross_entropy_, serves
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
) -> tuple[Tensor, Tensor]:
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
        The objective to differentiate, and the mean nats per valid token (not differentiable), both fp32 scalars. They are
        equal if `z_loss` is 0, and 0 if no token is valid.

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


def _plain_cross_entropy_(
    logits: Tensor, index: Tensor, z_loss: float, differentiate: bool, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.cross_entropy.cross_entropy_` in plain PyTorch.

    Args:
        logits: (c, V); overwritten by their gradient if `differentiate`.
        index: (c,) target token ids.
        buffer: scratch space of at least (c, V) in the dtype of the softmax.

    Returns:
        Nats and log-sum-exp of every token, each (c,).
    """
    index = index.unsqueeze(1)  # (c, 1)
    p = torch.softmax(logits, -1, dtype=buffer.dtype, out=buffer[: logits.shape[0]])
    # From the likeliest entry, whose probability is at least 1 / V: the target's own probability may underflow.
    lse = logits.amax(-1, keepdim=True).to(p.dtype) - p.amax(-1, keepdim=True).log()  # (c, 1)
    nats = lse - logits.gather(1, index).to(p.dtype)
    if differentiate:
        if z_loss:
            p *= 1 + 2 * z_loss * lse
        p.scatter_add_(1, index, p.new_full((1, 1), -1.0).expand_as(index))
        logits.copy_(p)
    return nats.squeeze(1), lse.squeeze(1)


def _vocab_parallel_cross_entropy_(
    logits: Tensor, index: Tensor, z_loss: float, differentiate: bool, buffer: Tensor, tensor: Axis
) -> tuple[Tensor, Tensor]:
    """Compute `_plain_cross_entropy_` over a sharded vocabulary.

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


def _chunk_function(logits: Tensor, dtype: torch.dtype, tensor: Axis) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what computes a chunk: the vocabulary-parallel function, the fused kernel, or plain PyTorch.

    Args:
        logits: buffer (c, V / T) of the largest chunk.
        dtype: of the softmax.
    """
    if tensor.size > 1:
        buffer = torch.empty_like(logits, dtype=dtype)
        return functools.partial(_vocab_parallel_cross_entropy_, buffer=buffer, tensor=tensor)
    if serves(logits):
        return cross_entropy_
    return functools.partial(_plain_cross_entropy_, buffer=torch.empty_like(logits, dtype=dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        z_loss, ignore_index, differentiate, tensor = options
        states = gather_tokens(hidden, tensor).wait().flatten(0, -2)  # (N, D)
        targets = targets.flatten()  # (N,)
        n_tokens, n_entries = len(states), len(weight)  # N, V / T
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = (differentiate and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(states) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None

        valid = targets != ignore_index  # (N,)
        n_valid = valid.sum().clamp_(min=1)
        nats = torch.zeros((), dtype=dtype, device=hidden.device)
        squares = torch.zeros_like(nats)  # of the log-sum-exp
        rows = logits_rows(n_tokens, n_entries)
        logits_buffer = states.new_empty(rows, n_entries)
        chunk_function = _chunk_function(logits_buffer, dtype, tensor)
        for start in range(0, n_tokens, rows):
            chunk = slice(start, min(start + rows, n_tokens))
            x, is_valid = states[chunk], valid[chunk]  # (c, D), (c,)
            logits = torch.mm(x, weight.t(), out=logits_buffer[: x.shape[0]])  # (c, V / T)
            # Ignored rows are given target 0 and get a gradient all the same.
            row_nats, lse = chunk_function(logits, targets[chunk].where(is_valid, 0), z_loss, differentiate)
            nats, squares = nats + (row_nats * is_valid).sum(), squares + (lse.square() * is_valid).sum()
            # They are masked on the small side of each product, not in the logits (which are gradients by now).
            mask = is_valid.unsqueeze(1).to(x.dtype)  # (c, 1)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
                grad_hidden[chunk] *= mask
            if grad_weight is not None:
                grad_weight += torch.mm(logits.t(), x * mask)

        if grad_hidden is not None:
            grad_hidden = reduce_partial(grad_hidden / n_valid, tensor).wait().view_as(hidden)
        if grad_weight is not None:
            grad_weight = grad_weight.div_(n_valid).to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        nats = nats / n_valid
        objective = nats + z_loss * (squares / n_valid)
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        if grad is None:
            return None, None, None, None
        grad_hidden, grad_weight = (
            None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None
