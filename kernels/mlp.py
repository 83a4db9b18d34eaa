"""A feed-forward layer of plain `nn.Linear` modules whose activation is a formula, with a backward that keeps little.

    mlp = FormulaMLP(1024, 2816, "silu(gate) * up")
    y = mlp(x)

Autograd keeps what every operation reads: of a gated layer in plain PyTorch, four tensors of tokens x d_ff. Here one autograd
function spans the layer. Between forward and backward it keeps its input and the pre-activations (two tensors, one if ungated),
and backward recomputes h from them, in the pass that computes their gradient.

This module holds the layer and the function that runs it. The activation lives in `activations/`; `huggingface/` puts this
function into the layers of Transformers' models.

Shapes: N tokens (all leading dimensions of x together), D d_model, F d_ff.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activation
from .activations.activation import Activation
from .autograd import FirstOrder, Link, link_to
from .tensors import is_plain

_FIRST_ORDER = FirstOrder("a fused feed-forward layer", "take plain modules, or unpatch the model")


class FormulaMLP(nn.Module):
    """Apply a feed-forward layer whose activation is a formula: x (..., d_model) -> (..., d_model).

    A gated formula makes `down_proj(f(gate_proj(x), up_proj(x)))`, a formula of `x` makes `down_proj(f(up_proj(x)))`. The
    projections are `nn.Linear` modules with these names, so the state dict of a Llama layer loads. If something is attached to
    one of them (a hook, an adapter, a parametrization), forward calls the modules and fuses the activation only.

    Args:
        d_model: width of the input and of the output.
        d_ff: width of the hidden layer.
        formula: of `gate` and `up` (gated), or of `x`, and of `parameters` by name.
        parameters: a number for each fixed one, {init: ..., share: layer | channel | group} for each learned one. Learned
            ones are `nn.Parameter`s of shape (1,), (d_ff,) or (groups,) in `learned`. {schedule: linear, from: 0, to: 1} is a
            scheduled one: it starts at `from`, and `set_step` moves it.
        bias: whether the projections have biases.
        backend: "auto", "reference", "c" or "triton"; see `activation`.
        device, dtype: of the parameters.

    Raises:
        FormulaError: the formula is refused; the message points at the place.
        ValueError: an unknown backend, or groups that do not divide d_ff.

    Example:
        >>> import torch
        >>> from formula_ffn import FormulaMLP
        >>> mlp = FormulaMLP(64, 172, "silu(gate) * up")
        >>> y = mlp(torch.randn(2, 10, 64))
        >>> y.sum().backward()
        >>> y.shape, mlp.gate_proj.weight.grad.shape
        (torch.Size([2, 10, 64]), torch.Size([172, 64]))
        >>> list(FormulaMLP(64, 256, "x * sigmoid(b * x)", {"b": {"init": 1.0, "share": "channel"}}).state_dict())
        ['up_proj.weight', 'down_proj.weight', 'learned.b']
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        formula: str,
        parameters: Mapping[str, Any] | None = None,
        bias: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation(formula, parameters, backend)
        self.gate_proj = nn.Linear(d_model, d_ff, bias, device, dtype) if self.activation.formula.gated else None
        self.up_proj = nn.Linear(d_model, d_ff, bias, device, dtype)
        self.down_proj = nn.Linear(d_ff, d_model, bias, device, dtype)
        self.learned = new_learned(self.activation, d_ff, device, dtype)
        self._scheduled = {name: p.init for name, p in self.activation.formula.scheduled.items()}
        for name, value in self._scheduled.items():  # in no state dict: they follow from the step
            self.register_buffer(
                f"scheduled_{name}", torch.full((1,), value, dtype=torch.float32, device=device), persistent=False
            )

    def forward(self, x: Tensor) -> Tensor:
        tensors = [*self.learned.values(), *(self.get_buffer(f"scheduled_{name}") for name in self._scheduled)]
        return run_mlp(self.activation, x, self.gate_proj, self.up_proj, self.down_proj, tensors)

    def set_step(self, step: int, of: int) -> None:
        """Give the scheduled parameters their values after `step` steps of a training of `of` steps."""
        for name, parameter in self.activation.formula.scheduled.items():
            self._scheduled[name] = parameter.value(step, of)
            self.get_buffer(f"scheduled_{name}").fill_(self._scheduled[name])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FormulaMLP:
        super()._apply(fn, recurse)
        for name, value in self._scheduled.items():  # they stay in fp32 where the weights become bf16
            buffer = self.get_buffer(f"scheduled_{name}")
            setattr(self, f"scheduled_{name}", torch.full((1,), value, dtype=torch.float32, device=buffer.device))
        return self

    def reset_parameters(self) -> None:
        """Initialize all parameters again, for example after `to_empty`."""
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            if linear is not None:
                linear.reset_parameters()
        for name, parameter in self.activation.formula.learned.items():
            nn.init.constant_(self.learned[name], parameter.init)

    def extra_repr(self) -> str:
        return repr(self.activation.formula.text)


