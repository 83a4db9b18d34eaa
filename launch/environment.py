"""Environment variables that libraries read once, when they are loaded: set before torch is imported, whoever started the rank.

A value that the user has set is kept.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def configure_libraries(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set how libraries are to behave, where the user has not."""
    # PyTorch's GPU allocator grows its segments, instead of leaving gaps between them.
    if not any(name in environment for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    environment.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler reports its own start and stop on the console
