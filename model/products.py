"""The matrix products of the layers, forward and backward: in the dtype of the model, or with operands in low precision.

A linear layer has three products: y = x weight^T, dx = dy weight, dweight = dy^T x. `Products` computes them in the dtype of
their operands. `LowPrecision` rounds the operands first, for the projections of attention and of the feed-forward layers;
embedding, output projection, norms and attention itself keep the dtype of the model. Two keys select it:

    precision=fp8          on a GPU with FP8 units torch's `_scaled_mm` multiplies; a CPU computes the same, and is not faster
    precision.emulate=...  operands are rounded to the format and multiplied in fp32, on any device, so that an ablation can ask
                           which arms survive a format that this machine does not have

    fp8     E4M3 in forward, E5M2 for gradients, with a scale per row of each operand or per tensor (`precision.scaling`)
    mxfp8   E4M3, also for gradients
    nvfp4   E2M1, also for gradients, rounded to nearest: without the random rotations and the stochastic rounding that recipes
            for it add

`kernels/rounding/` has the formats. Scales are computed from the operand at hand. Scales of earlier steps would save a pass
over it, and be a state that a resumed run has to carry and that a sudden outlier exceeds. Each tensor rank scales its own
shard, so the losses of tensor ranks differ from those of one rank by roundings to the format.

Shapes: N tokens, A inputs and B outputs of a layer; R and S rows of two operands, K the numbers that a product sums over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.schema import PrecisionConfig
from kernels.activations.activation import Activation
from kernels.common.errors import UserError
from kernels.rounding import E4M3, E5M2, Rounded, round_fp8, round_mxfp8, round_nvfp4

_FP8_SINCE = (8, 9)  # compute capability: Ada, and all since Hopper
_MULTIPLE = 16  # of an FP8 product's K and columns


class Products:
    """The products of a linear layer in the dtype of their operands."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x weight^T: (..., A), (B, A) -> (..., B)."""
        return F.linear(x, weight)

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """Return dy weight: (..., B), (B, A) -> (..., A)."""
        return dy @ weight

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """Return dy^T x: (N, B), (N, A) -> (B, A)."""
        return dy.T @ x

    def of_activation(
        self, activation: Activation, pre: Tensor, learned: Sequence[Tensor], weight: Tensor, reduced: Tensor | None
    ) -> Tensor:
        """Return h weight^T of the activation h of pre-activations, which nothing else reads; `forward` for the shapes.

        Args:
            reduced: what the activation reduces over d_ff of all tensor ranks, if it does (`Activation.reduce`).
        """
        return self.forward(activation.forward(pre, learned, reduced), weight)


PLAIN = Products()


