"""NorMuon (Li et al. 2025, arXiv 2510.05491): each row of an orthogonal update is divided by its usual size.

That is the root of the running mean of its elements' squares, `row_variance`: one number per row of a logical matrix, kept up
to date by the rank that owns the matrix. Every rank has room for all of them.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from training.optimizers.layout import MatrixLayout
from training.optimizers.matrices import Matrix
from training.optimizers.muon import MatrixGroup, Muon


class NorMuon(Muon):
    """`optim=normuon`."""

    rule = "normuon"

    def attach(self, layout: MatrixLayout) -> None:
        super().attach(layout)
        rows: dict[str, int] = {}
        for matrix in layout.matrices:
            rows[matrix.parameter] = rows.get(matrix.parameter, 0) + matrix.rows
        self._rows, self._variances = rows, torch.zeros(sum(rows.values()), device=layout.device)
        self._of_parameter = self._by_parameter(self._variances)

    def _by_parameter(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the views {parameter: (rows,)} of a number per row of all of them."""
        return dict(zip(self._rows, flat.split(list(self._rows.values())), strict=True))

    def compute(self, group: MatrixGroup, numbers: list[int], matrices: Tensor) -> Tensor:
        updates = super().compute(group, numbers, matrices).float()
        variances = [_rows_of(group.exchange.matrices[number], self._of_parameter) for number in numbers]
        for variance, squares in zip(variances, updates.square().mean(2), strict=True):
            variance.lerp_(squares, 1 - self.optim.beta2)
        updates = updates / (torch.stack(variances).sqrt().unsqueeze(2) + self.optim.eps)
        # Back to the size of an orthogonal matrix.
        norms = torch.linalg.vector_norm(updates, dim=(1, 2), keepdim=True)
        size = math.sqrt(min(matrices.shape[1:]))
        return (updates * (size / (norms + self.optim.eps))).to(matrices.dtype)

    def gather_row_states(self) -> dict[str, dict[str, Tensor]]:
        """Return {parameter: {"row_variance": (rows,)}}, brought together from the owners of the matrices. Collective."""
        if self.matrix_groups and dist.get_world_size() > 1:
            own = torch.zeros_like(self._variances)
            parts = self._by_parameter(own)
            for group in self.matrix_groups.values():
                for matrix, owner in zip(group.exchange.matrices, group.exchange.owners, strict=True):
                    if owner == dist.get_rank():
                        _rows_of(matrix, parts).copy_(_rows_of(matrix, self._of_parameter))
            dist.all_reduce(own)  # each row has one owner, so nothing is rounded
            self._variances.copy_(own)
        return {name: {"row_variance": values} for name, values in self._of_parameter.items()}


def _rows_of(matrix: Matrix, by_parameter: dict[str, Tensor]) -> Tensor:
    return by_parameter[matrix.parameter][matrix.first_row : matrix.first_row + matrix.rows]
