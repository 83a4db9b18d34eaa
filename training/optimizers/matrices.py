"""The logical matrices of a model: what an optimizer of matrices orthogonalises, and where it lies in the shards of parameters.

A parameter may hold several: q, k and v are stacked, and so are gate and up. A tensor rank holds a part of each, which is one
run of elements of its flattened shard.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from torch import nn

from model.parallel import shard_spec


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A logical matrix of rows x columns.

    Args:
        parameter: the name of the parameter that holds it.
        first_row: among all rows of the whole parameter.
        start: first element of a tensor rank's part, in the flattened shard of the parameter.
        dim: the dimension along which tensor ranks hold equal parts.
        tensor_ranks: those that hold a part, in order.
    """

    parameter: str
    rows: int
    columns: int
    first_row: int
    start: int
    dim: int
    tensor_ranks: tuple[int, ...]

    @property
    def part_shape(self) -> tuple[int, int]:
        """The shape of a tensor rank's part."""
        parts = len(self.tensor_ranks)
        return (self.rows // parts, self.columns) if self.dim == 0 else (self.rows, self.columns // parts)

    @property
    def part_elements(self) -> int:
        """The elements of a tensor rank's part."""
        return math.prod(self.part_shape)


def logical_matrices(
    name: str, parameter: nn.Parameter, tensor_size: int, head_dim: int | None = None
) -> Iterator[Matrix]:
    """Yield the logical matrices of a parameter of two or more dimensions; the leading ones count matrices.

    Args:
        tensor_size: ranks that it is sharded over.
        head_dim: rows of a head, if the heads of q, k and v are matrices of their own.
    """
    shape, spec = list(getattr(parameter, "ds_shape", parameter.shape)), shard_spec(parameter)  # of the shard
    if spec is None and tensor_size > 1:
        raise ValueError(f"{name} is a whole matrix on each of {tensor_size} tensor ranks: no rule for it")
    rows, columns = shape[-2:]
    dim = spec.dim - (len(shape) - 2) if spec else 0
    everyone = tuple(range(tensor_size))
    sections = [rows * (tensor_size if dim == 0 else 1)]
    if spec and len(spec.sections) > 1:
        sections = list(spec.sections)
    first_row = 0
    for block in range(math.prod(shape[:-2])):
        start = block * rows * columns
        for section in sections:
            part = section // tensor_size if dim == 0 else section
            if head_dim and name.endswith("attention.qkv"):
                yield from _heads(name, first_row, start, part, columns, head_dim, everyone)
            else:
                whole = columns * (tensor_size if dim == 1 else 1)
                yield Matrix(name, section, whole, first_row, start, dim, everyone)
            start += part * columns
            first_row += section


def _heads(
    name: str, first_row: int, start: int, rows: int, columns: int, head_dim: int, everyone: Sequence[int]
) -> Iterator[Matrix]:
    """Yield the heads in `rows` rows of every tensor rank's shard: each head is of one rank."""
    for rank in everyone:
        for first in range(0, rows, head_dim):
            yield Matrix(name, head_dim, columns, first_row + rank * rows + first, start + first * columns, 0, (rank,))
