"""Where the first non-finite number of a step came from: which rank, tensor and samples.

`DroppedGradient` sees a gradient that DeepSpeed is about to drop. `find_culprit` looks for what made it so: it scans weights
and moments, and where these are finite computes the same samples once more, watching activations and then gradients before
they are reduced. Both work only when a step is skipped; a step that is applied pays for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.ranges import SampleRanges
from model.finite import find, kind_of, readable
from model.weights import stored_name
from training.zero import partition_range, stage_3_parameter

if TYPE_CHECKING:
    from training.engine import Engine

_CODES = ("", "inf", "NaN")


class DroppedGradient:
    """Scans this rank's fragments of a gradient in the moment in which an optimizer of ZeRO drops it.

    Attributes:
        found: {parameter's name: "NaN" or "inf"} of the last gradient that was dropped.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.found: dict[str, str] | None = None
        # The first of these that is called with `overflow` set still finds the gradient.
        for method in ("clear_hp_grads", "zero_grad") if engine.stage else ():
            if hasattr(engine.optimizer, method):
                self._watch(method)

    def _watch(self, method: str) -> None:
        optimizer, original = self._engine.optimizer, getattr(self._engine.optimizer, method)

        def scan_and_clear(*arguments: Any, **named: Any) -> Any:
            if optimizer.overflow and self.found is None:
                self.scan()
            return original(*arguments, **named)

        setattr(optimizer, method, scan_and_clear)

    def scan(self) -> None:
        """Scan the gradient as it is now."""
        kinds = {fragment.name: kind_of(fragment.values) for fragment in self._engine.gradient_fragments()}
        self.found = {name: kind for name, kind in kinds.items() if kind}

    def norm(self) -> float:
        """Return the norm of the gradient that was dropped: NaN where some rank has found one, else infinity. Collective."""
        code = max((_CODES.index(kind) for kind in (self.found or {}).values()), default=0)
        codes = torch.tensor([code], device=self._engine.device)
        dist.all_reduce(codes, op=dist.ReduceOp.MAX)
        return float(_CODES[int(codes)] or "inf")


def find_culprit(engine: Engine, tokens: Tensor, numbers: np.ndarray) -> str:
    """Return what made the gradient of a skipped step non-finite, as a clause; the same on every rank. Collective.

    Args:
        tokens: (sequences of this data rank, S + 1) of the step.
        numbers: of these samples in the stream.
    """
    for look in (_kept, _used, _computed, _differentiated):
        if culprit := _first(look(engine, tokens, numbers)):
            return culprit
    found = _first(
        next((f"has {kind} in the gradient of {name}" for name, kind in (engine.dropped.found or {}).items()), "")
    )
    return f"{found}, which the same samples do not give again" if found else "the norm of a finite gradient overflows"


def _first(what: str) -> str:
    """Return the first rank's `what` that is not empty, after the rank; "": there is none. Collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, what)
    return next((f"rank {rank} {each}" for rank, each in enumerate(found) if each), "")


def _kept(engine: Engine, *_: object) -> str:
    """Return the first master or moment of this rank that is not finite, with the verb."""
    found = find(_state(engine))
    return f"holds {found}" if found else ""


def _used(engine: Engine, *_: object) -> str:
    """Return the first weight that the model computes with on this rank and that is not finite, with the verb."""
    named, rank = list(engine.module.named_parameters()), engine.mesh.data_context.rank
    weights = [(name, p.data) for name, p in named]
    if engine.stage == 3:  # which keeps small parameters whole beside their partitions
        weights += [(name, stage_3_parameter(p).ds_tensor[: partition_range(p, rank)[1]]) for name, p in named]
    found = find(weights)
    return f"holds {found}" if found else ""


def _state(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's masters and moments by their stored names."""
    from training.fragments import fragments, has_states  # imports DeepSpeed

    with_states = has_states(engine)
    for fragment in fragments(engine):
        for key in ("", *(fragment.states if with_states else ())) if fragment.size else ():
            yield stored_name(fragment.name, key), fragment.read(key)


@torch.no_grad()
def _computed(engine: Engine, tokens: Tensor, numbers: np.ndarray) -> str:
    """Compute the loss of each sample, and return the first module whose output is not finite, with those samples."""
    first: list[str] = []

    def watch(name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            kinds = [kind_of(each) for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
            if not first and any(kinds):
                first.append(f"{max(kinds, key=_CODES.index)} in the output of {name}")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in engine.module.named_modules() if name]
    bad = []
    for row, number in zip(tokens, numbers.tolist(), strict=True):
        nats, *_ = engine.evaluate(row[None, :-1], row[None, 1:])
        if kind := kind_of(nats):
            bad.append((number, number + 1))
            first = first or [f"{kind} in the loss"]
    for handle in handles:
        handle.remove()
    samples = SampleRanges.of(bad) if bad else _range(numbers)
    return f"computes {first[0]} (samples {samples})" if first else ""


def _differentiated(engine: Engine, tokens: Tensor, numbers: np.ndarray) -> str:
    """Compute the gradient before any reduction, and return the first parameter in backward order where it is not finite."""
    first: list[str] = []
    samples, at = _range(numbers), 0

    def see(name: str, gradient: Tensor) -> None:
        nonlocal samples
        if not first and (kind := kind_of(gradient)):
            first.append(f"{kind} in the gradient of {readable(name)}")
            samples = _range(numbers[at : at + engine.batch.micro_batch])

    for micro_batch in tokens.split(engine.batch.micro_batch):
        engine.watch_gradients(micro_batch, see)
        at += len(micro_batch)
    return f"computes {first[0]} (samples {samples})" if first else ""


def _range(numbers: np.ndarray) -> SampleRanges:
    return SampleRanges.of((number, number + 1) for number in numbers.tolist())
