"""The feed-forward layer: up projection, the arm's formula, down projection, with a backward that keeps little.

Autograd would keep what every operation has read: four times the hidden width for SwiGLU. Here one function spans the layer,
and `ffn.save` says what it keeps between forward and backward, beside the layer's input and the weights:

    packed      the pre-activations, as the up projection wrote them; h is computed again from them (the default)
    output      h, where the derivative is a function of it (`from_output` of the arm): nothing is computed again
    everything  the pre-activations and h: nothing is computed again
    input       nothing: the up projection is computed again too

Shapes: D d_model, F d_ff; leading dimensions are any.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import FFNConfig
from kernels import FormulaError, activation
from kernels.elementwise import Activation
from kernels.statistics import gaussian_rms
from kernels.telemetry import Statistics
from model.accounting import FFNShape


def check_arms(
    shapes: Sequence[FFNShape], device: torch.device, dtype: torch.dtype, statistics: bool = False
) -> list[str]:
    """Differentiate and build every arm, and return sentences that a user should read before training with it.

    Args:
        shapes: one a layer.
        device, dtype: of the pre-activations.
        statistics: whether the kernels that tell of themselves are going to be used.

    Raises:
        UserError: a formula that overflows where its value is moderate, or whose initial scale is not known.
    """
    said = []
    for shape in shapes[:1] + tuple(b for a, b in itertools.pairwise(shapes) if a.arm != b.arm):
        arm = shape.arm
        try:
            function = activation(arm.formula, arm.parameters, arm.backend, arm.from_output)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                function.prepare(device, dtype, statistics)
        except FormulaError as error:
            raise UserError(f"ffn.formula is refused: {error}") from error
        except (ValueError, ImportError) as error:  # not what it computes, or not installed
            raise UserError(f"ffn.backend={arm.backend}: {error}") from error
        said += [str(warning.message) for warning in caught]
        if arm.init_scale is None and not 0 < (size := gaussian_rms(function.formula)) < math.inf:
            raise UserError(
                f"ffn={arm.name}: for normal pre-activations the root mean square of {arm.formula} is {size:g}, so the "
                "scale of the initial down projection cannot be derived: give ffn.init_scale"
            )
        if all(slope == 0 for slope in function.compiled.slopes.values()):
            said.append(f"ffn={arm.name}: the gradient of {arm.formula} is 0 everywhere, so ffn.up learns nothing")
    return said


class FeedForward(nn.Module):
    """The arm under study: D -> F (once, or twice if gated) -> the formula -> D."""

    def __init__(self, arm: FFNConfig, width: int, d_model: int) -> None:
        super().__init__()
        self.activation = activation(arm.formula, arm.parameters, arm.backend, arm.from_output)
        formula = self.activation.formula
        self.gated, self.save, self.init_scale = formula.gated, arm.save, arm.init_scale
        self.d_ff = width
        self.statistics: Statistics | None = None  # where it is set, forward tells it what it sees
        self.up = nn.Parameter(torch.empty((2, width, d_model) if self.gated else (width, d_model)))  # gate first
        self.down = nn.Parameter(torch.empty(d_model, width))
        self.learned = nn.ParameterDict(
            {
                name: nn.Parameter(torch.empty(width if p.share == "channel" else 1))
                for name, p in formula.learned.items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        learned = [self.learned[name] for name in self.activation.formula.learned]
        return _FeedForward.apply(self.activation, self.save, self.statistics, x, self.up, self.down, *learned)

    @property
    def down_scale(self) -> float:
        """What multiplies the initial down projection, so that every arm writes as much into the residual stream as SwiGLU.

        With unit-normal pre-activations, and the width that gives all arms the same number of parameters.
        """
        if self.init_scale is not None:
            return self.init_scale
        formula = self.activation.formula
        return (
            gaussian_rms(activation("silu(gate) * up").formula) / gaussian_rms(formula) * (formula.matrices / 3) ** 0.5
        )


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        save: str,
        statistics: Statistics | None,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        *learned: Tensor,
    ) -> Tensor:
        pre = _project(x, up)
        if statistics is None:
            h = activation.forward(pre, learned)
        else:
            h, seen = activation.forward_with_statistics(pre, learned)
            statistics.add(seen)
        ctx.activation, ctx.save = activation, save
        kept = {"packed": (pre,), "output": (h,), "everything": (pre, h), "input": ()}[save]
        ctx.save_for_backward(x, up, down, *learned, *kept)
        ctx.learned = len(learned)
        return F.linear(h, down)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, *rest = ctx.saved_tensors
        learned, kept = rest[: ctx.learned], rest[ctx.learned :]
        h = kept[-1] if ctx.save in ("output", "everything") else None
        flat = gradient.reshape(-1, gradient.shape[-1])
        dh = (flat @ down).view(*gradient.shape[:-1], down.shape[1])
        need_down = ctx.needs_input_grad[5]
        if ctx.save == "output":
            dpre, dlearned = ctx.activation.backward_from_output(h, dh), []
        else:
            pre = kept[0] if kept else _project(x, up)
            dpre, again, dlearned = ctx.activation.backward(pre, dh, learned, with_h=h is None and need_down)
            h = again if h is None else h
        d_down = flat.T @ h.reshape(len(flat), -1) if need_down else None
        packed = dpre.reshape(len(flat), -1)
        d_up = (packed.T @ x.reshape(len(flat), -1)).view(up.shape) if ctx.needs_input_grad[4] else None
        d_x = (packed @ up.flatten(0, -2)).view(x.shape) if ctx.needs_input_grad[3] else None
        return None, None, None, d_x, d_up, d_down, *_cast(dlearned, learned)


def _project(x: Tensor, up: Tensor) -> Tensor:
    """x (..., D) -> pre-activations (..., F), or (..., 2, F) if gated."""
    pre = F.linear(x, up.flatten(0, -2))
    return pre.unflatten(-1, (2, -1)) if up.ndim == 3 else pre


def _cast(gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, like, strict=True)]
