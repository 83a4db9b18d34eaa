"""RMSNorm fused with the addition before it: error beside PyTorch's own, memory, threads; and in Triton, without a GPU."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from far import far_tensors, last_program
from poisoned import Poisoned
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.c import library
from kernels.norm import norm, rms_norm
from tests.selection import quick

EPS = 1e-5
# Both round fp32 at the store and as often before it, so the two errors are drawn from one distribution. What a row rounds once
# (its rstd) and a column adds up (dweight) are the smallest samples: of some hundreds, the ratio is 1 to within a few percent.
RATIO = 1.1
needs_compiler = pytest.mark.skipif(norm._library() is None, reason="no C compiler")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def plain(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's own operations."""
    s = x if residual is None else x + residual
    return F.rms_norm(s, weight.shape, weight, eps), s


def draw(rows: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    names = ("x", "residual", "dy", "ds")
    given = {name: torch.randn(rows, width, generator=generator).to(dtype) for name in names}
    given["x"], given["residual"] = scale * given["x"], scale * given["residual"]
    return given | {"weight": (1 + 0.3 * torch.randn(width, generator=generator)).to(dtype)}


def everything(
    function: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Tensor], dtype: torch.dtype, add: bool
) -> dict[str, Tensor]:
    """Return y, s and the gradients of a norm computed in `dtype`, in float64."""
    leaves = {name: given[name].detach().to(dtype).requires_grad_() for name in ("x", "residual", "weight")}
    y, s = function(leaves["x"], leaves["weight"], EPS, leaves["residual"] if add else None)
    dy, ds = given["dy"].to(dtype), given["ds"].to(dtype)
    torch.autograd.backward(*(((y, s), (dy, ds)) if add else ((y,), (dy,))))
    actual = {"y": y, "s": s, "dx": leaves["x"].grad, "dweight": leaves["weight"].grad}
    if add:
        actual["dresidual"] = leaves["residual"].grad
        torch.testing.assert_close(actual["dresidual"], actual["dx"], rtol=0, atol=0, equal_nan=True)
    assert all(each.dtype == dtype for each in actual.values())
    return {name: each.detach().double() for name, each in actual.items()}


def assert_errs_as_plain(given: dict[str, Tensor], dtype: torch.dtype, add: bool) -> None:
    exact = everything(plain, given, torch.float64, add)
    ours, theirs = everything(rms_norm, given, dtype, add), everything(plain, given, dtype, add)
    for name, true in exact.items():
        error, allowed = (ours[name] - true).norm(), RATIO * (theirs[name] - true).norm()
        assert error <= allowed, f"{name} errs {RATIO * error / allowed:.3f} times as much as PyTorch's"


def assert_close(given: dict[str, Tensor], dtype: torch.dtype, add: bool) -> None:
    """Every element within its roundings: for widths too small for a ratio to mean something."""
    exact, ours = (everything(*each, add) for each in ((plain, given, torch.float64), (rms_norm, given, dtype)))
    eps, fp32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    for name, true in exact.items():
        # The rounding of s reaches y and dx by a slope of a few; and 16 roundings of fp32 in what is added up.
        torch.testing.assert_close(
            ours[name], true, rtol=4 * eps, atol=4 * eps + 16 * fp32, msg=lambda m, n=name: n + m
        )


# ---------------------------------------------------------------------------------------------------------------- on a CPU


@needs_compiler
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_errs_as_pytorchs_own_does(dtype, scale, add):
    assert norm._backend(torch.zeros(1, dtype=dtype)) is norm.C
    for rows, width in ((300, 1024), (500, 192), (300, 1031)):
        assert_errs_as_plain(draw(rows, width, dtype, scale), dtype, add)


@needs_compiler
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width(dtype, add):
    for width in (1, 2, 7, 15, 16, 17, 63, 64, 65, 127, 4097):
        given = draw(5, width, dtype)
        given["x"] += 3 * given["x"].sign()  # away from 0, where a slope has no bound
        with Poisoned():
            assert_close(given, dtype, add)


