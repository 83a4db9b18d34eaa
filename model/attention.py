"""Causal attention: one function, `attend`, and the rule that chooses its backend.

    flash   a flash-attn package (GPU, bf16; `flash_attention.py`)
    sdpa    torch's scaled_dot_product_attention: cuDNN's kernel or torch's own on a GPU, its CPU kernel on a CPU
    flex    torch's flex_attention, compiled (GPU; it has no backward on a CPU)
    blocks  matrix products over causal blocks, for CPUs (`attention_blocks.py`)

Every backend is causal, supports grouped-query heads, and can mask attention across packed documents. On a GPU none of them
ever holds the S x S probabilities of all heads: `_kernels` and `_repeats_heads` have the rules.

Shapes: B batch, S sequence, H query heads, K key/value heads, E head_dim, N = B x S tokens.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.common.errors import UserError
from kernels.tensors import capability_of, on_gpu
from model.attention_blocks import causal_attention
from model.flash_attention import find_flash_attention

BACKENDS = ("auto", "flash", "sdpa", "flex", "blocks")

# On a CPU in fp32, the longest sequence at which blocks were measured faster than SDPA (table in bench/LOG.md).
_BLOCKS_LONGEST_FP32 = 512
# Major versions of NVIDIA's GPUs on which cuDNN's kernels come first: Hopper, where published measurements have them 1.7 to 2.3
# times as fast as torch's own, and B200, for which these are not made. On Ampere, Ada and Blackwell workstations they are not.
_CUDNN_FIRST = (9, 10)
_LOGIT_ROWS = 256  # query rows whose logits `largest_logits` holds at once
_HALF = (torch.bfloat16, torch.float16)


class AttentionChoice(NamedTuple):
    """A backend, and what to warn about it: why it is not another one."""

    backend: str
    warnings: tuple[str, ...] = ()


class Documents:
    """The documents of packed sequences, in the form that each backend takes; each form is computed once per batch.

    Args:
        numbers: (B, S) integers, non-decreasing in S; tokens attend only within their own document.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    @functools.cached_property
    def mask(self) -> Tensor:
        """Which key each query sees: (B, 1, S, S), of bool."""
        return (self.numbers.unsqueeze(2) == self.numbers.unsqueeze(1)).tril_().unsqueeze(1)

    @functools.cached_property
    def bounds(self) -> tuple[Tensor, int]:
        """The documents of all sequences as one packed sequence: their first tokens and N (int32), and the longest.

        A GPU is synchronised twice.
        """
        starts = torch.ones_like(self.numbers, dtype=torch.bool)
        starts[:, 1:] = self.numbers[:, 1:] != self.numbers[:, :-1]
        bounds = F.pad(starts.flatten().nonzero().flatten().int(), (0, 1), value=self.numbers.numel())
        return bounds, int(bounds.diff().max())

    @functools.cached_property
    def block_mask(self) -> Any:
        """The mask of flex_attention."""
        numbers = self.numbers

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001 (flex's signature)
            return (i >= j) & (numbers[b, i] == numbers[b, j])

        return _block_mask(mask, len(numbers), numbers.shape[1], numbers.device)


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    sequence_length: int,
    capability: tuple[int, int] | None = None,
) -> AttentionChoice:
    """Return the backend to use: `backend` itself, or for "auto" the fastest one.

    On a GPU that is SDPA where cuDNN's kernels lead and this torch prefers them, else flash-attn if it can be imported, else
    SDPA. On a CPU blocks were faster than SDPA in bf16 at every length and head size measured (1.5 to 6 times with backward),
    and in fp32 for short sequences only.

    Args:
        capability: of the GPU, as (9, 0) for sm_90; None: ask the device.

    Raises:
        UserError: the named backend is not installed, or does not run on this device or in this dtype.
    """
    is_gpu = device.type == "cuda"
    if is_gpu and capability is None and backend in ("auto", "flash"):
        capability = torch.cuda.get_device_capability(device)
    if backend == "auto":
        if not is_gpu:
            return AttentionChoice(
                "blocks" if dtype == torch.bfloat16 or sequence_length <= _BLOCKS_LONGEST_FP32 else "sdpa"
            )
        if dtype not in _HALF or _prefers_cudnn(capability):
            return AttentionChoice("sdpa")
        package, why = find_flash_attention(capability)
        if package is None:
            broken = why.startswith("cannot")
            return AttentionChoice(
                "sdpa", (f"flash-attn is installed and {why}: attention is SDPA's",) if broken else ()
            )
        return AttentionChoice("flash")
    if backend in ("flash", "flex") and not is_gpu:
        raise UserError(f"model.attention={backend} needs a GPU; on this machine choose auto, blocks or sdpa")
    if backend == "flash" and dtype == torch.float32:
        raise UserError("model.attention=flash computes in bf16; use precision=bf16, or model.attention=sdpa")
    if backend == "flash" and capability is not None:
        package, why = find_flash_attention(capability)
        if package is None:
            raise UserError(f"model.attention=flash needs the package flash-attn, which {why}; auto uses SDPA")
    return AttentionChoice(backend)


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str, documents: Documents | None = None) -> Tensor:
    """Compute causal softmax attention, with scores scaled by head_dim ** -0.5.

    Args:
        q: (B, S, H, E).
        k, v: (B, S, K, E), where K divides H.
        backend: as `choose` returned it.
        documents: of the sequences; None: one document.

    Returns:
        (B, S, H, E).
    """
    if backend == "blocks":
        return causal_attention(q, k, v, None if documents is None else documents.numbers)
    if backend == "flash":
        return _flash(q, k, v, documents)
    if backend == "flex":
        return _flex(q, k, v, documents)
    if documents is None:
        return _sdpa(q, k, v, None, causal=True)
    if on_gpu(q) and q.dtype in _HALF and (varlen := _varlen_attn()) is not None:
        return _packed(varlen, q, k, v, documents)
    return _sdpa(q, k, v, documents.mask, causal=False)


