"""The Triton backend: bf16, fp16 and fp32 tensors on a GPU, and fp32 on a CPU under TRITON_INTERPRET=1.

fp32 inside, one rounding at the store. A Triton program computes a tile of columns of one row; row offsets are int64.
`triton_source.py` generates the kernels. This module does not import Triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..formula.symbolic import Compiled
from ..rounding import E4M3
from ..tensors import on_device_of
from ..triton.runtime import load
from .telemetry import BatchStats, sums_of
from .triton_source import source, source_fp8, source_with_stats

TILE = 1024  # columns per program: 8 for each of 128 threads, one load of 128 bits in 16-bit dtypes
WARPS = 4
_SUMS = 256  # most blocks of rows, each with its own partial sums of the gradients of learned parameters


class TritonKernels:
    """The kernels of one formula."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled, self.module = compiled, load(source(compiled))
        self.matrices = len(compiled.formula.pre_activations)
        self.per_channel = [learned.share == "channel" for learned in compiled.formula.learned.values()]

    @functools.cached_property
    def module_with_stats(self) -> ModuleType:
        """The forward kernel with statistics, generated on first use."""
        return load(source_with_stats(self.compiled))

    @functools.cached_property
    def module_fp8(self) -> ModuleType:
        """The forward kernel that writes FP8, generated on first use."""
        return load(source_fp8(self.compiled))

    def forward(self, _: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> Tensor:
        """See `reference.forward`."""
        width = pre.shape[-1]
        h = self._empty_h(pre)
        if h.numel():
            self._launch(self.module.forward, h.numel() // width, width, [pre, h, *_detached(learned)])
        return h

    def forward_with_stats(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor]
    ) -> tuple[Tensor, BatchStats]:
        """See `reference.forward_with_stats`."""
        width, count = pre.shape[-1], len(sums_of(compiled)) + 1
        h = self._empty_h(pre)
        if not h.numel():
            zeros = torch.zeros(count, device=pre.device)
            return h, BatchStats(zeros[:-1], zeros[-1], torch.zeros(width, device=pre.device), 0)
        rows = h.numel() // width
        rows_per_program, blocks = _blocks(rows)
        totals = torch.empty((count, blocks, _tiles(width)), dtype=torch.float32, device=pre.device)
        active = torch.empty((blocks, width), dtype=torch.float32, device=pre.device)
        tensors = [pre, h, *_detached(learned), totals, active]
        self._launch(self.module_with_stats.statistics, blocks, width, tensors, rows, rows_per_program)
        return h, BatchStats(totals[:-1].sum((1, 2)), totals[-1].amax(), active.sum(0), h.numel())

    def forward_fp8(self, _: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See `reference.forward_fp8`."""
        like = self._empty_h(pre)
        width = like.shape[-1]
        h = torch.empty_like(like, dtype=E4M3)
        scale = torch.empty((*like.shape[:-1], 1), dtype=torch.float32, device=pre.device)
        if h.numel():
            unit, kernel = unit_of(width), self.module_fp8.forward_fp8
            with on_device_of(pre):
                kernel[(h.numel() // width,)](
                    pre, h, *_detached(learned), scale, width // unit, UNIT=unit, TILE=_tile(width), num_warps=WARPS
                )
        return h, scale

    def backward(
        self, _: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """See `reference.backward`."""
        width, dpre = pre.shape[-1], torch.empty_like(pre)
        h = torch.empty_like(dh) if with_h else None
        trained = learned[: len(self.per_channel)]  # without the scheduled ones
        if not dh.numel():
            return dpre, h, [torch.zeros(p.shape, dtype=torch.float32, device=pre.device) for p in trained]
        rows, kernel = dh.numel() // width, self.module.backward_with_h if with_h else self.module.backward
        outputs = [dpre] if h is None else [dpre, h]
        tensors = [pre, dh, *outputs, *_detached(learned)]
        if not trained:
            self._launch(kernel, rows, width, tensors)
            return dpre, h, []
        rows_per_program, blocks = _blocks(rows)
        sums = [
            torch.empty((blocks, width if per_channel else _tiles(width)), dtype=torch.float32, device=pre.device)
            for per_channel in self.per_channel
        ]
        self._launch(kernel, blocks, width, [*tensors, *sums], rows, rows_per_program)
        return dpre, h, [_total(s, p) for s, p in zip(sums, trained, strict=True)]

    def backward_from_output(self, _: Compiled, h: Tensor, dh: Tensor) -> Tensor:
        """See `reference.backward_from_output`."""
        dpre = torch.empty_like(h)
        if h.numel():
            self._launch(self.module.from_output, h.numel() // h.shape[-1], h.shape[-1], [h, dh, dpre])
        return dpre

    def _empty_h(self, pre: Tensor) -> Tensor:
        shape = pre.shape if self.matrices == 1 else (*pre.shape[:-2], pre.shape[-1])
        return torch.empty(shape, dtype=pre.dtype, device=pre.device)

    def _launch(self, kernel: Any, programs: int, width: int, tensors: list[Tensor], *rows: int) -> None:
        unit = unit_of(width)
        with on_device_of(tensors[0]):
            kernel[(programs, _tiles(width))](
                *tensors, *rows, width // unit, UNIT=unit, TILE=_tile(width), num_warps=WARPS
            )


def unit_of(width: int) -> int:
    """Return the number of columns per unit in which a width is passed to a kernel."""
    return 1 if width % 8 else 8


def _tile(width: int) -> int:
    return min(TILE, max(128, 1 << (width - 1).bit_length()))


def _tiles(width: int) -> int:
    return math.ceil(width / _tile(width))


def _blocks(rows: int) -> tuple[int, int]:
    """Return the rows per program, and the number of programs."""
    rows_per_program = math.ceil(rows / _SUMS)
    return rows_per_program, math.ceil(rows / rows_per_program)


def _detached(learned: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().contiguous() for tensor in learned]


def _total(sums: Tensor, parameter: Tensor) -> Tensor:
    return (sums.sum(0) if sums.shape[1] == parameter.numel() else sums.sum()).view(parameter.shape)


_kernels: dict[Compiled, TritonKernels] = {}


def kernels_of(compiled: Compiled) -> TritonKernels:
    """Return the kernels of a formula, generated and imported at the first call."""
    if compiled not in _kernels:
        _kernels[compiled] = TritonKernels(compiled)
    return _kernels[compiled]
