"""Which ranks share what: the mesh of ranks, and how a parameter is cut over those that share each matrix.

World size = data x context x tensor, tensor innermost, so that the ranks that talk most are neighbours. Three ways to share:

    tensor    each matrix is cut over these ranks (Megatron-LM, Shoeybi 2019, arXiv 1909.08053); with `sequence`, what lies
    between
              the matrices is cut too, over tokens (Korthikanti 2022, arXiv 2205.05198)
    context   each sequence is cut over these ranks; around attention they exchange sequence for heads (DeepSpeed-Ulysses,
    Jacobs
              2023, arXiv 2309.14509)
    data      each has its own sequences

ZeRO partitions over data x context, the ranks that hold the same part of each matrix: `replicas`. What ranks say to each
other is in `collectives.py`.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Axis:
    """One way of sharing, as this rank sees it: `rank` of `size`, and the group of those ranks (None: all that there are)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclasses.dataclass(frozen=True)
class Mesh:
    """This rank's place among all."""

    tensor: Axis = Axis()
    context: Axis = Axis()
    data: Axis = Axis()
    replicas: Axis = Axis()  # data x context
    sequence: bool = False  # between the matrices, tensor ranks share the tokens


def join(tensor: int = 1, context: int = 1, sequence: bool = False, timeout: datetime.timedelta | None = None) -> Mesh:
    """Make the groups of a mesh over all ranks of the process group. Collective.

    Args:
        tensor, context: ranks that share each matrix, and each sequence; their product divides the world size.
        sequence: whether tensor ranks share the tokens between the matrices.
        timeout: of a collective; None: torch's own.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    ranks = torch.arange(world).view(-1, context, tensor)  # data, context, tensor

    def axis(members: Tensor, alone: bool = False) -> Axis:
        """members: (groups, ranks of each); `alone`: a rank alone needs a group too."""
        if len(members) == 1:
            return Axis(rank, world)
        if members.shape[1] == 1 and not alone:
            return Axis()
        groups = [
            dist.new_group(each, timeout=timeout) for each in members.tolist()
        ]  # every rank takes part in making each
        mine, place = (members == rank).nonzero()[0].tolist()
        return Axis(place, members.shape[1], groups[mine])

    return Mesh(
        tensor=axis(ranks.flatten(0, 1)),
        context=axis(ranks.transpose(1, 2).flatten(0, 1)),
        data=axis(ranks.flatten(1).T),
        replicas=axis(ranks.flatten(0, 1).T, alone=True),
        sequence=sequence and tensor > 1,
    )


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a parameter is cut over tensor ranks: along `dim`, each of the `sections` (sizes that add up) for itself."""

    dim: int
    sections: tuple[int, ...]

    def part(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Return the part of tensor rank `rank` of `size`; a view where there is one section."""
        parts = [section.chunk(size, self.dim)[rank] for section in whole.split(self.sections, self.dim)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the whole tensor from the parts of all tensor ranks, in order."""
        if len(parts) == 1:
            return parts[0]
        local = [section // len(parts) for section in self.sections]
        by_section = zip(*(part.split(local, self.dim) for part in parts), strict=True)
        return torch.cat([piece for section in by_section for piece in section], self.dim)


def cut_parameter(mesh: Mesh, shape: Sequence[int], dim: int, sections: Sequence[int] = ()) -> nn.Parameter:
    """Return this rank's empty part of a parameter of the whole `shape`, which is cut over tensor ranks along `dim`.

    Args:
        sections: sizes along `dim` that are cut each for itself; none: the whole of it.
    """
    local = list(shape)
    local[dim] //= mesh.tensor.size
    parameter = nn.Parameter(torch.empty(local))
    parameter.cut = Cut(dim, tuple(sections) or (shape[dim],))
    # DeepSpeed's word for it: its norm counts such parameters on every tensor rank, and all others once.
    parameter.tensor_model_parallel = mesh.tensor.size > 1
    return parameter


def cut_of(parameter: nn.Parameter) -> Cut | None:
    """Return how a parameter is cut over tensor ranks; None: every rank has all of it."""
    return getattr(parameter, "cut", None)


def whole_shape(parameter: nn.Parameter, tensor: int) -> tuple[int, ...]:
    """Return the shape of a parameter before it was cut over `tensor` ranks, and by ZeRO-3."""
    shape, cut = list(getattr(parameter, "ds_shape", parameter.shape)), cut_of(parameter)
    if cut is not None:
        shape[cut.dim] *= tensor
    return tuple(shape)
