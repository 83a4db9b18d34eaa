"""Attributes of another installed package that has the same name as ours: Hugging Face's `kernels`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def attribute_of_namesake(package: str, search_path: Sequence[str], name: str) -> Any:
    """Return an attribute of the package of the same name that comes later on the path.

    Args:
        package: the shared name.
        search_path: `__path__` of our package: our folder first, then those of the same name (`pkgutil.extend_path`).
        name: the attribute.

    Raises:
        AttributeError: there is no such package, or it has no such attribute.
    """
    module = _load(package, search_path)
    if module is None or not hasattr(module, name):
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(module, name)


def _load(package: str, search_path: Sequence[str]) -> ModuleType | None:
    """Run the other package's `__init__.py` as a submodule of ours: its imports find its own files by the extended path."""
    alias = f"{package}._namesake"
    if alias in sys.modules:  # also while its __init__.py still runs, as in any circular import
        return sys.modules[alias]
    for folder in search_path[1:]:
        spec = importlib.util.spec_from_file_location(alias, Path(folder, "__init__.py"))
        if spec is None or spec.loader is None or not Path(folder, "__init__.py").is_file():
            continue
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[alias]
            raise
        return module
    return None
