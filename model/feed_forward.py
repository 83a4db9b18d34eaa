"""The feed-forward layer: up projection, the arm's formula, down projection, with a backward that keeps little.

Autograd would keep what every operation has read: four times the hidden width for SwiGLU. Here one function spans the layer,
and `ffn.save` says what it keeps between forward and backward, beside the layer's input and the weights:

    packed      the pre-activations, as the up projection wrote them; h is computed again from them (the default)
    output      h, where the derivative is a function of it (`from_output` of the arm): nothing is computed again
    everything  the pre-activations and h: nothing is computed again
    input       nothing: the up projection is computed again too

Over tensor ranks F is cut: `up` is column parallel, `down` row parallel, and what crosses ranks is in `collectives.py`.

Shapes: D d_model, F this rank's share of d_ff; leading dimensions are any. With sequence parallelism x and the result are (N
/ T, D).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import FFNConfig
from kernels import FormulaError, activation
from kernels.activations.activation import Activation
from kernels.activations.telemetry import Statistics
from kernels.common.errors import UserError
from kernels.formula.gaussian import gaussian_rms
from launch.estimate.counts import FFNShape
from model.collectives import gather, reduce
from model.parallel import Axis, Mesh, cut_parameter


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

    def __init__(self, arm: FFNConfig, width: int, d_model: int, mesh: Mesh = Mesh()) -> None:
        super().__init__()
        self.activation = activation(arm.formula, arm.parameters, arm.backend, arm.from_output)
        formula = self.activation.formula
        self.gated, self.save, self.init_scale = formula.gated, arm.save, arm.init_scale
        self.d_ff, self.tensor = width, mesh.tensor
        self.statistics: Statistics | None = None  # where it is set, forward tells it what it sees
        shape = (2, width, d_model) if self.gated else (width, d_model)  # gate first
        self.up = cut_parameter(mesh, shape, len(shape) - 2)
        self.down = cut_parameter(mesh, (d_model, width), 1)
        self.learned = nn.ParameterDict(
            {
                name: cut_parameter(mesh, (width,), 0) if p.share == "channel" else nn.Parameter(torch.empty(1))
                for name, p in formula.learned.items()
            }
        )

    def forward(self, x: Tensor, sequence: bool = False) -> Tensor:
        """x (..., D) -> (..., D); `sequence` says that x is a tensor rank's share of the tokens, and so will be the result."""
        learned = [self.learned[name] for name in self.activation.formula.learned]
        seam = _Seam(self.activation, self.save, self.statistics, self.tensor, sequence)
        return _FeedForward.apply(seam, x, self.up, self.down, *learned)

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


class _Seam(NamedTuple):
    """What a layer's function needs to know beside its tensors."""

    activation: Activation
    save: str
    statistics: Statistics | None
    tensor: Axis
    sequence: bool


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, seam: _Seam, x: Tensor, up: Tensor, down: Tensor, *learned: Tensor) -> Tensor:
        pre = _project(gather(x, seam.tensor, seam.sequence).wait(), up)
        if seam.statistics is None:
            h = seam.activation.forward(pre, learned)
        else:
            h, seen = seam.activation.forward_with_statistics(pre, learned)
            seam.statistics.add(seen)
        kept = {"packed": (pre,), "output": (h,), "everything": (pre, h), "input": ()}[seam.save]
        ctx.save_for_backward(x, up, down, *learned, *kept)
        ctx.seam, ctx.learned = seam, len(learned)
        return reduce(F.linear(h, down), seam.tensor, seam.sequence).wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, *rest = ctx.saved_tensors
        learned, kept = rest[: ctx.learned], rest[ctx.learned :]
        _, need_x, need_up, need_down, *_ = ctx.needs_input_grad
        activation, save, _, tensor, sequence = ctx.seam
        h = kept[-1] if save in ("output", "everything") else None
        gradient = gather(gradient, tensor, sequence).wait()
        again = gather(x, tensor, sequence)  # while what follows is computed
        flat = gradient.reshape(-1, gradient.shape[-1])
        dh = (flat @ down).view(*gradient.shape[:-1], down.shape[1])
        if save == "output":
            dpre, dlearned = activation.backward_from_output(h, dh), []
        else:
            pre = kept[0] if kept else _project(again.wait(), up)
            dpre, h_again, dlearned = activation.backward(pre, dh, learned, with_h=h is None and need_down)
            h = h_again if h is None else h
        # A parameter of the whole layer sees the channels of every tensor rank.
        shares = (parameter.share for parameter in activation.formula.learned.values())
        alone = Axis()
        summed = [
            reduce(d, tensor if share == "layer" else alone, False) for d, share in zip(dlearned, shares, strict=False)
        ]
        packed = dpre.reshape(len(flat), -1)
        # First the gradient that ranks add up: that takes place beside the other products.
        d_x = reduce((packed @ up.flatten(0, -2)).view(gradient.shape), tensor, sequence) if need_x else None
        d_down = flat.T @ h.reshape(len(flat), -1) if need_down else None
        d_up = (packed.T @ again.wait().reshape(len(flat), -1)).view(up.shape) if need_up else None
        d_x = None if d_x is None else d_x.wait()
        return None, d_x, d_up, d_down, *_cast([d.wait() for d in summed], learned)


def _project(x: Tensor, up: Tensor) -> Tensor:
    """x (..., D) -> pre-activations (..., F), or (..., 2, F) if gated."""
    pre = F.linear(x, up.flatten(0, -2))
    return pre.unflatten(-1, (2, -1)) if up.ndim == 3 else pre


def _cast(gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, like, strict=True)]
