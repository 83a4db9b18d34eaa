"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the hidden matrices, AdamW for everything else.

The momentum is elementwise, so every rank updates its own fragments of it. What moves a matrix is its momentum made
orthogonal, which needs all of it: `exchange.py` brings every logical matrix to one rank. The gradient was clipped before, by
the norm of all gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from conf.schema import OptimConfig
from training.optimizers.adamw import step_adamw
from training.optimizers.exchange import Exchange
from training.optimizers.layout import MatrixLayout
from training.optimizers.newton_schulz import coefficients, orthogonalise


@dataclasses.dataclass(frozen=True)
class MatrixGroup:
    """The matrices of tensors that are updated together, and where this rank's pieces of them lie."""

    exchange: Exchange
    places: list[tuple[Tensor, int]]  # of each piece: the tensor, and the first element in it
    scales: list[float]  # of each matrix's update


class Muon(torch.optim.Optimizer):
    """`optim=muon` for the tensors that ZeRO hands over: parameters at stage 0, else flat fp32 partitions of a group.

    `attach` tells it which matrices these hold, before the first step.
    """

    rule = "muon"

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig) -> None:
        super().__init__(groups, {"lr": optim.lr, "weight_decay": 0.0})
        self.optim, self._polynomials = optim, coefficients(optim.ns_coefficients, optim.ns_steps)
        self.layout: MatrixLayout | None = None
        # {parameter: (rows,)}: what multiplies the rows of a shard after an update.
        self.row_factors: dict[str, Tensor] = {}
        self.matrix_groups: dict[tuple[int, ...], MatrixGroup] = {}  # by the tensors of a step

    def attach(self, layout: MatrixLayout) -> None:
        """Learn which matrices the tensors hold."""
        self.layout = layout

    def gather_row_states(self) -> dict[str, dict[str, Tensor]]:
        """Return {parameter: {state: (rows,)}}: none here. Collective."""
        return {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: overloads
        """Update all tensors of the groups that have a gradient. Collective over all ranks."""
        assert closure is None, "a step is not computed twice"
        for group in self.param_groups:
            if group["rule"] != self.rule:
                step_adamw(group, self.state, self.optim)
            elif tensors := [tensor for tensor in group["params"] if tensor.grad is not None]:
                self._step(group, tensors)

    def _step(self, group: dict[str, Any], tensors: list[Tensor]) -> None:
        updates = {tensor: self._update_momentum(tensor).view(-1) for tensor in tensors}
        torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        found = self._group_of(tensors)
        pieces = found.exchange.pieces
        sources = [
            updates[tensor][start : start + piece.size]
            for (tensor, start), piece in zip(found.places, pieces, strict=True)
        ]
        for number, values in found.exchange.run(sources, functools.partial(self.compute, found)):
            (tensor, start), piece = found.places[number], pieces[number]
            weights = tensor.view(-1)[start : start + piece.size]
            weights.add_(values.to(tensor.device), alpha=-group["lr"] * found.scales[piece.matrix])
            matrix = found.exchange.matrices[piece.matrix]
            if (factors := self.row_factors.get(matrix.parameter)) is not None:  # of q, k and v, which are cut by rows
                elements = torch.arange(matrix.start + piece.start, matrix.start + piece.start + piece.size)
                weights.mul_(factors[elements.to(factors.device) // matrix.columns].to(tensor.device))

    def _update_momentum(self, tensor: Tensor) -> Tensor:
        """Return what is to be made orthogonal; it may take the place of the gradient."""
        assert tensor.grad is not None
        beta = self.optim.momentum
        if not (state := self.state[tensor]):
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["momentum"] = torch.zeros_like(tensor)
        state["step"] += 1
        momentum = state["momentum"].lerp_(tensor.grad, 1 - beta)
        return tensor.grad.lerp_(momentum, beta) if self.optim.nesterov else momentum

    def _group_of(self, tensors: list[Tensor]) -> MatrixGroup:
        key = tuple(map(id, tensors))
        if key not in self.matrix_groups:
            assert self.layout is not None, "attach comes before the first step"
            exchange, places = self.layout.exchange(tensors)
            scales = [update_scale(self.optim.update_scale, each.rows, each.columns) for each in exchange.matrices]
            self.matrix_groups[key] = MatrixGroup(exchange, places, scales)
        return self.matrix_groups[key]

    def compute(self, group: MatrixGroup, numbers: list[int], matrices: Tensor) -> Tensor:  # noqa: ARG002
        """Return the updates of B matrices of one shape, before they are scaled: (B, m, n) -> (B, m, n).

        Args:
            numbers: of the matrices in the group.
        """
        return orthogonalise(matrices, self._polynomials)


def update_scale(kind: str, rows: int, columns: int) -> float:
    """Return the factor of an orthogonal update of a logical matrix.

    "rms" gives its elements AdamW's usual root mean square, 0.2 (Liu et al. 2025, arXiv 2502.16982); "spectral" is the
    original's, which fixes the largest singular value.
    """
    return 0.2 * math.sqrt(max(rows, columns)) if kind == "rms" else math.sqrt(max(1.0, rows / columns))
