"""The activation as custom operators of torch, for torch.compile, FakeTensor and export.

Plain tensors in eager mode bypass them: an operator costs 15 µs per call on a CPU and 60 µs on a GPU.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor

from ..formula import parse
from .activation import FIRST_ORDER, NAMESPACE, Activation


@functools.lru_cache(maxsize=256)
def activation_of(key: str) -> Activation:
    """Return the activation with a given `Activation.key`; works in any process."""
    text, parameters, backend = json.loads(key)
    return Activation(parse(text, parameters), backend)


@torch.library.custom_op(f"{NAMESPACE}::forward", mutates_args=())
def forward(pre: Tensor, learned: list[Tensor], key: str) -> Tensor:
    """Compute h; see `Activation.forward`."""
    return activation_of(key).compute(pre, learned)


@forward.register_fake
def _(pre: Tensor, learned: list[Tensor], key: str) -> Tensor:  # noqa: ARG001
    return pre.new_empty(_h_shape(pre, key))


@torch.library.custom_op(f"{NAMESPACE}::backward", mutates_args=())
def backward(pre: Tensor, dh: Tensor, learned: list[Tensor], key: str, with_h: bool) -> list[Tensor]:
    """Compute [gradient of pre, h if `with_h`, gradient of each learned parameter]; see `Activation.backward`."""
    dpre, h, dlearned = activation_of(key).compute_backward(pre, dh, learned, with_h)
    return [dpre, *([h] if h is not None else []), *dlearned]


@backward.register_fake
def _(pre: Tensor, dh: Tensor, learned: list[Tensor], key: str, with_h: bool) -> list[Tensor]:
    wide = torch.promote_types(pre.dtype, torch.float32)
    h = [dh.new_empty(_h_shape(pre, key))] if with_h else []
    trained = learned[: len(activation_of(key).formula.learned)]
    return [pre.new_empty(pre.shape), *h, *(tensor.new_empty(tensor.shape, dtype=wide) for tensor in trained)]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG001
    pre, learned, ctx.key = inputs
    ctx.save_for_backward(pre, *learned)


def _backward(ctx: Any, dh: Tensor) -> tuple:
    pre, *learned = ctx.saved_tensors
    dpre, *dlearned = backward(pre, dh, learned, ctx.key, False)
    gradients = [d.to(p.dtype) for d, p in zip(dlearned, learned, strict=False)]
    return dpre, [*gradients, *[None] * (len(learned) - len(gradients))], None  # scheduled parameters have none


def _backward_of_backward(*_: Any) -> Any:
    raise FIRST_ORDER.of_second_derivatives()


forward.register_autograd(_backward, setup_context=_setup_context)
backward.register_autograd(_backward_of_backward)


def _h_shape(pre: Tensor, key: str) -> torch.Size | tuple:
    return (*pre.shape[:-2], pre.shape[-1]) if activation_of(key).formula.gated else pre.shape
