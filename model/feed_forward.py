"""The feed-forward layer: up projection, the arm's formula, down projection, with a memory-lean backward.

Autograd would save the inputs of every operation: four times the hidden width for SwiGLU. Here one autograd function spans the
layer. `ffn.save` selects what it saves for backward, beside the layer's input and the weights:

    packed      the pre-activations, as the up projection wrote them; backward recomputes h (the default)
    output      h, for arms whose derivative is a function of it (`from_output`); backward recomputes nothing
    everything  the pre-activations and h; backward recomputes nothing
    input       nothing; backward recomputes the up projection and h

F is sharded over tensor ranks: `up` is column parallel, `down` is row parallel. Communication lives in `collectives.py`.

Shapes: D d_model, F this rank's shard of d_ff, N tokens, T tensor ranks; leading dimensions are arbitrary. With sequence
parallelism x and the result are (N / T, D).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from conf.schema import FFNConfig
from conf.shape import FFNShape
from kernels import FormulaError, activation
from kernels.activations.activation import Activation
from kernels.activations.reductions import WidthRanks
from kernels.activations.telemetry import ActivationStats
from kernels.autograd import FirstOrder
from kernels.common.errors import UserError
from kernels.formula import Formula
from kernels.formula.gaussian import gaussian_rms, gaussian_std
from model.collectives import Pending, all_gather, all_reduce, gather_tokens, reduce_partial
from model.parallel import Axis, Mesh, shard_parameter
from model.products import PLAIN, Products


def _initial_size(ffn: FFNConfig, formula: Formula, width: int) -> tuple[float, str]:
    """Return what the initial down projections of all arms make equal, of h for normal pre-activations, and its name."""
    if ffn.init_match == "std":
        return gaussian_std(formula, width), "standard deviation"
    return gaussian_rms(formula, width), "root mean square"


def check_arms(
    shapes: Sequence[FFNShape], device: torch.device, dtype: torch.dtype, statistics: bool = False
) -> list[str]:
    """Differentiate and build every arm, and return warnings that a user should read before training with it.

    Args:
        shapes: one per layer.
        device, dtype: of the pre-activations.
        statistics: whether the kernels with telemetry will be used.

    Raises:
        UserError: a formula overflows where its value is moderate, its initial scale cannot be derived, or its backend does not
            run here.
    """
    messages: list[str] = []
    for arm, layers in itertools.groupby(shapes, key=lambda shape: shape.arm):  # once per run of equal layers
        try:
            shape = next(layers)
            function = activation(shape.formula, backend=arm.backend)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                function.prepare(device, dtype, statistics)
        except FormulaError as error:
            raise UserError(f"ffn.formula is refused: {error}") from error
        except (ValueError, ImportError) as error:  # the backend does not compute this, or is not installed
            raise UserError(f"ffn.backend={arm.backend}: {error}") from error
        messages += [str(warning.message) for warning in caught]
        size, name = _initial_size(arm, function.formula, shape.d_ff)
        if arm.init_scale is None and not 0 < size < math.inf:
            raise UserError(
                f"ffn={arm.name}: for normal pre-activations the {name} of {arm.formula} is {size:g}, so the "
                "scale of the initial down projection cannot be derived: set ffn.init_scale"
            )
        if all(slope == 0 for slope in function.compiled.slopes.values()):
            messages.append(f"ffn={arm.name}: the gradient of {arm.formula} is 0 everywhere, so ffn.up learns nothing")
    return messages


class FeedForward(nn.Module):
    """The arm under study: D -> F (once, or twice if gated) -> the formula -> D."""

    def __init__(self, ffn: FFNShape, d_model: int, mesh: Mesh = Mesh(), products: Products = PLAIN) -> None:
        super().__init__()
        arm, formula, width = ffn.arm, ffn.formula, ffn.d_ff
        self.activation = activation(formula.on_ranks(mesh.tensor.size), backend=arm.backend)
        self.gated, self.save, self.arm = formula.gated, arm.save, arm
        self.d_ff, self.tensor, self.products = width, mesh.tensor, products
        self.statistics: ActivationStats | None = None  # if set, forward adds this layer's telemetry to it
        shape = (2, width, d_model) if self.gated else (width, d_model)  # gate, then up
        self.up = shard_parameter(mesh, shape, len(shape) - 2)
        self.down = shard_parameter(mesh, (d_model, width), 1)
        self.learned = nn.ParameterDict(
            {
                name: nn.Parameter(torch.empty(1)) if p.share == "layer" else shard_parameter(mesh, (p.size(width),), 0)
                for name, p in formula.learned.items()
            }
        )
        self.scheduled = {name: p.init for name, p in formula.scheduled.items()}  # their values at the current step
        self._scheduled_tensors: list[Tensor] = []  # the same, made by the forward pass that first needs them

    def forward(self, x: Tensor, tensor: Axis | None = None) -> Tensor:
        """Apply the layer: x (..., D) -> (..., D).

        Args:
            tensor: the tensor axis of this forward pass; None: that of the mesh.
        """
        learned = [*(self.learned[name] for name in self.activation.formula.learned), *self._scheduled_on(x.device)]
        tensor = self.tensor if tensor is None else tensor
        options = _Options(self.activation, self.save, self.statistics, tensor, self.products)
        return _FeedForward.apply(options, x, self.up, self.down, *learned)

    def set_step(self, step: int, of: int) -> None:
        """Give the formula's scheduled parameters their values after `step` steps of a run of `of` steps."""
        values = {name: p.value(step, of) for name, p in self.activation.formula.scheduled.items()}
        if values != self.scheduled:
            self.scheduled, self._scheduled_tensors = values, []

    def _scheduled_on(self, device: torch.device) -> list[Tensor]:
        if self.scheduled and (not self._scheduled_tensors or self._scheduled_tensors[0].device != device):
            self._scheduled_tensors = [torch.full((1,), value, device=device) for value in self.scheduled.values()]
        return self._scheduled_tensors

    @property
    def down_scale(self) -> float:
        """Scale of the initial down projection, with which every arm writes as much into the residual stream as SwiGLU.

        As much that depends on the token: the mean of h, which SwiGLU does not have, adds the same vector to every token. It
        assumes unit-normal pre-activations, and the width that gives all arms the same number of parameters.
        """
        if self.arm.init_scale is not None:
            return self.arm.init_scale
        formula = self.activation.formula
        (of_swiglu, _), (own, _) = (
            _initial_size(self.arm, f, self.d_ff) for f in (activation("silu(gate) * up").formula, formula)
        )
        return of_swiglu / own * (formula.matrices / 3) ** 0.5


