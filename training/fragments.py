"""The fp32 masters and moments that a rank holds, the same way at every ZeRO stage, and the optimizer's state around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from conf.optimizers import OPTIMIZERS
from training.optimizers import MatrixOptimizer
from training.optimizers.exchange import Holding
from training.optimizers.layout import MatrixLayout, dtype_of, is_hidden
from training.optimizers.matrices import logical_matrices
from training.zero import fragment_mapping, partition_range, stage_3_parameter

if TYPE_CHECKING:
    from training.engine import Engine


@dataclasses.dataclass(frozen=True)
class Fragment:
    """The elements of a parameter that this rank holds: `size` from `start` on, of the flattened tensor of `shape`.

    `read(key)` returns them, flat and in fp32, of the master weight (key "") or of a state of the optimizer, one of `states`.
    `write(key, values)` sets them.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size  # of this tensor rank's shard
    start: int
    size: int
    read: Callable[[str], Tensor]
    write: Callable[[str, Tensor], None]
    states: tuple[str, ...] = ()
    row_states: tuple[str, ...] = ()  # with one number per row of the full tensor; `row_states` has them


def fragments(engine: Engine) -> Iterator[Fragment]:
    """Yield this rank's fragment of every parameter."""
    make = {0: _stage_0_fragment, 3: _stage_3_fragment}.get(engine.stage, _stage_1_or_2_fragment)
    optimizer = OPTIMIZERS[engine.config.optim.name]
    for name, parameter in engine.module.named_parameters():
        fragment = make(engine, name, parameter)
        rule = optimizer.rule(name, len(fragment.shape))
        yield dataclasses.replace(fragment, states=rule.states, row_states=rule.row_states)


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


def flat_parameters(engine: Engine) -> list[tuple[Tensor, str]]:
    """Return the tensors that the inner optimizer updates, each with its rule.

    They are the model's own, or ZeRO's flat fp32 partitions of the parameters of a group.
    """
    groups = inner_optimizer(engine).param_groups
    if engine.stage == 3:
        optimizer = engine.optimizer
        rules = [groups[optimizer.sub_group_to_group_id[i]]["rule"] for i in range(len(optimizer.fp16_groups))]
        return list(zip(optimizer.fp32_partitioned_groups_flat, rules, strict=True))
    return [(parameter, group["rule"]) for group in groups for parameter in group["params"]]


def places(engine: Engine) -> dict[str, tuple[int, int]]:
    """Return where this rank's fragments lie: {parameter: (index in `flat_parameters`, first element there)}."""
    if engine.stage == 3:
        optimizer = engine.optimizer
        return {
            name: tuple(optimizer.grad_position[optimizer.get_param_id(parameter)][:2])
            for name, parameter in engine.module.named_parameters()
        }
    flats = [flat for flat, _ in flat_parameters(engine)]
    by_storage = {flat.untyped_storage().data_ptr(): index for index, flat in enumerate(flats)}
    found = {}
    for fragment in fragments(engine):
        if fragment.size:
            master = fragment.read("")
            index = by_storage[master.untyped_storage().data_ptr()]
            found[fragment.name] = index, master.storage_offset() - flats[index].storage_offset()
    return found


def layout_of(engine: Engine) -> MatrixLayout:
    """Return the layout of an engine's model under its ZeRO stage. Collective."""
    optim, mesh, found = engine.config.optim, engine.mesh, places(engine)
    named = {each.name: each for each in fragments(engine) if is_hidden(optim, each.name, each.parameter)}
    ranges = {name: (fragment.start, fragment.size) for name, fragment in named.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    index_of = {name: index for name, (index, _) in found.items()}
    dist.all_gather_object(everyone, (Holding(mesh.tensor.rank, mesh.data_context.rank, ranges), index_of))
    head_dim = engine.module.shape.head_dim if optim.split_heads else None
    parameters = {name: fragment.parameter for name, fragment in named.items()}
    return MatrixLayout(
        optim,
        [m for name, each in parameters.items() for m in logical_matrices(name, each, mesh.tensor.size, head_dim)],
        [flat for flat, _ in flat_parameters(engine)],
        found,
        {name: index for _, theirs in everyone for name, index in theirs.items()},
        [holding for holding, _ in everyone],
        dist.get_rank(),
        engine.stage == 0,
        engine.device,
        dtype_of(optim, engine.dtype),
    )


def inner_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Return the optimizer of `training/optimizers/`, which ZeRO wraps at every stage but 0."""
    return engine.optimizer if engine.stage == 0 else engine.optimizer.optimizer


def has_states(engine: Engine) -> bool:
    """Return whether the optimizer has taken a step, so that every fragment has its states."""
    if not inner_optimizer(engine).state:
        return False
    link_optimizer_state(engine)
    return True


def row_states(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Return {parameter: {state: (rows,)}} of states with one number per row of a full tensor, to read or set. Collective."""
    inner = inner_optimizer(engine)
    return inner.gather_row_states() if isinstance(inner, MatrixOptimizer) else {}


def optimizer_steps(engine: Engine) -> int:
    """Return how many steps the optimizer has applied."""
    states = (inner_optimizer(engine).state[flat] for flat, _ in flat_parameters(engine))
    return max(int(state["step"]) for state in states if "step" in state)


def create_optimizer_state(engine: Engine, steps: int) -> None:
    """Create states of zeros, as the optimizer's first step would, and make DeepSpeed find them."""
    inner = inner_optimizer(engine)
    states = {rule.name: rule.states for rule in OPTIMIZERS[engine.config.optim.name].rules}
    for flat, rule in flat_parameters(engine):
        state = inner.state[flat]
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)
        for name in states[rule]:
            state[name] = torch.zeros_like(flat)
    for by_name in row_states(engine).values():
        for values in by_name.values():
            values.zero_()
    link_optimizer_state(engine)


def link_optimizer_state(engine: Engine) -> None:
    """Link the fragments of ZeRO stages 1 and 2 to the optimizer state of every parameter group.

    DeepSpeed links parameters to their state once, in the first group's first step, when later groups have no state yet.
    """
    if engine.stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
