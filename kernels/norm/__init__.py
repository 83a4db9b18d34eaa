"""RMSNorm, fused with the residual addition before it."""

from .norm import rms_norm

__all__ = ["rms_norm"]
