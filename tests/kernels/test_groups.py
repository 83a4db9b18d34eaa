"""Learned parameters of groups of channels: the plain formula's values and gradients, on every backend."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from kernels import FormulaError, FormulaMLP, Learned, activation, parse
from kernels.activations.activation import Activation

GATED = (
    "silu(b * gate) * up + a * up + c * gate",
    {"a": {"init": 0.1}, "b": {"init": 1.0, "share": "group", "groups": 4}, "c": {"init": 0.2, "share": "channel"}},
)
UNGATED = ("where(x > 0, x, b * x) + a", {name: {"init": 0.25, "share": "group", "groups": 3} for name in "ab"})
WIDTH = 24


def plain(which: str, pre: Tensor, learned: dict[str, Tensor]) -> Tensor:
    """The formula as it is written, with a group's value repeated for each of its channels."""
    a, b = (learned[name].repeat_interleave(WIDTH // len(learned[name])) for name in "ab")
    if which == "ungated":
        return torch.where(pre > 0, pre, b * pre) + a
    gate, up = pre.unbind(-2)
    return nn.functional.silu(b * gate) * up + a * up + learned["c"] * gate


def tensors(function: Activation) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return pre-activations, a gradient of h, and learned parameters that all differ."""
    generator = torch.Generator().manual_seed(0)
    shape = (5, 7, 2, WIDTH) if function.formula.gated else (5, 7, WIDTH)
    pre, dh = (torch.randn(shape, generator=generator) for shape in (shape, (5, 7, WIDTH)))
    learned = {n: p.init + torch.rand(p.size(WIDTH), generator=generator) for n, p in function.formula.learned.items()}
    return pre, dh, learned


def check(which: str, backend: str, dtype: torch.dtype) -> None:
    """Compare h and every gradient with autograd's of the plain formula in float64."""
    function = activation(*(GATED if which == "gated" else UNGATED), backend=backend)
    pre, dh, learned = tensors(function)
    results = []
    for kind, compute in ((dtype, function), (torch.float64, lambda p, **named: plain(which, p, named))):
        leaves = [pre.to(kind).requires_grad_(), *(t.to(kind).requires_grad_() for t in learned.values())]
        h = compute(leaves[0], **dict(zip(learned, leaves[1:], strict=True)))
        results.append([h, *torch.autograd.grad(h, leaves, dh.to(kind))])
    eps = torch.finfo(dtype).eps
    for ours, true in zip(*results, strict=True):
        assert ours.shape == true.shape
        # A few roundings of each term; a group's gradient is a sum of 5 x 7 x 6 or 8 terms of about 1.
        torch.testing.assert_close(ours.double(), true, rtol=16 * eps, atol=280 * eps)


@pytest.mark.parametrize("which", ["gated", "ungated"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("reference", torch.float32), ("c", torch.float32)]
)
def test_values_and_gradients_are_those_of_the_plain_formula(which, backend, dtype):
    check(which, backend, dtype)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("which", ["gated", "ungated"])
def test_in_triton_too(interpreter, which):
    interpreter.submit(check, which, "triton", torch.float32).result()


def test_statistics_and_fp8_are_of_the_same_h():
    function = activation(*GATED, backend="auto")
    pre, _, learned = tensors(function)
    h, stats = function.forward_with_stats(pre, list(learned.values()))
    assert torch.equal(h, function(pre, **learned))
    assert stats.elements == h.numel()
    fp8, scale = function.forward_fp8(pre, list(learned.values()))
    assert (fp8.float() * scale - h).abs().max() < 0.1 * h.abs().max()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_operators_have_the_shapes_of_groups(backend):
    function = activation(*GATED, backend=backend)
    pre, dh, learned = tensors(function)
    given = list(learned.values())
    opcheck(torch.ops.kernels.backward.default, (pre, dh, given, function.key, True))
    leaves = [tensor.requires_grad_() for tensor in given]
    opcheck(torch.ops.kernels.forward.default, (pre.requires_grad_(), leaves, function.key))


def test_a_key_tells_numbers_of_groups_apart():
    keys = {activation("b * x", {"b": {"init": 1, "share": "group", "groups": groups}}).key for groups in (2, 4)}
    assert len(keys) == 2


def test_a_compiled_layer_gives_the_gradients_of_an_eager_one():
    mlp = FormulaMLP(8, WIDTH, *GATED)
    with torch.no_grad():
        mlp.learned["b"] += torch.arange(4.0)
    assert mlp.learned["b"].shape == (4,)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    gradients = []
    for layer in (mlp, torch.compile(mlp, backend="aot_eager", fullgraph=True)):
        y = layer(x)
        gradients.append([y, *torch.autograd.grad(y.square().sum(), list(mlp.parameters()))])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_a_tensor_rank_has_its_part_of_the_groups():
    formula = parse(*GATED).on_ranks(2)
    assert formula.learned["b"] == Learned(1.0, "group", 2)
    whole, half = activation(*GATED), activation(formula)
    pre, _, learned = tensors(whole)
    parts = {n: t if t.numel() == 1 else t.chunk(2)[1] for n, t in learned.items()}
    assert torch.equal(half(pre.chunk(2, -1)[1], **parts), whole(pre, **learned).chunk(2, -1)[1])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"init": 1, "share": "group"}, "the parameter 'b' with share: group needs groups"),
        ({"init": 1, "share": "group", "groups": 0}, "has groups: 0; it must be a whole number of at least 1"),
        ({"init": 1, "share": "group", "groups": 2.5}, "has groups: 2.5; it must be a whole number"),
        ({"init": 1, "share": "group", "groups": True}, "has groups: True; it must be a whole number"),
        ({"init": 1, "share": "channel", "groups": 4}, "one per channel, has no groups: they belong to share: group"),
        ({"init": 1, "groups": 4}, "one per layer, has no groups: they belong to share: group"),
        ({"init": 1, "share": "row"}, "is shared by layer, by channel or by group, not 'row'"),
    ],
)
def test_what_is_no_group_is_refused(given: dict[str, Any], reason: str):
    with pytest.raises(FormulaError, match=re.escape(reason)):
        parse("b * x", {"b": given})


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_groups_that_do_not_divide_the_width_are_refused(backend):
    function = activation("b * x", {"b": {"init": 1.0, "share": "group", "groups": 3}}, backend)
    with pytest.raises(ValueError, match="'b' has 3 groups, which do not divide d_ff=8"):
        function(torch.ones(2, 8), b=torch.ones(3))
    with pytest.raises(ValueError, match=re.escape("one per group, must be (3,) on cpu, not (9,) on cpu")):
        function(torch.ones(2, 9), b=torch.ones(9))
    with pytest.raises(ValueError, match="'b' has 3 groups, which do not divide d_ff=8"):
        FormulaMLP(4, 8, "b * x", {"b": {"init": 1.0, "share": "group", "groups": 3}})
