"""The C backend around its arithmetic: its cache of libraries, threads, shapes and strides, and its operators in torch."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.library import opcheck

from kernels import activation
from kernels.activations import c_backend as c
from kernels.activations import reference
from kernels.activations.activation import Activation
from kernels.c import library
from kernels.c import toolchain as c_build

try:
    c_build.build("int one(void) { return 1; }")
except OSError as error:
    pytest.skip(f"no C compiler: {error}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SWIGLU = ("silu(gate) * up", None)
PRELU = ("where(x > 0, x, slope * x)", {"slope": {"init": 0.25}})
CHANNEL = ("where(x > 0, x, slope * x)", {"slope": {"init": 0.25, "share": "channel"}})
XIELU = (
    "where(x > 0, softplus(ap) * x**2, softplus(an) * (expm1(x) - x)) + 0.5 * x",
    {"ap": {"init": 0.2}, "an": {"init": 0.2}},
)
ALL = (SWIGLU, PRELU, CHANNEL, XIELU)


def inputs(
    function: Activation, rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return pre-activations, a gradient of h, and learned parameters."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 2, width) if function.formula.gated else (rows, width)
    pre = (3 * torch.randn(shape, generator=generator)).to(dtype)
    dh = torch.randn(rows, width, generator=generator).to(dtype)
    learned = [torch.full((width if p.share == "channel" else 1,), p.init) for p in function.formula.learned.values()]
    return pre, dh, learned


def everything(function: Activation, pre: Tensor, dh: Tensor, learned: list[Tensor]) -> list[Tensor]:
    """Return h, the gradient of pre, h again, and the gradients of the learned parameters."""
    dpre, again, dlearned = function.backward(pre, dh, learned, with_h=True)
    assert again is not None
    return [function.forward(pre, learned), dpre, again, *dlearned]


def assert_is_right(function: Activation, pre: Tensor, dh: Tensor, learned: list[Tensor]) -> None:
    exact = everything(
        Activation(function.formula, "reference"), pre.double(), dh.double(), [tensor.double() for tensor in learned]
    )
    eps = torch.finfo(pre.dtype).eps
    for ours, true in zip(everything(function, pre, dh, learned), exact, strict=True):
        sums = ours.dtype == torch.float32 and ours.numel() <= pre.shape[-1] and dh.shape[0] > 1
        # Roundings of the result and of fp32 on the way; a sum over n elements has their roundings' sum.
        slack = 4 * torch.finfo(torch.float32).eps * (dh.numel() if sums else 1)
        torch.testing.assert_close(ours.double(), true, rtol=eps + slack, atol=8 * eps + slack)


# ----------------------------------------------------------------------------------------------------- shapes and strides


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_widths(which, dtype):
    function = activation(*which, backend="c")
    for width in (1, 7, 8, 15, 16, 17, 127, 4095, 4096, 4097):
        assert_is_right(function, *inputs(function, 5, width, dtype))


def test_a_parameter_of_a_layer_and_one_of_each_channel_are_different_kernels():
    """The same text: one must not be handed the other's kernels."""
    for which in (PRELU, CHANNEL, PRELU):
        function = activation(*which, backend="c")
        assert_is_right(function, *inputs(function, 5, 7))


def test_any_name_is_a_parameters():
    """Words of C and names of the template among them."""
    names = ("c", "n", "int", "V", "width", "row", "h", "total", "mine", "number", "first", "dx")
    text = "x" + "".join(f" + {name}*x" for name in names)
    shares = dict.fromkeys(names, "layer") | dict.fromkeys(("n", "row", "h", "dx"), "channel")
    function = activation(text, {name: {"init": 0.5, "share": share} for name, share in shares.items()}, backend="c")
    assert c.kernels_of(function.compiled) is not None
    assert_is_right(function, *inputs(function, 5, 19))


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_the_gradient_of_a_layers_parameter_has_the_error_of_its_terms_alone(backend):
    """It is a sum of terms that cancel: adding them up in fp32 would err by 2 to 4 times as much as their own roundings do."""
    function, errors = activation(*PRELU, backend=backend), []
    for seed in range(8):
        pre, dh, learned = inputs(function, 64, 5000, seed=seed)
        terms = torch.where(pre > 0, 0.0, pre.double() * dh.double())
        _, _, (total,) = function.backward(pre, dh, learned)
        errors.append((total.double() - terms.sum()) / terms.square().sum().sqrt())
    assert torch.stack(errors).square().mean().sqrt() <= 2.0**-24


