"""A formula as hand-written plain torch: one operation after the other in the dtype of the tensors, differentiated by autograd.

The baseline of the fused kernels in error, speed and memory; not a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..formula import Formula, Node
from ..formula.functions import REGISTRY, implementation
from ..formula.grammar import EPSILON, OPERATORS

Value = Any  # a Tensor, or a number


def plain(formula: Formula, hold: bool = False) -> Callable[..., Tensor]:
    """Return `f(pre, **learned) -> h`, with `pre` (..., d_ff), or (..., 2, d_ff) for a gated formula (gate first).

    Args:
        hold: whether reductions over d_ff are constants to autograd, as they are in telemetry.
    """

    def h(pre: Tensor, /, **learned: Tensor) -> Tensor:  # a parameter may be named pre
        values: dict[str, Value] = {**formula.fixed, **{name: value.to(pre.dtype) for name, value in learned.items()}}
        if formula.gated:
            values |= {"gate": pre[..., 0, :], "up": pre[..., 1, :]}
        else:
            values["x"] = pre
        result = _value(formula.tree, values, pre.dtype, hold)
        shape = pre.select(-2, 0).shape if formula.gated else pre.shape
        if not isinstance(result, Tensor):  # where(a > 0, x, 0) with a fixed a below 0
            return pre.new_full(shape, result)
        return result if result.shape == shape else result.expand(shape)

    return h


def _value(node: Node, values: Mapping[str, Value], dtype: torch.dtype, hold: bool) -> Value:
    if node.kind == "number":
        return node.value
    if node.kind == "symbol":
        return values[str(node.value)]
    arguments = [_value(argument, values, dtype, hold) for argument in node.arguments]
    if node.kind == "reduce":
        if node.value == "norm":
            return arguments[0] / _reduced("rms", arguments[:1] + (arguments[1:] or [EPSILON]), hold)
        return _reduced(str(node.value), arguments, hold)
    if node.value == "where":
        return _where(dtype, *arguments)
    function = _FUNCTIONS[str(node.value)] if node.kind == "call" else OPERATORS[node.kind]
    if node.kind == "call" and not any(isinstance(argument, Tensor) for argument in arguments):
        arguments = [torch.tensor(argument, dtype=torch.float64, device="cpu") for argument in arguments]
        return float(function(*arguments))
    return function(*arguments)


def _where(dtype: torch.dtype, condition: Value, then: Value, otherwise: Value) -> Value:
    if not isinstance(condition, Tensor):
        return then if condition else otherwise
    if not isinstance(then, Tensor) and not isinstance(otherwise, Tensor):  # of two numbers torch.where returns fp32
        return torch.where(condition, then, otherwise).to(dtype)
    return torch.where(condition, then, otherwise)


def _reduced(name: str, arguments: list[Value], hold: bool) -> Tensor:
    value = _REDUCTIONS[name](*arguments)
    return value.detach() if hold else value


def _rms(e: Tensor, epsilon: float = 0.0) -> Tensor:
    return torch.sqrt(e.square().mean(-1, keepdim=True) + epsilon)


def _std(e: Tensor, epsilon: float = 0.0) -> Tensor:
    if not epsilon:
        return e.std(-1, correction=0, keepdim=True)
    return torch.sqrt(e.var(-1, correction=0, keepdim=True) + epsilon)


_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mean": lambda e: e.mean(-1, keepdim=True),
    "sum": lambda e: e.sum(-1, keepdim=True),
    "max": lambda e: e.max(-1, keepdim=True).values,
    "min": lambda e: e.min(-1, keepdim=True).values,
    "rms": _rms,
    "std": _std,
}
_FUNCTIONS: dict[str, Callable[..., Value]] = {
    name: implementation(eager, torch)
    for name, f in REGISTRY.items()
    if f.in_grammar and (eager := f.eager or f.torch) is not None
}
