"""How learning rates, weight decay and initial weights follow width and depth: `optim.scaling`.

`mup` is the maximal update parametrisation (Yang et al. 2022, arXiv 2203.03466) with residual branches divided by depth
(CompleteP, Dey et al. 2025, arXiv 2505.01618). With it the activations, and what a step changes in them, do not depend on width
and depth, so that a learning rate found on a small model holds for a large one. For AdamW, with w = d_model / base_width and
l = n_layers / base_layers, relative to a model of the base's shape:

| parameters | learning rate | weight decay | initial standard deviation |
|---|---|---|---|
| embedding, norms, a formula's own | 1 | 1 | 1 |
| q, k, v, gate, up | 1/w | w | 1/sqrt(w) |
| attention.out, ffn.down | 1/(w l) | w l | 1/(sqrt(w) l) |
| head | 1/w | w | 1/w |

The factors 1/w on logits and 1/l on branches are part of the weights, which AdamW moves in proportion to its rate alone; so
nothing is multiplied in a forward pass. Widths of heads and the ratio of d_ff to d_model are meant to stay as they are.

For orthogonal updates (Muon), 1/w in the rates of hidden matrices is 1/sqrt(w) where the elements of an update keep their size,
and 1 where its largest singular value has: all of them are alike, while the largest of Adam's update grows with the width.
"""

from __future__ import annotations

import dataclasses
import math

from conf.schema import OptimConfig
from conf.shape import Shape

OUTPUTS = ("attention.out", "ffn.down")  # of a branch, into the residual stream


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The factors of a model relative to a base; all 1 where the base has its shape."""

    base_width: int  # d_model
    base_layers: int
    width: float = 1.0  # d_model over that of the base
    depth: float = 1.0  # layers over those of the base

    def rate(self, name: str, exponent: float = 1.0) -> float:
        """Return the factor of a parameter's learning rate. That of its weight decay is the inverse.

        Args:
            exponent: e of a rate that falls with width ** e; see `Optimizer.width_exponent` of conf/optimizers.
        """
        if name.startswith("embedding") or name.endswith("norm.weight") or ".learned." in name:
            return 1.0
        rate = self.width**-exponent
        return rate / self.depth if name.endswith(OUTPUTS) else rate

    def deviation(self, name: str, init_std: float | None = None) -> float:
        """Return a matrix's initial standard deviation, an arm's `down_scale` aside.

        Args:
            init_std: of the base, but for what writes into the residual stream; None: 1 / sqrt(base_width).
        """
        std = self.base_width**-0.5 if init_std is None else init_std
        if name.startswith("embedding"):
            return std
        if name.startswith("head"):
            return std / self.width
        std /= math.sqrt(self.width)
        return std / math.sqrt(2 * self.base_layers) / self.depth if name.endswith(OUTPUTS) else std


def scaling_of(optim: OptimConfig, shape: Shape) -> Scaling:
    """Return the factors for a model of a shape."""
    if optim.scaling == "none":
        return Scaling(shape.d_model, shape.n_layers)
    width, depth = shape.d_model / optim.base_width, shape.n_layers / optim.base_layers
    return Scaling(optim.base_width, optim.base_layers, width, depth)
