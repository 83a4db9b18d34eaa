"""The kernels of softmax cross-entropy: error beside plain PyTorch's, every width, extremes, and what lies around a row.

In C on this machine; in Triton in the interpreter, and compiled for Hopper.
"""

from __future__ import annotations

import importlib.util
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from poisoned import Poisoned
from torch import Tensor

from kernels.cross_entropy import cross_entropy, cross_entropy_
from tests.selection import quick

pytestmark = pytest.mark.skipif(cross_entropy._library() is None, reason="no C compiler")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
IGNORED = -100
DTYPES = (torch.float32, torch.bfloat16)


def draw(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def plain(
    logits: Tensor, targets: Tensor, z_loss: float, dtype: torch.dtype, softcap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return nats, log-sum-exp and the gradient as autograd has them, computed in `dtype`; 0 where the target is IGNORED."""
    leaf = logits.to(dtype).requires_grad_()
    capped = softcap * torch.tanh(leaf / softcap) if softcap else leaf
    nats = F.cross_entropy(capped, targets, reduction="none", ignore_index=IGNORED)
    lse = capped.logsumexp(-1).where(targets != IGNORED, 0)
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


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("vocabulary", [1, 7, 16, 33, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_and_a_soft_cap(dtype, vocabulary, softcap):
    check_ignored_rows_and_a_soft_cap(dtype, vocabulary, softcap)


def check_ignored_rows_and_a_soft_cap(dtype: torch.dtype, vocabulary: int, softcap: float, rows: int = 9) -> None:
    logits, targets = draw(rows, vocabulary, dtype)
    targets[::3] = IGNORED
    exact = plain(logits, targets, 1e-3, torch.float64, softcap)
    eps, fp32 = torch.finfo(dtype).eps, 2.0**-23
    with Poisoned() as poisoned:
        given = poisoned.copy(logits)
        nats, lse = cross_entropy_(given, targets, 1e-3, True, IGNORED, softcap)
    torch.testing.assert_close(nats.double(), exact[0], rtol=4 * fp32, atol=32 * fp32)
    torch.testing.assert_close(lse.double(), exact[1], rtol=4 * fp32, atol=4 * fp32)
    # The slope of the cap, 1 - tanh^2, is small where the cap is reached, and rounds as its argument does.
    torch.testing.assert_close(given.double(), exact[2], rtol=eps / 2 + (64 if softcap else 32) * fp32, atol=4 * fp32)
    assert not given[::3].any()
    assert not nats[::3].any()


def test_an_ignored_row_may_hold_anything():
    logits = torch.tensor([[math.nan, math.inf], [1.0, 2.0]])
    nats, lse = cross_entropy_(logits, torch.tensor([IGNORED, 0]), 1e-3, True)
    assert (nats[0], lse[0]) == (0, 0)
    assert logits[0].tolist() == [0, 0]
    assert logits[1].isfinite().all()


def test_no_rows():
    nats, lse = cross_entropy_(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 0.0, True)
    assert nats.shape == lse.shape == (0,)


def test_what_does_not_fit_is_refused():
    logits = torch.zeros(3, 5)
    for wrong in (5, -1):
        with pytest.raises(IndexError, match=f"targets must be 0 to 4 or -100, not {wrong}"):
            cross_entropy_(logits, torch.tensor([0, wrong, IGNORED]), 0.0, True)
    for targets in (torch.zeros(4, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="do not fit logits"):
            cross_entropy_(logits, targets, 0.0, True)
    with pytest.raises(ValueError, match="do not fit logits"):
        cross_entropy_(logits.t(), torch.zeros(5, dtype=torch.int64), 0.0, True)


# --------------------------------------------------------------------------------------------------------------- in Triton


def check_triton() -> None:
    """In the interpreter: every width, several blocks of columns, extremes, and the two launches of a sharded vocabulary."""
    from kernels.cross_entropy import triton as kernels

    cross_entropy.triton_kernels = lambda _: kernels
    kernels.COLUMNS = 128
    for vocabulary, softcap in ((1, 0.0), (33, 0.0), (129, 0.0), (300, 5.0)):
        check_ignored_rows_and_a_soft_cap(torch.float32, vocabulary, softcap, rows=3)
    test_extremes()
    test_an_ignored_row_may_hold_anything()
    test_no_rows()
    test_only_measuring_leaves_the_logits_alone()
    far = torch.full((2, 300), -math.inf)  # a block of nothing but -inf comes first
    far[:, 290:] = torch.arange(10.0)
    nats, _ = cross_entropy_(far.clone(), torch.tensor([295, 299]), 0.0, True)
    torch.testing.assert_close(nats, F.cross_entropy(far, torch.tensor([295, 299]), reduction="none"))
    outside, _ = cross_entropy_(torch.zeros(2, 5), torch.tensor([5, 0]), 0.0, True)
    assert outside.isnan().tolist() == [True, False]
    for softcap in (0.0, 5.0):
        check_sharded(kernels, softcap)


def check_sharded(kernels, softcap: float) -> None:
    logits, targets = draw(4, 300, torch.float32)
    targets[::3] = IGNORED
    exact = plain(logits, targets, 1e-3, torch.float64, softcap)
    shards = [shard.contiguous() for shard in logits.split(100, 1)]
    parts = [kernels.measure(shard, targets, 100 * i, IGNORED, softcap) for i, shard in enumerate(shards)]
    lse = torch.stack([part[0] for part in parts]).logsumexp(0).where(targets != IGNORED, 0)
    nats = lse - sum(part[1] for part in parts)
    for i, shard in enumerate(shards):
        kernels.differentiate_(shard, targets, lse, 100 * i, IGNORED, 1e-3, softcap)
    fp32 = 2.0**-23
    torch.testing.assert_close(nats.double(), exact[0], rtol=4 * fp32, atol=32 * fp32)
    torch.testing.assert_close(torch.cat(shards, 1).double(), exact[2], rtol=64 * fp32, atol=4 * fp32)


@needs_triton
def test_triton_in_the_interpreter(interpreter):
    interpreter.submit(check_triton).result()


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "sharded"),  # a dtype changes the loads and stores alone
    quick(itertools.product(["bf16", "fp32"], [False, True]), ("bf16", True), ("fp32", False)),
)
def test_machine_code_for_hopper(dtype, sharded):
    """No spills, and rows read and written 128 bits at a time."""
    from bench.sm90 import machine_code
    from kernels.cross_entropy.triton import COLUMNS, WARPS, cross_entropy_kernel

    tensors = {"logits": f"*{dtype}", "targets": "*i64", "nats": "*fp32", "lse": "*fp32"}
    numbers = {"width": "i32", "first": "i64", "ignore": "i64", "z_loss": "fp32", "cap": "fp32"}
    kinds = tensors | numbers
    kinds |= {name: "constexpr" for name in cross_entropy_kernel.arg_names if name.isupper()}
    for measure, differentiate in ((True, False), (False, True)) if sharded else ((True, True),):
        constants = {"MEASURE": measure, "DIFFERENTIATE": differentiate, "SHARDED": sharded, "CAPPED": False}
        code = machine_code(cross_entropy_kernel, kinds, constants | {"COLUMNS": COLUMNS}, WARPS, {"width"})
        assert not code.spilled
        assert code.bits("LDG").count(128) >= measure + differentiate
        assert code.bits("STG").count(128) >= differentiate
