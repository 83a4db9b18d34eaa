"""The Triton backend without a GPU: every formula in Triton's interpreter, and what the compiler makes of it for Hopper.

The interpreter replaces the compiler for a whole process, so what is interpreted runs in a process of its own, one for all.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
from far import far_tensors, last_program
from poisoned import Poisoned
from torch import Tensor

from bench.formulas import formulas
from kernels import activation, parse
from kernels.activations import reference, triton_backend, triton_source
from kernels.formula.compiled import OUTPUT, Compiled, compile_formula
from kernels.formula.program import Program, run
from kernels.triton import runtime
from tests.kernels.test_telemetry import assert_stats, inputs
from tests.selection import quick

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# tests/kernels/test_triton_reductions.py has those that reduce over d_ff.
FORMULAS = {name: formula for name, formula in formulas().items() if not parse(*formula).reduces}
# What no formula above uses; and the oddest names, constants and outputs.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    formula: (formula, {})
    for formula in (
        "log(x*x + 1e-3) + log1p(abs(x))",
        "sin(x) + cos(2*x)",
        "atan(x) * sign(x)",
        "sqrt(x*x + 0.01)",
        "max(x, 1 - x) * min(x, 0.5) + clip(x, -1, 2)",
        "exp(min(x, 3)) + expm1(min(2*x, 1))",
        "softplus(gate) * up + erf(up)",
        "where(x >= 0.5, 1, 0) * x + where(x <= -1, x, 2)",
        "where(1 > 0, x, 2) * exp(1) * sqrt(2 / pi)",
        "(x * x + 1) ** (0.01 * x) + abs(x) ** 1.5",
        "where(x > 0, 1, 0)",
        *(
            f"{name}(x)"
            for name in ("sign", "tanh", "erf", "sin", "cos", "atan", "sigmoid", "softplus", "silu", "gelu")
        ),
    )
}
MORE["odd names"] = ("width*x + lambda*h + tl*row", {"width": 0.5, **{n: {"init": 1.5} for n in ("lambda", "h", "tl")}})
MORE["odd names"][1]["row"] = {"init": 2.0, "share": "channel"}
ALL = FORMULAS | MORE
WIDTHS = (1, 7, 8, 127, 1030)
ROWS = 2


# ------------------------------------------------------------------------------------------- the error that fp32 allows


@dataclasses.dataclass
class Bounded:
    """A float64 value, and the largest error that relative roundings of `eps` can have made on the way, to first order."""

    value: Tensor
    error: Tensor
    eps: float

    def map(self, name: str, *others: Bounded) -> Bounded:
        """Apply an operation: the errors of its arguments, each by its slope, and its own: a rounding, or a function's."""
        values = [each.value.detach().requires_grad_() for each in (self, *others)]
        result = torch.as_tensor(_OPERATIONS[name](*values))
        slopes = torch.autograd.grad(result.sum(), values, allow_unused=True) if result.requires_grad else [None] * 3
        error = (1 if name in _ROUNDED_ONCE else 6) * self.eps * result.detach().abs()  # a function: 3 ulp
        if name == "normal_cdf":  # exp(-s): a rounding of s counts s times; and nothing is left of it beyond 5.7
            left = result.detach().clamp(min=SMALLEST)
            error = error - 6 * self.eps * left * left.log() + torch.where(values[0] < -5.7, left, 0.0)
        for each, slope in zip((self, *others), slopes, strict=False):
            if slope is not None:  # an infinite slope times no error is no error
                error = error + torch.nan_to_num(slope.abs() * each.error, nan=0.0)
        return Bounded(result.detach(), error, self.eps)


_OPERATIONS = reference._OPERATIONS
_ROUNDED_ONCE = ("add", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "sqrt")


