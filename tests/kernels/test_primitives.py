"""kernels/c/primitives.h: every function against float64, in ulp where tensors are fp32, at every number there is in bf16.

A bound in ulp is derived: half an ulp for the last rounding, and as much again for each rounding before it that the function's
slope does not damp. Results below the smallest normal number, 2^-126, may come out as 0 (as torch's do).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import activation, parse
from kernels.activations import c_backend as c
from kernels.c.toolchain import build
from kernels.formula.compiled import Compiled, compile_formula
from kernels.formula.program import Line, Program

try:
    build("int one(void) { return 1; }")
except OSError as error:
    pytest.skip(f"no C compiler: {error}", allow_module_level=True)

EXACT = {
    **{name: getattr(torch, name) for name in ("abs", "sign", "sqrt", "exp", "expm1", "log", "log1p", "sigmoid")},
    **{name: getattr(torch, name) for name in ("tanh", "sin", "cos", "atan", "erf", "neg")},
    "softplus": lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())),
    "normal_cdf": lambda x: torch.special.ndtr(x).masked_fill(x < -5.7, 0),
    "complement": lambda x: torch.sigmoid(-x),
    "sech2": lambda x: 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x),
}
BESIDE = {"complement": "sigmoid", "sech2": "tanh"}  # whose result they take, beside its argument
# Roundings: abs and sign have none; exp has one in its polynomial and one at its end; sigmoid adds those of 1 + e and of the
# quotient (torch's errs as much); a polynomial in x^2, or of an argument that was itself reduced, has one more.
ULP = {
    **{"abs": 0.0, "neg": 0.0, "sign": 0.0, "sqrt": 0.5, "exp": 1.0, "expm1": 1.5, "log": 1.5, "log1p": 1.5},
    **{
        "sigmoid": 2.5,
        "complement": 2.5,
        "tanh": 1.5,
        "sech2": 3.5,
        "sin": 1.0,
        "cos": 1.0,
        "atan": 1.5,
        "erf": 2.0,
        "normal_cdf": 1.5,
        "softplus": 2.0,
    },
}
# normal_cdf is exp(-s) of a polynomial s: a rounding of s is s / 2 ulp of the result, and that of each of the last terms
# counts, a product and a sum. (1 + erf) / 2 has no digit left at -5.5.
MORE = {"normal_cdf": lambda exact: -4 * exact.clamp(min=SMALLEST).log()}
# How often the result in bf16 may be the neighbour of the number nearest to the truth. The short forms err by 2^-17 and a step
# of bf16 is 2^-8 or 2^-7, so a result falls on the wrong side of the middle at less than 2^-9 of the points where the function
# bends; at most points it is straight or flat. Measured: at most 1.1e-4, of erf.
NEIGHBOUR = 2.0**-12
SMALLEST = 2.0**-126


def function(operation: str) -> c.CKernels:
    """Return the kernels of one operation, and of what it takes beside its argument, with no check of its domain."""
    lines = (Line("t0", operation, ("x",)),)
    if operation in BESIDE:
        lines = (Line("t0", BESIDE[operation], ("x",)), Line("t1", operation, ("t0", "x")))
    forward = Program(("x",), lines, {"h": lines[-1].name})
    gradient = Program(("x", "dh"), (), {"dx": "dh"})
    both = Program(("x", "dh"), lines, {"dx": "dh", "h": lines[-1].name})
    formula = parse("x")
    library = c.kernels_of(Compiled(formula, compile_formula(formula).expression, {}, forward, gradient, both, None))
    assert library is not None
    return library


def compute(operation: str, x: Tensor) -> Tensor:
    return function(operation).forward(None, x, [])  # type: ignore[arg-type]


def points(operation: str) -> Tensor:
    """Return 2 million numbers up to 10,000: denormal, near 0, moderate, large; both signs, inside the function's domain."""
    size = torch.cat(
        [
            torch.logspace(-44, 4, 300_000, dtype=torch.float64),
            torch.linspace(0, 2, 300_001, dtype=torch.float64),
            torch.linspace(2, 30, 200_001, dtype=torch.float64),
            torch.linspace(30, 110, 100_001, dtype=torch.float64),
            torch.linspace(110, 1e4, 100_001, dtype=torch.float64),
        ]
    )
    x = torch.cat([size, -size]).float()
    lowest = {"log": 0.0, "sqrt": 0.0, "log1p": -1.0}.get(operation, -math.inf)
    return x[x > lowest]


def ulp(exact: Tensor) -> Tensor:
    """Return the step between fp32 numbers at the size of each."""
    exponent = torch.frexp(exact.abs().clamp(min=SMALLEST)).exponent - 1
    return torch.ldexp(torch.ones_like(exact), exponent - 23)


