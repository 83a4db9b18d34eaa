"""Causal attention for CPUs, from plain tensor operations.

PyTorch's own CPU kernel for ``scaled_dot_product_attention`` is slow in bf16.  Here
query rows are taken in blocks; each block multiplies only the keys up to its own
end, and both directions run as batched matrix products, which oneDNN does fast.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Probabilities up to this many elements are kept for the backward pass; longer
# sequences compute them again, so that memory grows with T and not with T * T.
_KEEP_ELEMENTS = 2**24
# Elements of one block of scores: small enough that the softmax finds in cache
# what the matrix product wrote.
_BLOCK_ELEMENTS = 2**22


def causal_attention(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Softmax attention of every token to itself and to earlier tokens.

    Scores are scaled by ``D ** -0.5``.  Matrix products take the dtype of the inputs,
    the softmax reduces in fp32.

    Args:
        q: (B, T, H, D) queries, of any floating dtype.
        k: (B, T, K, D) keys of the same dtype; K divides H, and query heads
            ``i * H / K`` to ``(i + 1) * H / K - 1`` share key head ``i``.
        v: (B, T, K, D) values.
        document_ids: (B, T) integers; tokens attend only within their own document.

    Returns:
        (B, T, H, D), contiguous, in the dtype of ``q``.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    batch, length, heads, dim = q.shape
    if k.shape != v.shape or k.shape[:2] != (batch, length) or k.shape[3] != dim or heads % k.shape[2]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if document_ids is not None and document_ids.shape != (batch, length):
        raise ValueError(f"document_ids {tuple(document_ids.shape)} is not {(batch, length)}")
    return _CausalAttention.apply(q, k, v, document_ids)


def _blocks(batch: int, length: int, heads: int, kv_heads: int) -> list[tuple[slice, slice, slice]]:
    """Split the work into (batch rows, rows of the flat B * K dimension, query rows)."""
    # Narrow blocks skip more of the masked half; wide ones make better products.
    rows = min(length, max(64, min(length // 4, 256)))
    step = max(1, _BLOCK_ELEMENTS // (heads * rows * length))
    return [
        (slice(b, min(b + step, batch)), slice(b * kv_heads, min(b + step, batch) * kv_heads),
         slice(r, min(r + rows, length)))
        for b in range(0, batch, step)
        for r in range(0, length, rows)
    ]  # fmt: skip


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """(b, t, H, D) to (b * K, H / K * t, D): the rows that share one key head, together."""
    b, t, heads, dim = x.shape
    x = x.view(b, t, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    return x.reshape(b * kv_heads, heads // kv_heads * t, dim)


def _unfold(x: Tensor, b: int, t: int) -> Tensor:
    """(b * K, H / K * t, D) to a view (b, t, K, H / K, D)."""
    return x.view(b, x.shape[0] // b, x.shape[1] // t, t, x.shape[2]).permute(0, 3, 1, 2, 4)


def _probabilities(q: Tensor, k: Tensor, rows: slice, document_ids: Tensor | None) -> Tensor:
    """Attention of one block: q (n, g * t, D) scaled, k (n, rows.stop, D) to (n, g * t, rows.stop)."""
    scores = torch.bmm(q, k.mT)
    length = rows.stop - rows.start
    heads = scores.view(q.shape[0], -1, length, rows.stop)
    # Only the last columns of the block hold keys after their query.
    future = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    heads[..., rows.start :] += future
    if document_ids is not None:
        b = document_ids.shape[0]
        other = document_ids[:, rows, None] != document_ids[:, None, : rows.stop]
        heads.view(b, -1, length, rows.stop).masked_fill_(other[:, None], -torch.inf)
    return torch.softmax(scores, -1, out=scores)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None) -> Tensor:
        batch, length, heads, dim = q.shape
        kv_heads = k.shape[2]
        if document_ids is not None and bool((document_ids == document_ids[:, :1]).all()):
            document_ids = None
        q_scaled = q * dim**-0.5
        k_flat, v_flat = _fold(k, kv_heads), _fold(v, kv_heads)  # (B * K, T, D)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        keep = any(ctx.needs_input_grad[:3]) and batch * heads * length**2 <= _KEEP_ELEMENTS
        kept = []
        for b, flat, rows in _blocks(batch, length, heads, kv_heads):
            q_block = _fold(q_scaled[b, rows], kv_heads)
            documents = None if document_ids is None else document_ids[b]
            p = _probabilities(q_block, k_flat[flat, : rows.stop], rows, documents)
            block = torch.bmm(p, v_flat[flat, : rows.stop])
            target = out[b, rows]
            target.view(*target.shape[:2], kv_heads, -1, dim).copy_(_unfold(block, *target.shape[:2]))
            if keep:
                kept.append(p)
        ctx.save_for_backward(q_scaled, k_flat, v_flat, document_ids, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_scaled, k_flat, v_flat, document_ids, *kept = ctx.saved_tensors
        batch, length, heads, dim = q_scaled.shape
        kv_heads = k_flat.shape[0] // batch
        dq = torch.empty_like(q_scaled)
        dk, dv = torch.zeros_like(k_flat), torch.zeros_like(v_flat)
        for i, (b, flat, rows) in enumerate(_blocks(batch, length, heads, kv_heads)):
            q_block = _fold(q_scaled[b, rows], kv_heads)
            k_block = k_flat[flat, : rows.stop]
            if kept:
                p = kept[i]
            else:
                documents = None if document_ids is None else document_ids[b]
                p = _probabilities(q_block, k_block, rows, documents)
            grad_block = _fold(grad[b, rows], kv_heads)
            dv[flat, : rows.stop].baddbmm_(p.mT, grad_block)
            dp = torch.bmm(grad_block, v_flat[flat, : rows.stop].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dk[flat, : rows.stop].baddbmm_(ds.mT, q_block)
            target = dq[b, rows]
            block = torch.bmm(ds, k_block)
            torch.mul(
                _unfold(block, *target.shape[:2]), dim**-0.5,
                out=target.view(*target.shape[:2], kv_heads, -1, dim),
            )  # fmt: skip
        return dq, _unfold(dk, batch, length).squeeze(3), _unfold(dv, batch, length).squeeze(3), None
