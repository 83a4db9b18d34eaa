"""Load C kernels through ctypes: generated sources, and the hand-written files of the ops.

`toolchain.py` compiles and caches; `primitives.h` has the vector arithmetic that all kernels share.
"""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .toolchain import build

DTYPES = ("f32", "bf16")
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
PRIMITIVES = Path(__file__).with_name("primitives.h")
_compiler_failed = False  # warn once per process, and do not retry
_failed: set[str] = set()  # sources that a working compiler refused


def serves(tensor: Tensor) -> bool:
    """Return whether the C kernels compute tensors of this device and dtype."""
    return tensor.device.type == "cpu" and tensor.dtype in NAMES


def load_file(path: Path, signatures: Mapping[str, Sequence[type]]) -> ctypes.CDLL | None:
    """Build and load a hand-written C file, instantiated for each dtype; None where no compiler works.

    The name of the dtype replaces DTYPE in the file.

    Args:
        path: the C file.
        signatures: {function: argument types}; in the library it is `<function>_<dtype>` and returns an int.
    """
    template = path.read_text(encoding="utf-8")
    parts = [PRIMITIVES.read_text(encoding="utf-8"), *(template.replace("DTYPE", dtype) for dtype in DTYPES)]
    built = load("\n".join(parts), path.name)
    if built is not None:
        for function, types in signatures.items():
            for dtype in DTYPES:
                getattr(built, f"{function}_{dtype}").argtypes = types
    return built


def load(text: str, name: str) -> ctypes.CDLL | None:
    """Build and load C source; None, with a warning, where it cannot be built.

    A source that fails where the compiler works is its own failure, with a warning of its own; one warning per process says
    that no compiler works.

    Args:
        name: what the source computes, for the warning.
    """
    global _compiler_failed
    if _compiler_failed or text in _failed:
        return None
    try:
        return build(text)
    except OSError as error:
        _compiler_failed = not _compiler_works()
        if not _compiler_failed:
            _failed.add(text)
        missing, them = ("kernels", "") if _compiler_failed else (f"kernels for {name}", " it")
        warnings.warn(f"no C {missing}, slower plain PyTorch computes{them} instead: {error}", stacklevel=2)
        return None


def _compiler_works() -> bool:
    """Return whether anything can be built: a source that no earlier process has left in the cache."""
    try:
        build(f"int works(void) {{ return {time.time_ns() % 1_000_000_007}; }}")
    except OSError:
        return False
    return True
