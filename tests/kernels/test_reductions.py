"""Reductions over d_ff: their grammar, their derivatives on every backend, and over tensor ranks."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reducing import REDUCING
from torch import Tensor

from bench.conformance import CAP, _errors
from bench.edge_cases import draw, edge_cases
from kernels import FormulaError, activation, parse
from kernels.activations import Activation
from kernels.activations.eager import plain
from kernels.activations.properties import bytes_moved
from kernels.activations.reductions import WidthRanks
from kernels.activations.triton_rows import source_of_rows
from kernels.formula.compiled import compile_formula
from kernels.formula.domains import Domains, check_domains, ranges_of
from kernels.formula.gaussian import gaussian_reductions, gaussian_std
from tests.selection import quick

DISTINCT = ("topk", "softmax", "polynorm", "channel", "products")


def inputs(function: Activation, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return pre-activations, a gradient of h, and learned parameters."""
    generator = torch.Generator().manual_seed(width)
    pre = 2 * torch.randn((rows, 2, width) if function.formula.gated else (rows, width), generator=generator)
    shares = (p.share for p in function.formula.learned.values())
    learned = [torch.rand(width if share == "channel" else 1, generator=generator) for share in shares]
    dh = torch.randn(rows, width, generator=generator)
    return pre.to(dtype), dh.to(dtype), [value.to(torch.promote_types(dtype, torch.float32)) for value in learned]


# ------------------------------------------------------------------------------------------------------------- the grammar


@pytest.mark.parametrize(
    ("text", "reason", "under"),
    [
        ("x/rms(x)", "the division can hit zero: give rms an epsilon, as in rms(x, 1e-06)", "rms(x)"),
        ("x/std(x)", "the division can hit zero: give std an epsilon", "std(x)"),
        ("x/mean(abs(x))", "the division can hit zero", "mean(abs(x))"),
        ("log(sum(x**2))*x", "log requires an argument above 0", "sum(x**2))"),
        ("sqrt(mean(x**2))*x", "sqrt requires an argument above 0", "mean(x**2))"),
        ("x*std(x, 0)", "the epsilon of std must be a number above 0", "0)"),
        ("x*norm(x, -1)", "the epsilon of norm must be a number above 0", "-1)"),
        ("x*norm(x, x)", "the epsilon of norm must be a number above 0", "x)"),
        ("mean(2)*x", "mean of what is the same in every channel: write it without", "2)*x"),
        ("max(mean(x) + 1)*x", "max of what is the same in every channel", "+ 1)*x"),
        (
            "norm(norm(norm(x)))",
            "reductions are nested at most once: this norm is the outermost of 3",
            "norm(norm(norm",
        ),
        ("mean(x, 2)*x", "mean takes 1 argument, not 2", "mean(x, 2)"),
        ("std(x, 1, 2)*x", "std takes 1 argument, or a second one, its epsilon, not 3", "std(x, 1, 2)"),
        ("x*norm", "expected '(' after norm", ""),
        ("mean(x > 0)*x", "a comparison can only be the first argument of where", "> 0"),
        ("average(x)*x", "did you mean 'mean'?", "average(x)"),
        ("layer_norm(x)", "write (x - mean(x))/std(x, 1e-6)", "layer_norm(x)"),
    ],
)
def test_what_cannot_be_reduced_is_refused_with_a_caret_under_the_place(text, reason, under):
    with pytest.raises(FormulaError, match=None) as refusal:
        check_domains(parse(text))
    assert reason in refusal.value.reason
    assert text[refusal.value.place :].startswith(under)


def test_a_parameter_of_the_layer_is_the_same_in_every_channel():
    parameters = {"b": {"init": 1.0}}
    with pytest.raises(FormulaError, match="mean of what is the same in every channel"):
        parse("x*mean(b)", parameters)
    parse("x*mean(b)", {"b": {"init": 1.0, "share": "channel"}})


def test_a_name_of_a_reduction_is_no_parameters():
    with pytest.raises(FormulaError, match="cannot be named 'norm': that name is taken"):
        parse("x*norm", {"norm": 1.0})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("silu(gate)*up", {}),
        ("x*norm(x) + rms(x, 1e-6)*x", [1]),
        ("x*norm(x) + rms(x)*x", [1, 1]),
        ("x*std(x)*std(  x )*max(x)", [2, 2]),
    ],
)
def test_equal_reductions_are_counted_and_computed_once(text, kept):
    formula = parse(text)
    assert list(formula.reductions.values()) == list(kept)
    assert [len(r.names) for r in compile_formula(formula).reductions.all] == list(kept)


