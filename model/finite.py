"""Non-finite numbers: what kind they are, and in which tensor of memory or of a file.

A NaN is told as NaN and an infinity as inf, NaN first where there are both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from conf.optimizers import all_states


def kind_of(values: Tensor) -> str:
    """Return "NaN" or "inf" if a tensor of floating-point numbers holds one, else ""."""
    if not values.numel():
        return ""
    # One pass without a temporary: both ends of the range are NaN where one element is.
    low, high = torch.aminmax(values.detach())
    return kind_of_number(float(low)) or kind_of_number(float(high))


def kind_of_number(value: float) -> str:
    """Return "NaN" or "inf" for a number that is one, else ""."""
    return "" if math.isfinite(value) else "NaN" if math.isnan(value) else "inf"


def find(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the first non-finite tensor as a clause, "NaN in NAME"; "": all are finite.

    Args:
        tensors: (stored name, values) pairs.
    """
    for name, values in tensors:
        if kind := kind_of(values):
            return f"{kind} in {readable(name)}"
    return ""


def readable(stored: str) -> str:
    """Return the stored name of a tensor as a sentence has it: "layers.0.ffn.down (exp_avg)" for a state of the optimizer."""
    for state in all_states():
        if stored.endswith(f".{state}"):
            return f"{stored.removesuffix(f'.{state}')} ({state})"
    return stored


class FileScan:
    """Looks for non-finite numbers in a safetensors file of fp32 tensors, of which `add` takes one block after the other."""

    def __init__(self) -> None:
        self._head = b""
        self._begin = 0  # of the tensors in the file; 0: the header is not complete yet
        self._read = 0  # bytes of tensors
        self._bad = -1  # offset of the first non-finite number, after the header
        self._rest = b""  # of a number that a block ended in
        self._kind = ""

    def add(self, block: bytes) -> None:
        """Take the next bytes of the file."""
        if not self._begin:
            self._head += block
            size = 8 + int.from_bytes(self._head[:8], "little")
            if len(self._head) < 8 or len(self._head) < size:
                return
            self._head, block, self._begin = self._head[:size], self._head[size:], size
        if self._kind:
            return
        block = self._rest + block
        whole = len(block) // 4 * 4
        self._rest = block[whole:]
        numbers = torch.frombuffer(bytearray(block[:whole]), dtype=torch.float32) if whole else torch.empty(0)
        if kind := kind_of(numbers):
            self._kind = kind
            self._bad = self._read + 4 * int(np.flatnonzero(~torch.isfinite(numbers).numpy())[0])
        self._read += whole

    @property
    def found(self) -> str:
        """The first tensor that is not finite, as `find` tells it."""
        if not self._kind:
            return ""
        header = json.loads(self._head[8:])
        for name, entry in header.items():
            if name != "__metadata__" and entry["data_offsets"][0] <= self._bad < entry["data_offsets"][1]:
                return f"{self._kind} in {readable(name)}"
        return self._kind
