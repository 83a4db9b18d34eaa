"""Softmax cross-entropy of rows of logits, which become their own gradient: one pass over memory on a CPU, in C.

What does not live here: the output projection that makes the logits, chunk by chunk, and what runs elsewhere (model/loss.py).
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
    """Whether tensors of this kind can be computed here."""
    return is_plain(logits) and c.serves(logits) and _library() is not None


def cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Return the nats of each row against its target, and its log-sum-exp, both (rows,) in fp32.

    Args:
        logits: (rows, words) without gaps; overwritten by the gradient of nats + z_loss * log-sum-exp^2 of each row if
            `differentiate`.
        targets: (rows,) int64 word numbers.

    Raises:
        ValueError: the tensors do not fit together.
        IndexError: a target is no word.
    """
    if (
        logits.ndim != 2
        or not logits.is_contiguous()
        or targets.shape != logits.shape[:1]
        or targets.dtype != torch.int64
    ):
        raise ValueError(f"targets {tuple(targets.shape)} {targets.dtype} do not fit logits {tuple(logits.shape)}")
    rows, words = logits.shape
    nats, lse = (torch.empty((rows,), dtype=torch.float32) for _ in range(2))
    if not rows:
        return nats, lse
    if not 0 <= int(targets.min()) <= int(targets.max()) < words:
        raise IndexError(f"a target is no word: there are {words}, and targets are {targets.min()} to {targets.max()}")
    tensors = (logits, targets.contiguous(), nats, lse)
    run = getattr(_library(), f"cross_entropy_{c.NAMES[logits.dtype]}")
    run(*(tensor.data_ptr() for tensor in tensors), rows, words, int(differentiate), z_loss)
    return nats, lse


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    return c.load_file(
        Path(__file__).with_suffix(".c"), {"cross_entropy": [pointer] * 4 + [number] * 3 + [ctypes.c_float]}
    )
