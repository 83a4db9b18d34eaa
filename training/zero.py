"""The attributes that ZeRO attaches to parameters, typed, and what is done with them on every rank alike.

DeepSpeed sets them on `nn.Parameter` objects at run time. tests/training/test_deepspeed_contract.py covers every one of them.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn


class FragmentAddress(Protocol):
    """The elements of a flattened parameter that a rank's partition holds."""

    start: int
    numel: int


class FragmentMapping(Protocol):
    """Where stages 1 and 2 keep a rank's fragment: fp32 master, optimizer state and gradient."""

    lp_fragment_address: FragmentAddress

    def get_hp_fragment(self, optim_state_key: str | None = None) -> Tensor: ...

    def get_lp_grad_fragment(self, index_in_param_group: int) -> Tensor: ...


class _Stage1Or2(Protocol):
    _hp_mapping: FragmentMapping | None
    _index_in_param_group: int


class Stage3Parameter(Protocol):
    """A parameter partitioned by stage 3. Outside `GatheredParameters` its own data is a placeholder."""

    ds_tensor: Tensor  # this rank's partition, flat; where it is padded, uninitialised memory
    ds_numel: int  # elements of the gathered parameter
    ds_shape: torch.Size


def fragment_mapping(parameter: nn.Parameter) -> FragmentMapping | None:
    """Return this rank's fragment of a parameter under stages 1 and 2; None if other ranks hold all of it."""
    return cast(_Stage1Or2, parameter)._hp_mapping


def index_in_group(parameter: nn.Parameter) -> int:
    """Return the index under which stages 1 and 2 keep the gradient of a parameter in its optimizer group."""
    return cast(_Stage1Or2, parameter)._index_in_param_group


def stage_3_parameter(parameter: nn.Parameter) -> Stage3Parameter:
    """Return a parameter under stage 3 with its attributes typed."""
    return cast(Stage3Parameter, parameter)


def partition_range(parameter: nn.Parameter, rank: int) -> tuple[int, int]:
    """Return the first element of a flattened parameter that a rank's partition holds under stage 3, and their number.

    The rest of the partition is padding, which is never initialised: it may hold any number, NaN too.

    Args:
        rank: of the data x context axis.
    """
    partitioned = stage_3_parameter(parameter)
    padded = partitioned.ds_tensor.numel()
    start = min(rank * padded, partitioned.ds_numel)
    return start, min(padded, partitioned.ds_numel - start)


@torch.no_grad()
def spoil_gradient(stage: int, parameter: nn.Parameter, rank: int) -> None:
    """Make this rank's fragment of a gradient infinite between backward and step, so that the step is skipped.

    Args:
        rank: of the data x context axis.
    """
    from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

    if stage == 0:
        if parameter.grad is not None:
            parameter.grad.fill_(torch.inf)
    elif stage == 3:
        if partition_range(parameter, rank)[1]:  # no later step would clear the padding
            partition = safe_get_local_grad(parameter).clone()
            partition[:1] = torch.inf
            safe_set_local_grad(parameter, partition)
    elif (mapping := fragment_mapping(parameter)) is not None:
        mapping.get_lp_grad_fragment(index_in_group(parameter)).fill_(torch.inf)