class LowPrecision(Products):
    """Products of operands that were rounded first.

    Args:
        rounded: (operand (R, K), whether it is a gradient) -> the operand in low precision, with scales shared along K.
        multiply: (operand (R, K), operand (S, K), dtype of the result) -> (R, S).
        fused: whether the activation's kernel writes h in FP8 with a scale per row.
    """

    def __init__(
        self,
        rounded: Callable[[Tensor, bool], Rounded],
        multiply: Callable[[Rounded, Rounded, torch.dtype], Tensor],
        multiple: int = 1,
        fused: bool = False,
    ) -> None:
        self._rounded, self._multiply, self._multiple, self._fused = rounded, multiply, multiple, fused

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return self._product(rows, weight, False, super().forward).view(*x.shape[:-1], len(weight))

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        rows = dy.reshape(-1, dy.shape[-1])

        def plain(dy: Tensor, weight_t: Tensor) -> Tensor:
            return dy @ weight_t.T

        return self._product(rows, weight.T, True, plain).view(*dy.shape[:-1], weight.shape[1])

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return self._product(dy.T, x.T, True, lambda dy_t, x_t: dy_t @ x_t.T)

    def of_activation(
        self, activation: Activation, pre: Tensor, learned: Sequence[Tensor], weight: Tensor, reduced: Tensor | None
    ) -> Tensor:
        if not self._fused or not self._fits(weight):
            return super().of_activation(activation, pre, learned, weight, reduced)
        h, scale = activation.forward_fp8(pre, learned, reduced)  # (..., F), (..., 1)
        rows = Rounded(h.view(-1, h.shape[-1]), scale.view(-1, 1))
        return self._multiply(rows, self._rounded(weight.detach(), False), pre.dtype).view(*h.shape[:-1], len(weight))

    def _product(self, a: Tensor, b: Tensor, gradient: bool, plain: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return a b^T: (R, K), (S, K) -> (R, S), where a is a gradient or not; in full precision if FP8 units cannot."""
        if not self._fits(b):
            return plain(a, b)
        # Detached, a parameter is a plain tensor, which kernels take.
        return self._multiply(self._rounded(a, gradient), self._rounded(b.detach(), False), a.dtype)

    def _fits(self, b: Tensor) -> bool:
        return b.shape[0] % self._multiple == 0 and b.shape[1] % self._multiple == 0


def products_of(
    precision: PrecisionConfig, device: torch.device, capability: tuple[int, int] | None = None
) -> tuple[Products, str]:
    """Return the products that `precision` asks for, and a warning, empty if there is none.

    Args:
        capability: compute capability of the GPU; None: ask the device.

    Raises:
        UserError: precision=fp8 on a GPU without FP8 units.
    """
    rowwise = precision.scaling == "rowwise"
    if precision.name == "fp8":
        if device.type != "cuda":
            warning = "precision=fp8 on a CPU computes what a GPU would, and is slower than bf16"
            return LowPrecision(_fp8_rounding(rowwise), _multiply_values), warning
        if torch.version.hip is not None:  # MI300's FP8 is another one, with a zero of its own
            raise UserError("precision=fp8 is made for GPUs of NVIDIA; on this one use precision=bf16")
        if (capability or torch.cuda.get_device_capability(device)) < _FP8_SINCE:
            raise UserError(
                "precision=fp8 needs a GPU with FP8 units (sm_89 or later), and this one has none: use precision=bf16, with "
                "precision.emulate=fp8 for the same roundings"
            )
        return LowPrecision(_fp8_rounding(rowwise), _multiply_fp8, _MULTIPLE, fused=rowwise), ""
    if precision.emulate == "none":
        return PLAIN, ""
    if precision.emulate == "fp8":
        return LowPrecision(_fp8_rounding(rowwise), _multiply_values), ""
    to_format = {"mxfp8": round_mxfp8, "nvfp4": round_nvfp4}[precision.emulate]
    return LowPrecision(lambda x, _: to_format(x), _multiply_values), ""


def describe_products(precision: PrecisionConfig) -> str:
    """Return what the console says of products in low precision: "" where there are none."""
    if precision.name == "fp8":
        return f" and FP8 products ({precision.scaling})"
    return "" if precision.emulate == "none" else f" and operands rounded to {precision.emulate}"


def _fp8_rounding(rowwise: bool) -> Callable[[Tensor, bool], Rounded]:
    return lambda x, gradient: round_fp8(x, E5M2 if gradient else E4M3, rowwise)


def _multiply_values(a: Rounded, b: Rounded, dtype: torch.dtype) -> Tensor:
    """Return a b^T in fp32, rounded once."""
    product = torch.mm(a.values.float(), b.values.float().T)
    if a.scale is not None and b.scale is not None:
        product *= a.scale * b.scale.T
    return product.to(dtype)


def _multiply_fp8(a: Rounded, b: Rounded, dtype: torch.dtype) -> Tensor:
    """Return a b^T on FP8 units. Sums of gradients are in fp32 throughout; those of forward may take the faster registers."""
    (left, scale), (right, scale_right) = a, b
    assert scale is not None  # FP8 has them
    assert scale_right is not None
    forward = left.dtype == E4M3
    multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return multiply(left, right.T, scale, scale_right.T, out_dtype=dtype, use_fast_accum=forward)
