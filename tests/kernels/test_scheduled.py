"""Scheduled parameters: their values over steps, and kernels that take them as tensors and give them no gradient."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.library import opcheck

from kernels import FormulaError, FormulaMLP, activation, parse
from kernels.activations import c_source, triton_source
from kernels.formula.domains import check_domains

RAMP = {"schedule": "linear", "from": 0, "to": 1}
MIXED = (
    "(1 - t) * silu(b * gate) * up + t * relu(gate) * up",
    {"t": RAMP, "b": {"init": 1.0, "share": "channel"}},
)
PLAIN = ("(1 - t) * silu(gate) * up + t * relu(gate) * up", {"t": RAMP})
WIDTH = 24


def value(of: int = 100, **more: Any):
    """Return the function of a step that a parameter from 0 to 1 is."""
    parameter = parse("t*x", {"t": RAMP | more}).scheduled["t"]
    return lambda step: parameter.value(step, of)


def test_by_default_it_changes_over_the_whole_run():
    at = value()
    assert [at(step) for step in (0, 25, 50, 99, 100, 101)] == [0, 0.25, 0.5, 0.99, 1, 1]
    assert [value(of=10)(step) for step in (0, 5, 10)] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"steps": 50}, [0, 0.5, 1, 1]),
        ({"steps": 0.5}, [0, 0.5, 1, 1]),
        ({"start": 25}, [0, 0, 1 / 3, 1]),
        ({"start": 0.25, "steps": 50}, [0, 0, 0.5, 1]),
        ({"start": 25, "steps": 25}, [0, 0, 1, 1]),
        ({"steps": 1}, [0, 1, 1, 1]),
        ({"steps": 200}, [0, 0.125, 0.25, 0.5]),  # longer than the run: it does not arrive
        ({"schedule": "cosine"}, [0, 0.5 * (1 - 0.5**0.5), 0.5, 1]),
    ],
)
def test_start_and_steps_are_steps_or_fractions_of_the_run(more, expected):
    assert [value(**more)(step) for step in (0, 25, 50, 100)] == pytest.approx(expected, abs=1e-15)


def test_the_ends_are_exact_and_may_fall():
    at = parse("t*x", {"t": {"schedule": "cosine", "from": 1 / 3, "to": -0.1, "start": 2, "steps": 3}}).scheduled["t"]
    assert [at.value(step, 9) for step in (0, 2, 5, 9)] == [1 / 3, 1 / 3, -0.1, -0.1]
    assert at.value(3, 9) > at.value(4, 9)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"schedule": "linear", "from": 0}, "'t' needs to: its values at the ends"),
        ({"schedule": "step", "from": 0, "to": 1}, "schedule: 'step'; it must be linear or cosine"),
        (RAMP | {"init": 1}, "takes schedule, from, to, start and steps, not init"),
        (RAMP | {"from": "a"}, "must be a finite number, not 'a'"),
        (RAMP | {"to": 1e39}, "the scheduled parameter 't' reaches 1e+39, beyond 32-bit arithmetic"),
        (RAMP | {"steps": 0}, "has steps: 0; it must be a whole number of steps, or a fraction of the run below 1"),
        (RAMP | {"steps": 1.5}, "has steps: 1.5"),
        (RAMP | {"steps": 1.0}, "has steps: 1.0"),
        (RAMP | {"start": -1}, "has start: -1"),
        (RAMP | {"start": "x"}, "has start: 'x'"),
    ],
)
def test_what_is_no_schedule_is_refused(given, reason):
    with pytest.raises(FormulaError, match=re.escape(reason)):
        parse("t * x", {"t": given})


def test_domains_cover_all_values_between_the_ends():
    check_domains(parse("x / t", {"t": {"schedule": "linear", "from": 0.5, "to": 2}}))
    with pytest.raises(FormulaError, match="the division can hit zero"):
        check_domains(parse("x / t", {"t": {"schedule": "linear", "from": -1, "to": 2}}))
    with pytest.raises(FormulaError, match="log requires an argument above 0"):
        check_domains(parse("x * log(t)", {"t": {"schedule": "linear", "from": 1, "to": 0}}))


@pytest.mark.parametrize("ends", [(1, 30), (30, 1), (1, 59)])
def test_overflow_is_found_at_any_value_of_the_schedule(ends):
    """exp(t x) exp(-t x) overflows only where t x is above 88: at x = 20 that needs a t above 4.4."""
    text = "x * exp(min(t * max(x, -3) , 20*t)) * exp(-min(t * max(x, -3), 20*t))"
    assert activation(text, {"t": {"schedule": "linear", "from": 0.5, "to": 1}}).compiled
    with pytest.raises(FormulaError, match="in 32-bit arithmetic"):
        assert activation(text, {"t": {"schedule": "linear", "from": ends[0], "to": ends[1]}}).compiled


def test_a_nan_is_kept_at_both_ends():
    function = activation("where(t > 0.5, where(x > 0, 1, 0), x)", {"t": RAMP})
    for t in (0.0, 1.0):
        assert function(torch.full((1, 8), torch.nan), t=torch.tensor([t])).isnan().all()


def plain(pre: Tensor, t: Tensor, b: Tensor | None = None) -> Tensor:
    gate, up = pre.unbind(-2)
    return (1 - t) * nn.functional.silu(gate if b is None else b * gate) * up + t * torch.relu(gate) * up


def check(backend: str, dtype: torch.dtype, which: Any, values: tuple[float, ...]) -> None:
    """Compare h and the gradients with autograd's of the plain formula in float64, at several values of t."""
    generator = torch.Generator().manual_seed(0)
    pre, dh = torch.randn(5, 2, WIDTH, generator=generator), torch.randn(5, WIDTH, generator=generator)
    b = 1 + torch.rand(WIDTH, generator=generator)
    eps = torch.finfo(dtype).eps
    for t in values:
        function, results = activation(*which, backend=backend), []
        more = {"b": b} if "b" in which[1] else {}
        for kind, compute in ((dtype, function), (torch.float64, plain)):
            leaves = [pre.to(kind).requires_grad_(), *(each.to(kind).requires_grad_() for each in more.values())]
            h = compute(leaves[0], **dict(zip(more, leaves[1:], strict=True)), t=torch.tensor([t]))
            results.append([h, *torch.autograd.grad(h, leaves, dh.to(kind))])
        for ours, true in zip(*results, strict=True):
            torch.testing.assert_close(ours.double(), true, rtol=16 * eps, atol=64 * eps)
        h, stats = function.forward_with_stats(pre.to(dtype), [*more.values(), torch.tensor([t])])
        assert torch.equal(h, results[0][0].detach())
        assert bool(stats.sums[0] > 0) == (t == 1)  # zeros of h: ReLU has them, and nothing else here


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("reference", torch.float32), ("c", torch.float32)]
)
@pytest.mark.parametrize("which", [MIXED, PLAIN])
def test_values_and_gradients_are_those_of_the_plain_formula(backend, dtype, which):
    check(backend, dtype, which, (0.0, 0.375, 1.0))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("which", "t"), [(MIXED, 0.375), (PLAIN, 1.0)])
