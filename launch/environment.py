"""Environment variables that libraries read once, when they are loaded: set before torch is imported, whoever started the rank.

A value that the user has set is kept.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def configure_libraries(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what PyTorch's GPU allocator is to do unless the user has: grow its segments instead of leaving gaps between them."""
    if not any(name in environment for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