OUTPUT_ARMS = [
    ("relu(x)**2", "2*sqrt(h)"),
    ("tanh(x)", "1 - h**2"),
    ("where(x > 0, x, expm1(x))", "where(h > 0, 1, h + 1)"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("formula", "derivative"), OUTPUT_ARMS)
def test_the_gradient_from_the_output(formula, derivative, dtype):
    function = activation(formula, backend="c", from_output=derivative)
    for width in (1, 17, 4097):
        h = function.forward(torch.randn(3, width).to(dtype), [])
        dh = torch.randn(3, width).to(dtype)
        exact = reference.backward_from_output(function.compiled, h.double(), dh.double())
        actual = function.backward_from_output(h, dh)
        # The rounding of the result, and 8 of fp32 on the way; 1 - h^2 cancels to what fp32 knows of 1.
        eps, fp32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
        slack = 8 * fp32 * dh.abs().max().item()
        torch.testing.assert_close(actual.double(), exact, rtol=eps, atol=slack)


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("which", ALL)
def test_no_rows_and_no_columns(which, backend):
    function = activation(*which, backend=backend)
    for rows, width in ((0, 8), (3, 0), (0, 0)):
        h, dpre, again, *dlearned = everything(function, *inputs(function, rows, width))
        assert (h.shape, again.shape, dpre.shape[-1]) == ((rows, width), (rows, width), width)
        assert all((gradient == 0).all() for gradient in dlearned)


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("which", ALL)
def test_one_row_without_leading_dimensions(which, backend):
    function = activation(*which, backend=backend)
    pre, dh, learned = inputs(function, 1, 24)
    for ours, theirs in zip(
        everything(function, pre[0], dh[0], learned), everything(function, pre, dh, learned), strict=True
    ):
        assert torch.equal(ours, theirs.view(ours.shape))
    for ours, theirs in zip(function.forward_fp8(pre[0], learned), function.forward_fp8(pre, learned), strict=True):
        assert torch.equal(ours.float(), theirs[0].float())


@pytest.mark.parametrize("backend", ["c", "reference"])
def test_one_number_is_a_row_of_one_channel(backend):
    function = activation(*PRELU, backend=backend)
    x, slope = torch.tensor(-2.0, requires_grad=True), torch.tensor([0.25])
    h = function(x, slope=slope)
    h.backward()
    assert (h.shape, h.item(), x.grad.item()) == ((), -0.5, 0.25)
    with pytest.raises(ValueError, match=r"pre-activations are \(\.\.\., d_ff\), not a single number"):
        function.forward(torch.tensor(-2.0), [slope])
    with pytest.raises(ValueError, match=r"a gated formula takes pre-activations \(\.\.\., 2, d_ff\), not \(\)"):
        activation(*SWIGLU, backend=backend)(torch.tensor(-2.0))


@pytest.mark.parametrize("which", ALL)
def test_strides(which):
    function = activation(*which, backend="c")
    pre, dh, learned = inputs(function, 6, 37)
    expected = everything(function, pre, dh, learned)
    wide = torch.full((*pre.shape[:-1], 74), torch.nan)
    wide[..., ::2] = pre
    turned = dh.t().contiguous().t()
    assert not wide[..., ::2].is_contiguous()
    assert not turned.is_contiguous()
    for ours, theirs in zip(everything(function, wide[..., ::2], turned, learned), expected, strict=True):
        assert torch.equal(ours, theirs)
    ones = torch.ones(1).expand(6, 37)  # as sum().backward() gives: every stride is 0
    same = everything(function, pre[:1].expand(pre.shape), ones, learned)
    assert_is_right(function, pre[:1].expand(pre.shape), ones, learned)
    assert torch.equal(same[0][0], same[0][5])
    pre.requires_grad_()
    leaves = [tensor.requires_grad_() for tensor in learned]
    function(pre, **dict(zip(function.formula.learned, leaves, strict=True))).sum().backward()
    assert torch.equal(pre.grad, function.backward(pre.detach(), ones, [t.detach() for t in leaves])[0])


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_is_written_and_none_beside(which, dtype, monkeypatch):
    """Outputs lie in memory full of NaN, between two fences that must stay as they are."""
    function = activation(*which, backend="c")
    pre, dh, learned = inputs(function, 9, 4097, dtype)
    expected = everything(function, pre, dh, learned)
    fenced: list[Tensor] = []

    def poisoned(shape, dtype=None, **_):
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 128,), torch.nan, dtype=dtype or torch.float32)
        fenced.append(buffer)
        return buffer[64 : 64 + count].view(shape)

    monkeypatch.setattr(c.torch, "empty", poisoned)
    monkeypatch.setattr(c.torch, "empty_like", lambda tensor: poisoned(tensor.shape, tensor.dtype))
    actual = everything(function, pre, dh, learned)
    monkeypatch.undo()
    assert len(fenced) == 3
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert all(buffer[:64].isnan().all() and buffer[-64:].isnan().all() for buffer in fenced)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(which, dtype, threads):  # noqa: ARG001
    function = activation(*which, backend="c")
    given = inputs(function, 131, 1025, dtype)
    actual = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        actual.append(everything(function, *given))
    for results in actual[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, actual[0], strict=True))


