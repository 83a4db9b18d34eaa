"""RMSNorm and rotary position embeddings, as modules around their kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.norm import rms_norm
from kernels.rotary import rotate
from model.collectives import with_summed_gradient
from model.parallel import Axis


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        gradient_axis: tensor ranks that apply this replicated weight to different tokens or heads; they sum its gradient.
    """

    def __init__(self, width: int, eps: float, gradient_axis: Axis = Axis()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.gradient_axis = eps, gradient_axis

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add and normalise in one pass.

        Args:
            x, residual: (..., width); no residual: x alone is normalised.

        Returns:
            The norm of x + residual, and x + residual, each (..., width).
        """
        return rms_norm(x, with_summed_gradient(self.weight, self.gradient_axis), self.eps, residual)


class Rotary(nn.Module):
    """Rotary position embeddings (Su 2021, arXiv 2104.09864), in the half-split layout of LLaMA's published weights.

    Tables are computed once for the longest sequence so far, in fp32 for heads of fp32 and below. They are no buffers, so
    checkpoints do not hold them.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def tables(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each (length, head_dim / 2)."""
        tables = self._tables.get((device, dtype))
        if tables is None or len(tables[0]) < length:
            # The length is rounded up to a power of two, so that generation does not recompute the tables for every token.
            # A training step could not save tensors made in inference mode for backward.
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(1 << (length - 1).bit_length(), dtype=torch.float64)
                steps = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
                angles = torch.outer(positions, self.theta**-steps)  # (length, head_dim / 2)
                tables = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
            self._tables[device, dtype] = tables
        cos, sin = tables
        return cos[:length], sin[:length]

    def forward(self, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Rotate q and k (B, S, heads, head_dim), whose first token is at position `start`."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        cos, sin = self.tables(start + q.shape[1], q.device, dtype)
        return rotate(q, k, cos[start:], sin[start:])
