"""Which tensors Triton kernels support, and the loading of generated kernels. This module does not import Triton."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..c.toolchain import triton_problem
from ..common.cache import folder
from ..tensors import on_gpu

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=1)
def installed() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU, which is slow and meant for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=1)
def problem() -> str:
    """Why no Triton kernel can be launched on this machine, and the remedy; "" if nothing is missing."""
    if not installed():
        return "the package triton is not installed: pip install triton"
    return "" if interpreted() else triton_problem()


def serves(pre: Tensor) -> bool:
    """Whether Triton kernels support the device and dtype of `pre` on this machine."""
    if problem():
        return False
    if interpreted():
        return pre.dtype == torch.float32  # the interpreter's bf16 is wrong
    built = torch.version.cuda is not None or pre.is_meta  # for NVIDIA; a trace needs none
    return on_gpu(pre) and built and pre.dtype in _DTYPES


def refusal(pre: Tensor) -> Exception:
    """Return the exception for a `pre` that the backend, selected by name, does not support."""
    if problem():
        return ImportError(f"the Triton backend cannot run: {problem()}")
    kind = f"{pre.dtype} on {pre.device.type}".removeprefix("torch.")
    if interpreted():
        return ValueError(f"under TRITON_INTERPRET=1 the Triton backend computes float32, not {kind}")
    return ValueError(f"the Triton backend computes float32, bfloat16 and float16 on an NVIDIA GPU, not {kind}")


@functools.lru_cache(maxsize=1)
def warn_if_missing() -> None:
    """Warn once per process that a GPU is used without Triton."""
    if problem():
        warnings.warn(f"no Triton kernels, slower plain PyTorch computes instead: {problem()}", stacklevel=2)


@functools.lru_cache(maxsize=256)
def load(text: str) -> ModuleType:
    """Return the module of generated source, imported from a file: Triton reads the source of a kernel from its file.

    The file is named by a hash of the text and replaced atomically, so processes may write the same one at the same time.
    """
    name = f"triton_{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
    path = folder() / f"{name}.py"
    if not _holds(path, text):
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _holds(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8") == text
    return False