# ------------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    c_build._cache.cache_clear()
    yield tmp_path / "formula-ffn" / "kernels"
    c_build._cache.cache_clear()


def value_of(library: ctypes.CDLL) -> int:
    return library.value()


@pytest.mark.parametrize("ending", [".so", ".sum"])
@pytest.mark.parametrize("damage", [b"", b"half of a library", None])
def test_a_damaged_library_is_built_again(cache, ending, damage):
    number = 100 + len(ending) * 10 + len(damage or b"missing")  # a library that is loaded stays loaded: other names
    text = f"int value(void) {{ return {number}; }}"
    subprocess.run(
        [sys.executable, "-c", f"from kernels.c import toolchain as c_build; c_build.build({text!r})"],
        cwd=ROOT,
        check=True,
    )
    (built,) = cache.glob("*.so")
    good, broken = built.read_bytes(), built.with_suffix(ending)
    if damage is None:
        broken.unlink()
    else:
        broken.write_bytes(damage)
    assert value_of(c_build.build(text)) == number
    assert c_build._intact(built)
    assert len(built.read_bytes()) == len(good)
    assert not list(cache.glob("*.tmp"))


def test_a_second_build_compiles_nothing(cache, monkeypatch):
    text = "int value(void) { return 7; }"
    c_build.build(text)
    monkeypatch.setattr(c_build, "_compile", lambda *_: pytest.fail("it was compiled again"))
    assert value_of(c_build.build(text)) == 7
    assert len(list(cache.glob("*.so"))) == 1


