"""Softmax cross-entropy of logits that become their own gradient."""

from .cross_entropy import cross_entropy_, serves

__all__ = ["cross_entropy_", "serves"]
