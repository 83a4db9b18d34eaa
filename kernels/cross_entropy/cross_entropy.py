"""Softmax cross-entropy of rows of logits, with the gradient in place of the logits: one pass over memory on a CPU, in C.

The output projection that computes the logits chunk by chunk, and the loss on other devices, are the caller's.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..c import library as c
from ..tensors import is_plain


def serves(logits: Tensor) -> bool:
    """Whether `cross_entropy_` supports the device and dtype of `logits`."""
    return is_plain(logits) and c.serves(logits) and _library() is not None


def cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Return the loss of each row in nats, and its log-sum-exp, both (rows,) in fp32.

    Args:
        logits: (rows, vocabulary), contiguous, fp32 or bf16 on a CPU.
        targets: (rows,) int64 indices into the vocabulary.
        z_loss: coefficient of log-sum-exp^2 in the gradient (Chowdhery 2022, arXiv 2204.02311).
        differentiate: overwrite `logits` with the gradient of loss + z_loss * log-sum-exp^2 of each row.

    Raises:
        ValueError: shapes or dtypes do not match.
        IndexError: a target is outside of the vocabulary.
    """
    if (
        logits.ndim != 2
        or not logits.is_contiguous()
        or targets.shape != logits.shape[:1]
        or targets.dtype != torch.int64
    ):
        raise ValueError(f"targets {tuple(targets.shape)} {targets.dtype} do not fit logits {tuple(logits.shape)}")
    rows, vocabulary = logits.shape
    nats, lse = (torch.empty((rows,), dtype=torch.float32) for _ in range(2))
    if not rows:
        return nats, lse
    if not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise IndexError(f"targets must be 0 to {vocabulary - 1}, not {targets.min()} to {targets.max()}")
    tensors = (logits, targets.contiguous(), nats, lse)
    run = getattr(_library(), f"cross_entropy_{c.NAMES[logits.dtype]}")
    run(*(tensor.data_ptr() for tensor in tensors), rows, vocabulary, int(differentiate), z_loss)
    return nats, lse


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    return c.load_file(
        Path(__file__).with_suffix(".c"), {"cross_entropy": [pointer] * 4 + [number] * 3 + [ctypes.c_float]}
    )
