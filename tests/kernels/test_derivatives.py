"""Which derivatives the fused functions have: first ones in reverse mode. The others are refused, and are never zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from kernels import FormulaMLP, activation, linear_cross_entropy, rms_norm, rotate

D = 8
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT, TARGETS = torch.randn(11, D, generator=GENERATOR), torch.tensor([3, 10, 0])
COS, SIN = torch.rand(3, D // 2, generator=GENERATOR), torch.rand(3, D // 2, generator=GENERATOR)
X = torch.randn(3, D, generator=GENERATOR)
LAYER = FormulaMLP(D, 16, "silu(gate) * up").requires_grad_(False)


def of_rows(x: Tensor) -> Tensor:
    """RMSNorm of rows that lie in memory as columns, so that a kernel reads a copy of them."""
    return rms_norm(x.t().contiguous().t(), WEIGHT[0], 1e-5)[0]


def rotated(x: Tensor, tables: tuple[Tensor, Tensor] = (COS, SIN)) -> Tensor:
    q, k = rotate(x.view(1, 3, 1, D), 2 * x.view(1, 3, 1, D), *tables)
    return q + k


def by_hand(x: Tensor) -> Tensor:
    a, b = 3 * x[:, : D // 2], 3 * x[:, D // 2 :]
    return torch.cat((a * COS - b * SIN, b * COS + a * SIN), -1).view(1, 3, 1, D)


ONCE: dict[str, Callable[[Tensor], Tensor]] = {
    "ungated": activation("gelu(x)"),
    "gated": lambda x: activation("silu(gate) * up")(x.view(3, 2, D // 2)),
    "reference": activation("x * sigmoid(x)", backend="reference"),
    "norm": lambda x: rms_norm(x, WEIGHT[0], 1e-5)[0],
    "norm of a copy": of_rows,
    "norm of a sum": lambda x: rms_norm(x, WEIGHT[0], 1e-5, 2 * x)[0],
    "loss": lambda x: linear_cross_entropy(x, WEIGHT, TARGETS),
    "layer": LAYER,
}
TRANSFORMED = {name: ONCE[name] for name in ("ungated", "gated", "reference", "loss", "layer")}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", ONCE)
def test_a_second_derivative_is_refused(name, power):
    """Whether it arrives by the incoming gradient (power 2), or by the input alone (power 1: that gradient is a constant)."""
    x = X.clone().requires_grad_()
    y = ONCE[name](x)
    total = y.sum() if power == 1 else y.square().sum()
    (expected,) = torch.autograd.grad(total, x, retain_graph=True)
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(
        RuntimeError, match=r"^(a fused|linear_cross).* can be differentiated once: .* for second derivatives$"
    ):
        torch.autograd.grad(gradient.sum(), x, allow_unused=True)


@pytest.mark.parametrize("name", ONCE)
def test_a_hessian_is_refused(name):
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.functional.hessian(lambda x: ONCE[name](x).sum(), X)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", ["gate_proj.weight", "up_proj.weight", "up_proj.bias", "down_proj.weight"])
def test_a_second_derivative_in_a_parameter_of_a_layer_is_refused(name, alone):
    """Where it alone is trained, neither it nor what depends on it is saved."""
    module = FormulaMLP(D, 16, "silu(gate) * up", bias="bias" in name).requires_grad_(not alone)
    parameter = module.get_parameter(name).requires_grad_()
    x = X.clone().requires_grad_(not alone)
    (gradient,) = torch.autograd.grad(module(x).sum(), parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="a fused feed-forward layer can be differentiated once"):
        torch.autograd.grad(gradient.sum(), parameter)


def test_a_second_derivative_in_the_weight_of_a_loss_is_refused():
    weight = WEIGHT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(X, weight, TARGETS), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy can be differentiated once"):
        gradient.sum().backward()


def test_a_second_derivative_through_the_operator_is_refused():
    x, dh = X.clone().requires_grad_(), torch.ones_like(X)
    gradient, *_ = torch.ops.kernels.backward(x, dh, [], activation("gelu(x)").key, False)
    with pytest.raises(RuntimeError, match="a fused activation can be differentiated once"):
        gradient.sum().backward()


def test_the_inputs_of_a_loss_are_not_kept():
    """What refuses a second derivative holds no memory of theirs."""
    hidden, sizes = X.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        linear_cross_entropy(hidden, WEIGHT, TARGETS)
    assert sum(sizes) == X.untyped_storage().nbytes()  # the gradient of `hidden`


def test_a_rotation_is_differentiated_any_number_of_times():
    q = X.double().view(1, 3, 1, D).requires_grad_()
    tables = COS.double(), SIN.double()
    assert torch.autograd.gradcheck(lambda q: rotate(q, q, *tables), q)
    assert torch.autograd.gradgradcheck(lambda q: rotate(q.square(), q, *tables), q)
    actual = torch.autograd.functional.hessian(lambda x: rotated(x).pow(3).sum(), X)
    torch.testing.assert_close(actual, torch.autograd.functional.hessian(lambda x: by_hand(x).pow(3).sum(), X))


# ---------------------------------------------------------------------------------------------------------- forward mode, vmap


def by_dual(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


FORWARD = {
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "dual": by_dual,
}
BATCHED = {
    "vmap": lambda function, x: torch.func.vmap(function)(x[None]),
    "vmap of grad": lambda function, x: torch.func.vmap(torch.func.grad(lambda x: function(x).sum()))(x[None]),
}


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_forward_mode_is_refused(name, way):
    match = r"^(a fused|linear_cross).* has no forward-mode derivatives \(jvp, jacfwd\): .* for these$"
    with pytest.raises(NotImplementedError, match=match):
        FORWARD[way](TRANSFORMED[name], X)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=match):
        FORWARD[way](TRANSFORMED[name], X)


@pytest.mark.parametrize("name", ["ungated", "layer"])
def test_forward_mode_is_refused_while_it_is_compiled(name):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: FORWARD["jvp"](TRANSFORMED[name], x), backend="aot_eager")
    with pytest.raises(NotImplementedError, match="has no forward-mode derivatives"):
        compiled(X)
    torch._dynamo.reset()


@pytest.mark.parametrize("way", BATCHED)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_vmap_is_refused(name, way):
    with pytest.raises(
        NotImplementedError, match=r"^(a fused|linear_cross).* has no batching rule for vmap.* for these$"
    ):
        BATCHED[way](TRANSFORMED[name], X)


@pytest.mark.parametrize("name", ["ungated", "gated", "reference", "norm", "loss", "layer"])
def test_batched_gradients_are_refused(name):
    x = X.clone().requires_grad_()
    y = ONCE[name](x)
    with pytest.raises(NotImplementedError, match="has no batching rule for vmap"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True)


@pytest.mark.parametrize("name", ["ungated", "gated", "reference", "layer"])
def test_jacobians_by_vmap_are_refused(name):
    with pytest.raises(NotImplementedError, match="has no batching rule for vmap, nor for jacobians by it"):
        torch.func.jacrev(ONCE[name])(X)


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("name", ["norm", "norm of a sum", "rotation"])
def test_where_pytorch_computes_forward_mode_is_its_own(name, way):
    ours, plain = {
        "norm": (ONCE["norm"], lambda x: F.rms_norm(x, (D,), WEIGHT[0], 1e-5)),
        "norm of a sum": (ONCE["norm of a sum"], lambda x: F.rms_norm(3 * x, (D,), WEIGHT[0], 1e-5)),
        "rotation": (rotated, by_hand),
    }[name]
    torch.testing.assert_close(FORWARD[way](ours, X), FORWARD[way](plain, X))


def test_a_tangent_of_another_tensor_than_x_counts_too():
    def norm(weight: Tensor) -> Tensor:
        return rms_norm(X, weight, 1e-5, X)[0]

    torch.testing.assert_close(FORWARD["jvp"](norm, WEIGHT[0]), norm(torch.ones(D)))
    tangent = by_dual(lambda sin: rotated(X, (COS, sin)), SIN)
    assert tangent is not None
    assert tangent.abs().sum() > 0
    function = activation("x * sigmoid(b * x)", {"b": {"init": 1.0}})
    with pytest.raises(NotImplementedError, match="has no forward-mode derivatives"):
        by_dual(lambda b: function(X, b=b), torch.ones(1))


# ------------------------------------------------------------------------------------------------------------ torch.func.grad


@pytest.mark.parametrize("name", ["ungated", "gated", "reference", "norm", "layer"])
def test_func_grad_is_that_of_backward(name):
    x = X.clone().requires_grad_()
    ONCE[name](x).square().sum().backward()
    actual = torch.func.grad(lambda x: ONCE[name](x).square().sum())(X)
    torch.testing.assert_close(actual, x.grad)


def test_func_grad_in_the_parameters_alone():
    function, b = activation("x * sigmoid(b * x)", {"b": {"init": 1.0}}), torch.ones(1, requires_grad=True)
    function(X, b=b).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda b: function(X, b=b).sum())(b.detach()), b.grad)
    weight = torch.ones(D, requires_grad=True)
    rms_norm(X, weight, 1e-5)[0].sum().backward()
    actual = torch.func.grad(lambda weight: rms_norm(X, weight, 1e-5)[0].sum())(weight.detach())
    torch.testing.assert_close(actual, weight.grad)


def test_func_grad_of_the_loss_is_refused():
    with pytest.raises(NotImplementedError, match=r"is differentiated by backward\(\), not by torch\.func: take"):
        torch.func.grad(ONCE["loss"])(X)
