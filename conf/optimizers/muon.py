"""Muon for the hidden matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW for everything else.

An update is the momentum of a matrix, made nearly orthogonal by a Newton-Schulz iteration, so it needs the whole matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from conf.optimizers.optimizer import Optimizer, Rule
from kernels.common.errors import UserError

if TYPE_CHECKING:
    from conf.schema import Config, OptimConfig

# Momentum and fp32 weight both ways, gradient both ways (it becomes the update), weight in bf16.
_MUON_RULE = Rule("muon", ("momentum",), 26)


class OrthogonalOptimizer(Optimizer):
    """`optim=muon`, and others whose hidden matrices are moved by nearly orthogonal updates."""

    @property
    def whole_matrices(self) -> bool:
        return True

    def lr(self, optim: OptimConfig, rule: Rule) -> float:
        return optim.lr if rule is self.hidden or optim.adamw_lr is None else optim.adamw_lr

    def weight_decay(self, optim: OptimConfig, rule: Rule) -> float:
        of_others = optim.adamw_weight_decay
        return optim.weight_decay if rule is self.hidden or of_others is None else of_others

    def width_exponent(self, optim: OptimConfig, rule: Rule) -> float:
        # The singular values of an orthogonal update are all alike, so those of one with elements of a fixed root mean square
        # grow with the square root of the width, not with the width. The scale "spectral" fixes them.
        if rule is not self.hidden:
            return 1.0
        return 0.0 if optim.update_scale == "spectral" else 0.5

    def flops(self, optim: OptimConfig, rows: int, columns: int) -> float:
        short, long = sorted((rows, columns))
        # A step multiplies X by its transpose, the result by itself, and that by X.
        return optim.ns_steps * (4.0 * short**2 * long + 2.0 * short**3)

    def check(self, config: Config) -> None:
        if config.optim.qk_clip and config.model.qk_norm:
            raise UserError(
                "optim.qk_clip bounds attention logits, which model.qk_norm=true bounds already: set one of them to 0 or false"
            )


MUON = OrthogonalOptimizer("muon", _MUON_RULE)