@pytest.mark.parametrize("add", [False, True])
def test_the_gradients_of_the_reference(add):
    given = draw(3, 5, torch.float64)
    assert norm._backend(given["x"]) is norm.PLAIN
    leaves = [given[name].view(-1, 5).requires_grad_() for name in ("x", "residual")]
    weight = given["weight"].requires_grad_()
    torch.autograd.gradcheck(lambda x, r, w: rms_norm(x, w, 0.1, r if add else None), (*leaves, weight))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    given, before, actual = draw(533, 257, dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            actual.append(everything(rms_norm, given, dtype, True))
    finally:
        torch.set_num_threads(before)
    for other in actual[1:]:
        assert all(torch.equal(other[name], actual[0][name]) for name in other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (0, 0)])
def test_no_rows_and_no_columns(shape, dtype):
    x, residual = (torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.ones(shape[-1], dtype=dtype, requires_grad=True)
    y, s = rms_norm(x, weight, EPS, residual)
    (y + s).sum().backward()
    assert y.shape == s.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(shape[-1], dtype=dtype))


def layouts(dense: Tensor) -> Iterator[Tensor]:
    """The values of (2, 3, 4, 16) in other places: heads of a packed tensor, turned twice, every second one."""
    packed = torch.full((2, 3, 9, 16), math.nan, dtype=dense.dtype)
    packed[:, :, 2:6] = dense
    yield packed[:, :, 2:6]
    yield dense.transpose(0, 1).contiguous().transpose(0, 1)
    yield dense.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 3, 4, 32), math.nan, dtype=dense.dtype)
    wide[..., ::2] = dense
    yield wide[..., ::2]


@needs_compiler
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype, add):
    shape = (2, 3, 4, 16)
    given = {name: each.view(shape) if each.ndim == 2 else each for name, each in draw(24, 16, dtype).items()}
    expected = everything(rms_norm, given, dtype, add)
    for name in ("x", "residual", "dy", "ds"):
        for laid in layouts(given[name]):
            assert not laid.is_contiguous()
            actual = everything(rms_norm, given | {name: laid}, dtype, add)
            assert all(torch.equal(actual[each], expected[each]) for each in expected), name


