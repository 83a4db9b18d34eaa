"""The fp32 masters and moments that a rank holds, the same way at every ZeRO stage, and the optimizer's state around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from model.weights import MOMENTS
from training.zero import fragment_mapping, partition_range, stage_3_parameter

if TYPE_CHECKING:
    from training.engine import Engine


@dataclasses.dataclass(frozen=True)
class Fragment:
    """The elements of a parameter that this rank holds: `size` from `start` on, of the flattened tensor of `shape`.

    `read(key)` returns them, flat and in fp32, of the master weight (key "") or of a moment. `write(key, values)` sets them.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size  # of this tensor rank's shard
    start: int
    size: int
    read: Callable[[str], Tensor]
    write: Callable[[str, Tensor], None]


def fragments(engine: Engine) -> Iterator[Fragment]:
    """Yield this rank's fragment of every parameter."""
    make = {0: _stage_0_fragment, 3: _stage_3_fragment}.get(engine.stage, _stage_1_or_2_fragment)
    for name, parameter in engine.module.named_parameters():
        yield make(engine, name, parameter)


def _stage_0_fragment(engine: Engine, name: str, parameter: nn.Parameter) -> Fragment:
    def read(key: str) -> Tensor:
        return (engine.optimizer.state[parameter][key] if key else parameter.data).view(-1)

    def write(key: str, values: Tensor) -> None:
        read(key).copy_(values)

    return Fragment(name, parameter, parameter.shape, 0, parameter.numel(), read, write)


def _stage_1_or_2_fragment(_: Engine, name: str, parameter: nn.Parameter) -> Fragment:
    mapping = fragment_mapping(parameter)

    def read(key: str) -> Tensor:
        assert mapping is not None, "an empty fragment is not read"
        return mapping.get_hp_fragment(key or None).view(-1)

    def write(key: str, values: Tensor) -> None:
        read(key).copy_(values)

    start, size = 0, 0
    if mapping is not None:
        start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    return Fragment(name, parameter, parameter.shape, start, size, read, write)


def _stage_3_fragment(engine: Engine, name: str, parameter: nn.Parameter) -> Fragment:
    partitioned = stage_3_parameter(parameter)
    start, size = partition_range(parameter, engine.mesh.data_context.rank)

    def read(key: str) -> Tensor:
        partition = safe_get_local_optimizer_state(parameter, key) if key else safe_get_local_fp32_param(parameter)
        return partition.view(-1)[:size]

    def write(key: str, values: Tensor) -> None:
        padded = torch.zeros(partitioned.ds_tensor.numel(), device=engine.device)
        padded[:size] = values
        if key:
            safe_set_local_optimizer_state(parameter, padded, key)
            return
        safe_set_local_fp32_param(parameter, padded)
        partitioned.ds_tensor.data.copy_(padded)  # setting the master does not update the weight that the model uses

    return Fragment(name, parameter, partitioned.ds_shape, start, size, read, write)


def _flat_parameters(engine: Engine) -> list[Tensor]:
    """Return the tensors that the inner optimizer updates: the model's own, or ZeRO's flat fp32 partitions of them."""
    if engine.stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]


def inner_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Return torch's AdamW, which ZeRO wraps at every stage but 0."""
    return engine.optimizer if engine.stage == 0 else engine.optimizer.optimizer


def has_moments(engine: Engine) -> bool:
    """Return whether the optimizer has taken a step, so that every fragment has moments."""
    if not inner_optimizer(engine).state:
        return False
    link_optimizer_state(engine)
    return True


def optimizer_steps(engine: Engine) -> int:
    """Return how many steps the optimizer has applied."""
    states = (inner_optimizer(engine).state[flat] for flat in _flat_parameters(engine))
    return max(int(state["step"]) for state in states if "step" in state)


def create_optimizer_state(engine: Engine, steps: int) -> None:
    """Create zero moments, as the optimizer's first step would, and make DeepSpeed find them."""
    inner = inner_optimizer(engine)
    for flat in _flat_parameters(engine):
        state = inner.state[flat]
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(flat)
    link_optimizer_state(engine)


def link_optimizer_state(engine: Engine) -> None:
    """Link the fragments of ZeRO stages 1 and 2 to the optimizer state of every parameter group.

    DeepSpeed links parameters to their state once, in the first group's first step, when later groups have no state yet.
    """
    if engine.stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
