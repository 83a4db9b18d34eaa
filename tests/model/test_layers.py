"""RMSNorm and rotary positions against their formulas, written with other operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.layers import RMSNorm, Rotary


def test_rms_norm():
    norm = RMSNorm(24, eps=0.01).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 24))
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    expected = torch.stack([row / (sum(v * v for v in row) / 24 + 0.01) ** 0.5 * norm.weight for row in x.view(-1, 24)])
    y, s = norm(x)
    torch.testing.assert_close(y, expected.view(3, 5, 24), rtol=1e-13, atol=1e-13)
    assert s is x


def test_a_norm_adds_to_the_stream_before_it():
    norm = RMSNorm(24, eps=0.01).double()
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(2, 3, 5, 24, dtype=torch.float64)
    y, s = norm(x, residual)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, norm(s)[0])


def test_the_gradients_of_rms_norm():
    norm = RMSNorm(6, eps=0.01).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(-1, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *both: torch.func.functional_call(norm, {"weight": both[1]}, both[0])[0], (x, weight)
    )


def norm_results(x: Tensor, weight: Tensor, grad: Tensor, dtype: torch.dtype, written_out: bool) -> list[Tensor]:
    """Return the norm of x and its two gradients, computed in `dtype` by our module or by plain operations."""
    norm = RMSNorm(x.shape[-1], eps=1e-5)
    norm.weight = torch.nn.Parameter(weight.to(dtype))
    x = x.to(dtype, copy=True).requires_grad_()
    y = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight if written_out else norm(x)[0]
    y.backward(grad.to(dtype))
    return [each.detach().double() for each in (y, x.grad, norm.weight.grad)]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_errs_as_plain_operations_do(dtype, scale):
    x, grad = (torch.randn(64, 96).bfloat16().double() for _ in range(2))
    weight = (1 + 0.3 * torch.randn(96)).bfloat16().double()
    exact = norm_results(scale * x, weight, grad, torch.float64, True)
    ours, plain = (norm_results(scale * x, weight, grad, dtype, written_out) for written_out in (False, True))
    for actual, other, expected, name in zip(ours, plain, exact, ("y", "dx", "dw"), strict=True):
        assert (actual - expected).norm() <= 2 * (other - expected).norm(), name


def rotated(x: Tensor, theta: float, start: int) -> Tensor:
    """Rotate pairs of channels (i, i + E/2) as complex numbers."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    angles = torch.outer(
        torch.arange(start, start + x.shape[1]).double(), theta ** -(torch.arange(half).double() / half)
    )
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("start", [0, 1, 17])
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rotary_positions_are_complex_rotations(theta, start):
    x = torch.randn(2, 11, 3, 12, dtype=torch.float64)
    for actual in Rotary(12, theta)(x, x, start):
        torch.testing.assert_close(actual, rotated(x, theta, start), rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_rotation():
    rotary = Rotary(6, 100.0)
    q = torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 4, 1, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, 3), (q, k))


def test_only_the_distance_of_two_positions_counts():
    rotary = Rotary(12, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 12, dtype=torch.float64)
    scores = [(rotary(q, k, start + 5)[0] * rotary(q, k, start)[1]).sum().item() for start in (0, 3, 900)]
    assert max(scores) - min(scores) < 1e-11 < abs(scores[0] - (q * k).sum().item())


def test_tables_grow_and_keep_to_their_dtype():
    rotary = Rotary(12, 10000.0)
    x = torch.randn(1, 50, 1, 12, dtype=torch.float64)
    short, long, again = (rotary(some, some)[0] for some in (x[:, :4], x, x[:, :4]))
    assert torch.equal(short, again)
    assert torch.equal(long[:, :4], short)
    for dtype in (torch.float32, torch.bfloat16):
        # The tables are made in float64: what is left is the rounding of the tables, of x and of the two products.
        actual, _ = rotary(x.to(dtype), x.to(dtype))
        assert actual.dtype == dtype
        assert (actual.double() - long).abs().max() <= 4 * torch.finfo(dtype).eps * x.abs().max()
    assert not list(rotary.state_dict())
