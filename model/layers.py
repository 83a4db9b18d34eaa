"""The decoder's small operations, one seam each: RMSNorm and rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one fused kernel there; on a CPU it is a dozen passes over copies in fp32
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight in few passes: the mean is taken in fp32, the products are in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        # dx = s w g - x s^3 mean(w g x) and dw = sum over rows of s g x: both reductions are of g x, as matrix products.
        precise = torch.promote_types(x.dtype, torch.float32)
        product = (grad * x).flatten(0, -2)
        grad_weight = torch.mm(scale.view(1, -1), product).flatten()
        mean = torch.mm(product, weight.unsqueeze(1)).view_as(scale).to(precise) / x.shape[-1]
        coefficient = (mean * scale.to(precise) ** 3).to(x.dtype)
        return (grad * weight).mul_(scale).addcmul_(x, coefficient, value=-1), grad_weight, None


class Rotary(nn.Module):
    """Rotary positions (Su 2021, arXiv 2104.09864), in the half-split layout of LLaMA's published weights.

    Tables are computed once in fp32 for the longest sequence seen, and kept out of checkpoints.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def tables(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each (length, 1, head_dim), the sine with the sign of the half it multiplies."""
        cos, sin = self._tables.get((device, dtype), (None, None))
        if cos is None or cos.shape[0] < length:
            # A power of two, so that generation token by token does not make them anew each time; and never as tensors of
            # inference mode, which a later training step could not save.
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(1 << (length - 1).bit_length(), dtype=torch.float64)
                steps = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
                angles = torch.outer(positions, self.theta**-steps)  # (length, head_dim / 2)
                cos = torch.cat((angles.cos(), angles.cos()), -1).unsqueeze(1).to(device, dtype)
                sin = torch.cat((-angles.sin(), angles.sin()), -1).unsqueeze(1).to(device, dtype)
            self._tables[device, dtype] = cos, sin
        return cos[:length], sin[:length]

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotate x (B, S, H, head_dim), whose first token stands at position `start`."""
        cos, sin = self.tables(start + x.shape[1], x.device, x.dtype)
        return _Rotate.apply(x, cos[start:], sin[start:])


class _Rotate(torch.autograd.Function):
    """x cos + swap(x) sin, where swap exchanges the halves; the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (grad * cos).addcmul_(grad.roll(grad.shape[-1] // 2, -1), sin, value=-1), None, None
