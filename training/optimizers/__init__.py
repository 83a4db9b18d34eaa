"""The updates of the optimizers, one file each; what they keep, cost and refuse is in `conf/optimizers/`.

`groups.py` divides parameters over their rules. `matrices.py` finds the logical matrices in the shards of parameters, and
`exchange.py` brings each of them whole to one rank and the result back, for optimizers that need that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from conf.schema import OptimConfig
from training.optimizers.adamw import adamw
from training.optimizers.layout import MatrixLayout
from training.optimizers.muon import Muon
from training.optimizers.normuon import NorMuon


@runtime_checkable
class MatrixOptimizer(Protocol):
    """An optimizer whose update of an element depends on others, so that it must know what ZeRO made of the parameters."""

    row_factors: dict[str, Tensor]

    def attach(self, layout: MatrixLayout) -> None:
        """Learn where the parameters lie in the tensors that ZeRO hands over, before the first step."""

    def gather_row_states(self) -> dict[str, dict[str, Tensor]]:
        """Return {parameter: {state: (rows,)}} of the states with one number per row, which may be set. Collective."""
        ...


UPDATES: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": Muon,
    "normuon": NorMuon,
}