@needs_compiler
def test_the_rows_of_packed_heads_are_not_copied():
    packed = torch.randn(2, 3, 9, 16)
    assert norm.runs(packed[:, :, 2:6])[0].data_ptr() == packed[:, :, 2:6].data_ptr()
    rows, run, stride = norm.runs(packed[:, :, 2:6])
    assert (rows.shape, run, stride) == ((2, 3, 4, 16), 4, 9 * 16)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_sum(dtype):
    """Every stride of them is 0."""
    given = draw(6, 37, dtype)
    x, residual, weight = (given[name].requires_grad_() for name in ("x", "residual", "weight"))
    y, s = rms_norm(x, weight, EPS, residual)
    (y.sum() + s.sum()).backward()
    ones = {"dy": torch.ones(6, 37), "ds": torch.ones(6, 37)}
    expected = everything(rms_norm, given | ones, dtype, True)
    assert torch.equal(x.grad.double(), expected["dx"])
    assert torch.equal(weight.grad.double(), expected["dweight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_only_one_result_is_used_for(dtype):
    given = draw(4, 24, dtype)
    x, residual, weight = (given[name].requires_grad_() for name in ("x", "residual", "weight"))
    y, s = rms_norm(x, weight, EPS, residual)
    through_s = torch.autograd.grad(s, (x, residual, weight), given["ds"], retain_graph=True, allow_unused=True)
    assert torch.equal(through_s[0], given["ds"])
    assert torch.equal(through_s[1], given["ds"])
    assert through_s[2] is None
    through_y = torch.autograd.grad(y, (x, residual), given["dy"])
    none = everything(rms_norm, given | {"ds": torch.zeros(4, 24)}, dtype, True)
    assert all(torch.equal(each.double(), none["dx"]) for each in through_y)
    y, _ = rms_norm(x.detach(), weight, EPS, residual)  # a stream that needs no gradient beside one that does
    assert torch.equal(torch.autograd.grad(y, residual, given["dy"])[0].double(), none["dx"])


@pytest.mark.parametrize("name", ["x", "residual", "dy", "ds"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_nan_stays_in_its_row(dtype, name):
    given = draw(5, 35, dtype)
    given[name][2, 33] = math.nan
    actual = everything(rms_norm, given, dtype, True)
    assert actual["dx"][2, 33].isnan()
    assert actual["dweight"][33].isnan() == (name != "ds")
    if name in ("x", "residual"):
        assert actual["y"][2].isnan().all()
        assert actual["s"][2].isnan().sum() == 1
    assert all(actual[each][[0, 1, 3, 4]].isfinite().all() for each in ("y", "s", "dx"))


@needs_compiler
def test_without_a_compiler_pytorch_computes(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(library, "_compiler_failed", False)
    norm._library.cache_clear()
    try:
        given = draw(6, 40, torch.bfloat16)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = [everything(rms_norm, given, torch.bfloat16, True) for _ in range(2)][1]
        assert [str(each.message) for each in caught] == [
            "no C kernels, slower plain PyTorch computes instead: there is no C compiler (cc, gcc or clang)"
        ]
    finally:
        monkeypatch.undo()
        norm._library.cache_clear()
    assert norm._library() is not None  # a source that no compiler was there for is not taken for a bad one
    y, s, _ = norm.PLAIN.forward(given["x"], given["residual"], given["weight"], EPS)
    assert torch.equal(actual["y"], y.double())
    assert torch.equal(actual["s"], s.double())


def test_what_has_no_memory_of_its_own_takes_pytorchs(monkeypatch):
    monkeypatch.setattr(norm._RMSNorm, "apply", lambda *_: pytest.fail("a kernel would have read this"))
    with FakeTensorMode():
        x, weight = torch.randn(3, 8), torch.ones(8)
        assert [each.shape for each in rms_norm(x, weight, EPS, x)] == [(3, 8), (3, 8)]
    given = draw(4, 16, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w, r: rms_norm(x, w, EPS, r), backend="aot_eager", fullgraph=True)
    y, s = compiled(given["x"], given["weight"], given["residual"])
    torch._dynamo.reset()
    assert torch.equal(s, given["x"] + given["residual"])
    torch.testing.assert_close(y, plain(given["x"], given["weight"], EPS, given["residual"])[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": torch.ones(7)},
        {"residual": torch.ones(8)},
        {"residual": torch.ones(2, 8).half()},
        {"x": torch.ones(()), "weight": torch.ones(()), "residual": None},
    ],
)
def test_tensors_that_do_not_fit_are_refused(wrong):
    given = {"x": torch.ones(2, 8), "weight": torch.ones(8), "residual": torch.ones(2, 8)} | wrong
    with pytest.raises(ValueError, match="x, weight and residual of a norm do not fit together"):
        rms_norm(given["x"], given["weight"], EPS, given["residual"])


# --------------------------------------------------------------------------------------------------------------- in Triton


def check_triton() -> None:
    """In the interpreter: the error, any width, strides, and no memory but the outputs'."""
    from kernels.norm import triton as norm_triton

    norm._backend = lambda x: norm.Backend(norm_triton.forward, norm_triton.backward)  # noqa: ARG005
    for add in (False, True):
        assert_errs_as_plain(draw(40, 1024, torch.float32), torch.float32, add)
    norm_triton._PROGRAMS = 4  # so that each has several tiles, and the last one fewer
    for add in (False, True):
        for width in (1, 7, 8, 64, 130, 1030):
            with Poisoned():
                assert_close(draw(5, width, torch.float32), torch.float32, add)
        given = {
            n: each.view(2, 3, 4, 16) if each.ndim == 2 else each for n, each in draw(24, 16, torch.float32).items()
        }
        expected = everything(rms_norm, given, torch.float32, add)
        laid = {name: list(layouts(given[name])) for name in ("x", "residual", "dy", "ds")}
        for turn in range(4):  # every tensor in every layout, each beside others
            these = {name: laid[name][(turn + i) % 4] for i, name in enumerate(laid)}
            actual = everything(rms_norm, given | these, torch.float32, add)
            # A tile of other rows adds in another order.
            for each in expected:
                torch.testing.assert_close(actual[each], expected[each], rtol=1e-6, atol=1e-6)
        test_no_rows_and_no_columns((2, 0, 8), torch.float32)
    for name in ("x", "residual", "dy", "ds"):
        test_a_nan_stays_in_its_row(torch.float32, name)


def check_far_offsets() -> None:
    """The last rows of tensors of more than 2**31 elements, which hold memory nowhere but at their ends."""
    from kernels.norm import triton as norm_triton

    width, rows = 1024, 2**21 + 1
    x, y = far_tensors(2, rows, width)
    x[-1] = torch.randn(width)
    rstd, weight = torch.zeros(rows), torch.ones(width)
    tall, columns, _ = norm_triton.tile_of(rows, width)
    tiles = math.ceil(rows / tall)
    with last_program():
        for run, of_run, number in ((rows, tiles, 1), (1, 1, rows)):  # one long run, and many of one row
            y[-1] = 0
            norm_triton.forward_kernel[(of_run * number,)](
                x, x, weight, y, x, rstd, of_run, run, width, width, EPS, ADD=False, ROWS=tall, COLUMNS=columns
            )
            torch.testing.assert_close(y[-1:], plain(x[-1:], weight, EPS)[0])
            assert not y[:2].any()


@needs_triton
def test_triton_in_the_interpreter(interpreter):
    interpreter.submit(check_triton).result()


@needs_triton
def test_offsets_beyond_32_bits(interpreter):
    interpreter.submit(check_far_offsets).result()


def machine_code_of(kernel: Any, dtype: str, run: int, width: int, add: bool) -> Any:
    from bench.sm90 import machine_code
    from kernels.norm.triton import tile_of

    rows, columns, warps = tile_of(run, width)
    numbers = {"tiles", "all_tiles", "tiles_per_program", "run", "stride", "dy_stride", "s_stride", "width"}
    kinds = {n: "constexpr" if n.isupper() else "i32" if n in numbers else f"*{dtype}" for n in kernel.arg_names}
    kinds |= {n: kind for n, kind in (("eps", "fp32"), ("rstd", "*fp32"), ("sums", "*fp32")) if n in kinds}
    divisible = {"width", "stride", "dy_stride", "s_stride"} if width % 16 == 0 else ()
    return machine_code(kernel, kinds, {"ADD": add, "ROWS": rows, "COLUMNS": columns}, warps, divisible)


@needs_triton
@pytest.mark.parametrize("add", quick([False, True], True))  # which does all that the kernels without it do, and more
@pytest.mark.parametrize(("run", "width"), quick([(12, 64), (2048, 1024), (2048, 4096), (2048, 8192)], (2048, 1024)))
def test_machine_code_for_hopper(run, width, add):
    """No spills, and the rows themselves 128 bits a load and store."""
    from kernels.norm.triton import backward_kernel, forward_kernel

    for kernel in (forward_kernel, backward_kernel):
        code = machine_code_of(kernel, "bf16", run, width, add)
        assert not code.spilled
        tensors = 2 if kernel is forward_kernel else 3
        assert code.bits("LDG").count(128) >= tensors - 1 + add
        assert code.bits("STG").count(128) >= 1


@needs_triton
def test_rows_of_odd_widths_are_compiled_too():
    from kernels.norm.triton import backward_kernel

    code = machine_code_of(backward_kernel, "fp32", 2048, 1030, True)
    assert not code.spilled
    assert max(code.bits("STG")) == 32
