"""Rotary position embedding of queries and keys."""

from .rotary import rotate

__all__ = ["rotate"]
