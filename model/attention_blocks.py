"""Causal attention for CPUs, from batched matrix products.

PyTorch's CPU kernel of `scaled_dot_product_attention` is slow in bf16. Here queries are processed in blocks of rows, and each
block multiplies only the keys up to its own end. Forward and backward run as batched matrix products, which oneDNN does fast.

Shapes: B batch, S sequence, H query heads, K key/value heads, G = H / K query heads per key head, E head_dim. A block has b
sequences and r query rows; n = b x K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.autograd import FirstOrder, Link, link_to

# Up to this many elements, forward saves the probabilities for backward. For longer sequences backward recomputes them, so that
# memory grows with S, not with S^2.
_SAVED_ELEMENTS = 2**24
# Elements of one block of scores: small enough that the softmax finds in cache what the matrix product wrote.
_BLOCK_ELEMENTS = 2**22
_FIRST_ORDER = FirstOrder("attention on a CPU", "take scaled_dot_product_attention of PyTorch")


def causal_attention(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Compute softmax attention of every token to itself and to earlier tokens.

    Scores are scaled by `E ** -0.5`. Matrix products run in the dtype of the inputs; the softmax reduces in fp32.

    Args:
        q: (B, S, H, E) queries, of any floating dtype.
        k: (B, S, K, E) keys of the same dtype. K divides H, and query heads `i * G` to `(i + 1) * G - 1` share key head `i`.
        v: (B, S, K, E) values.
        document_ids: (B, S) integers; tokens attend only within their own document.

    Returns:
        (B, S, H, E), contiguous, in the dtype of `q`.

    Raises:
        ValueError: the shapes do not match.
    """
    batch, length, heads, dim = q.shape
    if k.shape != v.shape or k.shape[:2] != (batch, length) or k.shape[3] != dim or heads % k.shape[2]:
        raise ValueError(f"shapes do not match: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if document_ids is not None and document_ids.shape != (batch, length):
        raise ValueError(f"document_ids {tuple(document_ids.shape)} is not {(batch, length)}")
    return _CausalAttention.apply(q, k, v, document_ids, link_to(q, k, v))


def _blocks(batch: int, length: int, heads: int, kv_heads: int) -> list[tuple[slice, slice, slice]]:
    """Split the work into blocks: slices of the batch, of the flat B x K dimension, and of the query rows."""
    # Narrow blocks skip more of the masked half; wide blocks make faster matrix products.
    rows = min(length, max(64, min(length // 4, 256)))
    step = max(1, _BLOCK_ELEMENTS // (heads * rows * length))
    blocks = []
    for start in range(0, batch, step):
        stop = min(start + step, batch)
        for row in range(0, length, rows):
            kv = slice(start * kv_heads, stop * kv_heads)
            blocks.append((slice(start, stop), kv, slice(row, min(row + rows, length))))
    return blocks


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """Put the rows that share a key head together: (b, r, H, E) -> (b x K, G x r, E)."""
    b, r, heads, dim = x.shape
    x = x.view(b, r, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    return x.reshape(b * kv_heads, heads // kv_heads * r, dim)


def _unfold(x: Tensor, b: int, r: int) -> Tensor:
    """Invert `_fold`, as a view: (b x K, G x r, E) -> (b, r, K, G, E)."""
    return x.view(b, x.shape[0] // b, x.shape[1] // r, r, x.shape[2]).permute(0, 3, 1, 2, 4)


def _probabilities(q: Tensor, k: Tensor, rows: slice, document_ids: Tensor | None) -> Tensor:
    """Compute the attention probabilities of one block.

    Args:
        q: (n, G x r, E), scaled.
        k: (n, rows.stop, E).
        rows: the r query rows.
        document_ids: (b, S).

    Returns:
        (n, G x r, rows.stop).
    """
    scores = torch.bmm(q, k.mT)
    r = rows.stop - rows.start
    by_head = scores.view(q.shape[0], -1, r, rows.stop)  # (n, G, r, rows.stop)
    # Keys later than their query occur only in the last r columns.
    future = torch.full((r, r), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    by_head[..., rows.start :] += future
    if document_ids is not None:
        b = document_ids.shape[0]
        crosses = document_ids[:, rows, None] != document_ids[:, None, : rows.stop]  # (b, r, rows.stop)
        by_head.view(b, -1, r, rows.stop).masked_fill_(crosses[:, None], -torch.inf)
    return torch.softmax(scores, -1, out=scores)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, link: Link | None) -> Tensor:
        ctx.link = link  # scaled and folded copies are saved
        batch, length, heads, dim = q.shape
        kv_heads = k.shape[2]
        if document_ids is not None and bool((document_ids == document_ids[:, :1]).all()):
            document_ids = None  # one document per sequence: nothing to mask
        q_scaled = q * dim**-0.5
        k_flat, v_flat = _fold(k, kv_heads), _fold(v, kv_heads)  # (B x K, S, E)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        save = any(ctx.needs_input_grad[:3]) and batch * heads * length**2 <= _SAVED_ELEMENTS
        saved: list[Tensor] = []
        for b, kv, rows in _blocks(batch, length, heads, kv_heads):
            q_block = _fold(q_scaled[b, rows], kv_heads)  # (n, G x r, E)
            documents = None if document_ids is None else document_ids[b]
            p = _probabilities(q_block, k_flat[kv, : rows.stop], rows, documents)
            block = torch.bmm(p, v_flat[kv, : rows.stop])  # (n, G x r, E)
            target = out[b, rows]  # (b, r, H, E)
            target.view(*target.shape[:2], kv_heads, -1, dim).copy_(_unfold(block, *target.shape[:2]))
            if save:
                saved.append(p)
        ctx.save_for_backward(q_scaled, k_flat, v_flat, document_ids, *saved)
        return out

    @staticmethod
    @_FIRST_ORDER.once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        q_scaled, k_flat, v_flat, document_ids, *saved = ctx.saved_tensors
        batch, length, heads, dim = q_scaled.shape
        kv_heads = k_flat.shape[0] // batch
        dq = torch.empty_like(q_scaled)  # (B, S, H, E)
        dk, dv = torch.zeros_like(k_flat), torch.zeros_like(v_flat)  # (B x K, S, E)
        for i, (b, kv, rows) in enumerate(_blocks(batch, length, heads, kv_heads)):
            q_block = _fold(q_scaled[b, rows], kv_heads)  # (n, G x r, E)
            k_block = k_flat[kv, : rows.stop]  # (n, rows.stop, E)
            if saved:
                p = saved[i]
            else:
                documents = None if document_ids is None else document_ids[b]
                p = _probabilities(q_block, k_block, rows, documents)
            dy_block = _fold(dy[b, rows], kv_heads)  # (n, G x r, E)
            dv[kv, : rows.stop].baddbmm_(p.mT, dy_block)
            dp = torch.bmm(dy_block, v_flat[kv, : rows.stop].mT)  # (n, G x r, rows.stop)
            dscores = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dk[kv, : rows.stop].baddbmm_(dscores.mT, q_block)
            target = dq[b, rows]  # (b, r, H, E)
            block = _unfold(torch.bmm(dscores, k_block), *target.shape[:2])
            torch.mul(block, dim**-0.5, out=target.view(*target.shape[:2], kv_heads, -1, dim))
        return dq, _unfold(dk, batch, length).squeeze(3), _unfold(dv, batch, length).squeeze(3), None, None
