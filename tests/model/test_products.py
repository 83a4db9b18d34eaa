"""The products of linear layers in low precision: against float64, on the code path of a GPU, and in a whole model."""

from __future__ import annotations

import pytest
import torch

from bench.launches import count_micro_batch
from conf.load import load
from conf.schema import PrecisionConfig
from conf.shape import shape_of
from conf.validate import validate
from kernels.common.errors import UserError
from kernels.rounding import E4M3, E5M2, Rounded, round_fp8, round_mxfp8, round_nvfp4
from launch.estimate.step_time import rounding_bytes
from model import products as module
from model.decoder import Decoder
from model.initialise import initialise
from model.products import PLAIN, LowPrecision, Products, products_of
from tests.model.conftest import config_of

CPU = torch.device("cpu")
FORMATS = {
    "fp8": lambda x, gradient: round_fp8(x, E5M2 if gradient else E4M3, rowwise=True),
    "mxfp8": lambda x, _: round_mxfp8(x),
    "nvfp4": lambda x, _: round_nvfp4(x),
}


def emulated(name: str, scaling: str = "rowwise") -> Products:
    return products_of(PrecisionConfig(emulate=name, scaling=scaling), CPU)[0]


def exact(rounded: Rounded) -> torch.Tensor:
    return rounded.values.double() * (1 if rounded.scale is None else rounded.scale.double())


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x (24, 80), weight (48, 80) and dy (24, 48), rows and columns of different sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((24, 80), (48, 80), (24, 48))
    return tuple(
        torch.randn(shape, generator=generator)
        * torch.logspace(-1, 1, shape[0])[:, None]
        * torch.logspace(0, 1, shape[1])
        for shape in shapes
    )  # type: ignore[return-value]


@pytest.mark.parametrize("name", list(FORMATS))
def test_each_product_is_that_of_its_rounded_operands(name):
    """Scales are shared along what a product sums over, so both operands of a gradient's product are rounded anew."""
    x, weight, dy = operands()
    rounded, products = FORMATS[name], emulated(name)
    pairs = {
        "forward": (products.forward(x, weight), rounded(x, False), rounded(weight, False)),
        "input_gradient": (products.input_gradient(dy, weight), rounded(dy, True), rounded(weight.T, False)),
        "weight_gradient": (products.weight_gradient(dy, x), rounded(dy.T, True), rounded(x.T, False)),
    }
    for product, (actual, a, b) in pairs.items():
        expected = exact(a) @ exact(b).T
        bound = (exact(a).abs() @ exact(b).abs().T) * (a.values.shape[1] + 2) * 2.0**-24
        assert ((actual.double() - expected).abs() <= bound).all(), product
        plain = getattr(PLAIN, product)(*{"forward": (x, weight), "input_gradient": (dy, weight)}.get(product, (dy, x)))
        error = (actual - plain).norm() / plain.norm()
        assert 1e-3 < error < (0.2 if name == "nvfp4" else 0.08)


def test_leading_dimensions_are_kept():
    x, weight, dy = operands()
    products = emulated("fp8")
    assert products.forward(x.view(2, 12, 80), weight).shape == (2, 12, 48)
    assert products.input_gradient(dy.view(2, 12, 48), weight).shape == (2, 12, 80)


