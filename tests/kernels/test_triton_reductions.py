"""Triton's kernels of formulas that reduce over d_ff: in the interpreter, and what the compiler makes of them for Hopper."""

from __future__ import annotations

import importlib.util
import itertools
import unittest.mock

import pytest
import torch
from poisoned import Poisoned
from reducing import REDUCING
from torch import Tensor

from bench.formulas import formulas
from kernels import activation, parse
from kernels.activations import reference, triton_backend
from kernels.activations.reductions import begin_adjoints, reduce_over
from kernels.activations.triton_rows import source_of_rows
from kernels.formula.compiled import Compiled, compile_formula
from kernels.triton import runtime
from tests.kernels.test_reductions import DISTINCT, inputs
from tests.kernels.test_telemetry import assert_stats
from tests.selection import quick

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ALL = REDUCING | {name: formula for name, formula in formulas().items() if parse(*formula).reduces}
EPS = 2.0**-24


def assert_near(compiled: Compiled, computed: Tensor, exact: Tensor, what: str) -> None:
    """Each operation rounds by at most half a unit, and a sum in a tree adds one for each of its levels."""
    passes = (*compiled.reductions.forward, *compiled.reductions.backward)
    operations = sum(len(each.program.lines) + 16 for each in passes) + len(compiled.backward_with_h.lines)
    error = (computed.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error <= operations * EPS, f"{what}: {float(error):.3g}"


def check(name: str, width: int, tiles: bool) -> None:
    """Run the kernels of a formula: rows in registers or in tiles, then pass by pass as tensor ranks do."""
    function = activation(*ALL[name], backend="triton")
    compiled = function.compiled
    pre, dh, learned = inputs(function, 5, width, torch.float32)
    exact = [tensor.double() for tensor in learned]
    dpre, h, totals = reference.backward(compiled, pre.double(), dh.double(), exact, True)
    assert h is not None
    kernels = triton_backend.kernels_of(compiled)
    longest = unittest.mock.patch.multiple(
        triton_backend, LONGEST_FORWARD=0 if tiles else width, LONGEST_BACKWARD=0 if tiles else width
    )
    with longest, Poisoned() as poisoned, unittest.mock.patch.object(triton_backend, "_SUMS", 2):
        pre, dh, learned = poisoned.copy(pre), poisoned.copy(dh), [poisoned.copy(each) for each in learned]
        alone = kernels.backward(compiled, pre, dh, learned, False)
        assert alone[1] is None
        both = kernels.backward(compiled, pre, dh, learned, True)
        forward = kernels.forward(compiled, pre, learned)
        reduced = reduce_over(kernels, compiled, pre, learned)
        again, finish = begin_adjoints(kernels, compiled, pre, dh, learned, reduced, True)
        stepwise = kernels.backward(compiled, pre, dh, learned, False, reduced, finish())
        mapped = kernels.forward(compiled, pre, learned, reduced)
    for what, each in {"h": forward, "h of backward": both[1], "h of a pass": again, "h of a map": mapped}.items():
        assert each is not None
        assert_near(compiled, each, h, what)
    for what, (dx, _, dlearned) in {"alone": alone, "with h": both, "stepwise": stepwise}.items():
        assert_near(compiled, dx, dpre, f"gradient, {what}")
        for parameter, mine, theirs in zip(compiled.formula.learned, dlearned, totals, strict=True):
            scale = dh.square().sum().sqrt()  # a sum over all elements, which may cancel
            assert (mine.double() - theirs).abs().max() <= 64 * EPS * scale * pre.abs().max(), f"d{parameter}, {what}"


def check_short(name: str) -> None:
    """The forms for 16 bits, with fp32 tensors: what they round is at most 2**-17 in each operation."""
    function = activation(*ALL[name], backend="triton")
    compiled = function.compiled
    pre, dh, learned = inputs(function, 5, 700, torch.float32)
    text, fp32 = source_of_rows(compiled), "PRECISE: tl.constexpr = pre.dtype.element_ty == tl.float32"
    assert fp32 in text
    assert "fn.quotient(" in text
    kernels = triton_backend.TritonRowKernels(compiled)
    kernels.rows = runtime.load(text.replace(fp32, "PRECISE: tl.constexpr = False"))
    dpre, h, _ = kernels.backward(compiled, pre, dh, learned, True)
    exact, h64, _ = reference.backward(compiled, pre.double(), dh.double(), [each.double() for each in learned], True)
    assert h is not None
    assert h64 is not None
    for mine, theirs in ((h, h64), (dpre, exact)):
        error = (mine.double() - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error <= len(compiled.backward_with_h.lines) * 2.0**-17


def check_statistics(name: str) -> None:
    function = activation(*ALL[name], backend="triton")
    pre, _, learned = inputs(function, 5, 127, torch.float32)
    kernels = triton_backend.kernels_of(function.compiled)
    h = kernels.forward(function.compiled, pre, learned)
    same, batch = kernels.forward_with_stats(function.compiled, pre, learned)
    assert torch.equal(h, same)
    assert_stats(function, pre, learned, h, batch)


def check_nan_and_ties() -> None:
    function = activation("max(x) + 0*x", backend="triton")
    for width, tiles in itertools.product((40, 1500), (False, True)):
        x = torch.zeros(3, width)
        x[0, [5, 17, width - 1]] = 3.0
        x[1] = -float("inf")
        x[2, [7, 9]] = float("nan")
        longest = {"LONGEST_FORWARD": 0, "LONGEST_BACKWARD": 0} if tiles else {}
        with unittest.mock.patch.multiple(triton_backend, **longest) if longest else unittest.mock.MagicMock():
            dpre, h, _ = function.backward(x, torch.ones_like(x), [], with_h=True)
        assert h is not None
        assert dpre[0].nonzero().tolist() == [[5]]
        assert (h[0] == 3).all()
        assert h[2].isnan().all()


@pytest.mark.parametrize("tiles", [False, True], ids=["registers", "tiles"])
@pytest.mark.parametrize("name", quick(ALL, *DISTINCT))
def test_every_formula_in_fp32(interpreter, name, tiles):
    interpreter.submit(check, name, 1100, tiles).result()


@pytest.mark.parametrize("name", ["polynorm", "softmax"])
def test_the_short_forms_for_16_bits(interpreter, name):
    interpreter.submit(check_short, name).result()


@pytest.mark.parametrize("width", [1, 7, 8, 127])
def test_every_width(interpreter, width):
    interpreter.submit(check, "topk" if width > 1 else "sum", width, False).result()


@pytest.mark.parametrize("name", quick(ALL, "polynorm", "products"))
def test_statistics_from_inside_the_forward_kernel(interpreter, name):
    interpreter.submit(check_statistics, name).result()


def test_a_nan_fills_its_row_and_the_first_of_equal_maxima_has_the_gradient(interpreter):
    interpreter.submit(check_nan_and_ties).result()


@pytest.mark.parametrize("name", quick(ALL, "polynorm"))  # with learned parameters, and more reductions than the others
def test_rows_in_registers_do_not_spill_on_hopper(name):
    from bench.sm90 import offline

    for kernel in offline(compile_formula(parse(*ALL[name]))):
        assert not kernel.spilled, kernel
        assert kernel.loads in (128, 0), kernel
        assert kernel.stores == 128, kernel