def new_learned(
    function: Activation, d_ff: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.ParameterDict:
    """Return the learned parameters of a formula at their initial values, in the formula's order.

    Raises:
        ValueError: the groups of one do not divide d_ff.
    """
    for name, p in function.formula.learned.items():
        if p.share == "group" and d_ff % p.groups:
            raise ValueError(f"the parameter {name!r} has {p.groups} groups, which do not divide d_ff={d_ff}")
    return nn.ParameterDict(
        {
            name: nn.Parameter(torch.full((p.size(d_ff),), p.init, device=device, dtype=dtype))
            for name, p in function.formula.learned.items()
        }
    )


def run_mlp(
    function: Activation,
    x: Tensor,
    gate: nn.Module | None,
    up: nn.Module,
    down: nn.Module,
    learned: Sequence[Tensor] = (),
) -> Tensor:
    """Run a feed-forward layer that is made of these modules.

    Args:
        function: the activation.
        x: (..., D).
        gate: D -> F, for a gated formula; None if ungated, or if `up` computes both.
        up: D -> F, or D -> 2F for both pre-activations, gate first.
        down: F -> D.
        learned: the formula's learned parameters in its order, then the scheduled ones.

    Returns:
        (..., D), of the dtype that `down` returns.
    """
    direct = _direct_weights(gate, up, down)
    if direct is not None:
        return fused_mlp(function, x, *direct, learned)
    pre = up(x) if gate is None else torch.stack((gate(x), up(x)), -2)
    if gate is None and function.formula.gated:
        pre = pre.unflatten(-1, (2, -1))
    return down(function(pre, **dict(zip(function.formula.tensors, learned, strict=True))))


def is_direct(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is `F.linear` of a plain weight and nothing besides: no hook, adapter, quantization or sharding."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and type(module.weight) in (Tensor, nn.Parameter)
    )


class Weights(NamedTuple):
    """The weights of a layer's projections, or their biases."""

    gate: Tensor | None  # (F, D); None if ungated, or packed with up
    up: Tensor | None  # (F, D), or (2F, D) packed
    down: Tensor | None  # (D, F)


def _direct_weights(*modules: nn.Module | None) -> tuple[Weights, Weights] | None:
    """Return weights and biases of the projections; None if one of them is more than a product."""
    weights, biases = [], []
    for module in modules:
        if module is not None and not is_direct(module):
            return None
        weights.append(None if module is None else module.weight)
        biases.append(None if module is None else module.bias)
    return Weights(*weights), Weights(*biases)


def fused_mlp(
    function: Activation, x: Tensor, weights: Weights, biases: Weights, learned: Sequence[Tensor] = ()
) -> Tensor:
    """Compute a feed-forward layer in one autograd function; differentiable once.

    Under autocast the products take autocast's dtype, as those of `F.linear` do, and the weights' gradients have the dtype of
    the weights.

    Raises:
        ValueError: x, weights and formula do not fit together.
    """
    gate, up, down = weights
    assert up is not None
    assert down is not None
    gated = function.formula.gated
    d_ff = up.shape[0] // 2 if gated and gate is None else up.shape[0]
    fits = (
        x.shape[-1:] == up.shape[1:] and down.shape[1] == d_ff and (gate is None or (gated and gate.shape == up.shape))
    )
    if not fits:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, *weights) if tensor is not None)
        raise ValueError(f"x and the weights of a layer with {function.formula.text!r} do not fit together: {shapes}")
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
    tensors: tuple[Any, ...] = (x, *weights, *biases, *learned)
    _FIRST_ORDER.check(*tensors)
    needs = tuple(tensor is not None and tensor.requires_grad for tensor in tensors)
    plan = _Plan(function, dtype, needs)
    if torch.is_grad_enabled() and any(needs):
        # Where x and all weights are trained, and no bias, all that is trained is saved.
        saved = all(need or tensor is None for tensor, need in zip(tensors[:4], needs, strict=False))
        link = None if saved and not any(needs[4:7]) else link_to(*tensors)
        return _FusedMLP.apply(plan, link, *tensors)[0]
    return _forward(plan, *tensors)[0]


