"""The output projection and its cross-entropy in one function, which never holds all logits.

N tokens over a vocabulary of V entries have N x V logits, the largest tensor of a small model. The gradient of the loss is
known as soon as the softmax is. So the forward pass works chunk by chunk: it computes a chunk of logits, turns it into its
gradient, reduces that to the (small) gradients of the hidden states and of the weight, and drops the chunk.

Shapes: N tokens, D d_model, V vocabulary entries, c tokens of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import FirstOrder, Link, link_to
from ..tensors import on_gpu
from .cross_entropy import cross_entropy_, serves

# (logits, targets, differentiate) -> nats and log-sum-exp of every token, 0 for one that is ignored; see `cross_entropy_`.
ChunkFunction = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
_FIRST_ORDER = FirstOrder("linear_cross_entropy", "take torch.nn.functional.cross_entropy")


class LossOptions(NamedTuple):
    """What the loss is: see `linear_cross_entropy`."""

    z_loss: float = 0.0
    ignore_index: int = -100
    softcap: float = 0.0


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    softcap: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Compute the mean cross-entropy of `softmax(hidden @ weight.T)` against `targets`, without holding all logits.

    Matrix products run in the dtype of the inputs; the softmax and the sums are fp32 (fp64 for fp64 inputs). Outside `no_grad`
    the forward pass computes the gradients. Differentiable once, in `hidden` and `weight`.

    >>> import torch
    >>> hidden, weight = torch.randn(2, 10, 64, requires_grad=True), torch.randn(1000, 64, requires_grad=True)
    >>> loss = linear_cross_entropy(hidden, weight, torch.randint(1000, (2, 10)))
    >>> loss.backward()
    >>> hidden.grad.shape, weight.grad.shape
    (torch.Size([2, 10, 64]), torch.Size([1000, 64]))

    Args:
        hidden: (..., D) hidden states, of any floating dtype.
        weight: (V, D) output projection of the same dtype.
        targets: (...) int64 token ids below V, or `ignore_index`.
        z_loss: coefficient of the mean of `logsumexp(logits) ** 2`, which is added.
        ignore_index: the target of tokens that are ignored.
        softcap: c of the logits' c tanh(logits / c) (Gemma 2, arXiv 2408.00118); 0: none.
        chunk: tokens whose logits exist at a time; None: 1024, and 8192 on a GPU, which is faster with fewer, larger products.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs); 0 if no token is valid.

    Raises:
        ValueError: the shapes or dtypes do not match, or `chunk` is not positive.
    """
    fits = weight.dim() == 2 and hidden.dim() > 0 and hidden.shape == (*targets.shape, weight.shape[1])
    if not fits or weight.dtype != hidden.dtype or targets.dtype != torch.int64:
        given = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (hidden, weight, targets))
        raise ValueError(f"hidden, weight and targets do not match: {given}")
    if chunk is None:
        chunk = 8192 if on_gpu(hidden) else 1024
    if chunk < 1:
        raise ValueError(f"chunk is a positive number of tokens, not {chunk}")
    _FIRST_ORDER.check_no_transforms(hidden, weight, targets)
    options = LossOptions(z_loss, ignore_index, softcap)
    link = link_to(hidden, weight)
    return _LinearCrossEntropy.apply(hidden, weight, targets, options, chunk, torch.is_grad_enabled(), link)


class ChunkedLoss(NamedTuple):
    """Sums over the valid tokens, and the gradients of (nats + z_loss x squares), not yet divided by `n_valid`."""

    nats: Tensor
    squares: Tensor  # of the log-sum-exp
    token_nats: Tensor  # (N,), of each token; 0 for one that is ignored
    n_valid: Tensor  # 1 if there is none
    grad_hidden: Tensor | None  # (N, D)
    grad_weight: Tensor | None  # (V, D), in the dtype of the softmax