def bounded(program: Program, inputs: dict[str, Tensor], eps: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a program in float64; return (value, bound of its error) for each output."""

    def exact(value: Any) -> Bounded:
        return Bounded(torch.as_tensor(value, dtype=torch.float64), torch.zeros((), dtype=torch.float64), eps)

    def operation(name: str) -> Callable[..., Any]:
        if name in ("gt", "ge"):
            return lambda a, b: _OPERATIONS[name](a.value, b.value)
        if name == "select":

            def select(condition: Tensor, a: Bounded, b: Bounded) -> Bounded:
                return Bounded(torch.where(condition, a.value, b.value), torch.where(condition, a.error, b.error), eps)

            return select
        if name == "keep_nan":
            return lambda a, _: a
        return lambda *arguments: arguments[0].map(name, *arguments[1:])

    def number(value: float) -> Bounded:
        return Bounded(exact(value).value, eps * exact(value).value.abs(), eps)

    table = {name: operation(name) for name in _OPERATIONS} | {"number": number}
    results = run(program, table, {name: exact(value.double()) for name, value in inputs.items()})
    return {name: (result.value, result.error) for name, result in results.items()}


SMALLEST = 1e-30  # below it the exponents of fp32 end: exp(100) is infinite there, and 1 / exp(100) is 0


def assert_within(computed: Tensor, value: Tensor, error: Tensor, what: str) -> None:
    allowed = torch.nan_to_num(error, nan=0.0, posinf=math.inf) + SMALLEST
    off = ((computed.double() - value).abs() / allowed).expand(computed.shape)
    worst = off.flatten().argmax()
    assert off.max() <= 1, f"{what}: {computed.flatten()[worst]:.9g}, {off.max():.1f} times the error that fp32 allows"


# ------------------------------------------------------------------------------------------ in the interpreter's process


def tensors(name: str, width: int, rows: int = ROWS) -> tuple[Compiled, Tensor, Tensor, list[Tensor]]:
    """Return a formula's programs, pre-activations with extremes among them, dh, and learned parameters."""
    compiled = compile_formula(parse(*ALL[name]))
    generator = torch.Generator().manual_seed(width)
    gated = compiled.formula.gated
    pre = 3 * torch.randn((rows, 2, width) if gated else (rows, width), generator=generator)
    extremes = torch.tensor([0.0, 1e-20, -1e-20, 1e-4, -1e-4, 0.01, -0.01, 20.0, -20.0, 90.0, -90.0, 300.0, -300.0])
    if width > 100:
        pre[..., : len(extremes)] = extremes
        pre[0, ..., -len(extremes) :] = extremes
    learned = [
        p.init + 0.1 * torch.rand(width if p.share == "channel" else 1, generator=generator)
        for p in compiled.formula.learned.values()
    ]
    return compiled, pre, torch.randn(rows, width, generator=generator), learned


def check(name: str, width: int, kernels: Any = None, eps: float = 2.0**-24) -> None:
    """Run all kernels of a formula and hold them to the error that their programs can make."""
    compiled, pre, dh, learned = tensors(name, width)
    kernels = kernels or triton_backend.kernels_of(compiled)
    names = compiled.formula.pre_activations
    inputs = dict(zip(names, pre.unbind(1) if len(names) == 2 else [pre], strict=True), dh=dh)
    inputs |= dict(zip(compiled.formula.learned, learned, strict=True))
    with Poisoned() as poisoned:
        pre, dh, learned = poisoned.copy(pre), poisoned.copy(dh), [poisoned.copy(each) for each in learned]
        h = kernels.forward(compiled, pre, learned)
        alone, none, totals = kernels.backward(compiled, pre, dh, learned, False)
        dpre, again, same_totals = kernels.backward(compiled, pre, dh, learned, True)
    assert none is None
    expected = bounded(compiled.backward_with_h, inputs, eps)
    assert_within(h, *expected["h"], "h")
    assert_within(again, *expected["h"], "h, in backward")
    for both in (alone, dpre):
        parts = both.unbind(1) if len(names) == 2 else [both]
        for each, part in zip(names, parts, strict=True):
            assert_within(part, *expected[f"d{each}"], f"d{each}")
    for parameter, total, same in zip(compiled.formula.learned.items(), totals, same_totals, strict=True):
        assert (total.dtype, same.dtype) == (torch.float32, torch.float32)
        value, error = (each.expand(dh.shape) for each in expected[f"d{parameter[0]}"])
        axes = (0,) if parameter[1].share == "channel" else (0, 1)
        # A sum of n terms rounds each of them n - 1 times at most.
        error = torch.nan_to_num(error) + dh.numel() * eps * value.abs()
        for each in (total, same):
            assert_within(each, value.sum(axes), error.sum(axes), f"d{parameter[0]}")


def check_from_output(formula: str, derivative: str, width: int) -> None:
    """The gradient computed from the output, held to the error that its program can make."""
    compiled = compile_formula(parse(formula, from_output=derivative))
    assert compiled.from_output is not None
    generator = torch.Generator().manual_seed(width)
    h = reference.forward(compiled, 2 * torch.randn(ROWS, width, generator=generator), [])
    dh = torch.randn(ROWS, width, generator=generator)
    with Poisoned() as poisoned:
        actual = triton_backend.kernels_of(compiled).backward_from_output(compiled, poisoned.copy(h), poisoned.copy(dh))
    expected = bounded(compiled.from_output, {OUTPUT: h, "dh": dh}, 2.0**-24)
    assert_within(actual, *expected[f"d{OUTPUT}"], "dx")


def check_changed(name: str, width: int, old: str, new: str, eps: float = 2.0**-24) -> None:
    """`check`, of kernels with something else in their source."""
    compiled = compile_formula(parse(*ALL[name]))
    text = triton_source.source(compiled)
    assert old in text
    kernels = triton_backend.TritonKernels(compiled)
    kernels.module = runtime.load(text.replace(old, new))
    check(name, width, kernels, eps)


def check_statistics(name: str, width: int, old: str = "", new: str = "") -> None:
    """The forward kernel that tells of itself, with something else in its source if asked: the same h, the right figures."""
    compiled = compile_formula(parse(*ALL[name]))
    function = activation(*ALL[name], backend="triton")
    pre, learned = inputs(function, 5, width, torch.float32)
    kernels = triton_backend.TritonKernels(compiled)
    if old:
        text = triton_source.source_with_stats(compiled)
        assert old in text
        kernels.module_with_stats = runtime.load(text.replace(old, new))
    with Poisoned() as poisoned:
        pre, learned = poisoned.copy(pre), [poisoned.copy(each) for each in learned]
        h = kernels.forward(compiled, pre, learned)
        with unittest.mock.patch.object(triton_backend, "_SUMS", 2):  # a program walks three rows, another the last two
            same, batch = kernels.forward_with_stats(compiled, pre, learned)
    assert torch.equal(h, same)
    assert_stats(function, pre, learned, h, batch)


def check_nan(name: str) -> None:
    compiled, pre, dh, learned = tensors(name, 130)
    kernels = triton_backend.kernels_of(compiled)
    for index in range(len(compiled.formula.pre_activations)):
        holed = pre.clone()
        holed.view(ROWS, -1, 130)[:, index, 5] = math.nan
        for h in (kernels.forward(compiled, holed, learned), kernels.backward(compiled, holed, dh, learned, True)[1]):
            assert h[:, 5].isnan().all(), "a NaN has become a number"
            assert h[:, 6:].isfinite().all(), "a NaN has spread"


def check_through_activation(name: str) -> None:
    """Inputs that are no dense tensors, through the public function, beside the reference backend."""
    formula, parameters = ALL[name]
    compiled, pre, _, values = tensors(name, 24, rows=6)
    results = []
    for backend in ("triton", "reference"):
        function = activation(formula, parameters, backend)
        learned = {n: v.clone().requires_grad_() for n, v in zip(compiled.formula.learned, values, strict=True)}
        wide = torch.cat((pre, pre), -1).requires_grad_()
        h = function(wide[..., ::2].unflatten(0, (2, 3)).transpose(0, 1), **learned)  # of no dense layout
        h.sum().backward()  # its gradient has strides of 0
        results.append([h.detach(), wide.grad, *(each.grad for each in learned.values())])
        empty = function(pre[:0].requires_grad_(), **learned)
        assert empty.shape == (0, 24)
        empty.sum().backward()
    for triton, plain in zip(*results, strict=True):
        # That the numbers are right is tested above; here it is where they lie.
        torch.testing.assert_close(triton, plain, rtol=1e-5, atol=1e-5)


def check_far_offsets() -> str | None:
    """The last row of tensors of more than 2**31 elements, which hold memory nowhere but at their ends."""
    width, rows = 1024, 2**21 + 1
    pre, h = far_tensors(2, rows, width)
    pre[-1] = torch.arange(width) - 512.0
    compiled = compile_formula(parse("relu(x)"))
    with last_program():
        kernels = triton_backend.kernels_of(compiled)
        kernels._launch(kernels.module.forward, rows, width, [pre, h])
    assert torch.equal(h[-1], pre[-1].relu())
    assert not h[:2].any()
    return None


def check_refusals() -> None:
    function = activation("relu(x)", backend="triton")
    with pytest.raises(
        ValueError, match="under TRITON_INTERPRET=1 the Triton backend computes float32, not bfloat16 on cpu"
    ):
        function(torch.zeros(3, dtype=torch.bfloat16))


# ------------------------------------------------------------------------------------------------------------ interpreted


# Those that no other arm covers part by part: tests/kernels/test_reference.py computes every arm.
DISTINCT = (
    "swiglu",
    "geglu",
    "relu2",
    "xielu",
    "prelu_channel",
    "maxout",
    "situ_glu",
    "tanh_log",
    "swiglu_clamped",
    "selu",
)


@pytest.mark.parametrize("name", quick(ALL, *DISTINCT, *MORE))
def test_every_formula_in_fp32(interpreter, name):
    interpreter.submit(check, name, 1030).result()


@pytest.mark.parametrize("width", [7, 1030])
@pytest.mark.parametrize(
    ("formula", "derivative"), [("relu(x)**2", "2*sqrt(h)"), ("tanh(x)", "1 - h**2"), ("softplus(x)", "-expm1(-h)")]
)
def test_the_gradient_from_the_output(interpreter, formula, derivative, width):
    interpreter.submit(check_from_output, formula, derivative, width).result()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["swiglu", "xielu", "prelu_channel"])
