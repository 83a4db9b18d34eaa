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
from ..formula.compiled import Compiled
from ..rounding import fp8_rows
from . import reference
from .c_rows import source_of_rows
from .c_source import source, source_with_stats
from .reductions import new_numbers
from .telemetry import BatchStats, sums_of

_kernels: dict[Compiled, CKernels] = {}


def source_of(compiled: Compiled) -> str:
    """Return the C source of a formula's kernels."""
    return source_of_rows(compiled) if compiled.reductions.all else source(compiled)


def kernels_of(compiled: Compiled) -> CKernels | None:
    """Return the kernels of a formula, built at the first call; None where they cannot be built."""
    if compiled not in _kernels:
        built = load(source_of(compiled), repr(compiled.formula.text))
        if built is None:
            return None
        kind = CRowKernels if compiled.reductions.all else CKernels
        _kernels.setdefault(compiled, kind(compiled, built))
    return _kernels[compiled]


class CKernels:
    """The kernels of one formula."""

    def __init__(self, compiled: Compiled, built: ctypes.CDLL) -> None:
        self.compiled, self.built = compiled, built
        self.matrices = len(compiled.formula.pre_activations)
        # An ungated formula without learned parameters is independent of rows: all elements form one row, with one remainder.
        self.flat = self.matrices == 1 and not compiled.formula.learned

    def forward(
        self,
        compiled: Compiled,  # noqa: ARG002
        pre: Tensor,
        learned: Sequence[Tensor],
        reduced: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """See `reference.forward`."""
        h = self._empty_h(pre)
        self._call("forward", (pre, h, *_values(learned)), h)
        return h

    def forward_fp8(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `reference.forward_fp8`."""
        return fp8_rows(self.forward(compiled, pre.float(), learned, reduced))

    @functools.cached_property
    def built_with_stats(self) -> ctypes.CDLL | None:
        """The forward kernel with statistics, built on first use; None where it cannot be built."""
        return load(source_with_stats(self.compiled), repr(self.compiled.formula.text))

    def forward_with_stats(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
    ) -> tuple[Tensor, BatchStats]:
        """See `reference.forward_with_stats`."""
        if self.built_with_stats is None:
            h = self.forward(compiled, pre, learned, reduced)
            return h, reference.stats_of(compiled, pre, h, learned, reduced)
        h = self._empty_h(pre)
        count = len(sums_of(compiled)) + 1
        sums, active = (torch.zeros(n, dtype=torch.float32, device=pre.device) for n in (count, pre.shape[-1]))
        if h.numel():
            numbers = [] if reduced is None else [reduced]
            tensors = (pre, h, *numbers, *_values(learned), *sums.split(1), active)
            _run(self.built_with_stats, "statistics", tensors, h, h.shape[-1])
        return h, BatchStats(sums[:-1], sums[-1], active, h.numel())

    def backward(
        self, compiled: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool,  # noqa: ARG002
        reduced: Tensor | None = None, adjoints: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
        """See `reference.backward`."""
        dpre, h = torch.empty_like(pre), torch.empty_like(dh) if with_h else None
        trained = learned[: len(self.compiled.formula.learned)]  # without the scheduled ones
        dlearned = _zeros(trained)
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
        shape = pre.shape if self.matrices == 1 else (*pre.shape[:-2], pre.shape[-1])
        return torch.empty(shape, dtype=pre.dtype, device=pre.device)

    def _call(self, name: str, tensors: Sequence[Tensor], like: Tensor) -> None:
        """Call a kernel for the rows of `like`."""
        if like.numel():
            _run(self.built, name, tensors, like, like.numel() if self.flat else like.shape[-1])


class CRowKernels(CKernels):
    """The kernels of one formula with reductions."""

    def __init__(self, compiled: Compiled, built: ctypes.CDLL) -> None:
        super().__init__(compiled, built)
        self.flat, self.passes = False, len(compiled.reductions.forward)

    def forward(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
    ) -> Tensor:
        return self._forward(compiled, pre, learned, reduced)[0]

    def forward_with_stats(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None = None
    ) -> tuple[Tensor, BatchStats]:
        if reduced is None:
            _, reduced = self._forward(compiled, pre, learned, None)
        return super().forward_with_stats(compiled, pre, learned, reduced)

    def backward(
        self, compiled: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool,
        reduced: Tensor | None = None, adjoints: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
        dpre, h = torch.empty_like(pre), torch.empty_like(dh) if with_h else None
        dlearned = _zeros(learned[: len(compiled.formula.learned)])
        outputs = [dpre] if h is None else [dpre, h]
        last = self.passes + len(compiled.reductions.backward)
        first = 0 if adjoints is None else last
        if adjoints is None:
            rows = dh.shape[:-1].numel()
            adjoints = new_numbers(dh, rows, len(compiled.reductions.all))
            # Of one rank, given or not: they are computed from the row at hand.
            reduced = new_numbers(dh, rows, len(compiled.reductions.names))
        assert reduced is not None, "adjoints without the reductions that they belong to"
        tensors = (pre, dh, *outputs, reduced, adjoints, *_values(learned), *dlearned)
        self._call_passes("backward_h" if with_h else "backward", tensors, dh, first, last + 1)
        return dpre, h, dlearned

    def reduce(self, compiled: Compiled, step: int, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor) -> Tensor:
        like = pre if self.matrices == 1 else pre[..., 0, :]
        unwritten = torch.empty(0, dtype=pre.dtype, device=pre.device)  # h
        self._call_passes("forward", (pre, unwritten, reduced, *_values(learned)), like, step, step + 1)
        reductions = compiled.reductions
        names = [name for reduction in reductions.forward[step].reductions for name in reduction.names]
        return reduced[:, [reductions.names.index(name) for name in names]]

    def reduce_gradients(
        self, compiled: Compiled, step: int, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], reduced: Tensor,
        adjoints: Tensor, with_h: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        h = torch.empty_like(dh) if with_h else None
        if h is not None:
            assert step == 0, "h is written in the first pass"
            self._call_passes("gradients_h", (pre, dh, h, reduced, adjoints, *_values(learned)), dh, 0, 1)
        else:
            number = self.passes + step
            unwritten = [torch.empty(0, dtype=pre.dtype, device=pre.device)] * (1 + len(learned))
            tensors = (pre, dh, unwritten[0], reduced, adjoints, *_values(learned), *unwritten[1:])
            self._call_passes("backward", tensors, dh, number, number + 1)
        return adjoints[:, [reduction.number for reduction in compiled.reductions.backward[step].reductions]], h

    def _forward(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor], reduced: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return h and the reductions, which are computed unless they are given."""
        h = self._empty_h(pre)
        first = 0 if reduced is None else self.passes
        if reduced is None:
            reduced = new_numbers(h, h.shape[:-1].numel(), len(compiled.reductions.names))
        self._call_passes("forward", (pre, h, reduced, *_values(learned)), h, first, self.passes + 1)
        return h, reduced

    def _call_passes(self, name: str, tensors: Sequence[Tensor], like: Tensor, first: int, after: int) -> None:
        """Call the passes `first` to `after` of a kernel for the rows of `like`."""
        if like.numel():
            _run(self.built, name, tensors, like, like.shape[-1], first, after)


def _run(built: ctypes.CDLL, name: str, tensors: Sequence[Tensor], like: Tensor, width: int, *passes: int) -> None:
    addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    sizes = map(ctypes.c_int64, (like.numel() // width, width, *passes))
    if getattr(built, f"{name}_{NAMES[like.dtype]}")(*addresses, *sizes):
        raise MemoryError("cannot allocate the partial sums of a kernel")


def _values(learned: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().to(torch.float32).contiguous() for tensor in learned]


def _zeros(learned: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) for tensor in learned]