@pytest.mark.parametrize("scaling", ["rowwise", "tensorwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_products_of_fp8_units_are_the_emulated_ones(scaling, dtype):
    """torch's `_scaled_mm`, which a GPU is given, runs on a CPU too; the order of its sums is its own."""
    x, weight, dy = (each.to(dtype) for each in operands())
    rounding = module._fp8_rounding(scaling == "rowwise")
    units, same = LowPrecision(rounding, module._multiply_fp8, 16), emulated("fp8", scaling)
    for product, (a, b) in {"forward": (x, weight), "input_gradient": (dy, weight)}.items():
        torch.testing.assert_close(getattr(units, product)(a, b), getattr(same, product)(a, b), rtol=2**-7, atol=1e-4)
    dy, x = torch.cat([dy, dy[:8]]), torch.cat([x, x[:8]])  # 32 tokens
    torch.testing.assert_close(units.weight_gradient(dy, x), same.weight_gradient(dy, x), rtol=2**-7, atol=1e-4)


def test_what_fp8_units_cannot_multiply_stays_in_full_precision():
    x, weight, dy = operands()
    units = LowPrecision(module._fp8_rounding(True), module._multiply_fp8, 16)
    odd = weight[:40]
    assert torch.equal(units.forward(x, odd), PLAIN.forward(x, odd))
    assert torch.equal(units.weight_gradient(dy, x), PLAIN.weight_gradient(dy, x))  # 24 tokens
    assert torch.equal(units.input_gradient(dy[:, :40], odd), PLAIN.input_gradient(dy[:, :40], odd))


class Counted(Products):
    """Plain products that are listed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def forward(self, x, weight):
        self.calls.append(("forward", tuple(weight.shape)))
        return super().forward(x, weight)

    def input_gradient(self, dy, weight):
        self.calls.append(("input_gradient", tuple(weight.shape)))
        return super().input_gradient(dy, weight)

    def weight_gradient(self, dy, x):
        self.calls.append(("weight_gradient", (dy.shape[1], x.shape[1])))
        return super().weight_gradient(dy, x)


def decoder_with(products: Products, arm: str = "swiglu", **model) -> Decoder:
    config = config_of(arm, **model)
    shape = shape_of(config)
    decoder = Decoder(shape, config.model, "sdpa", products=products)
    initialise(decoder, shape, 0, config.model.init_std)
    return decoder


@pytest.mark.parametrize("save", ["packed", "input", "everything"])
def test_the_projections_of_all_layers_take_part_and_nothing_else(tokens, save):
    counted = Counted()
    model, plain = decoder_with(counted), decoder_with(PLAIN)
    for each in (*model.layers, *plain.layers):
        each.ffn.save = save
    losses = [each(tokens[:, :-1], tokens[:, 1:])[0] for each in (model, plain)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-7)
    layer = model.layers[0]
    weights = [
        tuple(w.flatten(0, -2).shape) for w in (layer.attention.qkv, layer.attention.out, layer.ffn.up, layer.ffn.down)
    ]
    expected = (
        sorted((kind, weight) for kind in ("forward", "input_gradient", "weight_gradient") for weight in weights) * 2
    )
    if save == "input":
        expected += [("forward", weights[2])] * 2
    assert sorted(counted.calls) == sorted(expected)


def test_an_activation_that_is_written_in_fp8_changes_no_product(tokens):
    """h is rounded once from fp32, whether its kernel does it or a pass of its own."""
    rounding = module._fp8_rounding(True)
    results = []
    for fused in (False, True):
        model = decoder_with(LowPrecision(rounding, module._multiply_values, fused=fused)).float()
        loss, *_ = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    plain = decoder_with(PLAIN).float()(tokens[:, :-1], tokens[:, 1:])[0]
    assert 1e-6 < (results[0][0] - plain).abs() < 0.1


@pytest.mark.parametrize("scaling", ["rowwise", "tensorwise"])
def test_a_gpu_is_given_fp8_products(scaling):
    """Traced without a GPU: four forward, four for inputs, four for weights in each layer, and no host that waits."""
    pytest.importorskip("triton")
    model = ["model=llama_60m", "model.n_layers=2"]
    config = load([*model, "precision=fp8", f"precision.scaling={scaling}"])
    shape, tokens = shape_of(config), validate(config, 8).micro_batch * config.sequence_length
    counts = count_micro_batch(config)
    assert counts.names["GEMM: _scaled_mm"] == 12 * shape.n_layers
    assert counts.synchronisations == 0
    fused = [number for name, number in counts.names.items() if "forward_fp8" in name]
    assert fused == ([shape.n_layers] if scaling == "rowwise" else [])
    assert "other: abs" not in counts.names  # all is rounded by kernels
    if scaling == "rowwise":
        plain = count_micro_batch(load([*model, "precision=bf16"]))
        rounding = counts.bytes["rounding"] + counts.bytes["other"] - plain.bytes["other"]
        assert rounding == pytest.approx(rounding_bytes(shape, tokens), rel=0.02)


def test_fp8_needs_a_gpu_that_has_it():
    fp8 = PrecisionConfig("fp8")
    with pytest.raises(UserError, match=r"sm_89 or later.*precision\.emulate=fp8"):
        products_of(fp8, torch.device("cuda"), capability=(8, 0))
    assert isinstance(products_of(fp8, torch.device("cuda"), capability=(8, 9))[0], LowPrecision)
    assert "slower" in products_of(fp8, CPU)[1]
    assert products_of(PrecisionConfig(), CPU) == (PLAIN, "")
