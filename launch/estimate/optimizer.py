"""What a step of an optimizer costs that is not elementwise: FLOPs of its matrix products, traffic, and room to work in.

Every logical matrix is brought whole to one rank of all (training/optimizers/exchange.py), in rounds of bounded size.
"""

from __future__ import annotations

from conf.optimizers import OPTIMIZERS
from conf.schema import OptimConfig
from conf.shape import Shape

ROUND_ELEMENTS = 2**24  # of a rank's matrices that are brought together at once, unless a single one has more


def count_matrices(shape: Shape, split_heads: bool = False) -> dict[tuple[int, int], int]:
    """Return how many logical matrices of attention and FFN there are of each shape (rows, columns)."""
    found: dict[tuple[int, int], int] = {}

    def add(rows: int, columns: int, number: int) -> None:
        found[rows, columns] = found.get((rows, columns), 0) + number

    for layer, layers in shape.ffn_counts:
        for heads in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads):
            rows, number = (shape.head_dim, heads) if split_heads else (heads * shape.head_dim, 1)
            add(rows, shape.d_model, layers * number)
        add(shape.d_model, shape.n_heads * shape.head_dim, layers)
        add(layer.d_ff, shape.d_model, layers * (layer.matrices - 1))
        add(shape.d_model, layer.d_ff, layers)
    return found


def hidden_parameters(shape: Shape, tensor: int) -> float:
    """Return the parameters of a tensor rank in the matrices of attention and FFN, for which an optimizer may have a rule."""
    return sum(rows * columns * number for (rows, columns), number in count_matrices(shape).items()) / tensor


def optimizer_flops(shape: Shape, optim: OptimConfig, ranks: int) -> float:
    """Return the FLOPs in matrix products of a step on the rank that has most to do; no rank has less than a whole matrix."""
    flops = OPTIMIZERS[optim.name].flops
    matrices = count_matrices(shape, optim.split_heads)
    costs = {(rows, columns): flops(optim, rows, columns) for rows, columns in matrices}
    total = sum(number * costs[size] for size, number in matrices.items())
    return max(total / ranks, *costs.values())


def optimizer_traffic(shape: Shape, optim: OptimConfig, tensor: int, dp_cp: int, stage: int, width: int) -> float:
    """Return the bytes that a rank sends per step to bring matrices to their owners and results back.

    At stage 0 every data-parallel rank holds everything: an owner gathers over tensor ranks alone, and sends to all.
    """
    if not OPTIMIZERS[optim.name].whole_matrices:
        return 0.0
    hidden, ranks = hidden_parameters(shape, 1), tensor * dp_cp
    share = hidden / ranks
    if stage:
        return 2 * share * width * (ranks - 1) / ranks
    return width * (share * (tensor - 1) / tensor + hidden / tensor * (ranks - 1) / ranks)


def optimizer_working_bytes(shape: Shape, optim: OptimConfig, tensor: int, dp_cp: int, stage: int, width: int) -> float:
    """Return the bytes of the matrices, their products and what is on its way during a step of the optimizer.

    Of a round there are the results, and these packed and received. Where there are several, one more is going out and coming
    in while another one is coming back.
    """
    if not OPTIMIZERS[optim.name].whole_matrices:
        return 0.0
    largest = max(rows * columns for rows, columns in count_matrices(shape, optim.split_heads))
    share = max(hidden_parameters(shape, 1) / (tensor * dp_cp), largest)
    size = min(share, max(ROUND_ELEMENTS, largest))
    if tensor * dp_cp == 1:
        return 2.0 * width * size
    received = size if stage else size * dp_cp  # at stage 0 every rank receives the results of all
    several = share > size
    return width * ((5 if several else 2) * size + (2 if several else 1) * received)