class _Options(NamedTuple):
    """The arguments of the layer's autograd function that are no tensors."""

    activation: Activation
    save: str
    statistics: ActivationStats | None
    tensor: Axis
    products: Products


_FIRST_ORDER = FirstOrder("the feed-forward layer", "write it in plain PyTorch")


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: _Options, x: Tensor, up: Tensor, down: Tensor, *learned: Tensor) -> Tensor:
        products = options.products
        pre = _project(products, gather_tokens(x, options.tensor).wait(), up)  # (..., F) or (..., 2, F)
        reduced = options.activation.reduce(pre, learned, _ranks(options.tensor))  # a few numbers per token, or None
        h = None
        if options.statistics is not None:
            h, sample = options.activation.forward_with_stats(pre, learned, reduced)
            options.statistics.add(sample)
        elif options.save in ("output", "everything"):
            h = options.activation.forward(pre, learned, reduced)  # (..., F)
        if h is None:
            y = products.of_activation(options.activation, pre, learned, down, reduced)
        else:
            y = products.forward(h, down)
        saved = {"packed": (pre,), "output": (h,), "everything": (pre, h), "input": ()}[options.save]
        ctx.save_for_backward(x, up, down, reduced, *learned, *saved)
        ctx.options, ctx.n_learned = options, len(learned)
        return reduce_partial(y, options.tensor).wait()

    @staticmethod
    @_FIRST_ORDER.once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grads
        x, up, down, reduced, *rest = ctx.saved_tensors
        learned, saved = rest[: ctx.n_learned], rest[ctx.n_learned :]
        _, need_x, need_up, need_down, *_ = ctx.needs_input_grad
        activation, save, _, tensor, products = ctx.options
        dy = gather_tokens(dy, tensor).wait()  # (..., D)
        gathered = gather_tokens(x, tensor)  # overlaps the product below
        dy_rows = dy.reshape(-1, dy.shape[-1])  # (N, D)
        dh = products.input_gradient(dy_rows, down).view(*dy.shape[:-1], down.shape[1])  # (..., F)
        ddown = dup = None

        def down_gradient(h: Tensor | None) -> Tensor:
            assert h is not None  # saved, or recomputed by `with_h`
            return products.weight_gradient(dy_rows, h.reshape(len(dy_rows), -1))  # (D, F)

        h = saved[-1] if save in ("output", "everything") else None
        if save == "output":
            dpre, dlearned = activation.backward_from_output(h, dh), []
        else:
            pre = saved[0] if saved else _project(products, gathered.wait(), up)
            adjoints, with_h = None, h is None and need_down
            if reduced is not None:
                recomputed, finish = activation.begin_backward(pre, dh, learned, reduced, with_h, _ranks(tensor))
                h = recomputed if h is None else h
                ddown = down_gradient(h) if need_down else None  # while the ranks exchange the adjoints
                adjoints, with_h = finish(), False
            dpre, recomputed, dlearned = activation.backward(pre, dh, learned, with_h, reduced, adjoints)
            h = recomputed if h is None else h
        shared_by = (parameter.share for parameter in activation.formula.learned.values())
        # A parameter of the whole layer gets a gradient from the channels of every tensor rank.
        summed = [
            all_reduce(d, tensor) if share == "layer" and tensor.size > 1 else Pending(d)
            for d, share in zip(dlearned, shared_by, strict=False)
        ]
        dpre_rows = dpre.reshape(len(dy_rows), -1)  # (N, F) or (N, 2F)
        # The input's gradient first: its reduction overlaps the products of the weights' gradients.
        flat = up.flatten(0, -2)  # (F, D) or (2F, D)
        dx = reduce_partial(products.input_gradient(dpre_rows, flat).view(dy.shape), tensor) if need_x else None
        if need_down and ddown is None:
            ddown = down_gradient(h)
        if need_up:
            x_rows = gathered.wait().reshape(len(dy_rows), -1)  # (N, D)
            dup = products.weight_gradient(dpre_rows, x_rows).view(up.shape)  # (F, D) or (2, F, D)
        return (
            None,
            None if dx is None else dx.wait(),
            dup,
            ddown,
            *(d.wait().to(parameter.dtype) for d, parameter in zip(summed, learned, strict=False)),
            *[None] * (len(learned) - len(summed)),  # of scheduled parameters
        )


def _ranks(tensor: Axis) -> WidthRanks:
    """Return the tensor ranks as the activation's reductions over d_ff see them."""

    def gather(partial: Tensor) -> Callable[[], Tensor]:
        pending = all_gather(partial, tensor)  # (T N, k)
        return lambda: pending.wait().view(tensor.size, *partial.shape)

    return WidthRanks(tensor.rank, tensor.size, gather)


def _project(products: Products, x: Tensor, up: Tensor) -> Tensor:
    """Compute pre-activations: x (..., D) -> (..., F), or (..., 2, F) if gated."""
    pre = products.forward(x, up.flatten(0, -2))
    return pre.unflatten(-1, (2, -1)) if up.ndim == 3 else pre
