"""Statistics from inside the forward kernel: held to what plain torch and autograd find in float64, and to known values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.formulas import formulas
from kernels import activation
from kernels.activations import c_backend as c
from kernels.activations.activation import Activation
from kernels.activations.eager import plain
from kernels.activations.telemetry import SATURATED, ActivationStats, BatchStats, figures, sums_of
from kernels.c import library
from kernels.c import toolchain as c_build

ALL = formulas()
FEW = ("swiglu", "relu", "xielu", "prelu_channel", "maxout")


def compiler_works() -> bool:
    try:
        c_build.build("int one(void) { return 1; }")
    except OSError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not compiler_works(), reason="no C compiler")


def inputs(function: Activation, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return pre-activations, some of them far out, and learned parameters."""
    generator = torch.Generator().manual_seed(rows * width)
    pre = 1.5 * torch.randn((rows, 2, width) if function.formula.gated else (rows, width), generator=generator)
    if width > 2 and rows:
        pre[..., 1] = -7.5  # a column in which a ReLU is dead
        pre[0, ..., 2] = 9.25
    if function.formula.gated:
        pre[:, 1] *= 0.9  # nowhere the same as the gate: at the kink of max(gate, up) autograd takes half of each
    learned = [
        p.init + 0.1 * torch.rand(width if p.share == "channel" else 1, generator=generator)
        for p in function.formula.learned.values()
    ]
    return pre.to(dtype), learned


def assert_stats(function: Activation, pre: Tensor, learned: list[Tensor], h: Tensor, batch: BatchStats) -> None:
    """Hold statistics of an fp32 or 16-bit kernel to those that autograd gives in float64, for the h that was stored."""
    formula = function.formula
    parts = [part.double().requires_grad_() for part in (pre.unbind(-2) if formula.gated else [pre])]
    packed = torch.stack(parts, -2) if formula.gated else parts[0]
    values = dict(zip(formula.learned, (tensor.double() for tensor in learned), strict=True))
    exact = plain(formula, hold=True)(packed, **values)
    slopes = [None, None][: len(parts)]
    if exact.requires_grad:
        slopes = torch.autograd.grad(exact.sum(), parts, create_graph=True, allow_unused=True)
    slopes = [torch.zeros_like(part) if s is None else s for s, part in zip(slopes, parts, strict=True)]
    h64 = h.double()
    terms = {
        "zero": (h64 == 0).double(),
        "saturated": sum((s.abs() < SATURATED).double() for s in slopes),
        "slope": sum(s.abs() for s in slopes),
        **{f"h{power}": h64**power for power in range(1, 5)},
    }
    borderline = {"saturated": sum(near(s) for s in slopes)}
    if formula.gated:
        gate, up = parts
        opening = slopes[1]
        bend = torch.autograd.grad(opening.sum(), gate, allow_unused=True)[0] if opening.requires_grad else None
        bend = torch.zeros_like(gate) if bend is None else bend
        terms |= {"open": opening, "open2": opening**2, "flat": (bend.abs() < SATURATED).double()}
        terms |= {"gate": gate, "gate2": gate**2, "up": up, "up2": up**2, "gate_up": gate * up}
        borderline["flat"] = near(bend)
    assert tuple(terms) == sums_of(function.compiled)
    # A sum of n terms rounds each n - 1 times at most; a term has its own error: of the short forms in 16 bits.
    error = h.numel() * 2.0**-24 + (2.0**-12 if pre.dtype == torch.bfloat16 else 2.0**-18)
    for (name, term), actual in zip(terms.items(), batch.sums.double(), strict=True):
        allowed = float(term.detach().abs().sum()) * error + borderline.get(name, 0)
        assert abs(float(actual) - float(term.detach().sum())) <= allowed, name
    assert float(batch.peak) == float(h64.abs().max())
    assert batch.elements == h.numel()
    largest = torch.stack([h64.abs(), *(s.detach().abs() for s in slopes)]).amax(0)
    tiny = largest < torch.finfo(torch.float32).smallest_normal  # what fp32 may or may not take for 0
    active = ((largest > 0) & ~tiny).flatten(0, -2).sum(0)
    assert (batch.active >= active).all()
    assert (batch.active <= active + (tiny & (largest > 0)).flatten(0, -2).sum(0)).all()


