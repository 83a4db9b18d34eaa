"""Bring each matrix whole to one rank, its owner, and the owner's result back to the ranks that hold it.

ZeRO and tensor parallelism leave a rank runs of elements of matrices. Matrices are dealt out over all ranks by cost, so no
matrix is computed twice. They travel in rounds, by one all-to-all each way: what a rank holds of the matrices of others goes to
their owners, and comes back as results. While a round is computed, the next one is on its way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from launch.estimate.optimizer import ROUND_ELEMENTS
from training.optimizers.matrices import Matrix


class MatrixPiece(NamedTuple):
    """Elements that a rank holds of a matrix: `size` from `start` on, of the flattened part of its tensor rank."""

    matrix: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Holding:
    """What a rank holds of every parameter.

    Args:
        tensor: its tensor rank.
        replica: its rank among those that hold the same shards.
        ranges: {parameter: (first element, elements)} of the flattened shard.
    """

    tensor: int
    replica: int
    ranges: dict[str, tuple[int, int]]

    def pieces(self, matrices: Sequence[Matrix]) -> list[MatrixPiece]:
        """Return what it holds of some matrices, in their order."""
        pieces = []
        for number, matrix in enumerate(matrices):
            if self.tensor in matrix.tensor_ranks:
                start, size = self.ranges[matrix.parameter]
                low, high = max(start, matrix.start), min(start + size, matrix.start + matrix.part_elements)
                if low < high:
                    pieces.append(MatrixPiece(number, low - matrix.start, high - low))
        return pieces


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """Return the owner of each matrix: the dearest first, each to the rank with the least to do so far."""
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = min(range(ranks), key=loads.__getitem__)
        loads[owners[number]] += costs[number]
    return owners


@dataclasses.dataclass
class _Round:
    """One round, as this rank sees it. Pieces are listed by the other rank."""

    stacks: dict[tuple[int, int], list[int]]  # {shape: this rank's matrices}, computed together
    outgoing: list[list[int]]  # numbers of own pieces that go to each owner
    incoming: list[list[MatrixPiece]]  # pieces of this rank's matrices that come from each rank
    returned: list[list[MatrixPiece]]  # pieces of the results that go to each rank
    results: list[list[int]]  # numbers of own pieces whose results come from each owner


class Exchange:
    """Computes whole matrices, each on one rank of the default group.

    Args:
        matrices: the same on every rank.
        costs: of computing each of them, in any unit.
        holdings: of every rank.
        replicated: whether all replicas hold the same. Then an owner gathers within its own replica.
        rank: this one.
        device, dtype: in which matrices travel and are computed.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        costs: Sequence[float],
        holdings: Sequence[Holding],
        replicated: bool,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.matrices, self._holdings, self._device, self._dtype = matrices, holdings, device, dtype
        self.owners = deal(costs, len(holdings))
        held = [holding.pieces(matrices) for holding in holdings]
        self.pieces = held[rank]
        self._rounds = self._plan(held, replicated, rank)

    def _plan(self, held: list[list[MatrixPiece]], replicated: bool, rank: int) -> list[_Round]:
        rounds = _rounds_of(self.matrices, self.owners, len(held))
        number = 1 + max(rounds, default=-1)

        def sends(source: int, owner: int) -> bool:
            return not replicated or self._holdings[source].replica == self._holdings[owner].replica

        def empty() -> list[list]:
            return [[] for _ in held]

        plan = [_Round({}, empty(), empty(), empty(), empty()) for _ in range(number)]
        for matrix, (owner, turn) in enumerate(zip(self.owners, rounds, strict=True)):
            if owner == rank:
                shape = self.matrices[matrix].rows, self.matrices[matrix].columns
                plan[turn].stacks.setdefault(shape, []).append(matrix)
        for other, pieces in enumerate(held):
            for piece in pieces:
                if self.owners[piece.matrix] == rank:
                    turn = plan[rounds[piece.matrix]]
                    turn.returned[other].append(piece)
                    if sends(other, rank):
                        turn.incoming[other].append(piece)
        for piece_number, piece in enumerate(self.pieces):
            owner, turn = self.owners[piece.matrix], plan[rounds[piece.matrix]]
            turn.results[owner].append(piece_number)
            if sends(rank, owner):
                turn.outgoing[owner].append(piece_number)
        return plan

    def run(
        self, sources: Sequence[Tensor], compute: Callable[[list[int], Tensor], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the result of every piece that this rank holds: its number in `pieces`, and (size,) in the dtype. Collective.

        Args:
            sources: of each piece, (size,), of any dtype, on any device.
            compute: takes the numbers of B matrices of one shape and (B, rows, columns), and returns results of that shape.
        """
        if len(self._holdings) == 1:
            yield from self._alone(sources, compute)
            return
        arriving, returning = [self._send(turn, sources) for turn in self._rounds[:1]], []
        for number, turn in enumerate(self._rounds):
            stacks = self._gathered(turn, arriving.pop()())
            arriving += [self._send(following, sources) for following in self._rounds[number + 1 : number + 2]]
            returning.append((turn, self._return(turn, self._results(turn, stacks, compute))))
            if number:
                yield from self._arrived(*returning.pop(0))
        for turn, wait in returning:
            yield from self._arrived(turn, wait)

    def _alone(
        self, sources: Sequence[Tensor], compute: Callable[[list[int], Tensor], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Do what `run` does where a single rank holds everything: nothing is packed, and nothing travels."""
        for turn in self._rounds:
            stacks, whole = self._stacks(turn)
            own = [(number, self.pieces[number]) for number in turn.outgoing[0]]
            for number, piece in own:
                whole[piece.matrix].view(-1)[piece.start : piece.start + piece.size] = sources[number]
            results = self._results(turn, stacks, compute)
            for number, piece in own:
                yield number, results[piece.matrix].reshape(-1)[piece.start : piece.start + piece.size]

    def _arrived(self, turn: _Round, wait: Callable[[], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield the results of a round that are of own pieces."""
        numbers = [number for numbers in turn.results for number in numbers]
        yield from zip(numbers, wait().split([self.pieces[number].size for number in numbers]), strict=True)

    def _send(self, turn: _Round, sources: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Start to send own pieces to their owners; return what waits for the pieces of this rank's matrices."""
        numbers = [number for numbers in turn.outgoing for number in numbers]
        buffer = self._packed([sources[number] for number in numbers])
        return self._all_to_all(
            buffer,
            [sum(self.pieces[number].size for number in numbers) for numbers in turn.outgoing],
            [sum(piece.size for piece in pieces) for pieces in turn.incoming],
        )

    def _return(self, turn: _Round, results: dict[int, Tensor]) -> Callable[[], Tensor]:
        """Start to send results back; return what waits for those of own pieces."""
        parts: dict[tuple[int, int], Tensor] = {}  # by matrix and tensor rank
        values = []
        for other, pieces in enumerate(turn.returned):
            tensor = self._holdings[other].tensor
            for piece in pieces:
                if (piece.matrix, tensor) not in parts:
                    parts[piece.matrix, tensor] = self._part(results[piece.matrix], piece.matrix, tensor).reshape(-1)
                values.append(parts[piece.matrix, tensor][piece.start : piece.start + piece.size])
        return self._all_to_all(
            self._packed(values),
            [sum(piece.size for piece in pieces) for pieces in turn.returned],
            [sum(self.pieces[number].size for number in numbers) for numbers in turn.results],
        )

    def _packed(self, values: list[Tensor]) -> Tensor:
        buffer = torch.empty(sum(each.numel() for each in values), dtype=self._dtype, device=self._device)
        for space, each in zip(buffer.split([each.numel() for each in values]), values, strict=True):
            space.copy_(each, non_blocking=True)
        return buffer

    def _all_to_all(self, buffer: Tensor, sent: list[int], received: list[int]) -> Callable[[], Tensor]:
        """Start to send parts of a buffer to all ranks; return what waits for theirs."""
        target = buffer.new_empty(sum(received))
        work = dist.all_to_all_single(target, buffer, received, sent, async_op=True)

        def wait(_: Tensor = buffer) -> Tensor:  # which must live until then
            assert work is not None
            work.wait()
            return target

        return wait

    def _gathered(self, turn: _Round, received: Tensor) -> dict[tuple[int, int], Tensor]:
        """Return this rank's matrices in a round, whole: {shape: (B, rows, columns)}."""
        stacks, whole = self._stacks(turn)
        self._assemble(turn, received, whole)
        return stacks

    def _stacks(self, turn: _Round) -> tuple[dict[tuple[int, int], Tensor], dict[int, Tensor]]:
        """Return room for this rank's matrices in a round: {shape: (B, rows, columns)}, and each of them in it."""
        stacks, whole = {}, {}
        for (rows, columns), numbers in turn.stacks.items():
            stacks[rows, columns] = torch.empty(len(numbers), rows, columns, dtype=self._dtype, device=self._device)
            whole |= dict(zip(numbers, stacks[rows, columns].unbind(), strict=True))
        return stacks, whole

    def _results(
        self,
        turn: _Round,
        stacks: dict[tuple[int, int], Tensor],
        compute: Callable[[list[int], Tensor], Tensor],
    ) -> dict[int, Tensor]:
        """Return the result of each of this rank's matrices in a round: (rows, columns). It empties `stacks`."""
        results: dict[int, Tensor] = {}
        for shape, numbers in turn.stacks.items():
            results |= dict(zip(numbers, compute(numbers, stacks.pop(shape)).unbind(), strict=True))
        return results

    def _assemble(self, turn: _Round, received: Tensor, whole: dict[int, Tensor]) -> None:
        """Write the pieces that came into the matrices that they are of."""
        parts: dict[tuple[int, int], Tensor] = {}
        came = [(self._holdings[other].tensor, piece) for other, pieces in enumerate(turn.incoming) for piece in pieces]
        for (tensor, piece), values in zip(came, received.split([piece.size for _, piece in came]), strict=True):
            matrix, part = self.matrices[piece.matrix], self._part(whole[piece.matrix], piece.matrix, tensor)
            if part.is_contiguous():
                part.view(-1)[piece.start : piece.start + piece.size] = values
            else:  # columns: pieces are runs of the flattened part
                if (piece.matrix, tensor) not in parts:
                    parts[piece.matrix, tensor] = received.new_empty(matrix.part_elements)
                parts[piece.matrix, tensor][piece.start : piece.start + piece.size] = values
        for (number, tensor), values in parts.items():
            self._part(whole[number], number, tensor).copy_(values.view(self.matrices[number].part_shape))

    def _part(self, whole: Tensor, number: int, tensor: int) -> Tensor:
        """Return the part of a tensor rank in a whole matrix, a view."""
        matrix = self.matrices[number]
        size = matrix.part_shape[matrix.dim]
        return whole.narrow(matrix.dim, matrix.tensor_ranks.index(tensor) * size, size)


def _rounds_of(matrices: Sequence[Matrix], owners: Sequence[int], ranks: int) -> list[int]:
    """Return the round of each matrix: matrices of one shape and owner are next to each other, to be computed together."""
    rounds, filled = [0] * len(matrices), [[0, 0] for _ in range(ranks)]  # the round of each owner, and its elements
    for number in sorted(range(len(matrices)), key=lambda number: (matrices[number].rows, matrices[number].columns)):
        elements, own = matrices[number].rows * matrices[number].columns, filled[owners[number]]
        if own[1] and own[1] + elements > ROUND_ELEMENTS:
            own[:] = [own[0] + 1, 0]
        own[1] += elements
        rounds[number] = own[0]
    return rounds
