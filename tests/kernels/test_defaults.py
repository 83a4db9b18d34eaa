"""What a user makes the default of PyTorch is not a kernel's: neither a default device nor a default dtype reaches it."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernels import FormulaMLP, activation, linear_cross_entropy, patch, rms_norm, rotate
from kernels.activations.telemetry import ActivationStats
from kernels.cross_entropy import cross_entropy_
from kernels.rounding import E4M3, round_fp8, round_mxfp8, round_nvfp4
from tests.kernels.reducing import REDUCING

WIDTH = 24
PARAMETERS = {"b": {"init": 0.7, "share": "channel"}, "c": {"init": 0.3, "share": "group", "groups": 3}}
FORMULAS = {
    "ungated": ("gelu(x)", {}),
    "gated": ("silu(gate) * up", {}),
    "learned": ("where(gate > c, b * gate, c) * up * sigmoid(b * gate)", PARAMETERS),
    **{name: REDUCING[name] for name in ("norm", "softmax")},
}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator).to(dtype)


def tensors_of(name: str, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Return what an activation computes, all of its kernels."""
    function = activation(*FORMULAS[name], backend=backend)
    compiled = function.compiled
    learned = [draw(p.size(WIDTH)) for p in function.formula.tensors.values()]
    pre = draw(*((5, 2, WIDTH) if function.formula.gated else (5, WIDTH)), dtype=dtype)
    dh = draw(5, WIDTH, dtype=dtype)
    function.prepare(pre.device, dtype, with_stats=True)
    h, batch = function.forward_with_stats(pre, learned)
    stats = ActivationStats(compiled, WIDTH, pre.device)
    stats.add(batch)
    _, empty = function.forward_with_stats(pre[:0], learned)
    values, scale = function.forward_fp8(pre, learned)
    dpre, again, dlearned = function.backward(pre, dh, learned, True)
    leaf = pre.clone().requires_grad_()
    function(leaf, **dict(zip(function.formula.tensors, learned, strict=True))).backward(dh)
    assert leaf.grad is not None
    found = [h, batch.sums, batch.peak, batch.active, stats.sums, empty.sums, empty.active, values.float(), scale]
    return [*found, function.forward(pre, learned), dpre, again, *dlearned, leaf.grad]  # pyright: ignore[reportReturnType]  # h is given


def norms() -> list[Tensor]:
    x, weight = draw(5, WIDTH).requires_grad_(), draw(WIDTH).requires_grad_()
    y, s = rms_norm(x, weight, 1e-5, draw(5, WIDTH))
    (y.square().sum() + rms_norm(x, weight, 1e-5)[0].sum()).backward()
    assert x.grad is not None
    assert weight.grad is not None
    return [y, s, x.grad, weight.grad]


def rotations() -> list[Tensor]:
    q, k = draw(2, 3, 4, 8).requires_grad_(), draw(2, 3, 1, 8).requires_grad_()
    results = rotate(q, k, draw(3, 4), draw(3, 4).square())
    (results[0].square().sum() + results[1].sum()).backward()
    assert q.grad is not None
    assert k.grad is not None
    return [*results, q.grad, k.grad]


def losses() -> list[Tensor]:
    hidden, weight = draw(5, 8).requires_grad_(), draw(11, 8).requires_grad_()
    targets = draw(5).abs().mul(3).long()
    loss = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, softcap=5.0, chunk=2)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    logits = draw(5, 11)
    return [loss, hidden.grad, weight.grad, *cross_entropy_(logits, targets, 0.1, True), logits]


def roundings() -> list[Tensor]:
    rounded = round_fp8(draw(5, 40), E4M3, True), round_fp8(draw(5, 40), E4M3, False)
    return [
        *(t.float() for r in (*rounded, round_mxfp8(draw(5, 40)), round_nvfp4(draw(5, 40))) for t in r if t is not None)
    ]


def layers() -> list[Tensor]:
    formula, parameters = (
        "x * sigmoid(b * x) * t",
        {"b": {"init": 1.0}, "t": {"schedule": "linear", "from": 0.3, "to": 1}},
    )
    mlp = FormulaMLP(8, WIDTH, formula, parameters, device="cpu", dtype=torch.float32)
    for parameter in mlp.parameters():
        parameter.data.copy_(draw(*parameter.shape))
    mlp(draw(3, 8)).square().sum().backward()
    return [mlp(draw(3, 8)), mlp.get_buffer("scheduled_t"), *(p.grad for p in mlp.parameters() if p.grad is not None)]


class Ungated(nn.Module):
    """A feed-forward layer that `patch` knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = (
            nn.Linear(*each, device="cpu", dtype=torch.float32) for each in ((8, 16), (16, 8))
        )
        self.act_fn = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


def patched() -> list[Tensor]:
    layer = Ungated()
    for parameter in layer.parameters():
        parameter.data.copy_(draw(*parameter.shape))
    patch(layer)
    return [layer(draw(3, 8))]


RUNS: dict[str, Callable[[], list[Tensor]]] = {
    **{
        f"{name} {backend} {dtype}": lambda name=name, backend=backend, dtype=dtype: tensors_of(name, backend, dtype)
        for name in FORMULAS
        for backend in ("c", "reference")
        for dtype in (torch.float32, torch.bfloat16)
    },
    **{f.__name__: f for f in (norms, rotations, losses, roundings, layers, patched)},
}
TRITON = [*(f"{name} triton" for name in FORMULAS), "norms", "rotations", "losses", "roundings"]


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MAKERS = (
    *("empty", "zeros", "ones", "full", "tensor", "arange", "linspace", "logspace", "eye"),
    *("rand", "randn", "randint", "randperm"),
)
DEFAULTS = {"device": default_device, "device of a block": lambda: torch.device("meta"), "dtype": default_dtype}


def check(run: Callable[[], list[Tensor]], default: str) -> None:
    expected = run()
    with DEFAULTS[default]():
        actual = run()
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.device, a.dtype) == (b.device, b.dtype), number
        assert torch.equal(a.detach(), b.detach()), number


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", RUNS)
def test_a_default_changes_nothing(name, default):
    check(RUNS[name], default)


def check_triton(name: str) -> None:
    run = RUNS.get(name) or (lambda: tensors_of(name.split()[0], "triton", torch.float32))
    for default in DEFAULTS:
        check(run, default)


@pytest.mark.parametrize("name", TRITON)
def test_a_default_changes_nothing_in_triton(interpreter, name):
    interpreter.submit(check_triton, name).result()


def test_what_a_tensor_is_made_of_is_said_where_it_is_made():
    """For the branches that no other test takes: those of a GPU."""
    makers = {f"torch.{maker}" for maker in MAKERS}
    missing = [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for path in Path(activation.__code__.co_filename).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in makers
        if not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}
    ]
    assert missing == []