def chunked_loss(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    differentiate: bool,
    need: tuple[bool, bool],
    logits_buffer: Tensor,
    chunk_function: ChunkFunction,
) -> ChunkedLoss:
    """Compute loss and gradients chunk by chunk.

    No Python branch depends on a tensor's value, so a GPU is never synchronised.

    Args:
        states: (N, D).
        weight: (V, D); over tensor ranks this rank's rows.
        targets: (N,), or `ignore_index`.
        differentiate: whether the chunk function is to overwrite logits with their gradient.
        need: whether the gradients of `states` and of `weight` are needed.
        logits_buffer: (c, V), scratch space of a chunk.
        chunk_function: what computes a chunk.
    """
    n_tokens, rows = len(states), len(logits_buffer)
    dtype = torch.promote_types(states.dtype, torch.float32)
    need_hidden, need_weight = need
    grad_hidden = torch.empty_like(states) if need_hidden else None
    grad_weight: Tensor | None = None

    n_valid = (targets != ignore_index).sum().clamp_(min=1)
    token_nats, lse = (torch.empty(n_tokens, dtype=dtype, device=states.device) for _ in range(2))
    for start in range(0, n_tokens, rows):
        chunk = slice(start, min(start + rows, n_tokens))
        x = states[chunk]  # (c, D)
        logits = torch.mm(x, weight.t(), out=logits_buffer[: x.shape[0]])  # (c, V / T)
        token_nats[chunk], lse[chunk] = chunk_function(logits, targets[chunk], differentiate)
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[chunk])
        if need_weight:
            grad_weight = _add_product(grad_weight, logits.t(), x, dtype)
    if need_weight and grad_weight is None:  # no tokens
        grad_weight = torch.zeros_like(weight, dtype=dtype)
    return ChunkedLoss(token_nats.sum(), lse.square().sum(), token_nats, n_valid, grad_hidden, grad_weight)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `total` + a @ b in `dtype`, in place of `total`; None counts as 0. The product itself adds, wherever it can."""
    if a.dtype == dtype:
        return torch.mm(a, b) if total is None else torch.addmm(total, a, b, out=total)
    if on_gpu(a):  # there a product of bf16 may have a result of fp32
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    product = torch.mm(a, b)
    return product.to(dtype) if total is None else total.add_(product)


def plain_cross_entropy_(
    logits: Tensor, targets: Tensor, differentiate: bool, options: LossOptions, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `cross_entropy_` in plain PyTorch.

    Args:
        logits: (c, V); overwritten by their gradient if `differentiate`.
        targets: (c,) target token ids, or `ignore_index`.
        buffer: scratch space of at least (c, V) in the dtype of the softmax.

    Returns:
        Nats and log-sum-exp of every token, each (c,).
    """
    ignored = (targets == options.ignore_index).unsqueeze(1)  # (c, 1)
    index = targets.unsqueeze(1).masked_fill(ignored, 0)  # (c, 1)
    slope = softcap_(logits, options.softcap)
    p = torch.softmax(logits, -1, dtype=buffer.dtype, out=buffer[: logits.shape[0]])
    # From the likeliest entry, whose probability is at least 1 / V: the target's own probability may underflow.
    lse = logits.amax(-1, keepdim=True).to(p.dtype) - p.amax(-1, keepdim=True).log()  # (c, 1)
    nats = lse - logits.gather(1, index).to(p.dtype)
    if differentiate:
        if options.z_loss:
            p *= 1 + 2 * options.z_loss * lse
        p.scatter_add_(1, index, p.new_full((1, 1), -1.0).expand_as(index))
        if slope is not None:
            p *= slope
        logits.copy_(p.masked_fill_(ignored, 0))
    return nats.masked_fill_(ignored, 0).squeeze(1), lse.masked_fill_(ignored, 0).squeeze(1)


def softcap_(logits: Tensor, softcap: float) -> Tensor | None:
    """Overwrite logits by c tanh(logits / c), and return the derivative; None, and nothing, where c is 0."""
    if not softcap:
        return None
    t = torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / softcap)
    logits.copy_(t * softcap)
    return 1 - t.square()


def chunk_function_for(logits: Tensor, dtype: torch.dtype, options: LossOptions) -> ChunkFunction:
    """Return what computes a chunk on one rank: the fused kernel, or plain PyTorch.

    Args:
        logits: buffer (c, V) of the largest chunk.
        dtype: of the softmax.
    """
    if serves(logits):
        return functools.partial(_fused, options=options)
    return functools.partial(plain_cross_entropy_, options=options, buffer=torch.empty_like(logits, dtype=dtype))


def _fused(logits: Tensor, targets: Tensor, differentiate: bool, options: LossOptions) -> tuple[Tensor, Tensor]:
    return cross_entropy_(logits, targets, options.z_loss, differentiate, options.ignore_index, options.softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        options: LossOptions,
        chunk: int,
        differentiate: bool,
        link: Link | None,
    ) -> Tensor:
        states = hidden.reshape(targets.numel(), hidden.shape[-1])  # (N, D)
        logits_buffer = states.new_empty(min(chunk, max(1, len(states))), len(weight))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = (differentiate and need for need in ctx.needs_input_grad[:2])
        loss = chunked_loss(
            states,
            weight,
            targets.flatten(),
            ignore_index=options.ignore_index,
            differentiate=need_hidden or need_weight,
            need=(need_hidden, need_weight),
            logits_buffer=logits_buffer,
            chunk_function=chunk_function_for(logits_buffer, dtype, options),
        )
        d_hidden, d_weight = loss.grad_hidden, loss.grad_weight
        ctx.save_for_backward(
            None if d_hidden is None else d_hidden.div_(loss.n_valid).view_as(hidden),
            None if d_weight is None else d_weight.div_(loss.n_valid).to(weight.dtype),
        )
        ctx.link = link
        return (loss.nats + options.z_loss * loss.squares) / loss.n_valid

    @staticmethod
    @_FIRST_ORDER.once
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        saved = (None if tensor is None else tensor * gradient.to(tensor.dtype) for tensor in ctx.saved_tensors)
        return *saved, None, None, None, None, None
