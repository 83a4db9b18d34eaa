"""Causal attention: one function, `attend`, and the rule that chooses its backend.

    flash   the flash-attn package (GPU, bf16)
    sdpa    torch's scaled_dot_product_attention: its own flash kernel on a GPU, its CPU kernel on a CPU
    flex    torch's flex_attention, compiled (GPU; it has no backward on a CPU)
    blocks  matrix products over causal blocks, for CPUs (`attention_blocks.py`)

Every backend is causal, supports grouped-query heads, and can mask attention across packed documents.

Shapes: B batch, S sequence, H query heads, K key/value heads, E head_dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.common.errors import UserError
from model.attention_blocks import causal_attention

BACKENDS = ("auto", "flash", "sdpa", "flex", "blocks")

# On a CPU in fp32, the longest sequence at which blocks were measured faster than SDPA (table in bench/LOG.md).
_BLOCKS_LONGEST_FP32 = 512


def choose(backend: str, device: torch.device, dtype: torch.dtype, sequence_length: int) -> str:
    """Return the backend to use: `backend` itself, or for "auto" the fastest one.

    On a GPU that is flash-attn if it is installed, else torch's SDPA. On a CPU blocks were faster than SDPA in bf16 at every
    length and head size measured (1.5 to 6 times with backward), and in fp32 for short sequences only.

    Raises:
        UserError: the named backend is not installed, or does not run on this device or in this dtype.
    """
    if backend == "auto":
        if device.type != "cuda":
            return "blocks" if dtype == torch.bfloat16 or sequence_length <= _BLOCKS_LONGEST_FP32 else "sdpa"
        has_flash = importlib.util.find_spec("flash_attn") is not None and dtype in (torch.bfloat16, torch.float16)
        return "flash" if has_flash else "sdpa"
    if backend in ("flash", "flex") and device.type != "cuda":
        raise UserError(f"model.attention={backend} needs a GPU; on this machine choose auto, blocks or sdpa")
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise UserError("model.attention=flash needs the package flash-attn, which is not installed; auto uses SDPA")
    if backend == "flash" and dtype == torch.float32:
        raise UserError("model.attention=flash computes in bf16; use precision=bf16, or model.attention=sdpa")
    return backend


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str, documents: Tensor | None = None) -> Tensor:
    """Compute causal softmax attention, with scores scaled by head_dim ** -0.5.

    Args:
        q: (B, S, H, E).
        k, v: (B, S, K, E), where K divides H.
        backend: as `choose` returned it.
        documents: (B, S) integers, non-decreasing in S; tokens attend only within their own document. None: one document.

    Returns:
        (B, S, H, E).
    """
    if backend == "blocks":
        return causal_attention(q, k, v, documents)
    if backend == "flash":
        return _flash(q, k, v, documents)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, S, E)
    if backend == "flex":
        out = _flex(q, k, v, documents, grouped)
    elif documents is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        mask = (documents[:, :, None] == documents[:, None, :]).tril_().unsqueeze(1)  # (B, 1, S, S)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)


def attend_cached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention of the newest tokens over all keys so far, for generation.

    Args:
        q: (B, S, H, E), the S newest tokens.
        k, v: (B, L, K, E), all L >= S tokens.

    Returns:
        (B, S, H, E).
    """
    new, total = q.shape[1], k.shape[1]
    mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril_(total - new)  # (S, L)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    flash_attn = importlib.import_module("flash_attn")  # optional: `choose` has checked that it is installed
    if documents is None:
        return flash_attn.flash_attn_func(q, k, v, causal=True)
    batch, length = documents.shape
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    # Documents of all sequences become one packed sequence (B x S, heads, E), whose boundaries are the documents' first tokens.
    bounds = F.pad(starts.flatten().nonzero().flatten().int(), (0, 1), value=batch * length)
    longest = int(bounds.diff().max())
    q_packed, k_packed, v_packed = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn.flash_attn_varlen_func(q_packed, k_packed, v_packed, bounds, bounds, longest, longest, causal=True)
    return out.view_as(q)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, grouped: bool) -> Tensor:
    """Compute attention of q (B, H, S, E) and k, v (B, K, S, E) by flex_attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001 (flex's signature)
        causal = i >= j
        return causal if documents is None else causal & (documents[b, i] == documents[b, j])

    batch = None if documents is None else q.shape[0]
    block_mask = create_block_mask(mask, batch, None, q.shape[2], q.shape[2], device=q.device)
    return _compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=grouped)
