"""The C backend: fp32 and bf16 tensors on a CPU, fp32 inside, one rounding at the store.

The kernels of a formula are printed (`c_source.py`), compiled once by the machine's own compiler (`c_build.py`), and called
through ctypes; `load_file` does so with an operation that is written by hand. Every function of the grammar is inlined vector
arithmetic (`primitives.h`).
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import reference
from kernels.c_build import build
from kernels.c_source import DTYPES, PRIMITIVES, source, source_with_statistics
from kernels.symbolic import Compiled
from kernels.telemetry import Seen, sums_of

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_libraries: dict[Compiled, Library] = {}
_compiler_failed = False  # a process that found no compiler is told so once, and asks no more


def serves(pre: Tensor) -> bool:
    """Whether tensors of this kind can be computed here."""
    return pre.device.type == "cpu" and pre.dtype in NAMES


def library(compiled: Compiled) -> Library | None:
    """Return the kernels of a formula, built if need be; None where no compiler works."""
    if compiled not in _libraries:
        built = load(source(compiled))
        if built is None:
            return None
        _libraries.setdefault(compiled, Library(compiled, built))
    return _libraries[compiled]


def load_file(name: str, signatures: Mapping[str, Sequence[type]]) -> ctypes.CDLL | None:
    """Return the functions of a C file of this folder; None where no compiler works.

    The file stands once for each dtype, whose name replaces the word DTYPE in it.

    Args:
        name: of the file.
        signatures: for each function the types of its arguments; it is called `<function>_<dtype>` and returns an int.
    """
    template = Path(__file__).with_name(name).read_text(encoding="utf-8")
    parts = [PRIMITIVES.read_text(encoding="utf-8"), *(template.replace("DTYPE", dtype) for dtype in DTYPES)]
    built = load("\n".join(parts))
    if built is not None:
        for function, types in signatures.items():
            for dtype in DTYPES:
                getattr(built, f"{function}_{dtype}").argtypes = types
    return built


def load(text: str) -> ctypes.CDLL | None:
    """Return a library built from C source; None (and one warning a process) where no compiler works."""
    global _compiler_failed
    if _compiler_failed:
        return None
    try:
        return build(text)
    except OSError as error:
        _compiler_failed = True
        warnings.warn(f"no C kernels, slower plain PyTorch computes instead: {error}", stacklevel=2)
        return None


class Library:
    """The kernels of one formula."""

    def __init__(self, compiled: Compiled, built: ctypes.CDLL) -> None:
        self.compiled, self.built = compiled, built
        self.matrices = len(compiled.formula.pre_activations)
        # Rows mean nothing to an ungated formula that learns nothing: one long row has one end.
        self.flat = self.matrices == 1 and not compiled.formula.learned

    def forward(self, _: Compiled, pre: Tensor, learned: Sequence[Tensor]) -> Tensor:
        """See `reference.forward`."""
        h = self._empty_h(pre)
        self._call("forward", (pre, h, *_values(learned)), h)
        return h

    @functools.cached_property
    def built_with_statistics(self) -> ctypes.CDLL | None:
        """The variant that tells of itself, built when it is first asked for; None where no compiler is left."""
        return load(source_with_statistics(self.compiled))

    def forward_with_statistics(
        self, compiled: Compiled, pre: Tensor, learned: Sequence[Tensor]
    ) -> tuple[Tensor, Seen]:
        """See `reference.forward_with_statistics`."""
        if self.built_with_statistics is None:
            h = self.forward(compiled, pre, learned)
            return h, reference.statistics(compiled, pre, h, learned)
        h = self._empty_h(pre)
        sums, active = torch.zeros(len(sums_of(compiled)) + 1), torch.zeros(pre.shape[-1])
        if h.numel():
            tensors = (pre, h, *_values(learned), *sums.split(1), active)
            _run(self.built_with_statistics, "statistics", tensors, h, h.shape[-1])
        return h, Seen(sums[:-1], sums[-1], active, h.numel())

    def backward(
        self, _: Compiled, pre: Tensor, dh: Tensor, learned: Sequence[Tensor], with_h: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """See `reference.backward`."""
        dpre, h = torch.empty_like(pre), torch.empty_like(dh) if with_h else None
        dlearned = [torch.zeros(tensor.shape, dtype=torch.float32) for tensor in learned]
        tensors = (pre, dh, dpre, *([] if h is None else [h]), *_values(learned), *dlearned)
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
        """Run a kernel over the rows of `like`."""
        if like.numel():
            _run(self.built, name, tensors, like, like.numel() if self.flat else like.shape[-1])


def _run(built: ctypes.CDLL, name: str, tensors: Sequence[Tensor], like: Tensor, width: int) -> None:
    addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    sizes = ctypes.c_int64(like.numel() // width), ctypes.c_int64(width)
    if getattr(built, f"{name}_{NAMES[like.dtype]}")(*addresses, *sizes):
        raise MemoryError("no memory for the partial sums of a kernel")


def _values(learned: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().to(torch.float32).contiguous() for tensor in learned]
