"""Low precision: every rounding beside the nearest number of a table of the format."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import activation
from kernels.rounding import E4M3, E5M2, round_e2m1, round_fp8, round_mxfp8, round_nvfp4
from kernels.triton import runtime

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def table(dtype: torch.dtype) -> Tensor:
    """Return all finite numbers of an FP8 format that are not negative, in order."""
    codes = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    return codes[codes.isfinite()]


def nearest(x: Tensor, numbers: Tensor) -> Tensor:
    """Round float64 to the nearest of `numbers`, which lie in the order of their codes: to the even code in between."""
    above = torch.searchsorted(numbers, x.abs().clamp(max=numbers[-1])).clamp(max=len(numbers) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = numbers[above] - x.abs(), x.abs() - numbers[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return torch.where(up, numbers[above], numbers[below]) * x.sign()


def matrix(rows: int = 5, width: int = 70) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 10 ** torch.linspace(-3, 3, width)
    x[1] = 0
    return x


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_fp8_is_the_nearest_number_of_the_format(dtype, rowwise):
    x = matrix()
    values, scale = round_fp8(x, dtype, rowwise)
    assert values.dtype == dtype
    assert scale.shape == ((5, 1) if rowwise else (1, 1))
    assert torch.equal(values.double(), nearest((x / scale).double(), table(dtype)))
    largest = values.double().abs().amax(1) if rowwise else values.double().abs().amax()
    assert set(largest.flatten().tolist()) <= {torch.finfo(dtype).max, 0.0}
    assert scale.isfinite().all()


def test_mxfp8_shares_a_power_of_two():
    x = matrix()
    values, scale = round_mxfp8(x)
    assert scale is None
    for start in range(0, 70, 32):
        block = x[:, start : start + 32].double()
        amax = block.abs().amax(1, keepdim=True)
        shared = 2.0 ** (torch.floor(torch.log2(amax.clamp(min=1e-30))) - 8)
        expected = nearest(block / shared, table(E4M3)) * shared  # what is beyond the format's largest becomes that
        assert torch.equal(values[:, start : start + 32].double(), expected)


def test_nvfp4_has_two_scales():
    x = matrix()
    values, whole = round_nvfp4(x)
    assert whole is not None
    assert float(whole) == pytest.approx(float(x.abs().max()) / (448 * 6), rel=1e-6)
    for start in range(0, 70, 16):
        block = x[:, start : start + 16]
        scale = nearest((block.abs().amax(1, keepdim=True) / (6 * whole)).double(), table(E4M3))
        scaled = torch.where(scale > 0, (block / (scale.float() * whole)).double(), 0.0)
        assert torch.equal(values[:, start : start + 16].double(), nearest(scaled, E2M1) * scale)


def test_e2m1_rounds_to_even_and_saturates():
    x = torch.cat([torch.linspace(-8, 8, 3201), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    assert torch.equal(round_e2m1(x).double(), nearest(x.double(), E2M1))
    assert round_e2m1(torch.tensor([0.25, 0.75, 2.5, 5.0, -7.0])).tolist() == [0, 1, 2, 4, -6]


@pytest.mark.parametrize("rounded", [lambda x: round_fp8(x, E4M3, True), round_mxfp8, round_nvfp4])
def test_a_nan_stays_one(rounded):
    x = matrix()
    x[2, 3] = math.nan
    values, scale = rounded(x)
    result = values.double() * (1 if scale is None else scale)
    assert result[2, 3].isnan()


# ---------------------------------------------------------------------------------------------- h in FP8, by its own kernel

ARMS = {
    "silu(gate) * up": {},
    "relu(x)**2": {},
    "x * sigmoid(b * x)": {"b": {"init": 1.3, "share": "channel"}},
    "a * relu(x)": {"a": {"init": 2.0, "share": "layer"}},
    "where(x > 0, 1, 0)": {},
    "norm(relu(gate - mean(gate))*up)": {},
}


def check_fp8_kernel(text: str, width: int) -> None:
    """The Triton kernel beside the plain rounding of the reference's h."""
    triton, reference = (activation(text, ARMS[text], backend=backend) for backend in ("triton", "reference"))
    pre = 3 * torch.randn((4, 2, width) if triton.formula.gated else (4, width))
    pre[1] = 0
    learned = [torch.full((width if p.share == "channel" else 1,), p.init) for p in triton.formula.learned.values()]
    (h, scale), (expected, of_reference) = (each.forward_fp8(pre, learned) for each in (triton, reference))
    assert (h.shape, h.dtype, scale.shape) == ((4, width), E4M3, (4, 1))
    torch.testing.assert_close(scale, of_reference, rtol=1e-6, atol=0)
    # A rounding may go the other way where the functions differ in the last bit, and the interpreter of Triton 3.6 loses the
    # carry into the next power of two, which it writes as the one before.
    step = 2.0**-9  # below 2**-6 all numbers are this far apart
    far = (h.double() - expected.double()).abs() > (0.13 * expected.double().abs()).clamp(min=1.5 * step)
    mantissa, _ = torch.frexp(expected.float()[far])
    assert (mantissa.abs() == 0.5).all()
    assert torch.equal(h.double()[far], expected.double()[far] / 2)
    pre.view(-1)[3] = math.nan
    assert triton.forward_fp8(pre, learned)[1][0].isnan().all() or text.startswith("where")


@pytest.mark.skipif(not runtime.installed(), reason="Triton is not installed")
@pytest.mark.parametrize("width", [7, 130, 1100])
@pytest.mark.parametrize("text", list(ARMS))
def test_a_kernel_writes_h_in_fp8(interpreter, text, width):
    interpreter.submit(check_fp8_kernel, text, width).result()
