"""The feed-forward layer: what it computes, what it keeps for backward, and that its choices change no number."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.keys import FOLDER
from conf.schema import FFNConfig
from conf.shape import FFNShape
from conf.yaml_files import read_yaml
from kernels import activation, parse
from kernels.common.errors import UserError
from model.feed_forward import FeedForward, check_arms

D, WIDTH, TOKENS = 12, 40, 6
CPU = torch.device("cpu"), torch.float32


def layer(dtype: torch.dtype = torch.float64, d_model: int = D, d_ff: int = WIDTH, **arm) -> FeedForward:
    config = FFNConfig(**arm)
    formula = parse(config.formula, config.parameters, config.from_output)
    ffn = FeedForward(FFNShape(config, formula, d_ff), d_model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (ffn.up, ffn.down):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * d_model**-0.5)
        for name, learned in formula.learned.items():
            ffn.learned[name].fill_(learned.init)
    return ffn.to(dtype)


def written_out(ffn: FeedForward, x: Tensor) -> Tensor:
    """The layer in plain operations, with autograd's own backward of the projections: gate first, then up."""
    pre = torch.stack([F.linear(x, part) for part in ffn.up], -2) if ffn.gated else F.linear(x, ffn.up)
    return F.linear(ffn.activation(pre, **ffn.learned), ffn.down)


ARMS = {
    "swiglu": {"formula": "silu(gate) * up"},
    "relu2": {"formula": "relu(x)**2", "from_output": "2*sqrt(h)"},
    "prelu": {"formula": "where(x > 0, x, slope * x)", "parameters": {"slope": {"init": 0.25, "share": "channel"}}},
    "swish": {"formula": "x * sigmoid(beta * x)", "parameters": {"beta": {"init": 1.5}}},
}


@pytest.mark.parametrize(
    ("arm", "save"), [("relu2", "output"), *itertools.product(ARMS, ["packed", "everything", "input"])]
)
def test_the_gradients_are_those_of_the_layer_written_out(arm, save):
    ffn = layer(save=save, **ARMS[arm])
    x = torch.randn(2, TOKENS, D, dtype=torch.float64, requires_grad=True)
    wanted = [x, *ffn.parameters()]
    weight = torch.randn(2, TOKENS, D, dtype=torch.float64)
    expected = torch.autograd.grad(written_out(ffn, x), wanted, weight)
    actual = torch.autograd.grad(ffn(x), wanted, weight)
    torch.testing.assert_close(ffn(x), written_out(ffn, x), rtol=1e-12, atol=1e-13)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)  # sums of up to 80 terms in another order