def near(slope: Tensor) -> int:
    """Return how many slopes are so near the threshold that an error of fp32 or of a short form can carry them over."""
    return int(((slope.detach().abs() - SATURATED).abs() < 2.0**-12 * (SATURATED + 1)).sum())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_the_c_kernels_statistics_are_right_and_its_h_is_the_plain_kernels(name, dtype):
    function = activation(*ALL[name], backend="c")
    pre, learned = inputs(function, 37, 131, dtype)
    h, batch = function.forward_with_stats(pre, learned)
    assert torch.equal(h, function.forward(pre, learned))
    assert_stats(function, pre, learned, h, batch)


@pytest.mark.parametrize("name", ALL)
def test_the_reference_is_right(name):
    function = activation(*ALL[name], backend="reference")
    pre, learned = inputs(function, 37, 131, torch.float32)
    h, batch = function.forward_with_stats(pre, learned)
    assert torch.equal(h, function.forward(pre, learned))
    assert_stats(function, pre, learned, h, batch)


@pytest.mark.parametrize("backend", [pytest.param("c", marks=needs_compiler), "reference"])
@pytest.mark.parametrize("width", [1, 7, 8, 5632])
@pytest.mark.parametrize("name", FEW)
def test_every_width(name, width, backend):
    function = activation(*ALL[name], backend=backend)
    pre, learned = inputs(function, 5, width, torch.float32)
    assert_stats(function, pre, learned, *function.forward_with_stats(pre, learned))


@pytest.mark.parametrize("backend", [pytest.param("c", marks=needs_compiler), "reference"])
@pytest.mark.parametrize("name", FEW)
def test_no_elements_give_empty_stats(name, backend):
    function = activation(*ALL[name], backend=backend)
    for rows, width in ((0, 8), (3, 0)):
        pre, learned = inputs(function, rows, width, torch.float32)
        h, batch = function.forward_with_stats(pre, learned)
        assert h.shape == (rows, width)
        assert (batch.elements, float(batch.peak), batch.active.tolist()) == (0, 0.0, [0.0] * width)
        assert not batch.sums.any()


@needs_compiler
def test_rows_of_any_layout():
    function = activation("silu(gate) * up", backend="c")
    wide, _ = inputs(function, 12, 48, torch.float32)
    pre = wide[..., ::2].unflatten(0, (3, 4)).transpose(0, 1)
    assert_stats(function, pre, [], *function.forward_with_stats(pre, []))


@needs_compiler
@pytest.mark.parametrize("name", ["swiglu", "prelu_channel"])
def test_no_figure_depends_on_the_number_of_threads(name):
    function, before = activation(*ALL[name], backend="c"), torch.get_num_threads()
    pre, learned = inputs(function, 300, 257, torch.bfloat16)
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(function.forward_with_stats(pre, learned)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].sums, results[1].sums)
    assert torch.equal(results[0].active, results[1].active)


@pytest.mark.parametrize("backend", [pytest.param("c", marks=needs_compiler), "reference"])
def test_a_nan_is_not_hidden(backend):
    function = activation("silu(gate) * up", backend=backend)
    pre, _ = inputs(function, 40, 33, torch.float32)
    pre[20, 0, 5] = math.nan
    batch = function.forward_with_stats(pre, [])[1]
    assert all(math.isnan(collected(function, 33, batch)[name]) for name in ("mean", "rms", "max", "kurtosis"))
    assert float(batch.active[5]) == 40


