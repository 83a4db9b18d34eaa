"""Initial weights: a function of a parameter's name, its full shape and the seed alone.

They do not depend on the mesh or on the ZeRO stage, and outside the FFN they are the same for every arm. Matrices are normal.
The two that write into the residual stream (attention.out, ffn.down) are scaled by 1 / sqrt(2 n_layers), so that its variance
does not grow with depth (GPT-2, Radford 2019); ffn.down is also scaled by its arm's `down_scale`. Norms start at 1, learned
parameters of a formula at their `init`. `optim.scaling=mup` scales them otherwise (`scaling.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from conf.shape import Shape
from model.decoder import Decoder
from model.feed_forward import FeedForward
from model.parallel import full_shape, shard_spec
from model.scaling import Scaling


def initialise(
    model: Decoder,
    shape: Shape,
    seed: int,
    init_std: float | None = None,
    scaling: Scaling | None = None,
    gather: Callable[[nn.Parameter], contextlib.AbstractContextManager[Any]] = lambda _: contextlib.nullcontext(),
) -> None:
    """Fill every parameter of `model` in place.

    Args:
        init_std: standard deviation of the matrices; None: 1 / sqrt(d_model).
        scaling: with width and depth; None: that of `optim.scaling=none`.
        gather: a context in which a parameter that ZeRO-3 has partitioned is gathered and may be written.
    """
    scaling = scaling or Scaling(shape.d_model, shape.n_layers)
    constants, scales = _arm_constants(model)
    tensor = model.mesh.tensor
    for name, parameter in model.named_parameters():
        with gather(parameter), torch.no_grad():
            if name.endswith("norm.weight") or name in constants:
                parameter.fill_(constants.get(name, 1.0))
                continue
            scale = scaling.deviation(name, init_std) * scales.get(name, 1.0)
            generator = torch.Generator().manual_seed(_seed_of(name, seed))
            full = torch.empty(full_shape(parameter, tensor.size), dtype=torch.float32)
            full.normal_(0.0, scale, generator=generator)
            spec = shard_spec(parameter)
            parameter.copy_(full if spec is None else spec.shard(full, tensor.rank, tensor.size))


def _arm_constants(model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
    """Return {name of a formula's learned parameter: its initial value} and {name of an ffn.down: its `down_scale`}."""
    constants: dict[str, float] = {}
    scales: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, FeedForward):
            scales[f"{name}.down"] = module.down_scale
            for symbol, parameter in module.activation.formula.learned.items():
                constants[f"{name}.learned.{symbol}"] = parameter.init
    return constants, scales


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # a generator takes 63 bits
