"""Models of Transformers with fused feed-forward layers."""

from .layers import PatchError
from .patching import Patched, patch, unpatch

__all__ = ["PatchError", "Patched", "patch", "unpatch"]
