"""What ranks send each other, counted: every collective that runs inside `Traffic`, whoever called it."""

from __future__ import annotations

import collections
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# How many bytes a rank sends in a ring, as a multiple of (p - 1) / p of the whole tensor's bytes.
_RING = {"allreduce_": 2, "_allgather_base_": 1, "allgather_": 1, "allgather_into_tensor_coalesced_": 1}
_RING |= {"_reduce_scatter_base_": 1, "reduce_scatter_": 1, "reduce_scatter_tensor_coalesced_": 1, "alltoall_base_": 1}
_RING |= {"broadcast_": 1, "reduce_": 1}
_SILENT = {"barrier", "monitored_barrier_"}


class Traffic(TorchDispatchMode):
    """While it is entered, `sent` adds up the bytes that this rank sends: {(ranks of the group, collective): bytes}.

    A ring of p ranks is assumed, in which an all-reduce of n bytes makes each send 2 n (p - 1) / p, and every other collective
    n (p - 1) / p.

    Raises:
        KeyError: a collective that is not known.
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
        # Of what is gathered or scattered, one of the two arguments is the whole.
        whole = max(_bytes(argument) for argument in arguments[:2])
        key = tuple(dist.get_process_group_ranks(group)), name
        self.sent[key] += _RING[name] * whole * (size - 1) / size
        self.calls[key] += 1


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(_bytes(each) for each in argument) if isinstance(argument, (list, tuple)) else 0
