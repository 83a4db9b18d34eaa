"""Which kernel computes attention: one function, `attend`, and the rule that chooses its backend.

    flash   the flash-attn package (GPU, bf16)
    sdpa    torch's scaled_dot_product_attention: its own flash kernel on a GPU, its CPU kernel on a CPU
    flex    torch's flex_attention, compiled (GPU; its backward does not exist on CPU)
    blocks  plain matrix products over causal blocks (attention_blocks.py), made for the CPU

Every backend is causal, takes grouped-query heads, and can keep packed documents apart.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.common.errors import UserError
from model.attention_blocks import causal_attention

BACKENDS = ("auto", "flash", "sdpa", "flex", "blocks")


# On a CPU in fp32, the longest sequence for which blocks were measured faster than SDPA (bench/LOG.md has the table).
_BLOCKS_LONGEST_FP32 = 512


def choose(backend: str, device: torch.device, dtype: torch.dtype, sequence_length: int) -> str:
    """Resolve "auto", and refuse what cannot run.

    On a GPU flash-attn is taken where it is installed, else torch's SDPA. On a CPU in bf16 blocks were faster than SDPA at
    every length and head size measured (1.5 to 6 times with backward), in fp32 for short sequences only.

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
    """Causal softmax attention, scores scaled by head_dim ** -0.5.

    Args:
        q: (B, S, n_heads, head_dim).
        k, v: (B, S, n_kv_heads, head_dim), where n_kv_heads divides n_heads.
        backend: what `choose` returned.
        documents: (B, S) integers, non-decreasing in S; tokens attend only within their own document. None: one document.

    Returns:
        (B, S, n_heads, head_dim).
    """
    if backend == "blocks":
        return causal_attention(q, k, v, documents)
    if backend == "flash":
        return _flash(q, k, v, documents)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, S, head_dim)
    if backend == "flex":
        out = _flex(q, k, v, documents, grouped)
    elif documents is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        mask = (documents[:, :, None] == documents[:, None, :]).tril_().unsqueeze(1)  # (B, 1, S, S)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)


def attend_cached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the newest tokens q (B, S, ...) over all keys k, v (B, T, ...), T >= S, for generation."""
    new, total = q.shape[1], k.shape[1]
    mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril_(total - new)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if documents is None:
        return flash_attn_func(q, k, v, causal=True)
    batch, length = documents.shape
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    bounds = F.pad(starts.flatten().nonzero().flatten().int(), (0, 1), value=batch * length)
    longest = int(bounds.diff().max())
    packed = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*packed, bounds, bounds, longest, longest, causal=True).view_as(q)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, grouped: bool) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001 (the signature is flex's)
        causal = i >= j
        return causal if documents is None else causal & (documents[b, i] == documents[b, j])

    batch = None if documents is None else q.shape[0]
    block_mask = create_block_mask(mask, batch, None, q.shape[2], q.shape[2], device=q.device)
    return _compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=grouped)