def test_intervals_hold_what_rows_reduce_to():
    generator = torch.Generator().manual_seed(0)
    for name, inner, width in itertools.product(
        ("mean", "sum", "max", "min", "rms", "std", "norm"), ("x", "x**2", "exp(min(x, 3))", "x - 3"), (1, 2, 50)
    ):
        formula = parse(f"{name}({inner})*x")
        node = formula.tree.arguments[0]
        low, high = Domains(formula).of(node, ranges_of(formula))
        for scale in (0.0, 1e-3, 1.0, 3e3):
            x = (scale * torch.randn(1, width, generator=generator, dtype=torch.float64)).clamp(-1e4, 1e4)
            values = plain(formula)(x)[x != 0] / x[x != 0]
            slack = 1e-9 * (1 + values.abs())
            assert ((low - slack <= values) & (values <= high + slack)).all(), (name, inner, width, scale)


def test_sums_that_overflow_in_32_bits_are_refused_with_the_row():
    with pytest.raises(
        FormulaError, match=r"a reduction gives inf in 32-bit arithmetic in a token with x = 10000 in every"
    ):
        compile_formula(parse("norm(x**5)"))
    with pytest.raises(FormulaError, match="in 32-bit arithmetic in a token with"):
        compile_formula(parse("mean(exp(x))/(1 + mean(exp(x)))*x"))


# ------------------------------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("name", REDUCING)
def test_the_reference_in_float64_is_what_autograd_computes(name):
    formula, parameters = REDUCING[name]
    function = activation(formula, parameters, "reference")
    pre, dh, learned = inputs(function, 5, 17, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (pre, *learned)]
    named = dict(zip(function.formula.learned, learned, strict=True))
    expected, h = plain(function.formula)(pre, **named), function(pre, **named)
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(*(torch.autograd.grad(value, leaves, dh) for value in (h, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["norm", "topk", "softmax", "twice", "products"])
def test_gradients_are_those_of_finite_differences(name):
    formula, parameters = REDUCING[name]
    function = activation(formula, parameters, "reference")
    pre, _, learned = inputs(function, 2, 5, torch.float64)
    named = list(function.formula.learned)
    leaves = [tensor.requires_grad_() for tensor in (pre, *learned)]
    assert torch.autograd.gradcheck(lambda pre, *rest: function(pre, **dict(zip(named, rest, strict=True))), leaves)


# Each of these formulas on each backend and in each dtype once, and the cheapest on both in both.
_SOME = [(name, backend, torch.float32) for name in ("topk", "softmax") for backend in ("reference", "c")]
_SOME += [("polynorm", "reference", torch.float32), ("polynorm", "c", torch.bfloat16)]
_SOME += [("products", "reference", torch.bfloat16), ("products", "c", torch.float32)]
_SOME += [(name, backend, torch.bfloat16) for name in ("topk", "softmax") for backend in ("reference", "c")]


@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    quick(
        itertools.product(filter("channel".__ne__, REDUCING), ["reference", "c"], [torch.float32, torch.bfloat16]),
        *_SOME,
    ),
    ids=str,
)
def test_the_error_is_at_most_that_of_plain_torch(name, backend, dtype):
    formula, parameters = REDUCING[name]
    seeds = range(16) if parameters else range(1)  # a parameter's gradient is one number, and its error is noise
    draws = [draw(formula, parameters, backend, dtype, seed, 128, "cpu") for seed in seeds]
    for result, mine, theirs, ratio in _errors(draws, dtype):
        assert ratio <= CAP, (result, mine, theirs)
    outcomes = dict(edge_cases(draws[0], dtype))
    assert set(outcomes.values()) == {"ok"}, outcomes


@pytest.mark.parametrize("backend", ["reference", "c"])
@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize(
    "text", ["x*norm(x)", "x*rms(x)", "x*std(x)", "norm(relu(gate)*up)", "relu(gate - std(gate))*up"]
)
def test_rows_of_one_value_have_finite_gradients(text, value, backend):
    function = activation(text, backend=backend)
    pre, dh, _ = inputs(function, 3, 40, torch.float32)
    pre[1] = value
    dpre, h, _ = function.backward(pre, dh, [], with_h=True)
    assert h is not None
    assert h.isfinite().all()
    assert dpre.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "c"])
