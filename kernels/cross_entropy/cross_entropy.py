"""Softmax cross-entropy of rows of logits, with the gradient in place of the logits: one kernel, in C or Triton.

The output projection that computes the logits chunk by chunk, and the loss on other devices, are the caller's.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..c import library as c
from ..tensors import is_plain, on_gpu


def serves(logits: Tensor) -> bool:
    """Whether `cross_entropy_` supports the device and dtype of `logits`."""
    if not is_plain(logits):
        return False
    return triton_kernels(logits) is not None or (c.serves(logits) and _library() is not None)


def triton_kernels(logits: Tensor) -> ModuleType | None:
    """Return the module of the Triton kernels if they compute tensors like `logits`: on a GPU."""
    if not (on_gpu(logits) and is_plain(logits)):
        return None
    from ..triton import runtime

    if not runtime.serves(logits):
        return None
    from . import triton

    return triton


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    z_loss: float,
    differentiate: bool,
    ignore_index: int = -100,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each row in nats, and its log-sum-exp, both (rows,) in fp32.

    A row whose target is `ignore_index` has 0 for both, and its gradient is 0.

    Args:
        logits: (rows, vocabulary), contiguous; fp32 or bf16 on a CPU, and fp16 too on a GPU.
        targets: (rows,) int64 indices into the vocabulary, or `ignore_index`.
        z_loss: coefficient of log-sum-exp^2 in the gradient (Chowdhery 2022, arXiv 2204.02311).
        differentiate: overwrite `logits` with the gradient of loss + z_loss * log-sum-exp^2 of each row.
        softcap: c of the logits' c tanh(logits / c) (Gemma 2, arXiv 2408.00118); 0: none.

    Raises:
        ValueError: shapes or dtypes do not match.
        IndexError: a target is outside of the vocabulary. On a GPU, which is not waited for, its loss is NaN instead.
    """
    if (
        logits.ndim != 2
        or not logits.is_contiguous()
        or targets.shape != logits.shape[:1]
        or targets.dtype != torch.int64
    ):
        raise ValueError(f"targets {tuple(targets.shape)} {targets.dtype} do not fit logits {tuple(logits.shape)}")
    rows, vocabulary = logits.shape
    kernels = triton_kernels(logits)
    if kernels is not None:
        return kernels.cross_entropy_(logits, targets, z_loss, differentiate, ignore_index, softcap)
    nats, lse = (torch.empty((rows,), dtype=torch.float32, device=logits.device) for _ in range(2))
    if not rows:
        return nats, lse
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if outside.any():
        raise IndexError(f"targets must be 0 to {vocabulary - 1} or {ignore_index}, not {targets[outside][0]}")
    tensors = (logits, targets.contiguous(), nats, lse)
    run = getattr(_library(), f"cross_entropy_{c.NAMES[logits.dtype]}")
    addresses = (tensor.data_ptr() for tensor in tensors)
    run(*addresses, rows, vocabulary, int(differentiate), ignore_index, z_loss, softcap)
    return nats, lse


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    pointer, number, scalar = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    types = [pointer] * 4 + [number] * 4 + [scalar] * 2
    return c.load_file(Path(__file__).with_suffix(".c"), {"cross_entropy": types})
