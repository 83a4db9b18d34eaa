"""The rotation of queries and keys: error beside plain PyTorch's, memory, threads; and in Triton, without a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from far import far_tensors, last_program
from poisoned import Poisoned
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.c import library
from kernels.rotary import rotary, rotate
from tests.selection import quick

# Two products and a sum in fp32 each, with one rounding less where they are fused. Over thousands of elements the ratio of two
# such errors is known to within a percent or two.
RATIO = 1.1
needs_compiler = pytest.mark.skipif(rotary._library() is None, reason="no C compiler")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's own operations, in fp32 at least, rounded at the end."""

    def turn(x: Tensor) -> Tensor:
        a, b = x.to(cos.dtype).chunk(2, -1)
        along, across = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.cat((a * along - b * across, b * along + a * across), -1).to(x.dtype)

    return turn(q), turn(k)


def draw(width: int, dtype: torch.dtype, batch: int = 2, length: int = 37, heads: int = 6) -> dict[str, Tensor]:
    """Return q, k, their gradients, and tables in float64 that are exact in fp32."""
    generator = torch.Generator().manual_seed(width)
    shapes = {"q": heads, "k": heads // 3, "dq": heads, "dk": heads // 3}
    given = {n: torch.randn(batch, length, h, width, generator=generator).to(dtype) for n, h in shapes.items()}
    angles = 100 * torch.rand(length, width // 2, generator=generator)
    return given | {"cos": angles.cos().double(), "sin": angles.sin().double()}


def everything(function: Callable[..., tuple], given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return rotated q and k and the gradients of q and k, computed in `dtype`, in float64."""
    q, k = (given[name].detach().to(dtype).requires_grad_() for name in ("q", "k"))
    tables = (given[name].to(torch.promote_types(dtype, torch.float32)) for name in ("cos", "sin"))
    actual = function(q, k, *tables)
    torch.autograd.backward(actual, (given["dq"].to(dtype), given["dk"].to(dtype)))
    results = {"q": actual[0], "k": actual[1], "dq": q.grad, "dk": k.grad}
    assert all(each.dtype == dtype for each in results.values())
    return {name: each.detach().double() for name, each in results.items()}


def assert_errs_as_plain(given: dict[str, Tensor], dtype: torch.dtype) -> None:
    exact = everything(plain, given, torch.float64)
    ours, theirs = everything(rotate, given, dtype), everything(plain, given, dtype)
    for name, true in exact.items():
        error, allowed = (ours[name] - true).norm(), RATIO * (theirs[name] - true).norm()
        assert error <= allowed, f"{name} errs {RATIO * error / allowed:.3f} times as much as PyTorch's"


def assert_close(given: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every element within the roundings of the result, and of two products and a sum in fp32."""
    exact, ours = everything(plain, given, torch.float64), everything(rotate, given, dtype)
    fp32 = torch.finfo(torch.float32).eps
    for name, true in exact.items():
        size = max(given[each].abs().max().item() for each in ("q", "k", "dq", "dk"))
        torch.testing.assert_close(ours[name], true, rtol=torch.finfo(dtype).eps, atol=4 * fp32 * size)


# ---------------------------------------------------------------------------------------------------------------- on a CPU


@needs_compiler
@pytest.mark.parametrize("width", [64, 128, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_errs_as_plain_operations_do(dtype, width):
    assert rotary._backend(torch.zeros(1, dtype=dtype)) is rotary._c
    assert_errs_as_plain(draw(width, dtype), dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width(dtype):
    for width in (2, 6, 14, 30, 32, 34, 66, 126, 130, 256):
        with Poisoned():
            assert_close(draw(width, dtype, length=5), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_reference(dtype):
    given = draw(12, dtype)
    assert rotary._backend(given["q"]) is rotary._plain
    exact, actual = everything(plain, given, torch.float64), everything(rotate, given, dtype)
    for name, true in exact.items():
        # The roundings of the tables and of the two products, in the dtype itself.
        torch.testing.assert_close(
            actual[name], true, rtol=0, atol=4 * torch.finfo(dtype).eps * true.abs().max().item()
        )


def test_the_gradients_of_the_reference():
    given = draw(6, torch.float64, length=4, heads=3)
    q, k = (given[name].requires_grad_() for name in ("q", "k"))
    torch.autograd.gradcheck(lambda q, k: rotate(q, k, given["cos"], given["sin"]), (q, k))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    given, before, actual = draw(64, dtype, length=129), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            actual.append(everything(rotate, given, dtype))
    finally:
        torch.set_num_threads(before)
    for other in actual[1:]:
        assert all(torch.equal(other[name], actual[0][name]) for name in other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_no_tokens_and_no_heads(sizes, dtype):
    given = draw(8, dtype, *sizes)
    actual = everything(rotate, given, dtype)
    assert [actual[name].shape for name in ("q", "dk")] == [given["q"].shape, given["k"].shape]


def layouts(dense: Tensor) -> Iterator[Tensor]:
    """The same values in other places: heads of a packed tensor, turned, every second one."""
    batch, length, heads, width = dense.shape
    packed = torch.full((batch, length, heads + 5, width), math.nan, dtype=dense.dtype)
    packed[:, :, 2 : 2 + heads] = dense
    yield packed[:, :, 2 : 2 + heads]
    yield dense.transpose(1, 2).contiguous().transpose(1, 2)  # as attention leaves its gradients
    wide = torch.full((batch, length, heads, 2 * width), math.nan, dtype=dense.dtype)
    wide[..., ::2] = dense
    yield wide[..., ::2]


@needs_compiler
@pytest.mark.parametrize("name", ["q", "k", "dq", "dk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype, name):
    given = draw(32, dtype, length=5)
    expected = everything(rotate, given, dtype)
    for laid in layouts(given[name]):
        assert not laid.is_contiguous()
        actual = everything(rotate, given | {name: laid}, dtype)
        assert all(torch.equal(actual[each], expected[each]) for each in expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_sum(dtype):
    """Every stride of them is 0."""
    given = draw(16, dtype)
    q, k = (given[name].requires_grad_() for name in ("q", "k"))
    sum(each.sum() for each in rotate(q, k, given["cos"].float(), given["sin"].float())).backward()
    expected = everything(rotate, given | {n: torch.ones_like(given[n]) for n in ("dq", "dk")}, dtype)
    assert torch.equal(q.grad.double(), expected["dq"])
    assert torch.equal(k.grad.double(), expected["dk"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_nan_stays_in_its_pair(dtype):
    check_nan(dtype)


def check_nan(dtype: torch.dtype, length: int = 37) -> None:
    given = draw(34, dtype, length=length)
    for name in ("q", "dq"):
        given[name][1, 3, 2, 16] = math.nan
    actual = everything(rotate, given, dtype)
    for name in ("q", "dq"):
        assert actual[name].isnan().nonzero().tolist() == [[1, 3, 2, 16], [1, 3, 2, 33]]


@needs_compiler
def test_without_a_compiler_pytorch_computes(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(library, "_compiler_failed", False)
    rotary._library.cache_clear()
    try:
        given = draw(16, torch.bfloat16)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = [everything(rotate, given, torch.bfloat16) for _ in range(2)][1]
        assert [str(each.message).partition(":")[0] for each in caught] == [
            "no C kernels, slower plain PyTorch computes instead"
        ]
    finally:
        monkeypatch.undo()
        rotary._library.cache_clear()
    assert rotary._library() is not None  # a source that no compiler was there for is not taken for a bad one
    assert torch.equal(actual["q"], rotary._plain(given["q"], given["cos"], given["sin"], 1).double())


def test_what_has_no_memory_of_its_own_takes_pytorchs(monkeypatch):
    monkeypatch.setattr(rotary._Rotate, "apply", lambda *_: pytest.fail("a kernel would have read this"))
    with FakeTensorMode():
        x, tables = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4)
        assert [each.shape for each in rotate(x, x[:, :, :1], *tables)] == [(2, 3, 4, 8), (2, 3, 1, 8)]
    given = draw(8, torch.float32)
    arguments = given["q"], given["k"], given["cos"].float(), given["sin"].float()
    torch._dynamo.reset()
    actual = torch.compile(rotate, backend="aot_eager", fullgraph=True)(*arguments)
    torch._dynamo.reset()
    for ours, theirs in zip(actual, plain(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cos": torch.ones(3, 8)},
        {"sin": torch.ones(5, 4)},
        {"sin": torch.ones(3, 4).double()},
        {"k": torch.ones(2, 3, 1, 6)},
        {"k": torch.ones(2, 3, 1, 8).bfloat16()},
        {"q": torch.ones(2, 3, 4, 9), "k": torch.ones(2, 3, 1, 9)},
        {"q": torch.ones(8)},
        {"k": torch.ones(3, 8)},
    ],
)
def test_tensors_that_do_not_fit_are_refused(wrong):
    given = {"q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 3, 1, 8), "cos": torch.ones(3, 4), "sin": torch.ones(3, 4)}
    with pytest.raises(ValueError, match="q, k, cos and sin of a rotation do not fit together"):
        rotate(**(given | wrong))


# --------------------------------------------------------------------------------------------------------------- in Triton


def check_triton() -> None:
    """In the interpreter: the error, any width, strides, and no memory but the outputs'."""
    from kernels.rotary import triton as rotary_triton

    rotary._backend = lambda x: rotary_triton.rotate  # noqa: ARG005
    assert_errs_as_plain(draw(64, torch.float32, length=3, heads=12), torch.float32)
    for width in (2, 6, 34, 130):
        with Poisoned():
            assert_close(draw(width, torch.float32, length=3), torch.float32)
    with Poisoned():  # more heads than a tile has
        assert_close(draw(128, torch.float32, batch=1, length=2, heads=54), torch.float32)
    check_strides()
    test_no_tokens_and_no_heads((2, 0, 3), torch.float32)
    check_nan(torch.float32, length=4)


def check_strides() -> None:
    """Every tensor in every layout, each beside others."""
    given = draw(32, torch.float32, length=2)
    expected, laid = (
        everything(rotate, given, torch.float32),
        {n: list(layouts(given[n])) for n in ("q", "k", "dq", "dk")},
    )
    for turn in range(3):
        these = {name: laid[name][(turn + i) % 3] for i, name in enumerate(laid)}
        actual = everything(rotate, given | these, torch.float32)
        assert all(torch.equal(actual[each], expected[each]) for each in expected)


def check_far_offsets() -> None:
    """The last token of tensors of more than 2**31 elements, which hold memory nowhere but at their ends."""
    from kernels.rotary import triton as rotary_triton

    heads, width, tokens = 16, 64, 2**21 + 1
    x, y = far_tensors(2, tokens, 1, heads, width)
    x[-1] = torch.randn(heads, width)
    tables = torch.randn(2, 1, width // 2)
    tall, pairs, _ = rotary_triton.tile_of(heads, width // 2)
    with last_program():
        rotary_triton.rotate_kernel[(tokens, 1)](
            x, y, *tables, 1, heads, width // 2, *x.stride()[:3], 1.0, HEADS=tall, PAIRS=pairs
        )
    torch.testing.assert_close(y[-1:], plain(x[-1:], x[-1:], *tables)[0])
    assert not y[:2].any()


@needs_triton
def test_triton_in_the_interpreter(interpreter):
    interpreter.submit(check_triton).result()


@needs_triton
def test_offsets_beyond_32_bits(interpreter):
    interpreter.submit(check_far_offsets).result()


@needs_triton
@pytest.mark.parametrize(
    ("heads", "half", "dtype"),  # each size and each dtype once
    quick(itertools.product([6, 24], [32, 64], ["bf16", "fp32"]), (6, 32, "fp32"), (24, 64, "bf16")),
)
def test_machine_code_for_hopper(heads, half, dtype):
    """No spills, and heads 128 bits a load and store."""
    from bench.sm90 import machine_code
    from kernels.rotary.triton import rotate_kernel, tile_of

    tall, pairs, warps = tile_of(heads, half)
    tensors = {"x": f"*{dtype}", "y": f"*{dtype}", "cos": "*fp32", "sin": "*fp32", "direction": "fp32"}
    kinds = {n: "constexpr" if n.isupper() else tensors.get(n, "i32") for n in rotate_kernel.arg_names}
    divisible = ("half", "batch_stride", "token_stride", "head_stride")
    code = machine_code(rotate_kernel, kinds, {"HEADS": tall, "PAIRS": pairs}, warps, divisible)
    assert not code.spilled
    assert code.bits("LDG").count(128) >= 2
    assert set(code.bits("STG")) == {128}
