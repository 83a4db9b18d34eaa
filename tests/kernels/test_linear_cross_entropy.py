"""The output projection with its cross-entropy: error beside plain PyTorch, chunks, ignored tokens, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_cross_entropy

N, D, V = 60, 32, 300
RATIO = 1.1  # both round each product and each gradient once; the errors are norms over thousands of elements
Z_LOSS = 1e-2


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator).to(dtype) for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    targets[::7] = -100
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    squares = logits.logsumexp(-1)[targets != -100].square().mean()
    return F.cross_entropy(logits, targets) + Z_LOSS * squares


def fused(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 16) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, z_loss=Z_LOSS, chunk=chunk)


def results(function, dtype: torch.dtype, precision: torch.dtype) -> list[Tensor]:
    hidden, weight, targets = draw(dtype)
    leaves = [tensor.to(precision).requires_grad_() for tensor in (hidden, weight)]
    loss = function(*leaves, targets)
    assert loss.dtype == torch.promote_types(precision, torch.float32)
    return [loss.detach().double(), *(gradient.double() for gradient in torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_errs_as_plain_pytorch_does(dtype):
    exact, own, written = (
        results(plain, dtype, torch.float64),
        results(fused, dtype, dtype),
        results(plain, dtype, dtype),
    )
    # The loss is one number: the mean of N rows, each of which has the rounding of a logit.
    assert (own[0] - exact[0]).abs() <= 4 * torch.finfo(dtype).eps * exact[0]
    for ours, theirs, reference in zip(own[1:], written[1:], exact[1:], strict=True):
        assert (ours - reference).norm() <= RATIO * (theirs - reference).norm()


def test_in_float64_it_is_the_same_in_chunks_of_any_size():
    exact = results(plain, torch.float64, torch.float64)
    for chunk in (1, 7, N, 10 * N):
        own = results(lambda *a, chunk=chunk: fused(*a, chunk=chunk), torch.float64, torch.float64)
        for ours, reference in zip(own, exact, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-14)


def test_what_is_not_needed_is_not_computed():
    hidden, weight, targets = draw(torch.float32)
    whole = results(fused, torch.float32, torch.float32)
    for leaf, expected in ((hidden, whole[1]), (weight, whole[2])):
        leaf.requires_grad_()
        fused(hidden, weight, targets).backward()
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=0, atol=0)
        leaf.requires_grad_(False)
    assert fused(hidden, weight, targets).grad_fn is None
    hidden.requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(fused(hidden, weight, targets).double(), whole[0], rtol=0, atol=0)


def test_leading_dimensions_and_no_tokens():
    hidden, weight, targets = draw(torch.float32)
    nested = linear_cross_entropy(hidden.view(3, 20, D), weight, targets.view(3, 20))
    assert torch.equal(nested, linear_cross_entropy(hidden, weight, targets))
    assert linear_cross_entropy(hidden, weight, torch.full_like(targets, -100)) == 0
    assert linear_cross_entropy(hidden[:0], weight, targets[:0]) == 0


def test_one_token_without_leading_dimensions():
    hidden, weight, targets = draw(torch.float32)
    token = hidden[0].detach().requires_grad_()
    linear_cross_entropy(token, weight, targets[0]).backward()
    rows = hidden[:1].detach().requires_grad_()
    linear_cross_entropy(rows, weight, targets[:1]).backward()
    assert token.grad is not None
    assert rows.grad is not None
    assert torch.equal(token.grad, rows.grad[0])


def test_refusals():
    hidden, weight, targets = draw(torch.float32)
    for wrong in ((hidden[1:], weight, targets), (hidden, weight[:, 1:], targets), (hidden, weight.double(), targets)):
        with pytest.raises(ValueError, match="do not match"):
            linear_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="do not match"):
        linear_cross_entropy(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="do not match"):
        linear_cross_entropy(hidden[0, 0], weight, targets[0])
    with pytest.raises(ValueError, match="chunk is a positive number"):
        linear_cross_entropy(hidden, weight, targets, chunk=0)
