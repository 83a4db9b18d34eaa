"""Count the bytes that ranks send: every collective that runs inside `Traffic`, whatever code issues it."""

from __future__ import annotations

import collections
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Bytes that a rank sends in a ring, as a multiple of (p - 1) / p of the full tensor's bytes.
_RING = {
    "allreduce_": 2,
    "_allgather_base_": 1,
    "allgather_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "alltoall_base_": 1,
    "broadcast_": 1,
    "reduce_": 1,
}
_SILENT = {"barrier", "monitored_barrier_"}


class Traffic(TorchDispatchMode):
    """Inside this context, `sent` sums the bytes that this rank sends: {(ranks of the group, collective): bytes}.

    It assumes a ring of p ranks, in which each rank sends 2 n (p - 1) / p bytes for an all-reduce of n bytes, and
    n (p - 1) / p for every other collective; an all-to-all of unequal parts sends all but a rank's own.

    Raises:
        KeyError: an unknown collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[tuple[tuple[int, ...], str], float] = collections.defaultdict(float)
        self.calls: dict[tuple[tuple[int, ...], str], int] = collections.defaultdict(int)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            if name not in _SILENT:
                self._count(name, arguments)
        return function(*arguments, **(named or {}))

    def _count(self, name: str, arguments: tuple[Any, ...]) -> None:
        group = next(dist.ProcessGroup.unbox(a) for a in arguments if isinstance(a, torch.ScriptObject))
        size = group.size()
        # Of a gather or scatter, one of the two arguments is the full tensor, the other a shard of it.
        full = max(_bytes(argument) for argument in arguments[:2])
        key = tuple(dist.get_process_group_ranks(group)), name
        splits = [argument for argument in arguments if isinstance(argument, list) and len(argument) == size]
        if name == "alltoall_base_" and splits:  # output, then input
            numbers = [int(number) for number in splits[-1]]
            self.sent[key] += (sum(numbers) - numbers[group.rank()]) * arguments[1].element_size()
        else:
            self.sent[key] += _RING[name] * full * (size - 1) / size
        self.calls[key] += 1


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(_bytes(element) for element in argument) if isinstance(argument, (list, tuple)) else 0
