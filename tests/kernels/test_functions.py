"""The registry of elementary functions: every entry is complete, and has its bodies in C and in Triton."""

from __future__ import annotations

import math
import re

import mpmath
import numpy as np
import pytest
import torch

from kernels.c.library import PRIMITIVES
from kernels.formula.functions import REGISTRY, Function, implementation

TRITON = (PRIMITIVES.parents[1] / "triton" / "primitives.py").read_text()
TRITON_NAMES = {"max": "maximum", "min": "minimum"}
OPERATIONS = sorted(name for name, function in REGISTRY.items() if function.operation)


@pytest.mark.parametrize("name", [name for name, function in REGISTRY.items() if function.in_grammar])
def test_a_function_of_the_grammar_has_a_derivative_or_a_macro_and_an_interval(name):
    function = REGISTRY[name]
    assert function.slope or function.macro or name in ("max", "min")  # which SymPy classes of their own differentiate
    assert function.interval
    assert function.numpy
    assert function.torch or function.eager


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_bodies_in_both_kernel_languages(name):
    function, c = REGISTRY[name], PRIMITIVES.read_text()
    assert re.search(rf"\bk_{name}\(", c)
    assert bool(re.search(rf"\bk_{name}_bf16\(", c)) or not function.short_in_c
    if name != "abs":  # which is Triton's own
        [signature] = re.findall(rf"^def {TRITON_NAMES.get(name, name)}\(([^)]*)\)", TRITON, re.M)
        assert ("PRECISE" in signature) == function.short_in_triton


@pytest.mark.parametrize("name", OPERATIONS)
def test_its_implementations_compute_the_same(name):
    """NumPy and torch in float64 against 30 digits, at points of its domain."""
    function = REGISTRY[name]
    above = -3.0 if function.above is None else function.above + 0.25
    points = np.linspace(above, 3.0, 13)
    operands = [points] if (function.operands or function.arity) == 1 else [points[::-1] * 0.7, points]
    if name in ("complement", "sech2"):  # the value of sigmoid or tanh comes first
        operands[0] = 1 / (1 + np.exp(-points)) if name == "complement" else np.tanh(points)
    of = {kind: getattr(function, kind) for kind in ("numpy", "mpmath", "torch")}
    with mpmath.workdps(30):
        exact = [
            float(implementation(of["mpmath"], mpmath)(*map(mpmath.mpf, each))) for each in zip(*operands, strict=True)
        ]
    # erf and the normal distribution's are vectorised in fp32 there: they answer where 32-bit arithmetic overflows.
    rounding = np.finfo(np.float32 if name in ("erf", "normal_cdf") else np.float64).eps
    np.testing.assert_allclose(
        implementation(of["numpy"], np)(*operands), exact, rtol=16 * rounding, atol=16 * rounding
    )
    actual = implementation(of["torch"], torch)(*(torch.from_numpy(np.ascontiguousarray(each)) for each in operands))
    np.testing.assert_allclose(actual.numpy(), exact, rtol=16 * np.finfo(float).eps, atol=16 * np.finfo(float).eps)


@pytest.mark.parametrize("name", [name for name, function in REGISTRY.items() if function.in_grammar])
def test_its_interval_holds_its_values(name):
    function: Function = REGISTRY[name]
    assert function.interval
    low = -3.0 if function.above is None else function.above + 0.25
    for start, end in ((low, 3.0), (low, (low + 3) / 2), (0.5, 0.5)):
        arguments = [(start, end), (-1.0, -1.0), (1.0, 1.0)][: function.arity]
        least, most = function.interval(*arguments)
        written = function.eager or function.torch
        assert written
        x = torch.linspace(start, end, 101, dtype=torch.float64)
        values = implementation(written, torch)(x, *(bound for bound, _ in arguments[1:]))
        assert math.nextafter(least, -math.inf) <= float(values.min())
        assert float(values.max()) <= math.nextafter(most, math.inf)
