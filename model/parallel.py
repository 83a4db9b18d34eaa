"""The device mesh of ranks, and how a parameter is sharded over tensor ranks.

World size = data x context x tensor, with tensor innermost: the ranks that communicate most are neighbours.

    tensor    Each matrix is sharded over these ranks (Megatron-LM, Shoeybi 2019, arXiv 1909.08053). With sequence parallelism,
              activations between the matrices are sharded over tokens as well (Korthikanti 2022, arXiv 2205.05198).
    context   Each sequence is sharded over these ranks. Around attention they exchange sequence shards for head shards
              (DeepSpeed-Ulysses, Jacobs 2023, arXiv 2309.14509).
    data      Each rank has sequences of its own.

ZeRO partitions over data x context, the ranks that hold the same shard of every matrix: `Mesh.data_context`. Communication
inside the model lives in `collectives.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Axis:
    """One dimension of the mesh, as this rank sees it.

    Args:
        rank: this rank's index along the axis.
        size: ranks along the axis.
        group: their process group; None: the default group.
        sequence_parallel: of the tensor axis: between the matrices each rank holds N / size of the N tokens, not all of them.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False


@dataclasses.dataclass(frozen=True)
class Mesh:
    """This rank's place on every axis."""

    tensor: Axis = Axis()
    context: Axis = Axis()
    data: Axis = Axis()
    data_context: Axis = Axis()  # data x context: the ranks that ZeRO partitions over

    def for_generation(self) -> Mesh:
        """Return the mesh for decoding with a cache: every rank is given all the tokens, which may be a single one.

        So tensor ranks do not shard tokens, and each context rank computes the whole sequence alone.
        """
        return dataclasses.replace(
            self, tensor=dataclasses.replace(self.tensor, sequence_parallel=False), context=Axis()
        )


def init_mesh(tensor: int = 1, context: int = 1, sequence_parallel: bool = False) -> Mesh:
    """Create the process groups of a mesh over all ranks of the default group. Collective.

    Args:
        tensor, context: ranks that shard each matrix, and each sequence. Their product divides the world size.
        sequence_parallel: whether tensor ranks shard the tokens between the matrices; without effect on a single rank.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    ranks = torch.arange(world_size).view(-1, context, tensor)  # (data, context, tensor)

    def axis(members: Tensor, *, sequence_parallel: bool = False, group_of_one: bool = False) -> Axis:
        """members: (groups, ranks per group). DeepSpeed needs a real group on data_context, even of a single rank."""
        if len(members) == 1:
            return Axis(rank, world_size, None, sequence_parallel)
        if members.shape[1] == 1 and not group_of_one:
            return Axis()
        # `new_group` is collective over the whole world: every rank calls it for every group.
        groups = [dist.new_group(row) for row in members.tolist()]
        index, place = (members == rank).nonzero()[0].tolist()
        return Axis(place, members.shape[1], groups[index], sequence_parallel)

    return Mesh(
        tensor=axis(ranks.flatten(0, 1), sequence_parallel=sequence_parallel and tensor > 1),
        context=axis(ranks.transpose(1, 2).flatten(0, 1)),
        data=axis(ranks.flatten(1).T),
        data_context=axis(ranks.flatten(0, 1).T, group_of_one=True),
    )


@dataclasses.dataclass(frozen=True)
class ShardSpec:
    """How a parameter is sharded over tensor ranks.

    Args:
        dim: the sharded dimension.
        sections: sizes along `dim`, which add up to the full size. Each section is divided by itself: the rows of q, k and v
            in one matrix are three sections, and every rank gets a slice of each.
    """

    dim: int
    sections: tuple[int, ...]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """Return the shard of tensor rank `rank` of `size`; a view if there is one section."""
        slices = [section.chunk(size, self.dim)[rank] for section in full.split(self.sections, self.dim)]
        return slices[0] if len(slices) == 1 else torch.cat(slices, self.dim)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """Return the full tensor from the shards of all tensor ranks, in order."""
        if len(shards) == 1:
            return shards[0]
        local = [section // len(shards) for section in self.sections]
        by_section = zip(*(shard.split(local, self.dim) for shard in shards), strict=True)
        return torch.cat([piece for section in by_section for piece in section], self.dim)


class ShardedParameter(nn.Parameter):
    """One tensor rank's shard of a parameter.

    Args:
        shard: what this rank holds.
        spec: which part of the full parameter that is.
        tensor_parallel: the number of tensor ranks.
    """

    def __new__(cls, shard: Tensor, spec: ShardSpec, tensor_parallel: int) -> ShardedParameter:  # noqa: ARG004
        return super().__new__(cls, shard)

    def __init__(self, shard: Tensor, spec: ShardSpec, tensor_parallel: int) -> None:  # noqa: ARG002
        super().__init__()
        self.shard_spec = spec
        # DeepSpeed reads this: its gradient norm counts such parameters on every tensor rank, and all others once.
        self.tensor_model_parallel = tensor_parallel > 1

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedParameter:
        # nn.Parameter's own calls the class with its own two arguments.
        if id(self) not in memo:
            copy = type(self)(self.detach().clone(), self.shard_spec, 2 if self.tensor_model_parallel else 1)
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]


def shard_parameter(mesh: Mesh, full_shape: Sequence[int], dim: int, sections: Sequence[int] = ()) -> ShardedParameter:
    """Return this rank's shard, uninitialised, of a parameter of `full_shape` that is sharded along `dim`.

    Args:
        sections: sizes along `dim` that are sharded each by itself; none: `dim` as a whole. See `ShardSpec`.
    """
    shape = list(full_shape)
    shape[dim] //= mesh.tensor.size
    spec = ShardSpec(dim, tuple(sections) or (full_shape[dim],))
    return ShardedParameter(torch.empty(shape), spec, mesh.tensor.size)


def shard_spec(parameter: nn.Parameter) -> ShardSpec | None:
    """Return how a parameter is sharded over tensor ranks; None: every rank has all of it."""
    return parameter.shard_spec if isinstance(parameter, ShardedParameter) else None


def full_shape(parameter: nn.Parameter, tensor_parallel: int) -> tuple[int, ...]:
    """Return the shape of a parameter before `tensor_parallel` ranks sharded it, and before ZeRO-3 partitioned it."""
    shape, spec = list(getattr(parameter, "ds_shape", parameter.shape)), shard_spec(parameter)
    if spec is not None:
        shape[spec.dim] *= tensor_parallel
    return tuple(shape)