def test_every_width(interpreter, name, width):
    interpreter.submit(check, name, width).result()


@pytest.mark.parametrize("name", ["swiglu", "gelu", "situ_glu", "mish", "xielu", "softplus(gate) * up + erf(up)"])
def test_the_short_forms_for_16_bits(interpreter, name):
    """With fp32 tensors, so that what they round is all there is: their error is at most 2**-17."""
    fp32 = "PRECISE: tl.constexpr = pre.dtype.element_ty == tl.float32"
    interpreter.submit(check_changed, name, 1030, fp32, "PRECISE: tl.constexpr = False", 2.0**-17 / 6).result()


@pytest.mark.parametrize("name", quick(FORMULAS, "swiglu", "xielu", "prelu_channel", "maxout", "selu"))
def test_statistics_from_inside_the_forward_kernel(interpreter, name):
    interpreter.submit(check_statistics, name, 127).result()


@pytest.mark.parametrize("width", [1, 8, 1030])
def test_statistics_of_every_width(interpreter, width):
    interpreter.submit(check_statistics, "swiglu", width).result()


@pytest.mark.parametrize("name", ["swiglu", "xielu", "prelu_channel"])
def test_what_is_loaded_outside_of_a_row_is_in_no_statistic(interpreter, name):
    nan = "mask=inside, other=float('nan')).to"
    interpreter.submit(check_statistics, name, 127, "mask=inside).to", nan).result()


