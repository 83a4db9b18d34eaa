"""Softmax cross-entropy: of logits that become their own gradient, and of the output projection without all logits."""

from .cross_entropy import cross_entropy_, serves
from .linear import linear_cross_entropy

__all__ = ["cross_entropy_", "linear_cross_entropy", "serves"]
