"""The C backend: fp32 and bf16 tensors on a CPU, fp32 inside, one rounding at the store.

`c_source.py` generates the kernels of a formula; `c/` compiles and loads them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..c.library import NAMES, load
from ..formula.symbolic import Compiled
from ..rounding import fp8_rows
from . import reference
from .c_source import source, source_with_stats
from .telemetry import BatchStats, sums_of

_kernels: dict[Compiled, CKernels] = {}


def kernels_of(compiled: Compiled) -> CKernels | None:
    """Return the kernels of a formula, built at the first call; None where they cannot be built."""
    if compiled not in _kernels:
        built = load(source(compiled), repr(compiled.formula.text))
        if built is None:
            return None
        _kernels.setdefault(compiled, CKernels(compiled, built))
    return _kernels[compiled]


class CKernels:
    """The kernels of one formula."""

    def __init__(self, compiled: Compiled, built: ctypes.CDLL) -> None:
        self.compiled, self.built = compiled, built
        self.matrices = len(compiled.formula.pre_activations)
        # An ungated formula without learned parameters is independent of rows: all elements form one row, with one remainder.
        self.flat = self.matrices == 1 and not compiled.formula.learned

    def forward(self, _: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> Tensor:
        """See `reference.forward`."""
        h = self._empty_h(pre)
        self._call("forward", (pre, h, *_values(learned)), h)
        return h

    def forward_fp8(self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See `reference.forward_fp8`."""
        return fp8_rows(self.forward(compiled, pre.float(), learned))

    @functools.cached_property
    def built_with_stats(self) -> ctypes.CDLL | None:
        """The forward kernel with statistics, built on first use; None where it cannot be built."""
        return load(source_with_stats(self.compiled), repr(self.compiled.formula.text))

    def forward_with_stats(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor]
    ) -> tuple[Tensor, BatchStats]:
        """See `reference.forward_with_stats`."""
        if self.built_with_stats is None:
            h = self.forward(compiled, pre, learned)
            return h, reference.stats_of(compiled, pre, h, learned)
        h = self._empty_h(pre)
        sums, active = torch.zeros(len(sums_of(compiled)) + 1), torch.zeros(pre.shape[-1])
        if h.numel():
            tensors = (pre, h, *_values(learned), *sums.split(1), active)
            _run(self.built_with_stats, "statistics", tensors, h, h.shape[-1])
        return h, BatchStats(sums[:-1], sums[-1], active, h.numel())

    def backward(
        self, _: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """See `reference.backward`."""
        dpre, h = torch.empty_like(pre), torch.empty_like(dh) if with_h else None
        trained = learned[: len(self.compiled.formula.learned)]  # without the scheduled ones
        dlearned = [torch.zeros(tensor.shape, dtype=torch.float32) for tensor in trained]
        outputs = [dpre] if h is None else [dpre, h]
        tensors = (pre, dh, *outputs, *_values(learned), *dlearned)
        self._call("backward_h" if with_h else "backward", tensors, dh)
        return dpre, h, dlearned

    def backward_from_output(self, _: Compiled, h: Tensor, dh: Tensor) -> Tensor:
        """See `reference.backward_from_output`."""
        dpre = torch.empty_like(h)
        self._call("from_output", (h, dh, dpre), dh)
        return dpre

    def _empty_h(self, pre: Tensor) -> Tensor:
        return torch.empty(pre.shape if self.matrices == 1 else (*pre.shape[:-2], pre.shape[-1]), dtype=pre.dtype)

    def _call(self, name: str, tensors: Sequence[Tensor], like: Tensor) -> None:
        """Call a kernel for the rows of `like`."""
        if like.numel():
            _run(self.built, name, tensors, like, like.numel() if self.flat else like.shape[-1])


def _run(built: ctypes.CDLL, name: str, tensors: Sequence[Tensor], like: Tensor, width: int) -> None:
    addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    sizes = ctypes.c_int64(like.numel() // width), ctypes.c_int64(width)
    if getattr(built, f"{name}_{NAMES[like.dtype]}")(*addresses, *sizes):
        raise MemoryError("cannot allocate the partial sums of a kernel")


def _values(learned: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().to(torch.float32).contiguous() for tensor in learned]
