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

from ..formula.compiled import Compiled
from ..rounding import E4M3
from ..tensors import on_device_of
from ..triton.runtime import load
from .reductions import begin_adjoints, new_numbers, reduce_over
from .telemetry import BatchStats, sums_of
from .triton_rows import source_of_rows
from .triton_source import source, source_fp8, source_with_stats

TILE = 1024  # columns per program: 8 for each of 128 threads, one load of 128 bits in 16-bit dtypes
WARPS = 4
# Channels of a row that a program holds in registers, where no formula of conf/ffn spills them (bench/sm90.py).
LONGEST_FORWARD, LONGEST_BACKWARD = 8192, 4096
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

    def forward(
        self,
        compiled: Compiled,  # noqa: ARG002
        pre: Tensor,
        learned: Sequence[Tensor],
        reduced: Tensor | None = None,
    ) -> Tensor:
        """See `reference.forward`."""
        width = pre.shape[-1]
        h = self._empty_h(pre)
        if h.numel():
            tensors = [pre, h, *_given(reduced), *_detached(learned)]
            self._launch(self.module.forward, h.numel() // width, width, tensors)
        return h

    def forward_with_stats(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
    ) -> tuple[Tensor, BatchStats]:
        """See `reference.forward_with_stats`."""
        width, count = pre.shape[-1], len(sums_of(compiled)) + 1
        h = self._empty_h(pre)
        if not h.numel():
            zeros, active = (torch.zeros(n, dtype=torch.float32, device=pre.device) for n in (count, width))
            return h, BatchStats(zeros[:-1], zeros[-1], active, 0)
        rows = h.numel() // width
        rows_per_program, blocks = _blocks(rows)
        totals = torch.empty((count, blocks, _tiles(width)), dtype=torch.float32, device=pre.device)
        active = torch.empty((blocks, width), dtype=torch.float32, device=pre.device)
        tensors = [pre, h, *_given(reduced), *_detached(learned), totals, active]
        self._launch(self.module_with_stats.statistics, blocks, width, tensors, rows, rows_per_program)
        return h, BatchStats(totals[:-1].sum((1, 2)), totals[-1].amax(), active.sum(0), h.numel())

    def forward_fp8(
        self,
        compiled: Compiled,  # noqa: ARG002
        pre: Tensor,
        learned: Sequence[Tensor],
        reduced: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `reference.forward_fp8`."""
        like = self._empty_h(pre)
        width = like.shape[-1]
        h = torch.empty_like(like, dtype=E4M3)
        scale = torch.empty((*like.shape[:-1], 1), dtype=torch.float32, device=pre.device)
        if h.numel():
            tensors = [pre, h, *_given(reduced), *_detached(learned), scale]
            self._launch_rows(self.module_fp8.forward_fp8, h.numel() // width, width, tensors)
        return h, scale

    def backward(
        self, compiled: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool,  # noqa: ARG002
        reduced: Tensor | None = None, adjoints: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
        """See `reference.backward`."""
        width, dpre = pre.shape[-1], torch.empty_like(pre)
        h = torch.empty_like(dh) if with_h else None
        trained = learned[: len(self.per_channel)]  # without the scheduled ones
        if not dh.numel():
            return dpre, h, [torch.zeros(p.shape, dtype=torch.float32, device=pre.device) for p in trained]
        rows, kernel = dh.numel() // width, self.module.backward_with_h if with_h else self.module.backward
        outputs = [dpre] if h is None else [dpre, h]
        tensors = [pre, dh, *outputs, *_given(reduced, adjoints), *_detached(learned)]
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

    def _launch_rows(self, kernel: Any, programs: int, width: int, tensors: list[Tensor]) -> None:
        """Launch a kernel whose programs iterate over the tiles of a row."""
        unit = unit_of(width)
        with on_device_of(tensors[0]):
            kernel[(programs,)](*tensors, width // unit, UNIT=unit, TILE=_tile(width), num_warps=WARPS)

    def _launch(self, kernel: Any, programs: int, width: int, tensors: list[Tensor], *rows: int) -> None:
        unit = unit_of(width)
        with on_device_of(tensors[0]):
            kernel[(programs, _tiles(width))](
                *tensors, *rows, width // unit, UNIT=unit, TILE=_tile(width), num_warps=WARPS
            )


class TritonRowKernels(TritonKernels):
    """The kernels of one formula with reductions."""

    def __init__(self, compiled: Compiled) -> None:
        super().__init__(compiled)
        self.rows = load(source_of_rows(compiled))

    def forward(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
    ) -> Tensor:
        if reduced is not None:
            return super().forward(compiled, pre, learned, reduced)
        return self._forward(compiled, pre, learned)[0]

    def forward_with_stats(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
    ) -> tuple[Tensor, BatchStats]:
        reduced = self._forward(compiled, pre, learned)[1] if reduced is None else reduced
        return super().forward_with_stats(compiled, pre, learned, reduced)

    def forward_fp8(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        reduced = reduce_over(self, compiled, pre, learned) if reduced is None else reduced
        return super().forward_fp8(compiled, pre, learned, reduced)

    def backward(
        self, compiled: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool,
        reduced: Tensor | None = None, adjoints: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
        width = pre.shape[-1]
        if adjoints is not None or not dh.numel():
            return super().backward(compiled, pre, dh, learned, with_h, reduced, adjoints)
        fits = width <= LONGEST_BACKWARD
        if not fits and any(self.per_channel):
            reduced = reduce_over(self, compiled, pre, learned)
            h, finish = begin_adjoints(self, compiled, pre, dh, learned, reduced, with_h)
            dpre, _, dlearned = super().backward(compiled, pre, dh, learned, False, reduced, finish())
            return dpre, h, dlearned
        dpre, h = torch.empty_like(pre), torch.empty_like(dh) if with_h else None
        rows = dh.numel() // width
        kernel = getattr(self.rows, f"backward_{'row' if fits else 'tiles'}{'_with_h' if with_h else ''}")
        tensors = [pre, dh, dpre, *([] if h is None else [h]), *_detached(learned)]
        trained = learned[: len(self.per_channel)]  # without the scheduled ones
        if not trained:
            self._launch_row(kernel, rows, width, tensors, fits=fits)
            return dpre, h, []
        rows_per_program, blocks = _blocks(rows)
        sums = [
            torch.empty((blocks, width if per_channel else 1), dtype=torch.float32, device=pre.device)
            for per_channel in self.per_channel
        ]
        self._launch_row(kernel, blocks, width, [*tensors, *sums], rows, rows_per_program, fits=fits)
        return dpre, h, [_total(s, p) for s, p in zip(sums, trained, strict=True)]

    def reduce(self, compiled: Compiled, step: int, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor) -> Tensor:
        """See `reductions.Reducer`."""
        count = sum(len(reduction.names) for reduction in compiled.reductions.forward[step].reductions)
        partial = new_numbers(pre, len(reduced), count)
        tensors = [pre, reduced, *_detached(learned), partial]
        self._launch_rows(getattr(self.rows, f"reduce_{step}"), len(reduced), pre.shape[-1], tensors)
        return partial

    def reduce_gradients(
        self, compiled: Compiled, step: int, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], reduced: Tensor,
        adjoints: Tensor, with_h: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `reductions.Reducer`."""
        count = len(compiled.reductions.backward[step].reductions)
        partial = new_numbers(pre, len(reduced), count)
        h = torch.empty_like(dh) if with_h else None
        kernel = getattr(self.rows, f"gradients_{step}_with_h" if with_h else f"gradients_{step}")
        tensors = [pre, dh, *_given(h), reduced, adjoints, *_detached(learned), partial]
        self._launch_rows(kernel, len(reduced), pre.shape[-1], tensors)
        return partial, h

    def _forward(self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return h and the reductions."""
        width, h = pre.shape[-1], self._empty_h(pre)
        rows = h.shape[:-1].numel()
        reduced = new_numbers(pre, rows, len(compiled.reductions.names))
        if h.numel():
            fits = width <= LONGEST_FORWARD
            kernel = self.rows.forward_row if fits else self.rows.forward_tiles
            self._launch_row(kernel, rows, width, [pre, h, reduced, *_detached(learned)], fits=fits)
        return h, reduced

    def _launch_row(
        self, kernel: Any, programs: int, width: int, tensors: list[Tensor], *rows: int, fits: bool
    ) -> None:
        """Launch a kernel whose programs compute whole rows, one after the other: in registers if `fits`, else in tiles."""
        unit, tile = unit_of(width), row_tile(width) if fits else _tile(width)
        with on_device_of(tensors[0]):
            kernel[(programs,)](*tensors, *rows, width // unit, UNIT=unit, TILE=tile, num_warps=warps_of_row(tile))


def row_tile(width: int) -> int:
    """Return the columns of a program that holds a row in registers."""
    return max(128, 1 << (width - 1).bit_length())


def warps_of_row(tile: int) -> int:
    """Return the warps of a program that holds a row of `tile` channels, so that a thread has at most 16 of them."""
    return min(max(WARPS, tile // 512), 16)


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


def _given(*numbers: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in numbers if tensor is not None]


def _total(sums: Tensor, parameter: Tensor) -> Tensor:
    return (sums.sum(0) if sums.shape[1] == parameter.numel() else sums.sum()).view(parameter.shape)


_kernels: dict[Compiled, TritonKernels] = {}


def kernels_of(compiled: Compiled) -> TritonKernels:
    """Return the kernels of a formula, generated and imported at the first call."""
    if compiled not in _kernels:
        _kernels[compiled] = (TritonRowKernels if compiled.reductions.all else TritonKernels)(compiled)
    return _kernels[compiled]