def test_in_triton_too(interpreter, which, t):
    interpreter.submit(check, "triton", torch.float32, which, (t,)).result()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_it_has_no_gradient(backend):
    function, t = activation(*PLAIN, backend=backend), torch.tensor([0.5], requires_grad=True)
    pre = torch.randn(3, 2, 8, requires_grad=True)
    function(pre, t=t).sum().backward()
    assert t.grad is None
    assert pre.grad is not None
    _, _, dlearned = function.backward(pre.detach(), torch.ones(3, 8), [t.detach()])
    assert dlearned == []


def test_kernels_do_not_depend_on_the_schedule_and_sum_no_gradient_of_it():
    first, second = (
        activation(PLAIN[0], {"t": {"schedule": kind, "from": 0, "to": to}}).compiled
        for kind, to in (("linear", 1), ("cosine", 0.5))
    )
    assert c_source.source(first) == c_source.source(second)
    assert triton_source.source(first) == triton_source.source(second)
    assert "sum" not in triton_source.source(first)
    assert {"dt"}.isdisjoint(first.backward.outputs)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("which", [MIXED, PLAIN])
def test_the_operators_give_it_none_either(backend, which):
    function = activation(*which, backend=backend)
    learned = [torch.ones(9)] if which is MIXED else []
    pre, dh, given = torch.randn(4, 2, 9), torch.randn(4, 9), [*learned, torch.tensor([0.25])]
    opcheck(torch.ops.kernels.backward.default, (pre, dh, given, function.key, True))
    leaves = [*(tensor.requires_grad_() for tensor in learned), given[-1]]
    opcheck(torch.ops.kernels.forward.default, (pre.requires_grad_(), leaves, function.key))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_follows_the_steps_and_keeps_fp32(compiled):
    mlp = FormulaMLP(8, WIDTH, *PLAIN)
    assert list(mlp.state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = torch.compile(mlp, backend=counter, fullgraph=True) if compiled else mlp
    for step in (0, 3, 10):
        mlp.set_step(step, 10)
        pre = torch.stack((mlp.gate_proj(x), mlp.up_proj(x)), -2)
        torch.testing.assert_close(layer(x), mlp.down_proj(plain(pre, torch.tensor(step / 10))), rtol=1e-5, atol=1e-6)
        assert all(g is not None for g in torch.autograd.grad(layer(x).sum(), list(mlp.parameters())))
    assert counter.frame_count == compiled  # one graph for all values
    torch._dynamo.reset()
    mlp.set_step(1, 3)
    mlp.to(torch.bfloat16)
    assert float(mlp.scheduled_t) == pytest.approx(1 / 3, rel=1e-7)


def test_a_limit_and_a_sharpness_may_follow_a_schedule():
    function = activation(
        "min(gate, limit) * sigmoid(k * gate) * up",
        {"limit": {"schedule": "cosine", "from": 10, "to": 1}, "k": {"schedule": "linear", "from": 1, "to": 100}},
    )
    pre = torch.tensor([[[5.0, -1.0], [1.0, 1.0]]])
    h = function(pre, limit=torch.tensor([1.0]), k=torch.tensor([100.0]))
    torch.testing.assert_close(h, torch.tensor([[1.0, 0.0]]))
