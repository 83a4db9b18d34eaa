"""The fused feed-forward layer: error beside plain PyTorch, what it keeps, and how it composes with the rest of PyTorch."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import FormulaError, mlp
from kernels.activations.eager import plain
from kernels.mlp import FormulaMLP

# Both round each product and each elementwise result, the plain layer more often; so the fused error is drawn from the same
# distribution, or a narrower one. Of some thousand elements the ratio of two norms is 1 to within a few percent.
RATIO = 1.1
GATED = "silu(gate) * up"
CHANNEL = "x * sigmoid(b * x)"
FORMULAS = {
    "swiglu": (GATED, {}),
    "geglu": ("gelu(gate) * up", {}),
    "relu2": ("relu(x)**2", {}),
    "learned by channel": (CHANNEL, {"b": {"init": 0.7, "share": "channel"}}),
    "learned by layer": ("gate * sigmoid(b * gate) * (up + c)", {"b": {"init": 0.7}, "c": {"init": 0.1}}),
}
D, F, N = 64, 160, 96


def layer(name: str = "swiglu", bias: bool = False, dtype: torch.dtype | None = None) -> FormulaMLP:
    torch.manual_seed(0)
    formula, parameters = FORMULAS[name]
    module = FormulaMLP(D, F, formula, parameters, bias)
    for parameter in module.learned.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.to(dtype)


def by_hand(module: FormulaMLP, x: Tensor) -> Tensor:
    """The layer in PyTorch's own operations."""
    up = module.up_proj(x)
    pre = up if module.gate_proj is None else torch.stack((module.gate_proj(x), up), -2)
    return module.down_proj(plain(module.activation.formula)(pre, **module.learned))


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def everything(run: Any, module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return y and all gradients, in float64."""
    leaf = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = run(leaf)
    y.backward(dy.to(y.dtype))
    assert leaf.grad is not None
    results = {"y": y.detach(), "x": leaf.grad}
    results |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: value.double() for name, value in results.items()}


def errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    assert results.keys() == exact.keys()
    return {name: float((results[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


def assert_errs_as_plain(
    fused: dict[str, Tensor], written: dict[str, Tensor], module: FormulaMLP, x: Tensor, dy: Tensor, dtype: torch.dtype
) -> None:
    """Judge both by the same layer in float64; `dtype` is that of the products."""
    double = copy.deepcopy(module).double()
    exact = everything(lambda x: by_hand(double, x), double, x.double(), dy.double())
    own, plain_errors = errors(fused, exact), errors(written, exact)
    for name, value in exact.items():
        if value.numel() > 1:
            assert own[name] <= RATIO * plain_errors[name], name
        else:  # one draw: each of the terms that it adds up has some roundings of its own
            terms = terms_of(double, name.removeprefix("learned."), x.double(), dy.double())
            bound = 8 * torch.finfo(dtype).eps * float(terms.norm() / value.abs())
            assert own[name] <= bound, name


def terms_of(module: FormulaMLP, name: str, x: Tensor, dy: Tensor) -> Tensor:
    """Return the terms of the gradient of a parameter per layer, one for each element of h."""
    with torch.no_grad():
        up = module.up_proj(x)
        pre = up if module.gate_proj is None else torch.stack((module.gate_proj(x), up), -2)
    learned = {key: value.detach() for key, value in module.learned.items()}
    learned[name] = learned[name].expand(*x.shape[:-1], F).clone().requires_grad_()
    module.down_proj(plain(module.activation.formula)(pre, **learned)).backward(dy)
    assert learned[name].grad is not None
    return learned[name].grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMULAS)
def test_it_errs_as_plain_pytorch_does(name, dtype, bias):
    module, x, dy = layer(name, bias, dtype), draw(N, D, dtype=dtype), draw(N, D, seed=2, dtype=dtype)
    fused = everything(module, module, x, dy)
    assert isinstance(module(x.requires_grad_()).grad_fn, torch.autograd.function.BackwardCFunction)
    written = everything(lambda x: by_hand(module, x), module, x, dy)
    assert_errs_as_plain(fused, written, module, x, dy, dtype)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_those_of_finite_differences(name):
    module = layer(name, bias=True, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    inputs = (draw(3, D, dtype=torch.float64).requires_grad_(), *parameters.values())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize(("name", "units"), [("swiglu", 2), ("learned by layer", 2), ("relu2", 1)])
def test_it_keeps_its_input_and_the_pre_activations(name, units):
    module, x = layer(name, dtype=torch.bfloat16), draw(N, D, dtype=torch.bfloat16).requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    assert kept.pop(x.untyped_storage().data_ptr()) == 2 * N * D
    assert list(kept.values()) == [2 * units * N * F]


TRAINED = [
    ["x"],
    ["up_proj.weight"],
    ["down_proj.weight"],
    ["gate_proj.weight", "x"],
    ["gate_proj.bias"],
    ["up_proj.bias", "down_proj.bias"],
    ["down_proj.bias"],
    ["learned.b"],
    ["learned.c", "down_proj.weight"],
]


@pytest.mark.parametrize("trained", TRAINED, ids=" ".join)
def test_any_parameters_may_be_frozen(trained):
    module, x, dy = layer("learned by layer", bias=True), draw(N, D), draw(N, D, seed=2)
    whole = everything(module, module, x, dy)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    module.zero_grad()
    x.requires_grad_("x" in trained)
    module(x).backward(dy)
    gradients = {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    assert sorted(trained) == sorted(name for name, gradient in gradients.items() if gradient is not None)
    # With the down projection alone h is computed as in forward, not in the pass of the gradients.
    results = {name: gradient.double() for name, gradient in gradients.items() if gradient is not None}
    assert_equal(results, {name: whole[name] for name in trained})


def test_a_frozen_layer_keeps_no_input():
    module, x = layer(), draw(N, D).requires_grad_()
    module.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        module(x)
    assert kept
    assert x.data_ptr() not in kept


@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 0, D), (2, 3, D), (2, 3, 4, D)], ids=str)
def test_leading_dimensions_are_any(shape):
    module, x = layer(bias=True), draw(*shape).requires_grad_()
    y = module(x)
    torch.testing.assert_close(y, by_hand(module, x))
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_an_input_with_gaps():
    module, x = layer(), draw(D, 2 * N).t()[::2]
    assert not x.is_contiguous()
    dy = draw(N, 2 * D, seed=2)[:, ::2]
    assert_equal(everything(module, module, x, dy), everything(module, module, x.contiguous(), dy.contiguous()))


def assert_equal(results: dict[str, Tensor], expected: dict[str, Tensor], ulp: float = 4.0) -> None:
    """The same products, perhaps in blocks of another size: some roundings of fp32 at the size of the largest element."""
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        bound = ulp * torch.finfo(torch.float32).eps * float(value.abs().max())
        torch.testing.assert_close(results[name], value, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    module, x = layer(), draw(N, D)
    with mode():
        y = module(x)
    assert y.grad_fn is None
    torch.testing.assert_close(y.clone(), by_hand(module, x))


def test_it_is_not_differentiated_twice():
    module, x = layer(), draw(N, D).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: module(x).square().sum())(x).square().sum())(x)


def test_functional_call_and_func_grad():
    module, x = layer("learned by layer", bias=True), draw(N, D)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["swiglu", "learned by channel"])
def test_copies_and_state_dicts(name):
    module, x = layer(name, bias=True), draw(N, D)
    y = module(x)
    other = FormulaMLP(D, F, *FORMULAS[name], bias=True)
    assert not torch.equal(other(x), y)
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(twin(x), y)
        twin(x).sum().backward()
    empty = FormulaMLP(D, F, *FORMULAS[name], bias=True, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert empty(x).isfinite().all()
    for parameter, learned in zip(empty.learned.values(), empty.activation.formula.learned.values(), strict=True):
        assert (parameter == learned.init).all()


def test_names_are_those_of_a_llama_layer():
    assert list(layer().state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    assert list(layer("relu2").state_dict()) == ["up_proj.weight", "down_proj.weight"]


@pytest.mark.parametrize("name", ["swiglu", "learned by channel"])
def test_torch_compile_takes_all_of_it(name):
    module, x, dy = layer(name, bias=True), draw(N, D), draw(N, D, seed=2)
    eager = everything(module, module, x, dy)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_equal(everything(compiled, module, x, dy), eager)
    compiled(draw(2, 5, D)).sum().backward()


@pytest.mark.parametrize("name", FORMULAS)
def test_autocast_computes_in_bf16_and_returns_fp32_gradients(name):
    module, x, dy = layer(name, bias=True), draw(N, D), draw(N, D, seed=2)

    def cast(run: Any) -> Any:
        def inside(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = run(x)
            assert y.dtype == torch.bfloat16
            return y

        return inside

    dy = dy.bfloat16()
    fused = everything(cast(module), module, x, dy)
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    written = everything(cast(lambda x: by_hand(module, x)), module, x, dy)
    assert_errs_as_plain(fused, written, module, x, dy, torch.bfloat16)


def test_backward_inside_autocast():
    module, x = layer(), draw(N, D)
    gradients = []
    for inside in (True, False):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
            if inside:
                y.backward(torch.ones_like(y))
        if not inside:
            y.backward(torch.ones_like(y))
        gradients.append(module.up_proj.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    module, x, dy = layer("learned by layer", bias=True), draw(N, D), draw(N, D, seed=2)
    eager = everything(module, module, x, dy)
    again = everything(lambda x: checkpoint(module, x, use_reentrant=reentrant), module, x, dy)
    assert_equal(again, eager, ulp=0)


def test_gradients_accumulate():
    module, x, dy = layer(), draw(N, D), draw(N, D, seed=2)
    whole = everything(module, module, x, dy)
    module.zero_grad()
    for half in (slice(0, N // 2), slice(N // 2, N)):
        module(x[half]).backward(dy[half])
    # Two sums of half as many products, in another order.
    assert_equal({name: p.grad.double() for name, p in module.named_parameters()}, {
        name: whole[name] for name, _ in module.named_parameters()
    }, ulp=16.0)  # fmt: skip


def test_threads_may_share_a_layer():
    module, x, dy = layer(), draw(N, D), draw(N, D, seed=2)
    expected = torch.autograd.grad(module(x.requires_grad_()), x, dy)[0]
    results: list[Tensor] = []

    def run() -> None:
        leaf = x.detach().clone().requires_grad_()
        results.append(torch.autograd.grad(module(leaf), leaf, dy)[0])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)
    assert len(results) == 4


# ------------------------------------------------------------------------------------------------- modules with something on


def hooked(module: FormulaMLP, calls: list[str]) -> Iterator[Any]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        child = getattr(module, name)
        yield child.register_forward_hook(lambda *_, name=name: calls.append(name))


def test_hooks_on_the_projections_fire():
    module, x, dy = layer(bias=True), draw(N, D), draw(N, D, seed=2)
    fused = everything(module, module, x, dy)
    calls: list[str] = []
    handles = list(hooked(module, calls))
    assert_equal(everything(module, module, x, dy), fused)
    assert sorted(calls) == ["down_proj", "gate_proj", "up_proj"]
    for handle in handles:
        handle.remove()
    assert_equal(everything(module, module, x, dy), fused, ulp=0)
    assert len(calls) == 3


class Adapter(nn.Module):
    """A low-rank addition to a frozen linear module."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(0.1 * draw(4, base.in_features))
        self.b = nn.Parameter(0.1 * draw(base.out_features, 4, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


def test_an_adapter_on_a_projection_is_used():
    module, x, dy = layer(), draw(N, D), draw(N, D, seed=2)
    module.up_proj = Adapter(module.up_proj)
    assert_equal(everything(module, module, x, dy), everything(lambda x: by_hand(module, x), module, x, dy), ulp=32.0)
    assert module.up_proj.a.grad.abs().max() > 0


@pytest.mark.parametrize("change", ["parametrization", "subclass", "instance"])
def test_other_projections_are_called(change):
    module, x = layer(), draw(N, D)
    if change == "parametrization":
        nn.utils.parametrizations.weight_norm(module.up_proj)
        module.up_proj.parametrizations.weight.original0.data *= 2
    elif change == "subclass":
        module.up_proj = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})(
            D, F
        )
    else:
        module.up_proj.forward = lambda x: 2 * nn.Linear.forward(module.up_proj, x)
    torch.testing.assert_close(module(x), by_hand(module, x))


def test_refusals():
    with pytest.raises(FormulaError):
        FormulaMLP(D, F, "1 / x")
    with pytest.raises(ValueError, match="backend"):
        FormulaMLP(D, F, GATED, backend="fortran")
    with pytest.raises(ValueError, match="do not fit together"):
        layer()(draw(N, D + 1))
    with pytest.raises(ValueError, match="do not fit together"):
        layer()(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(layer())(draw(2, 3, D))


def test_wide_products_round_once(monkeypatch):
    """Where a CPU computes bf16 products in fp32, forward and backward do, and err no more than element by element."""
    module, x, dy = layer(dtype=torch.bfloat16), draw(N, D, dtype=torch.bfloat16), draw(N, D, seed=2)
    for supported in (True, False):
        monkeypatch.setattr(mlp, "BF16_ON_CPU", supported)
        written = everything(lambda x: by_hand(module, x), module, x, dy)
        assert_errs_as_plain(everything(module, module, x, dy), written, module, x, dy, torch.bfloat16)