@needs_compiler
def test_without_a_compiler_for_the_variant_h_stays_and_the_reference_looks(monkeypatch):
    function = activation("silu(gate) * up", backend="c")
    function.prepare(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(c, "_kernels", {})
    monkeypatch.setattr(library, "_compiler_failed", False)
    function.prepare(torch.device("cpu"), torch.float32)

    def refuse(_: str) -> None:
        raise OSError("the compiler is gone")

    monkeypatch.setattr(library, "build", refuse)
    pre, _ = inputs(function, 9, 33, torch.float32)
    with pytest.warns(UserWarning, match="no C kernels, slower plain PyTorch computes instead: the compiler is gone"):
        h, batch = function.forward_with_stats(pre, [])
    assert torch.equal(h, function.forward(pre, []))
    assert_stats(function, pre, [], h, batch)


def test_what_is_not_plain_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(TypeError, match="eager mode"):
        activation("relu(x)").forward_with_stats(torch.zeros(2, 3), [])


# ----------------------------------------------------------------------------------------------------------------- figures


def collected(function: Activation, width: int, *batches: BatchStats) -> dict[str, float]:
    stats = ActivationStats(function.compiled, width, torch.device("cpu"))
    for each in batches:
        stats.add(each)
    return figures(stats.names, stats.pre_activations, stats.sums.tolist(), float(stats.peak))


def test_calls_add_up():
    function = activation("gelu(gate) * up")
    pre, _ = inputs(function, 64, 50, torch.float32)
    parts = [function.forward_with_stats(part, [])[1] for part in (pre[:10], pre[10:])]
    once = collected(function, 50, function.forward_with_stats(pre, [])[1])
    twice = collected(function, 50, *parts)
    assert twice == pytest.approx(once, rel=1e-5)
    stats = ActivationStats(function.compiled, 50, torch.device("cpu"))
    for each in parts:
        stats.add(each)
    assert torch.equal(stats.active, function.forward_with_stats(pre, [])[1].active.double())


# Of h for normal pre-activations. mean/std are published; the other figures follow from the formulas.
MEAN_OVER_STD = {"sigmoid": 2.40, "relu": 0.68, "leaky_relu": 0.67, "gelu": 0.48, "silu": 0.37, "relu2": 0.45}


@pytest.mark.parametrize("name", [*MEAN_OVER_STD, "tanh", "glu", "bilinear", "reglu", "geglu", "swiglu"])
def test_known_values_for_normal_pre_activations(name):
    function = activation(*ALL[name])
    shape = (4096, 2, 256) if function.formula.gated else (4096, 256)
    pre = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    actual = collected(function, 256, function.forward_with_stats(pre, [])[1])
    # Two digits are published: half of the last one, and 2% for the million samples.
    assert actual["mean_over_std"] == pytest.approx(MEAN_OVER_STD.get(name, 0.0), rel=0.02, abs=0.005)
    if name in ("relu", "reglu", "relu2"):
        assert actual["zeros"] == pytest.approx(0.5, rel=0.02)
    if name == "relu":  # moments of half a normal distribution
        assert actual["rms"] == pytest.approx(math.sqrt(0.5), rel=0.02)
        mean, square = 1 / math.sqrt(2 * math.pi), 0.5
        fourth = 1.5 - 4 * mean * 2 * mean + 6 * mean**2 * square - 3 * mean**4
        assert actual["kurtosis"] == pytest.approx(fourth / (square - mean**2) ** 2, rel=0.02)
        assert actual["saturated"] == pytest.approx(0.5, rel=0.02)
        assert actual["slope"] == pytest.approx(0.5, rel=0.02)
    if name == "bilinear":
        assert actual["kurtosis"] == pytest.approx(9.0, rel=0.02)
        assert actual["gate_std"] == pytest.approx(1.0, rel=0.02)
        assert actual["gate_saturated"] == 0.0
    if name == "reglu":
        assert actual["gate_mean"] == pytest.approx(1 / math.sqrt(2 * math.pi), rel=0.02)
        assert actual["gate_saturated"] == pytest.approx(0.5, rel=0.02)
    if name == "glu":
        assert actual["gate_mean"] == pytest.approx(0.5, rel=0.02)


def test_the_correlation_of_gate_and_up():
    function = activation("silu(gate) * up")
    gate, other = torch.randn(2, 4096, 256, generator=torch.Generator().manual_seed(0))
    pre = torch.stack((3 * gate + 1, 0.6 * gate + 0.8 * other - 2), 1)
    actual = collected(function, 256, function.forward_with_stats(pre, [])[1])
    assert actual["gate_up_correlation"] == pytest.approx(0.6, rel=0.02)


def test_what_is_not_defined_is_nan():
    function = activation("silu(gate) * up")
    nothing = collected(function, 8)
    assert all(math.isnan(value) for name, value in nothing.items() if name != "max")
    constant = collected(function, 8, function.forward_with_stats(torch.zeros(4, 2, 8), [])[1])
    assert constant["zeros"] == 1.0
    assert math.isnan(constant["kurtosis"])
    assert math.isnan(constant["gate_up_correlation"])