@pytest.mark.parametrize("name", ["xielu", "prelu_channel"])
def test_what_is_loaded_outside_of_a_row_goes_into_no_sum(interpreter, name):
    """A GPU leaves it undefined, and the interpreter would make it 0."""
    interpreter.submit(check_changed, name, 127, "mask=inside).to", "mask=inside, other=float('nan')).to").result()


@pytest.mark.parametrize("name", quick(ALL, "swiglu", "relu", "xielu", "prelu_channel", "maxout", *MORE))
def test_a_nan_comes_out_a_nan(interpreter, name):
    interpreter.submit(check_nan, name).result()


@pytest.mark.parametrize("name", ["swiglu", "gelu", "xielu", "prelu_channel"])
def test_inputs_of_any_layout_and_of_no_rows(interpreter, name):
    interpreter.submit(check_through_activation, name).result()


def test_offsets_beyond_32_bits(interpreter):
    if reason := interpreter.submit(check_far_offsets).result():
        pytest.skip(reason)


def check_far_arguments() -> None:
    """sin and cos of numbers of any size, in a block and of a single number."""
    size = torch.cat([torch.logspace(4.9, 5.1, 101), torch.logspace(5, 38.5, 1001)])
    x = torch.cat([size, -size])[None]
    for operation in ("sin", "cos"):
        h = triton_backend.kernels_of(compile_formula(parse(f"{operation}(x)"))).forward(None, x, [])  # type: ignore[arg-type]
        assert h.abs().max() <= 1
        torch.testing.assert_close(h.double(), getattr(torch, operation)(x.double()), rtol=0, atol=2e-6)
    compiled = compile_formula(parse("sin(b)*x", {"b": {"init": 1}}))
    h = triton_backend.kernels_of(compiled).forward(compiled, torch.ones(1, 3), [torch.tensor([1e20])])
    torch.testing.assert_close(h[0, 0].item(), math.sin(1.0000000200408773e20), rtol=1e-6, atol=0)


def test_sine_and_cosine_of_numbers_of_any_size(interpreter):
    interpreter.submit(check_far_arguments).result()


def test_what_the_interpreter_cannot_compute_is_refused(interpreter):
    interpreter.submit(check_refusals).result()
