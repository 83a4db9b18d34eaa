"""Initial weights: a function of (parameter's name, seed) alone.

So they are the same whatever the ranks that share a matrix, their number, or the ZeRO stage, and everything outside the FFN
is the same for every arm. Matrices are normal; the two that write into the residual stream (attention.out, ffn.down) are
scaled by 1 / sqrt(2 n_layers), so that its variance does not grow with depth (GPT-2, Radford 2019), and ffn.down also by its
arm's `down_scale`. Norms start at 1, what a formula learns where the formula says.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from launch.estimate.counts import Shape
from model.decoder import Decoder
from model.feed_forward import FeedForward
from model.parallel import cut_of, whole_shape


def initialise(
    model: Decoder,
    shape: Shape,
    seed: int,
    init_std: float | None = None,
    gather: Callable[[nn.Parameter], contextlib.AbstractContextManager[Any]] = lambda _: contextlib.nullcontext(),
) -> None:
    """Fill every parameter of `model` in place.

    Args:
        init_std: standard deviation of the matrices; None: 1 / sqrt(d_model).
        gather: a context in which a parameter that ZeRO-3 has partitioned is whole and may be written.
    """
    std = shape.d_model**-0.5 if init_std is None else init_std
    constants, scales = _of_the_arms(model)
    tensor = model.mesh.tensor
    for name, parameter in model.named_parameters():
        with gather(parameter), torch.no_grad():
            if name.endswith("norm.weight") or name in constants:
                parameter.fill_(constants.get(name, 1.0))
                continue
            residual = name.endswith(("attention.out", "ffn.down"))
            scale = std / math.sqrt(2 * shape.n_layers) if residual else std
            scale *= scales.get(name, 1.0)
            generator = torch.Generator().manual_seed(_seed_of(name, seed))
            whole = torch.empty(whole_shape(parameter, tensor.size), dtype=torch.float32)
            whole.normal_(0.0, scale, generator=generator)
            cut = cut_of(parameter)
            parameter.copy_(whole if cut is None else cut.part(whole, tensor.rank, tensor.size))


def _of_the_arms(model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
    """Return what the formulas say of parameters, by name: the start of each learned one, and the scale of each ffn.down."""
    constants, scales = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, FeedForward):
            scales[f"{name}.down"] = module.down_scale
            learned = module.activation.formula.learned
            constants |= {f"{name}.learned.{each}": parameter.init for each, parameter in learned.items()}
    return constants, scales


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # a generator takes 63 bits