class _Plan(NamedTuple):
    """What the function needs beside its tensors."""

    activation: Activation
    dtype: torch.dtype  # of the products
    needs: tuple[bool, ...]  # which of the tensors need a gradient: x, weights, biases, learned


def _forward(
    plan: _Plan, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor,
    gate_bias: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None, *learned: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the result (..., D), and the pre-activations (N, F), or (N, 2, F) if gated."""
    with _without_autocast(x):
        rows = x.reshape(-1, x.shape[-1])  # (N, D)
        if gate is None:
            pre = _product(rows, up, up_bias, plan.dtype)
            pre = pre.unflatten(-1, (2, -1)) if plan.activation.formula.gated else pre
        elif is_plain(x):
            # Each product writes its half of the packed rows, so nothing is copied.
            pre = rows.new_empty((rows.shape[0], 2, up.shape[0]))
            _product(rows, gate, gate_bias, plan.dtype, pre[:, 0])
            _product(rows, up, up_bias, plan.dtype, pre[:, 1])
        else:
            halves = _product(rows, gate, gate_bias, plan.dtype), _product(rows, up, up_bias, plan.dtype)
            pre = torch.stack(halves, 1)
        h, shape = plan.activation.forward(pre, learned), (*x.shape[:-1], down.shape[0])
        if not is_plain(x):
            return _product(h, down, down_bias, plan.dtype).view(shape), pre
        y = h.new_empty(shape)  # no view: a result that is one cannot be changed in place under FSDP
        _product(h, down, down_bias, plan.dtype, y.view(-1, down.shape[0]))
        return y, pre


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(plan: _Plan, _: Link | None, *tensors: Any) -> tuple[Tensor, Tensor]:
        return _forward(plan, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        plan, ctx.link, x, gate, up, down, gate_bias, up_bias, down_bias, *learned = inputs
        _, pre = output
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        parameters = (gate, up, down, gate_bias, up_bias, down_bias)
        ctx.plan = plan
        ctx.like = _Like(x.shape, gate is None, *((x if tensor is None else tensor).dtype for tensor in parameters))
        need = _Needs.of(plan)
        ctx.save_for_backward(
            x if need.gate or need.up else None,
            gate if need.x else None,
            up if need.x else None,
            down if need.pre else None,
            pre if need.pre or need.down else None,
            *learned,
        )

    @staticmethod
    @_FIRST_ORDER.once
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        dy, _ = gradients
        if dy is None:
            return (None,) * (2 + len(ctx.plan.needs))
        return None, None, *_backward(ctx.plan, ctx.like, dy, *ctx.saved_tensors)


class _Like(NamedTuple):
    """What the gradients are like: the shape of x, and the dtypes of weights and biases (any, where there is none)."""

    x: torch.Size
    one_input_projection: bool  # ungated, or packed
    gate: torch.dtype
    up: torch.dtype
    down: torch.dtype
    gate_bias: torch.dtype
    up_bias: torch.dtype
    down_bias: torch.dtype


def _backward(
    plan: _Plan, like: _Like, dy: Tensor, x: Tensor | None, gate: Tensor | None, up: Tensor | None,
    down: Tensor | None, pre: Tensor | None, *learned: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of x, the weights, the biases and the learned parameters; None for those that nobody needs.

    The tensors are those that `setup_context` saved: `down` if the gradient of the pre-activations is needed, `up` and `gate`
    if that of x is, and x if that of `up` or `gate` is.
    """
    function, need = plan.activation, _Needs.of(plan)
    rows = dy.reshape(-1, dy.shape[-1])  # (N, D)
    d_x, d_gate, d_up, d_gate_bias, d_up_bias, d_down = (None,) * 6
    d_learned: list[Tensor | None] = [None] * len(learned)
    with _without_autocast(dy):
        if pre is not None and down is None:
            d_down = _weight_gradient(rows, function.forward(pre, learned), like.down)
        elif pre is not None and down is not None:
            dh = _product(rows, down.t(), None, plan.dtype)
            dpre, h, sums = function.backward(pre, dh, learned, need.down)
            d_down = None if h is None else _weight_gradient(rows, h, like.down)
            del dh, h
            d_learned[: len(sums)] = [d.to(tensor.dtype) for d, tensor in zip(sums, learned, strict=False)]
            # What each projection wrote: (N, F), or (N, 2F) if one wrote both.
            dgate, dup = (dpre.flatten(1),) * 2 if like.one_input_projection else dpre.unbind(1)
            if x is not None:
                inputs = x.reshape(-1, x.shape[-1])  # (N, D)
                d_gate = _weight_gradient(dgate, inputs, like.gate) if need.gate else None
                d_up = _weight_gradient(dup, inputs, like.up) if need.up else None
            d_gate_bias = dgate.sum(0).to(like.gate_bias) if need.gate_bias else None
            d_up_bias = dup.sum(0).to(like.up_bias) if need.up_bias else None
            if up is not None:
                d_x = _product(dup, up.t(), None, plan.dtype)
                d_x = (d_x if gate is None else d_x.add_(_product(dgate, gate.t(), None, plan.dtype))).view(like.x)
        d_down_bias = rows.sum(0).to(like.down_bias) if need.down_bias else None
    gradients = (d_x, d_gate, d_up, d_down, d_gate_bias, d_up_bias, d_down_bias, *d_learned)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, plan.needs, strict=True))