@pytest.mark.parametrize(("text", "value"), [("max(x) + 0*x", 3.0), ("min(x) + 0*x", -3.0)])
def test_the_first_of_equal_maxima_has_the_gradient(text, value, backend):
    function = activation(text, backend=backend)
    x = torch.zeros(1, 41)
    x[0, [5, 17, 40]] = value
    dpre, _, _ = function.backward(x, torch.ones_like(x), [], with_h=False)
    assert dpre.nonzero().tolist() == [[0, 5]]
    assert dpre[0, 5] == 41


@pytest.mark.parametrize("backend", ["reference", "c"])
@pytest.mark.parametrize("name", REDUCING)
def test_a_nan_fills_its_row_and_no_other(name, backend):
    formula, parameters = REDUCING[name]
    function = activation(formula, parameters, backend)
    pre, dh, learned = inputs(function, 3, 40, torch.float32)
    pre.view(3, -1, 40)[1, 0, 33] = math.nan
    h = function.forward(pre, learned)
    assert h[1].isnan().all()
    assert h[[0, 2]].isfinite().all()
    dpre, _, _ = function.backward(pre, dh, learned, with_h=False)
    assert dpre[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", quick(REDUCING, *DISTINCT))
def test_statistics_of_the_c_kernel_are_those_of_the_reference(name):
    formula, parameters = REDUCING[name]
    ours, theirs = (activation(formula, parameters, backend) for backend in ("c", "reference"))
    pre, _, learned = inputs(ours, 7, 4100, torch.float32)
    h, stats = ours.forward_with_stats(pre, learned)
    assert torch.equal(h, ours.forward(pre, learned))
    _, expected = theirs.forward_with_stats(pre, learned)
    # Counts may differ where a slope is within a rounding of the threshold.
    torch.testing.assert_close(stats.sums, expected.sums.float(), rtol=1e-4, atol=2.0)
    torch.testing.assert_close(stats.peak, expected.peak.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_package_compiles_with_torch_compile(backend):
    function = activation("x*norm(x**2)")
    x = torch.randn(4, 64, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), function(x))
    (mine,), (theirs,) = (torch.autograd.grad(f(x).square().sum(), [x]) for f in (compiled, function))
    torch.testing.assert_close(mine, theirs)


# ------------------------------------------------------------------------------------------------------- over tensor ranks


class Meeting:
    """Exchanges of threads that stand for tensor ranks; `messages` counts them."""

    def __init__(self, size: int) -> None:
        self.size, self.messages = size, 0
        self.barrier = threading.Barrier(size)
        self.parts: list[Any] = [None] * size

    def ranks(self, rank: int) -> WidthRanks:
        def gather(partial: Tensor) -> Callable[[], Tensor]:
            self.parts[rank] = partial
            if self.barrier.wait() == 0:
                self.messages += 1
            gathered = torch.stack(self.parts)
            self.barrier.wait()
            return lambda: gathered

        return WidthRanks(rank, self.size, gather)


def over_ranks(function: Activation, size: int, pre: Tensor, dh: Tensor, learned: list[Tensor]) -> tuple[Any, Meeting]:
    """Return h, its second computation, and the gradients of pre and of learned parameters, of ranks that share the width."""
    meeting, results = Meeting(size), [None] * size
    shares = [p.share for p in function.formula.learned.values()]

    def work(rank: int) -> None:
        mine = [
            value.chunk(size)[rank] if share == "channel" else value
            for value, share in zip(learned, shares, strict=True)
        ]
        shard, gradient = pre.chunk(size, -1)[rank].contiguous(), dh.chunk(size, -1)[rank].contiguous()
        ranks = meeting.ranks(rank)
        reduced = function.reduce(shard, mine, ranks)
        assert reduced is not None
        h = function.forward(shard, mine, reduced)
        again, finish = function.begin_backward(shard, gradient, mine, reduced, True, ranks)
        results[rank] = (h, again, *function.backward(shard, gradient, mine, False, reduced, finish())[::2])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    h, again, dpre, dlearned = zip(*results, strict=True)
    totals = [
        torch.cat(parts) if share == "channel" else torch.stack(parts).sum(0)
        for parts, share in zip(zip(*dlearned, strict=True), shares, strict=True)
    ]
    return (*(torch.cat(parts, -1) for parts in (h, again, dpre)), totals), meeting


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", ["reference", "c"])
@pytest.mark.parametrize("name", REDUCING)
def test_ranks_that_share_the_width_compute_what_one_computes(name, backend, size):
    formula, parameters = REDUCING[name]
    function = activation(formula, parameters, backend)
    dtype = torch.float64 if backend == "reference" else torch.float32
    pre, dh, learned = inputs(function, 6, 44, dtype)
    dpre, h, dlearned = function.backward(pre, dh, learned, with_h=True)
    (shared, again, dshared, dtotals), meeting = over_ranks(function, size, pre, dh, learned)
    close = {"rtol": 1e-10, "atol": 1e-10} if backend == "reference" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(shared, h, **close)
    torch.testing.assert_close(again, h, **close)
    torch.testing.assert_close(dshared, dpre, **close)
    for mine, theirs in zip(dtotals, dlearned, strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    reductions = function.compiled.reductions
    assert meeting.messages == len(reductions.forward) + len(reductions.backward), "one message a pass"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", quick(filter("channel".__ne__, REDUCING), "topk", "polynorm"))
def test_the_error_of_ranks_is_at_most_that_of_plain_torch(name, size, dtype):
    formula, parameters = REDUCING[name]
    case = draw(formula, parameters, "c", dtype, 1, 64, "cpu")
    exact, torchs = case.results(case.plain, torch.float64), case.results(case.plain, dtype)
    (h, _, dpre, _), _ = over_ranks(case.function, size, case.pre, case.dh, list(case.learned.values()))
    mine = {"h": h} | ({"dgate": dpre[:, 0], "dup": dpre[:, 1]} if case.gated else {"dx": dpre})
    for what, value in mine.items():
        ours, theirs = (float((each.double() - exact[what]).square().mean()) for each in (value, torchs[what]))
        assert ours <= CAP**2 * theirs, (what, math.sqrt(ours / theirs))


@pytest.mark.parametrize("size", [2, 4])
def test_the_first_of_equal_maxima_over_ranks_has_the_gradient(size):
    function = activation("max(x) + 0*x", backend="c")
    x = torch.zeros(1, 40)
    x[0, [15, 17, 39]] = 3.0
    (_, _, dpre, _), _ = over_ranks(function, size, x, torch.ones_like(x), [])
    assert dpre.nonzero().tolist() == [[0, 15]]
    assert dpre[0, 15] == 40


def test_numbers_of_other_rows_are_refused():
    function = activation("x*std(x)", backend="c")
    x, ranks = torch.randn(4, 8), Meeting(1).ranks(0)._replace(size=2)
    with pytest.raises(ValueError, match=r"reduced must be \(4, 2\) torch.float32 on cpu and contiguous, not \(3, 2\)"):
        function.forward(x, [], torch.zeros(3, 2))
    with pytest.raises(ValueError, match="and contiguous"):
        function.forward(x, [], torch.zeros(2, 4).T)
    with pytest.raises(ValueError, match=r"adjoints must be \(4, 1\)"):
        function.backward(x, x, [], reduced=torch.zeros(4, 2), adjoints=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="reduced must be"):
        function.begin_backward(x, x, [], torch.zeros(4, 1), False, ranks)


# ---------------------------------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("name", REDUCING)
def test_a_row_in_registers_is_read_once(name):
    compiled = compile_formula(parse(*REDUCING[name]))
    text = source_of_rows(compiled)
    for kernel in ("forward_row", "backward_row", "backward_row_with_h"):
        body = text.split(f"def {kernel}(")[1].split("@triton.jit")[0]
        streams = len(compiled.formula.pre_activations)
        assert body.count("tl.load(pre ") == streams
        assert body.count("tl.load(dh ") == ("backward" in kernel)
        moved = {"forward_row": "forward", "backward_row": "backward", "backward_row_with_h": "backward with h"}[kernel]
        written = sum(body.count(f"tl.store({name} ") for name in ("h", "dpre"))
        assert streams + ("backward" in kernel) + written == bytes_moved(compiled.formula, 1)[moved]


# ------------------------------------------------------------------------------------------------- normal pre-activations


def test_reductions_under_normal_pre_activations():
    formula = parse("x*(mean(x) + sum(x**2) + rms(x) + std(x) + max(x))")
    values = gaussian_reductions(compile_formula(formula), width=1000)
    mean, total, rms, std, mean_again, largest, _ = values.values()
    assert (mean, mean_again) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert (total, rms, std) == pytest.approx((1000.0, 1.0, 1.0), rel=1e-9)
    assert 3.0 < largest < 3.4  # a thousandth of normal numbers is above 3.09


@pytest.mark.parametrize(("text", "std"), [("norm(x)", 1.0), ("2*x*rms(3*x)", 6.0), ("x/sum(x**2 + 1)", 1 / 512)])
def test_the_spread_of_h_follows_the_reductions(text, std):
    assert gaussian_std(parse(text), width=256) == pytest.approx(std, rel=1e-5)
