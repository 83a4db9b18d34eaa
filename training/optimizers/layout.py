"""Which logical matrices the tensors of an optimizer hold, on every rank."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from conf.optimizers import OPTIMIZERS
from conf.schema import OptimConfig
from training.optimizers.exchange import Exchange, Holding
from training.optimizers.groups import dimensions_of
from training.optimizers.matrices import Matrix, logical_matrices


@dataclasses.dataclass(frozen=True)
class MatrixLayout:
    """Where the hidden matrices of a model lie in the tensors that its optimizer is given.

    Args:
        matrices: the same on every rank.
        tensors: that the optimizer is given, on every rank in the same order.
        places: {parameter: (index of the tensor, first element there)} of what this rank holds.
        index_of: {parameter: index of the tensor}, of those that only other ranks hold, too.
        holdings: of every rank.
        replicated: whether data-parallel ranks hold the same.
        device, dtype: in which matrices are computed.
    """

    optim: OptimConfig
    matrices: list[Matrix]
    tensors: list[Tensor]
    places: dict[str, tuple[int, int]]
    index_of: dict[str, int]
    holdings: list[Holding]
    rank: int
    replicated: bool
    device: torch.device
    dtype: torch.dtype

    def exchange(self, tensors: list[Tensor]) -> tuple[Exchange, list[tuple[Tensor, int]]]:
        """Return the exchange of the matrices that some of the tensors hold, and where each of its pieces begins in which."""
        indices = {index for index, each in enumerate(self.tensors) if any(each is tensor for tensor in tensors)}
        matrices = [matrix for matrix in self.matrices if self.index_of[matrix.parameter] in indices]
        optimizer = OPTIMIZERS[self.optim.name]
        costs = [optimizer.flops(self.optim, matrix.rows, matrix.columns) for matrix in matrices]
        exchange = Exchange(matrices, costs, self.holdings, self.replicated, self.rank, self.device, self.dtype)
        places = []
        for piece in exchange.pieces:
            matrix = matrices[piece.matrix]
            index, offset = self.places[matrix.parameter]
            first = self.holdings[self.rank].ranges[matrix.parameter][0]  # of the shard's elements
            places.append((self.tensors[index], offset + matrix.start + piece.start - first))
        return exchange, places


def layout_of_module(module: nn.Module, optim: OptimConfig, head_dim: int | None = None) -> MatrixLayout:
    """Return the layout of a model whose own parameters the optimizer is given, in a single process.

    Args:
        head_dim: of its attention, if `optim.split_heads` asks for it.
    """
    named = {name: each for name, each in module.named_parameters() if is_hidden(optim, name, each)}
    heads = head_dim if optim.split_heads else None
    indices = {name: index for index, name in enumerate(named)}
    first = next(iter(named.values()))
    return MatrixLayout(
        optim,
        [matrix for name, each in named.items() for matrix in logical_matrices(name, each, 1, heads)],
        list(named.values()),
        {name: (index, 0) for name, index in indices.items()},
        indices,
        [Holding(0, 0, {name: (0, each.numel()) for name, each in named.items()})],
        0,
        False,
        first.device,
        dtype_of(optim, first.dtype),
    )


def is_hidden(optim: OptimConfig, name: str, parameter: nn.Parameter) -> bool:
    """Return whether the optimizer has its rule of hidden matrices for a parameter."""
    optimizer = OPTIMIZERS[optim.name]
    return optimizer.rule(name, dimensions_of(parameter)) is optimizer.hidden


def dtype_of(optim: OptimConfig, of_weights: torch.dtype) -> torch.dtype:
    """Return the dtype in which matrices are computed."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}.get(optim.ns_dtype, of_weights)
