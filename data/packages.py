"""Packages that only some sources, tokenizers and commands need."""

from __future__ import annotations

import importlib
from types import ModuleType

from kernels.common.errors import UserError


def need(package: str, why: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.partition(".")[0]
        raise UserError(f"{why} needs the package {top}: pip install {top}") from error
