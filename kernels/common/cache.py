"""The folder in which built kernels are cached between processes."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path


@functools.lru_cache(maxsize=1)
def folder() -> Path:
    """Return the folder of built kernels: the user's cache, or a temporary one per process if that is not writable."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(home, "formula-ffn", "kernels")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError:
        return temporary_folder()


@functools.lru_cache(maxsize=1)
def temporary_folder() -> Path:
    """Return a folder of this process alone, for what the cache has no place for."""
    return Path(tempfile.mkdtemp(prefix="formula-ffn-kernels-"))