class _Needs(NamedTuple):
    """Which gradients are needed; `pre` is that of the pre-activations."""

    x: bool
    gate: bool
    up: bool
    down: bool
    gate_bias: bool
    up_bias: bool
    down_bias: bool
    pre: bool

    @staticmethod
    def of(plan: _Plan) -> _Needs:
        x, gate, up, down, gate_bias, up_bias, down_bias, *learned = plan.needs
        pre = any((x, gate, up, gate_bias, up_bias, *learned))
        return _Needs(x, gate, up, down, gate_bias, up_bias, down_bias, pre)


# ----------------------------------------------------------------------------------------------------------- matrix products

# A CPU without bf16 matrix instructions computes bf16 products element by element, up to a hundred times as slowly as fp32
# ones. There they are computed in fp32, rounded once at the end, unless there are so few rows that reading the weights is all.
BF16_ON_CPU = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
_FEWEST_ROWS = 32


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return x (N, A) @ weight.T (A, B) + bias, in `dtype`; `out` (N, B) may have gaps between its rows."""
    wide = _wide(x, dtype) and (x.shape[0] >= _FEWEST_ROWS or not weight.is_contiguous())
    work = torch.float32 if wide else dtype
    x, weight = x.to(work), weight.to(work)
    if out is None or wide:
        y = F.linear(x, weight, None if bias is None else bias.to(work))
        return y.to(dtype) if out is None else out.copy_(y)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias.to(work), x, weight.t(), out=out)


def _weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dy.T (B, N) @ x (N, A), in the dtype of a weight."""
    if _wide(x, x.dtype):
        return torch.mm(dy.float().t(), x.float()).to(x.dtype).to(dtype)
    return torch.mm(dy.t(), x).to(dtype)


def _wide(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product of this dtype is computed in fp32."""
    return dtype == torch.bfloat16 and x.device.type == "cpu" and not BF16_ON_CPU


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Enter it where the dtypes are chosen by hand."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
