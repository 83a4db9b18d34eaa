"""Matrices in low precision."""

from .rounding import E4M3, E5M2, TINY, Rounded, fp8_rows, round_e2m1, round_fp8, round_mxfp8, round_nvfp4

__all__ = ["E4M3", "E5M2", "TINY", "Rounded", "fp8_rows", "round_e2m1", "round_fp8", "round_mxfp8", "round_nvfp4"]
