"""Triton kernels on a GPU: when they serve, how generated ones are loaded, and the primitives."""
