"""The fused cross-entropy against torch's in float64: values, both gradients, chunks, tokens left out, extreme logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy.linear import LossOptions
from launch.estimate import counts
from model import loss
from model.loss import linear_cross_entropy
from model.parallel import Axis

TOKENS, WORDS, WIDTH = 37, 101, 16


def inputs(scale: float = 1.0, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, weight and targets, in float64 on values that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(tokens, WIDTH, generator=generator)
    weight = torch.randn(WORDS, WIDTH, generator=generator)
    targets = torch.randint(WORDS, (tokens,), generator=generator)
    return hidden.bfloat16().double(), weight.bfloat16().double(), targets


def written_out(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(precise, targets)
    return nats + z_loss * precise.logsumexp(-1)[targets != -100].square().mean(), nats


def results(
    function, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, **more: float
) -> list[Tensor]:
    """Return objective, nats and both gradients (of 3 x the objective), computed in `dtype`, as float64."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
    objective, nats, *_ = function(*leaves, targets, **more)
    (3 * objective).backward()
    return [x.detach().double() for x in (objective, nats, leaves[0].grad, leaves[1].grad)]


def assert_equal_but_for_rounding(actual: list[Tensor], exact: list[Tensor], logits: Tensor) -> None:
    """A rounding a term of each sum, and the one of a logit that becomes a relative error of its probability."""
    roundings = 4 * (WORDS + TOKENS + logits.abs().max().item())
    for ours, expected in zip(actual, exact, strict=True):
        bound = roundings * torch.finfo(torch.float64).eps * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(ours, expected, rtol=0, atol=bound)


CASES = {
    "plain": {},
    "tokens left out": {"left_out": slice(3, 30, 4)},
    "one token counts": {"left_out": slice(1, None)},
    "z-loss": {"z_loss": 0.1},
    "z-loss, tokens left out": {"z_loss": 0.1, "left_out": slice(3, 30, 4)},
    "soft cap": {"softcap": 3.0, "z_loss": 0.1, "left_out": slice(3, 30, 4)},
    "extreme logits": {"scale": 300.0},
    "extreme logits, z-loss": {"scale": 300.0, "z_loss": 1e-3},
}


@pytest.mark.parametrize("rows", [5, 37, 256], ids=lambda rows: f"chunks of {rows}")
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(monkeypatch, case, rows):
    monkeypatch.setattr(counts, "_CHUNK_ROWS", rows)
    monkeypatch.setattr(counts, "_CHUNK_ELEMENTS", 1)
    settings = CASES[case]
    hidden, weight, targets = inputs(settings.get("scale", 1.0))
    targets[settings.get("left_out", slice(0))] = -100
    more = {"z_loss": settings.get("z_loss", 0.0), "softcap": settings.get("softcap", 0.0)}
    logits = hidden @ weight.T
    exact = results(written_out, hidden, weight, targets, torch.float64, **more)
    if settings.get("scale", 1.0) > 1:
        assert exact[1] > 1000  # far beyond the 87 nats where a probability leaves fp32
    assert_equal_but_for_rounding(
        results(linear_cross_entropy, hidden, weight, targets, torch.float64, **more), exact, logits
    )
    for dtype in (torch.float32, torch.bfloat16):
        ours = results(linear_cross_entropy, hidden, weight, targets, dtype, **more)
        theirs = results(written_out, hidden, weight, targets, dtype, **more)
        for actual, other, expected, name in zip(ours, theirs, exact, ("objective", "nats", "dh", "dw"), strict=True):
            # On top, the rounding of the sums, which are fp32, and of the result.
            precise = TOKENS * torch.finfo(torch.float32).eps * expected.norm()
            bound = (
                1.2 * (other - expected).norm() + precise + (name[0] == "d") * torch.finfo(dtype).eps * expected.norm()
            )
            assert (actual - expected).norm() <= bound, (name, dtype)


def test_the_gradient_is_that_of_the_value():
    hidden, weight, targets = inputs(tokens=5)
    hidden, weight, targets = hidden[:, :6].requires_grad_(), weight[:11, :6].requires_grad_(), targets % 11
    targets[2] = -100
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, 0.1)[0], (hidden, weight))


def test_no_valid_token_is_zero_with_zero_gradients():
    hidden, weight, targets = inputs()
    objective, nats, *gradients = results(
        linear_cross_entropy, hidden, weight, torch.full_like(targets, -100), torch.float32, z_loss=0.1
    )
    assert objective == nats == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_each_token_has_its_loss(monkeypatch):
    monkeypatch.setattr(counts, "_CHUNK_ROWS", 5)
    hidden, weight, targets = inputs(tokens=36)
    targets[3:30:4] = -100
    *_, nats = linear_cross_entropy(hidden.view(4, 9, WIDTH), weight, targets.view(4, 9))
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none").view(4, 9)
    assert torch.equal(nats == 0, targets.view(4, 9) == -100)
    torch.testing.assert_close(nats, expected, rtol=1e-13, atol=1e-13)