@torch.no_grad()
def largest_logits(q: Tensor, k: Tensor, documents: Documents | None = None) -> Tensor:
    """Return the largest score that the softmax of each query head sees: (H,), fp32.

    It multiplies all queries and keys once more, a block of query rows at a time.

    Args:
        q: (B, S, H, E).
        k: (B, S, K, E), where K divides H.
        documents: as in `attend`.
    """
    length, dim = q.shape[1], q.shape[3]
    largest = torch.full((q.shape[2],), -torch.inf, device=q.device)
    grouped = q.unflatten(2, (k.shape[2], -1))  # (B, S, K, G, E)
    place = torch.arange(length, device=q.device)
    for first in range(0, length, _LOGIT_ROWS):
        last = min(first + _LOGIT_ROWS, length)
        scores = torch.einsum("brkge,bske->bkgrs", grouped[:, first:last], k[:, :last])
        unseen = place[None, None, :last] > place[None, first:last, None]  # (1, r, s)
        if documents is not None:
            unseen = unseen | (documents.numbers[:, first:last, None] != documents.numbers[:, None, :last])
        scores.masked_fill_(unseen[:, None, None], -torch.inf)
        largest = torch.maximum(largest, scores.amax((0, 3, 4)).flatten().float())
    return largest * dim**-0.5


def attend_cached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention of the newest tokens over all keys so far, for generation.

    Args:
        q: (B, S, H, E), the S newest tokens.
        k, v: (B, L, K, E), all L >= S tokens.

    Returns:
        (B, S, H, E).
    """
    new, total = q.shape[1], k.shape[1]
    if new == 1:  # it sees every key
        return _sdpa(q, k, v, None, causal=False, cached=True)
    mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril_(total - new)  # (S, L)
    return _sdpa(q, k, v, mask, causal=False, cached=True)


def _prefers_cudnn(capability: tuple[int, int] | None) -> bool:
    """Whether SDPA's first choice on this GPU is cuDNN, and that is the fastest backend."""
    nvidia = torch.version.hip is None  # AMD's capabilities are other numbers
    return nvidia and capability is not None and capability[0] in _CUDNN_FIRST and _torch_version() >= (2, 13)


@functools.cache
def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _kernels(
    dtype: torch.dtype, masked: bool, cached: bool, capability: tuple[int, int], deterministic: bool
) -> list[SDPBackend]:
    """Return SDPA's kernels on a GPU, in the order in which they are tried. The last one, plain matrix products, always runs.

    Args:
        masked: there is a mask tensor. cuDNN's backward then gives NaN where S % 128 == 64 (torch 2.11 to 2.13).
        cached: keys grow by a token per call. cuDNN builds a plan for every length anew.
        deterministic: cuDNN's backward is not.
    """
    own = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    cudnn = dtype in _HALF and not (masked or cached or deterministic) and _prefers_cudnn(capability)
    return [SDPBackend.CUDNN_ATTENTION, *own] if cudnn else own


def _repeats_heads(dtype: torch.dtype, masked: bool) -> bool:
    """Whether grouped heads leave SDPA's matrix products as its only kernel on a GPU, which holds all S x S probabilities.

    The flash kernels take grouped heads, in half precision and without a mask; the memory-efficient one takes equal heads only.
    """
    return masked or dtype not in _HALF


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, cached: bool = False) -> Tensor:
    """Compute attention of q (B, S, H, E) over k, v (B, L, K, E) by torch's function; returns (B, S, H, E)."""
    grouped = q.shape[2] != k.shape[2]
    if grouped and on_gpu(q) and _repeats_heads(q.dtype, mask is not None):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        grouped = False
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, S or L, E)
    compute = functools.partial(
        F.scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )
    if not on_gpu(q):
        return compute().transpose(1, 2)
    deterministic = torch.are_deterministic_algorithms_enabled()
    kernels = _kernels(q.dtype, mask is not None, cached, capability_of(q), deterministic)
    with sdpa_kernel(kernels, set_priority=True):
        return compute().transpose(1, 2)


@functools.cache
def _varlen_attn() -> Callable[..., Tensor] | None:
    """Return torch's attention over a packed sequence, with the arguments of `FlashAttention.packed`; None: it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}

    def packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        options = dict(causal)
        grouped = q.shape[1] != k.shape[1]
        if grouped and "enable_gqa" not in takes:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        elif grouped:
            options["enable_gqa"] = True
        return cast("Tensor", varlen_attn(q, k, v, bounds, bounds, longest, longest, **options))

    return packed


def _flash(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    package, _ = find_flash_attention(capability_of(q))
    assert package is not None, "choose has imported it"
    if documents is None:
        return package(q, k, v)
    return _packed(package.packed, q, k, v, documents)


def _packed(compute: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Compute attention within documents by a function of packed sequences, as `FlashAttention.packed`; (B, S, H, E)."""
    return compute(*(x.flatten(0, 1) for x in (q, k, v)), *documents.bounds).view_as(q)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(mask: Callable[..., Tensor], batch: int | None, length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(mask, batch, None, length, length, device=device)


@functools.lru_cache(maxsize=8)
def _causal_block_mask(length: int, device: torch.device) -> Any:
    return _block_mask(lambda b, h, i, j: i >= j, None, length, device)  # noqa: ARG005 (flex's signature)


def _flex(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    mask = _causal_block_mask(q.shape[1], q.device) if documents is None else documents.block_mask
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, S, E)
    return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)
