"""What an optimizer is to the rest of the project: which rule updates a parameter, what it keeps, costs and refuses.

Nothing here needs torch: the validation, the estimate and the readers of checkpoints ask it. The updates themselves are in
`training/optimizers/`, one file an optimizer, of the same names.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema import Config, OptimConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """How some of the parameters are updated.

    Args:
        name: as parameter groups have it.
        states: names of the fp32 tensors that it keeps per parameter, each of the parameter's shape, as checkpoints have them.
        bytes_moved: read and written per parameter by a step: states and fp32 weight both ways, gradient, weight in bf16.
        row_states: names of the fp32 vectors that it keeps, with one number per row of the whole parameter.
    """

    name: str
    states: tuple[str, ...]
    bytes_moved: float
    row_states: tuple[str, ...] = ()


# Decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101).
ADAMW_RULE = Rule("adamw", ("exp_avg", "exp_avg_sq"), 30)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer: the rule of the hidden matrices (attention and FFN), and that of everything else.

    Everything else is the embedding, the output projection, the norms and the learned parameters of formulas.
    """

    name: str
    hidden: Rule
    others: Rule = ADAMW_RULE

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Its rules, each once."""
        return tuple(dict.fromkeys((self.hidden, self.others)))

    @property
    def whole_matrices(self) -> bool:
        """Whether an update mixes the elements of a matrix, so that it needs the whole of it."""
        return False

    def rule(self, name: str, dimensions: int) -> Rule:
        """Return the rule of a parameter of the decoder.

        Args:
            name: as `Decoder.named_parameters` has it.
            dimensions: of the parameter.
        """
        return self.hidden if is_hidden_matrix(name, dimensions) else self.others

    def lr(self, optim: OptimConfig, rule: Rule) -> float:  # noqa: ARG002
        """Return the peak learning rate of a rule."""
        return optim.lr

    def weight_decay(self, optim: OptimConfig, rule: Rule) -> float:  # noqa: ARG002
        """Return the weight decay of the matrices of a rule."""
        return optim.weight_decay

    def width_exponent(self, optim: OptimConfig, rule: Rule) -> float:  # noqa: ARG002
        """Return e of `optim.scaling=mup`: a hidden matrix of w times the width learns at w ** -e of the rate.

        An update whose elements all have one size adds up over the width where they agree, as Adam's do: 1.
        """
        return 1.0

    def flops(self, optim: OptimConfig, rows: int, columns: int) -> float:  # noqa: ARG002
        """Return the FLOPs in matrix products of one update of a logical matrix."""
        return 0.0

    def check(self, config: Config) -> None:
        """Refuse what it cannot be combined with.

        Raises:
            UserError: what is wrong, and what to change.
        """


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Return whether a parameter of the decoder is a matrix of its attention or feed-forward layers."""
    return dimensions > 1 and name.startswith("layers.") and ".learned." not in name