def test_another_number_may_stand_for_left_out():
    hidden, weight, targets = inputs()
    targets[::3] = 7
    _, nats, _ = linear_cross_entropy(hidden, weight, targets, ignore_index=7)
    assert torch.equal(nats, linear_cross_entropy(hidden[targets != 7], weight, targets[targets != 7])[1])


def test_shapes_are_kept_and_what_does_not_fit_is_refused():
    hidden, weight, targets = inputs(tokens=36)
    flat = linear_cross_entropy(hidden, weight, targets)[0]
    assert torch.equal(flat, linear_cross_entropy(hidden.view(4, 9, WIDTH), weight, targets.view(4, 9))[0])
    leaf = hidden.view(4, 9, WIDTH).clone().requires_grad_()
    linear_cross_entropy(leaf, weight, targets.view(4, 9))[0].backward()
    assert leaf.grad.shape == leaf.shape
    for wrong in ((hidden, weight, targets[1:]), (hidden, weight[:, 1:], targets), (hidden, weight[0], targets)):
        with pytest.raises(ValueError, match="do not match"):
            linear_cross_entropy(*wrong)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(frozen):
    hidden, weight, targets = inputs()
    expected = results(linear_cross_entropy, hidden, weight, targets, torch.float64)
    leaves = {"hidden": hidden.clone(), "weight": weight.clone()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    (3 * linear_cross_entropy(*leaves.values(), targets)[0]).backward()
    assert leaves[frozen].grad is None
    learned, index = (leaves["weight"], 3) if frozen == "hidden" else (leaves["hidden"], 2)
    torch.testing.assert_close(learned.grad, expected[index], rtol=1e-15, atol=0)


def test_evaluation_is_the_same_value_without_a_graph():
    hidden, weight, targets = inputs()
    with_graph = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(with_graph[1], without[1])
    assert torch.equal(with_graph[2], without[2])
    assert with_graph[0].requires_grad
    assert not with_graph[2].requires_grad
    assert not without[0].requires_grad
    assert not with_graph[1].requires_grad


def test_the_matrix_of_logits_never_exists(monkeypatch):
    """No tensor that the forward pass keeps or makes is as large as all logits."""
    monkeypatch.setattr(counts, "_CHUNK_ROWS", 4)
    monkeypatch.setattr(counts, "_CHUNK_ELEMENTS", 1)
    hidden, weight, targets = inputs()

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    leaf, output = hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as largest:
        linear_cross_entropy(leaf, output, targets)[0].backward()
    assert largest.elements == max(WORDS * WIDTH, TOKENS * WIDTH, 4 * WORDS) < TOKENS * WORDS


class PlainKernels:
    """What the Triton kernels of a sharded vocabulary do, in plain PyTorch; the real ones are in tests/kernels."""

    @staticmethod
    def measure(
        logits: Tensor, targets: Tensor, first: int, ignore_index: int, softcap: float
    ) -> tuple[Tensor, Tensor]:
        ignored, own = targets == ignore_index, (targets - first).clamp(0, logits.shape[1] - 1)
        here = (targets - first == own) & ~ignored
        y = softcap * torch.tanh(logits / softcap) if softcap else logits
        return y.logsumexp(1).where(~ignored, 0), y.gather(1, own[:, None])[:, 0].where(here, 0)

    @staticmethod
    def differentiate_(
        logits: Tensor, targets: Tensor, lse: Tensor, first: int, ignore_index: int, z_loss: float, softcap: float
    ) -> None:
        x = logits.clone().requires_grad_()
        y = softcap * torch.tanh(x / softcap) if softcap else x
        p = (y.detach() - lse[:, None]).exp() * (1 + 2 * z_loss * lse[:, None])
        own = targets - first
        here = (own >= 0) & (own < logits.shape[1])
        p[here.nonzero()[:, 0], own[here]] -= 1
        (gradient,) = torch.autograd.grad((y * p).sum(), x)
        logits.copy_(gradient * (targets != ignore_index)[:, None])


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_fused_path_over_a_sharded_vocabulary_is_the_plain_one(monkeypatch, softcap):
    monkeypatch.setattr(loss, "all_gather", lambda x, _: SimpleNamespace(wait=lambda: x))  # of one rank
    hidden, weight, targets = inputs()
    targets[3:30:4] = -100
    options, logits = LossOptions(0.1, -100, softcap), hidden @ weight.T
    plain, fused = logits.clone(), logits.clone()
    expected = loss._vocab_parallel_plain_(plain, targets, True, options, torch.empty_like(logits), Axis())
    actual = loss._vocab_parallel_fused_(fused, targets, True, options, PlainKernels, Axis())
    for ours, reference in zip((*actual, fused), (*expected, plain), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-14)