def test_two_processes_build_the_same_library_once(cache):
    """Whoever comes second waits, and finds the library."""
    code = (
        "import os, pathlib\n"
        "from kernels.c import toolchain as c_build\n"
        "original = c_build._compile\n"
        "def counted(*arguments):\n"
        f"    pathlib.Path({str(cache.parent)!r}, f'built.{{os.getpid()}}').touch()\n"
        "    original(*arguments)\n"
        "c_build._compile = counted\n"
        "print(c_build.build('int value(void) { return 42; }').value())\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == ["42", "42"]
    assert len(list(cache.parent.glob("built.*"))) == 1


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")  # permissions would not stop root
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    c_build._cache.cache_clear()
    try:
        folder = c_build._cache()
        assert blocked not in folder.parents
        assert value_of(c_build.build("int value(void) { return 5; }")) == 5
        assert list(folder.glob("*.so"))
    finally:
        c_build._cache.cache_clear()


@pytest.mark.parametrize("place", ["os.replace", "the compiler"])
def test_a_cache_whose_disk_is_full_is_replaced_by_a_temporary_one(cache, tmp_path, monkeypatch, place):
    compiler, replace = c_build.find_compiler(), os.replace
    script = tmp_path / "cc"
    full = f'case "$*" in *"{cache}"*) echo ignored >&2; echo ld: No space left on device >&2; exit 1;; esac'
    script.write_text(f'#!/bin/sh\n{full}\nexec {compiler} "$@"\n')
    script.chmod(0o755)

    def refuse(source, target):
        if cache in Path(target).parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    if place == "os.replace":
        monkeypatch.setattr(os, "replace", refuse)
    else:
        monkeypatch.setenv("CC", str(script))
    assert value_of(c_build.build(f"int value(void) {{ return {len(place)}; }}")) == len(place)
    assert not list(cache.glob("*.so"))
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("broken", [False, True])
def test_without_a_compiler_there_is_one_warning_and_the_reference_computes(tmp_path, monkeypatch, broken):
    """No compiler at all, and one that fails."""
    if broken:
        (tmp_path / "cc").write_text("#!/bin/sh\necho no licence found >&2; exit 1\n")
        (tmp_path / "cc").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(library, "_compiler_failed", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for formula in ("silu(gate) * up * 1.25", "relu(gate) * up * 1.25"):  # formulas that nothing else has built
            function = activation(formula)
            pre, _, learned = inputs(function, 3, 9)
            assert torch.equal(function.forward(pre, learned), reference.forward(function.compiled, pre, learned))
    caught = [warning for warning in caught if "no C kernels" in str(warning.message)]
    assert len(caught) == 1
    assert ("no licence found" if broken else "there is no C compiler") in str(caught[0].message)


def test_a_formula_whose_kernels_do_not_compile_is_alone_in_that(monkeypatch):
    """One warning, by its name; the reference computes it; other formulas keep their C kernels."""
    monkeypatch.setattr(library, "_compiler_failed", False)
    monkeypatch.setattr(c, "source", lambda compiled: f"broken {compiled.formula.text}")
    function = activation("silu(gate) * up * 0.8125")
    pre, _, learned = inputs(function, 3, 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(function.forward(pre, learned), reference.forward(function.compiled, pre, learned))
    (warning,) = (str(each.message) for each in caught)
    assert warning.startswith("no C kernels for 'silu(gate) * up * 0.8125', slower plain PyTorch computes it instead")
    monkeypatch.undo()
    assert not library._compiler_failed
    assert c.kernels_of(activation("relu(gate) * up * 0.8125").compiled) is not None


@pytest.mark.parametrize("formula", ["min(x, 1e300)", "max(x, -1e308)", "clip(x, -1e39, 3.5e38)", "x + 0*min(x, 1e39)"])
def test_a_number_beyond_fp32_is_infinite_in_c(formula):
    function = activation(formula, backend="c")
    pre, dh, learned = inputs(function, 3, 9)
    assert c.kernels_of(function.compiled) is not None
    assert torch.equal(function.forward(pre, learned), pre)
    assert torch.equal(function.backward(pre, dh, learned)[0], dh)


# ------------------------------------------------------------------------------------------------- what torch makes of it


@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("which", [SWIGLU, PRELU, CHANNEL])
def test_the_operators_keep_torchs_rules(which, backend):
    function = activation(*which, backend=backend)
    pre, dh, learned = inputs(function, 4, 9)
    backward = torch.ops.kernels.backward.default
    opcheck(backward, (pre, dh, learned, function.key, True))
    leaves = [tensor.requires_grad_() for tensor in learned]
    opcheck(torch.ops.kernels.forward.default, (pre.requires_grad_(), leaves, function.key))


@pytest.mark.parametrize("which", [SWIGLU, PRELU])
def test_compiled_as_one_graph_for_any_number_of_tokens(which):
    function = activation(*which)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def layer(pre: Tensor, learned: dict[str, Tensor]) -> Tensor:
        return function(pre * 2, **learned) + 1

    for rows in (4, 7, 64, 3):
        pre, dh, tensors = inputs(function, rows, 9)
        learned = {n: t.requires_grad_() for n, t in zip(function.formula.learned, tensors, strict=True)}
        leaves = [pre.requires_grad_(), *learned.values()]
        h, expected = layer(pre, learned), function(pre * 2, **learned) + 1
        assert torch.equal(h, expected)
        gradients = torch.autograd.grad(h, leaves, dh)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, leaves, dh), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert (counter.frame_count, counter.op_count > 0) == (1, True)
    torch._dynamo.reset()