@pytest.mark.parametrize("operation", ULP)
def test_error_in_ulp(operation):
    x = points(operation)
    exact, h = EXACT[operation](x.double()), compute(operation, x).double()
    representable = exact.abs() < torch.finfo(torch.float32).max
    assert (h[~representable] == exact[~representable].sign() * math.inf).all()
    flushed = (exact.abs() < SMALLEST) & (h == 0)
    error = torch.where(flushed | ~representable, 0.0, (h - exact).abs() / ulp(exact))
    worst = int(error.argmax())
    more = MORE[operation](exact) if operation in MORE else 0.0
    assert (error <= ULP[operation] + more).all(), f"{error[worst]:.2f} ulp at {x[worst]!r}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", ["sin", "cos"])
def test_sine_and_cosine_of_numbers_of_any_size(operation, dtype):
    """Alone among small numbers, and in whole vectors; the range is [-1, 1] wherever the argument lies."""
    size = torch.cat([torch.logspace(4.9, 5.1, 5001), torch.logspace(5, 38.5, 20_001)])
    alone = torch.zeros(20_001, 16)
    alone[:, 5] = torch.logspace(5, 38.5, 20_001)
    for x in (size.to(dtype), -size.to(dtype), alone.flatten().to(dtype)):
        h, exact = compute(operation, x), EXACT[operation](x.double())
        assert h.abs().max() <= 1
        rounding = ulp(exact) if dtype == torch.float32 else torch.full_like(exact, 2.0**-8)
        far = x.abs() > 100_000
        assert ((h.double() - exact).abs() <= torch.where(far, 1.0, 2.0) * rounding).all()
    x = torch.tensor([215.0])
    fourth = (x * x) * (x * x)  # 2e9, rounded as the kernel rounds it
    h = activation(f"{operation}(x**4)", backend="c")(x)
    torch.testing.assert_close(h.double(), EXACT[operation](fourth.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("operation", ULP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edges(operation, dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0], dtype=dtype)
    exact, h = EXACT[operation](x.double()), compute(operation, x)
    if operation in ("sin", "cos"):
        exact[1:3] = math.nan
    if operation in ("softplus", "sqrt"):
        exact[0] = math.nan
    if operation == "sign":
        exact[0] = math.nan  # torch has 0 here; a NaN must not vanish
    assert torch.equal(h.isnan(), exact.isnan()), (h, exact)
    defined = ~exact.isnan()
    assert torch.equal(h[defined], exact[defined].to(dtype))
    zeros = defined & (exact == 0) & (x == 0)
    if operation not in ("expm1", "tanh", "sin", "sign"):  # there a 0 may change its sign, which no formula can tell
        assert torch.equal(h[zeros].signbit(), exact[zeros].signbit()), (h, exact)


def every_bfloat16() -> Tensor:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    return x[x.isfinite()]


def steps(a: Tensor, b: Tensor) -> Tensor:
    """Return how many bf16 numbers lie between a and b, and one."""

    def order(t: Tensor) -> Tensor:
        bits = t.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (order(a) - order(b)).abs()


@pytest.mark.parametrize(
    "operation", [operation for operation in ULP if operation not in BESIDE]
)  # those are exact beside 1
def test_bfloat16_is_the_nearest_number_or_its_neighbour(operation):
    x = every_bfloat16()
    x = x[x > {"log": 0.0, "sqrt": 0.0, "log1p": -1.0}.get(operation, -math.inf)]
    x = x[x.abs() <= 1e4]
    h, exact = compute(operation, x), EXACT[operation](x.double()).to(torch.bfloat16)
    flushed = (exact.abs() <= SMALLEST) & (h == 0)
    off = steps(h, exact).masked_fill(flushed, 0)
    assert off.max() <= 1, f"{int(off.max())} steps at {x[off.argmax()]!r}"
    assert (off > 0).double().mean() <= NEIGHBOUR


TAIL = 2.0**-23  # of the largest value in sight: what remains of 1 + erf(x) where erf(x) is close to -1


@pytest.mark.parametrize(
    ("formula", "exact"),
    [
        ("silu(x)", lambda x: x * torch.sigmoid(x)),
        ("gelu(x)", lambda x: 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5))),
        ("gelu_tanh(x)", lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))),
        ("relu(x)", torch.relu),
        ("clip(x, -1, 2)", lambda x: x.clamp(-1, 2)),
    ],
)
def test_formulas_of_several_functions(formula, exact):
    """4 ulp of the result, or half an ulp of the argument's size where terms cancel; torch's own have no better."""
    x = points("exp")
    x, truth = x[x.abs() <= 1e4], exact(x[x.abs() <= 1e4].double())
    error = (activation(formula, backend="c")(x).double() - truth).abs()
    allowed = 4 * ulp(truth) + TAIL / 2 * x.abs().clamp(max=10).double()
    assert (error <= allowed).all(), x[(error / allowed).argmax()]