@pytest.mark.parametrize("arm", ["swiglu", "swish"])
def test_the_gradients_pass_a_numerical_check(arm):
    ffn = layer(d_model=5, d_ff=7, **ARMS[arm])
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    parameters = dict(ffn.named_parameters())
    function = lambda x, *values: torch.func.functional_call(ffn, dict(zip(parameters, values, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, *parameters.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arm", ARMS)
def test_what_is_kept_changes_nothing_but_a_last_bit_of_h(arm, dtype):
    """h is computed again beside the derivatives, which share its parts: it may be rounded once more than in forward."""
    x = torch.randn(TOKENS, D, dtype=dtype, requires_grad=True)
    results = []
    for save in ("packed", "everything", "input"):
        ffn = layer(dtype, save=save, **ARMS[arm])
        y = ffn(x)
        names = [name for name, _ in ffn.named_parameters()]
        gradients = torch.autograd.grad(y.square().sum(), [x, *ffn.parameters()])
        results.append(dict(zip(["y", "x", *names], [y, *gradients], strict=True)))
    for other in results[1:]:
        for name, expected in results[0].items():
            if name == "down":
                atol = 2 * torch.finfo(dtype).eps * float(expected.abs().max())
                torch.testing.assert_close(other[name], expected, rtol=0, atol=atol)
            else:
                assert torch.equal(other[name], expected), name


def saved_bytes(function, x: Tensor, weights: list[Tensor]) -> int:
    """Return the bytes that autograd keeps beside the layer's input and weights, each storage once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *weights)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep_alive = function(x)
    del keep_alive
    return sum(kept.values())


@pytest.mark.parametrize(
    ("arm", "save", "units"),
    [
        ("swiglu", "packed", 2),
        ("swiglu", "everything", 3),
        ("swiglu", "input", 0),
        ("relu2", "packed", 1),
        ("relu2", "output", 1),
        ("relu2", "everything", 2),
        ("relu2", "input", 0),
    ],
)
def test_the_bytes_that_are_kept_for_backward(arm, save, units):
    ffn = layer(torch.bfloat16, save=save, **ARMS[arm])
    x = torch.randn(TOKENS, D, dtype=torch.bfloat16, requires_grad=True)
    unit = TOKENS * WIDTH * 2
    assert saved_bytes(ffn, x, list(ffn.parameters())) == units * unit


def test_eager_swiglu_keeps_twice_as_much():
    ffn = layer(torch.bfloat16)
    gate, up = (weight.detach().clone().requires_grad_() for weight in ffn.up)
    eager = lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), ffn.down)  # noqa: E731
    x = torch.randn(TOKENS, D, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(eager, x, [gate, up, ffn.down]) == 4 * TOKENS * WIDTH * 2


def test_it_works_under_activation_checkpointing():
    ffn = layer()
    x = torch.randn(TOKENS, D, dtype=torch.float64, requires_grad=True)
    wanted = [x, *ffn.parameters()]
    plain = torch.autograd.grad(ffn(x).square().sum(), wanted)
    again = torch.utils.checkpoint.checkpoint(ffn, x, use_reentrant=False)
    assert all(map(torch.equal, plain, torch.autograd.grad(again.square().sum(), wanted)))


def test_frozen_weights_cost_nothing_and_get_nothing():
    ffn = layer()
    ffn.up.requires_grad_(False)
    x = torch.randn(TOKENS, D, dtype=torch.float64)
    ffn(x).sum().backward()
    assert ffn.up.grad is None
    assert ffn.down.grad is not None


@pytest.mark.parametrize("match", ["std", "rms"])
def test_the_initial_output_is_that_of_swiglu_whatever_the_arm(match):
    """Unit-normal pre-activations through the formula, times the scale, times the root of the width, are as large."""
    torch.manual_seed(0)
    sizes = {}
    for name, arm in {**ARMS, "geglu": {"formula": "gelu(gate)*up"}, "sigmoid": {"formula": "sigmoid(x)"}}.items():
        ffn = layer(**arm, init_match=match)
        pre = torch.randn((400_000, 2, 1) if ffn.gated else (400_000, 1), dtype=torch.float64)
        learned = {key: value[:1].detach() for key, value in ffn.learned.items()}
        h = activation(arm["formula"], arm.get("parameters"))(pre, **learned)
        size = h.std() if match == "std" else h.square().mean().sqrt()
        sizes[name] = float(size) * ffn.down_scale * (3 / ffn.activation.formula.matrices) ** 0.5
    for name, size in sizes.items():
        assert size == pytest.approx(sizes["swiglu"], rel=0.02), name  # 400,000 samples of a fourth-power tail
    assert layer().down_scale == 1.0
    assert layer(init_scale=0.3).down_scale == 0.3


def test_the_plan_sensitivity_halves_and_doubles_the_scale_that_an_arm_has_by_itself():
    arms = read_yaml(FOLDER / "ablation" / "sensitivity.yaml")["arms"]
    for arm, formula in (("relu", "relu(x)"), ("swiglu", "silu(gate) * up")):
        own = layer(formula=formula).down_scale
        for recipe, factor in (("half", 0.5), ("twice", 2.0)):
            scale = float(arms[f"{arm}_{recipe}"].rpartition("=")[2])
            assert scale == pytest.approx(factor * own, rel=2e-3)  # three digits


def shape_of_arm(arm: FFNConfig) -> FFNShape:
    return FFNShape(arm, parse(arm.formula, arm.parameters), 8)


def test_an_arm_whose_gradient_is_zero_says_so():
    shape = shape_of_arm(FFNConfig(name="threshold", formula="where(x >= 0, 1, 0)"))
    assert check_arms((shape,), *CPU) == [
        "ffn=threshold: the gradient of where(x >= 0, 1, 0) is 0 everywhere, so ffn.up learns nothing"
    ]
    assert check_arms((shape_of_arm(FFNConfig()),), *CPU) == []


def test_a_formula_that_overflows_is_refused():
    shape = shape_of_arm(FFNConfig(name="custom", formula="exp(x) / (1 + exp(x))"))
    with pytest.raises(UserError, match=r"gives nan in 32-bit arithmetic at x = 100, where it is 1"):
        check_arms((shape,), *CPU)


def test_an_arm_that_gives_nothing_to_derive_its_scale_from_is_refused():
    never = FFNConfig(name="custom", formula="relu(x - 100)")
    with pytest.raises(UserError, match=r"the standard deviation of relu.x - 100. is 0, .* set ffn.init_scale"):
        check_arms((shape_of_arm(never),), *CPU)
    never.init_scale = 1.0
    assert check_arms((shape_of_arm(never),), *CPU) == []


def test_a_backend_that_cannot_serve_is_refused():
    shape = shape_of_arm(FFNConfig(backend="c"))
    with pytest.raises(
        UserError, match=r"ffn.backend=c: the C backend computes fp32 and bf16 on a CPU, not torch.float16"
    ):
        check_arms((shape,), torch.device("cpu"), torch.float16)
