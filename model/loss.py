"""The output projection: cross-entropy without the full matrix of logits, and logits for those who want them.

A batch of N tokens over V words needs N * V logits, the largest tensor of a small
model.  The gradient of the loss is known once the softmax is, so the forward pass
computes it chunk by chunk, reduces it to the (small) gradients of the hidden states
and of the weight, and drops the chunk.

Where tensor ranks share the vocabulary, each computes its own words' logits, and of a token they exchange two numbers: the
logarithm of the sum of exponentials over a rank's words, and the target's logit. Logits are never gathered in training.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy import cross_entropy_, serves
from launch.estimate.counts import logits_rows
from model.collectives import all_gather, gather, reduce
from model.parallel import Axis


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    tensor: Axis = Axis(),
    sequence: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of ``softmax(hidden @ weight.T)`` against ``targets``.

    Matrix products take the dtype of the inputs; the softmax and the sums are fp32 (fp64 for fp64 inputs). Outside `no_grad`
    the forward pass computes the gradients. There is no branch on a value: on a GPU nothing waits.

    Args:
        hidden: (..., d) hidden states, of any floating dtype; with `sequence` (N / T, d), this rank's share of N tokens.
        weight: (V, d) output projection of the same dtype; over tensor ranks, this rank's rows of it.
        targets: (...) int64 word numbers below V, or ``ignore_index``.
        z_loss: coefficient of the mean of ``logsumexp(logits) ** 2``, added to the objective.
        ignore_index: target of the tokens that do not count.
        tensor: the ranks that share the vocabulary; each gets the same result.
        sequence: whether they share the tokens too.

    Returns:
        The objective to differentiate and the mean nats per valid token (not
        differentiable), both fp32 scalars; they are equal if ``z_loss`` is 0, and 0 if
        no token is valid.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    fits = targets.numel() == len(hidden) * tensor.size if sequence else targets.shape == hidden.shape[:-1]
    if not fits or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, targets))
        raise ValueError(f"shapes of hidden, weight and targets do not fit: {shapes}")
    differentiate = torch.is_grad_enabled()  # always off inside Function.forward
    shared = _Shared(tensor, sequence)
    return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, ignore_index, differentiate, shared)


def gathered_logits(hidden: Tensor, weight: Tensor, tensor: Axis, sequence: bool) -> Tensor:
    """Return the logits (..., V) of all words on every rank; with `sequence` (N, V) of (N / T, d). Without a gradient."""
    logits = F.linear(gather(hidden, tensor, sequence).wait(), weight)
    if tensor.size == 1:
        return logits
    by_rank = all_gather(logits, tensor).wait().view(tensor.size, *logits.shape)
    return by_rank.movedim(0, -2).flatten(-2)


def _plain_cross_entropy_(
    logits: Tensor, index: Tensor, z_loss: float, differentiate: bool, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """`kernels.cross_entropy.cross_entropy_` in plain PyTorch; `buffer` (at least c, V) has the precise dtype."""
    index = index.unsqueeze(1)
    p = torch.softmax(logits, -1, dtype=buffer.dtype, out=buffer[: logits.shape[0]])
    # From the likeliest word, whose probability is at least 1 / V: the log of the target's own may underflow.
    lse = logits.amax(-1, keepdim=True).to(p.dtype) - p.amax(-1, keepdim=True).log()  # (c, 1)
    nats = lse - logits.gather(1, index).to(p.dtype)
    if differentiate:
        if z_loss:
            p *= 1 + 2 * z_loss * lse
        p.scatter_add_(1, index, p.new_full((1, 1), -1.0).expand_as(index))
        logits.copy_(p)
    return nats.squeeze(1), lse.squeeze(1)


def _shared_cross_entropy_(
    logits: Tensor, index: Tensor, z_loss: float, differentiate: bool, buffer: Tensor, tensor: Axis
) -> tuple[Tensor, Tensor]:
    """`_plain_cross_entropy_` where the words are shared: logits (c, V / T) of this rank's, index of all words."""
    index = index.unsqueeze(1) - tensor.rank * logits.shape[1]  # among this rank's words, if it is one
    mine = (index >= 0) & (index < logits.shape[1])
    index = index.clamp(0, logits.shape[1] - 1)
    p = torch.softmax(logits, -1, dtype=buffer.dtype, out=buffer[: logits.shape[0]])
    own_lse = logits.amax(-1, keepdim=True).to(p.dtype) - p.amax(-1, keepdim=True).log()
    target = torch.where(mine, logits.gather(1, index).to(p.dtype), 0)
    told = all_gather(torch.cat((own_lse, target), 1), tensor).wait().view(tensor.size, -1, 2)
    lse = told[..., 0].logsumexp(0).unsqueeze(1)  # (c, 1)
    nats = lse - told[..., 1].sum(0).unsqueeze(1)
    if differentiate:
        scale = (own_lse - lse).exp()
        p *= scale * (1 + 2 * z_loss * lse) if z_loss else scale
        p.scatter_add_(1, index, -mine.to(p.dtype))
        logits.copy_(p)
    return nats.squeeze(1), lse.squeeze(1)


class _Shared(NamedTuple):
    tensor: Axis
    sequence: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor,
        z_loss: float, ignore_index: int, differentiate: bool, shared: _Shared,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        tensor, sequence = shared
        states = gather(hidden, tensor, sequence).wait().flatten(0, -2)  # (N, d)
        targets = targets.flatten()  # (N,)
        tokens, words = states.shape[0], weight.shape[0]
        precise = torch.promote_types(hidden.dtype, torch.float32)
        want_hidden = differentiate and ctx.needs_input_grad[0]
        want_weight = differentiate and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(states) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if want_weight else None

        valid = targets != ignore_index
        count = valid.sum().clamp_(min=1)
        nats = torch.zeros((), dtype=precise, device=hidden.device)
        squares = torch.zeros_like(nats)
        rows = logits_rows(tokens, words)
        logits_buffer = states.new_empty(rows, words)
        rows_of = cross_entropy_
        if tensor.size > 1:
            buffer = states.new_empty(rows, words, dtype=precise)
            rows_of = functools.partial(_shared_cross_entropy_, buffer=buffer, tensor=tensor)
        elif not serves(logits_buffer):
            rows_of = functools.partial(_plain_cross_entropy_, buffer=states.new_empty(rows, words, dtype=precise))
        for start in range(0, tokens, rows):
            chunk = slice(start, min(start + rows, tokens))
            x, kept = states[chunk], valid[chunk]  # (c, d), (c,)
            logits = torch.mm(x, weight.t(), out=logits_buffer[: x.shape[0]])
            # Rows that do not count get a gradient all the same.
            row_nats, lse = rows_of(logits, targets[chunk].where(kept, 0), z_loss, differentiate)
            nats, squares = nats + (row_nats * kept).sum(), squares + (lse.square() * kept).sum()
            # Tokens that do not count are masked on the small side of each product, not in the logits.
            mask = kept.unsqueeze(1).to(x.dtype)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
                grad_hidden[chunk] *= mask
            if grad_weight is not None:
                grad_weight += torch.mm(logits.t(), x * mask)

        if grad_hidden is not None:
            grad_hidden = reduce(grad_hidden / count, tensor, sequence).wait().view_as(hidden)
        if grad_weight is not None:
            grad_weight = grad_weight.div_(count).to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        nats = nats / count
        objective = nats + z_loss * (squares / count)
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        grads = tuple(None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return *grads, None, None, None, None, None
