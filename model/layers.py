"""The decoder's small operations, one seam each: RMSNorm and rotary positions."""

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
        shared: tensor ranks that each normalise other tokens or other heads.
    """

    def __init__(self, width: int, eps: float, shared: Axis = Axis()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.shared = eps, shared

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual (..., width) -> (the norm of x + residual, x + residual); without a residual of x alone."""
        return rms_norm(x, with_summed_gradient(self.weight, self.shared), self.eps, residual)


class Rotary(nn.Module):
    """Rotary positions (Su 2021, arXiv 2104.09864), in the half-split layout of LLaMA's published weights.

    Tables are computed once for the longest sequence seen, in fp32 for heads of fp32 and below, and kept out of checkpoints.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def tables(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each (length, head_dim / 2)."""
        cos, sin = self._tables.get((device, dtype), (None, None))
        if cos is None or cos.shape[0] < length:
            # A power of two, so that generation token by token does not make them anew each time; and never as tensors of
            # inference mode, which a later training step could not save.
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(1 << (length - 1).bit_length(), dtype=torch.float64)
                steps = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
                angles = torch.outer(positions, self.theta**-steps)  # (length, head_dim / 2)
                cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
            self._tables[device, dtype] = cos, sin
        return cos[:length], sin[:length]

    def forward(self, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Rotate q and k (B, S, heads, head_dim), whose first token stands at position `start`."""
        precise = torch.promote_types(q.dtype, torch.float32)
        cos, sin = self.tables(start + q.shape[1], q.device, precise)
        return rotate(q, k, cos[start:], sin[start:])
