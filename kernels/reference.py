"""The reference backend: a formula evaluated with plain torch operations, differentiated by autograd.

Any floating dtype (float64 included) and any device. It is what every other backend is judged against.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formula import Formula, Node

_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": lambda a, b: a * b if a.ndim else b * a,  # torch rounds a number on the left to bf16, on the right it does not
    "/": operator.truediv,
    "**": operator.pow,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "negate": operator.neg,
}


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in ("abs", "sign", "sqrt", "exp", "expm1", "log", "log1p", "sigmoid", "tanh")
    },
    **{name: getattr(torch, name) for name in ("sin", "cos", "atan", "erf", "where")},
    "softplus": functools.partial(F.softplus, threshold=40.0),  # linear above; torch's own 20 errs by 2e-9 there
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "max": torch.maximum,
    "min": torch.minimum,
    "clip": torch.clamp,
}


class Activation:
    """`h = f(pre, **learned)`; see `kernels.activation`."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula

    def __call__(self, pre: Tensor, **learned: Tensor) -> Tensor:
        """Compute h (..., d_ff) of `pre`, which is (..., d_ff), or (..., 2, d_ff) for a gated formula (gate first)."""
        if self.formula.gated:
            if pre.ndim < 2 or pre.shape[-2] != 2:
                raise ValueError(f"a gated formula takes pre-activations (..., 2, d_ff), not {tuple(pre.shape)}")
            gate, up = pre.unbind(
                -2
            )  # whose backward stacks the two gradients; that of indexing would add two padded ones
            values = {"gate": gate, "up": up, **learned}
        else:
            values = {"x": pre, **learned}
        return _evaluate(self.formula.tree, values, pre.dtype).to(pre.dtype)

    def __repr__(self) -> str:
        return f"Activation({self.formula.text!r}, backend='reference')"


def _evaluate(node: Node, values: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    if node.kind == "number":
        # Without dimensions, so that it takes part in every operation and decides no dtype.
        return torch.tensor(float(node.value), dtype=torch.float64)
    if node.kind == "symbol":
        return values[str(node.value)]
    function = _FUNCTIONS[str(node.value)] if node.kind == "call" else _OPERATORS[node.kind]
    arguments = [_evaluate(argument, values, dtype) for argument in node.arguments]
    if node.value == "where" and arguments[0].ndim and not arguments[1].ndim + arguments[2].ndim:
        # A choice between two numbers has the condition's shape, so their dtype would decide that of the result.
        arguments[1:] = [number.to(torch.promote_types(dtype, torch.float32)) for number in arguments[1:]]
    return function(*arguments)
