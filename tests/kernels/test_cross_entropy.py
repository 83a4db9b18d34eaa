"""The C kernel of softmax cross-entropy: error beside plain PyTorch's, every width, extremes, and what lies around a row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from poisoned import Poisoned
from torch import Tensor

from kernels.cross_entropy import cross_entropy, cross_entropy_

pytestmark = pytest.mark.skipif(cross_entropy._library() is None, reason="no C compiler")
DTYPES = (torch.float32, torch.bfloat16)


def draw(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def plain(logits: Tensor, targets: Tensor, z_loss: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return nats, log-sum-exp and the gradient as autograd has them, computed in `dtype`."""
    leaf = logits.to(dtype).requires_grad_()
    nats = F.cross_entropy(leaf, targets, reduction="none")
    lse = leaf.logsumexp(-1)
    (gradient,) = torch.autograd.grad((nats + z_loss * lse.square()).sum(), leaf)
    return nats.detach(), lse.detach(), gradient


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("vocabulary", [1, 7, 16, 31, 33, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradient(dtype, vocabulary, z_loss):
    logits, targets = draw(9, vocabulary, dtype)
    exact = plain(logits, targets, z_loss, torch.float64)
    eps, fp32 = torch.finfo(dtype).eps, 2.0**-23
    with Poisoned() as poisoned:
        given = poisoned.copy(logits)
        nats, lse = cross_entropy_(given, targets, z_loss, True)
    # A difference of logits up to 30 is rounded, and a sum of exponentials whose every term is right to 2 ulp; the gradient
    # rounds a product more, and once at its store.
    torch.testing.assert_close(nats.double(), exact[0], rtol=4 * fp32, atol=32 * fp32)
    torch.testing.assert_close(lse.double(), exact[1], rtol=4 * fp32, atol=4 * fp32)
    torch.testing.assert_close(given.double(), exact[2], rtol=eps / 2 + 32 * fp32, atol=4 * fp32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_errs_no_more_than_pytorchs(dtype):
    logits, targets = draw(64, 4096, dtype)
    exact = plain(logits, targets, 0.0, torch.float64)[2]
    theirs = plain(logits, targets, 0.0, torch.float32)[2].to(dtype).double()
    cross_entropy_(logits, targets, 0.0, True)
    assert (logits.double() - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_only_measuring_leaves_the_logits_alone():
    logits, targets = draw(5, 100, torch.bfloat16)
    before = logits.clone()
    measured = cross_entropy_(logits, targets, 1e-3, False)
    assert torch.equal(logits, before)
    trained = cross_entropy_(logits, targets, 1e-3, True)
    assert all(torch.equal(a, b) for a, b in zip(measured, trained, strict=True))


def test_extremes():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [-math.inf, 3.0, 3.0], [1.0, math.nan, 2.0]])
    nats, lse = cross_entropy_(logits, torch.tensor([0, 0, 1, 0]), 0.0, True)
    assert nats[:2].tolist() == [0.0, 2e4]
    assert lse[:2].tolist() == [1e4, 1e4]
    assert logits[:2].tolist() == [[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]
    assert float(nats[2]) == pytest.approx(math.log(2), rel=2**-22)
    assert logits[2].tolist() == [0.0, -0.5, 0.5]
    assert nats[3].isnan()
    assert logits[3].isnan().all()


def test_no_rows():
    nats, lse = cross_entropy_(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 0.0, True)
    assert nats.shape == lse.shape == (0,)


def test_what_does_not_fit_is_refused():
    logits = torch.zeros(3, 5)
    with pytest.raises(IndexError, match="targets must be 0 to 4, not 0 to 5"):
        cross_entropy_(logits, torch.tensor([0, 5, 1]), 0.0, True)
    for targets in (torch.zeros(4, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="do not fit logits"):
            cross_entropy_(logits, targets, 0.0, True)
    with pytest.raises(ValueError, match="do not fit logits"):
        cross_entropy_(logits.t(), torch.zeros(5, dtype=torch.int64), 0.0, True)
