"""Saving and loading under ZeRO and tensor parallelism; the format, which knows no topology, is `model/weights.py`.

DeepSpeed's own files are pickles tied to a ZeRO stage and to a number of ranks, and it names the newest before all ranks have
written. Its universal checkpoint gives every parameter group the first one's weight decay under ZeRO-3, and does not load into
tensor ranks there. PyTorch's distributed checkpoint needs DTensors, which ZeRO's partitions are not. So each rank copies what
it holds of the fp32 masters and of the optimizer's moments to host memory, through the fragments that ZeRO itself works on:
training waits for that copy only. A thread then writes it to a file, all ranks at once and without a word between them but
whether it succeeded; when all files are synced, rank 0 adds the index and renames the folder: one called `step_N` is
complete. bf16 weights are not stored, they are the masters rounded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from conf.files import publish
from model.parallel import cut_of
from model.weights import (
    MOMENTS,
    CheckpointReader,
    Piece,
    checkpoints,
    file_of,
    index_entry,
    stored_name,
    write_rest,
    write_tensors,
)
from training.engine import Engine


@dataclasses.dataclass(frozen=True)
class Saved:
    """How a save ended; the same on every rank."""

    step: int
    path: Path
    failure: str  # why there is no checkpoint; "" is none
    warning: str  # older ones that could not be removed
    waited_seconds: float  # for how long training stood still
    seconds: float  # until it was complete


class Saver:
    """Saves checkpoints of a run beside its training, one at a time. Every rank has one, and calls its methods together.

    Args:
        folder: that of the run's checkpoints.
        exchange: with the savers of the other ranks.
        keep_last: how many of the newest are kept, beside the best one; None: all.
    """

    def __init__(self, engine: Engine, folder: Path, exchange: Exchange, keep_last: int | None = None) -> None:
        self.engine, self.folder, self.keep_last = engine, folder, keep_last
        self._exchange = exchange
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._ended: Saved | BaseException | None = None

    def begin(self, state: dict[str, Any]) -> None:
        """Copy what this rank holds to host memory, and begin to write it as `step_N` for N = state["step"].

        The save before must have ended.

        Args:
            state: what else must be known to go on, as JSON.
        """
        assert self._thread is None, "the save before has not been asked for its end"
        began = time.perf_counter()
        if not _inner(self.engine).state:  # no step was applied yet
            _make_optimizer_state(self.engine, 0)
        _link(self.engine)
        pieces, tensors = self._copy()
        state = {**state, "optimizer_steps": _optimizer_steps(self.engine)}
        waited = time.perf_counter() - began
        self._thread = threading.Thread(target=self._run, args=(pieces, tensors, state, began, waited), daemon=True)
        self._thread.start()

    def ended(self, wait: bool = False) -> Saved | None:
        """Return how the last save ended, once; None while it goes on, unless `wait`, and when there is none."""
        if self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self._thread.join()
        self._thread, ended = None, self._ended
        if isinstance(ended, BaseException):
            raise ended
        return ended

    def _copy(self) -> tuple[list[tuple[str, Piece]], dict[str, Tensor]]:
        """Return this rank's pieces, and what they hold in host memory that the next save is going to use again."""
        tensor, replica, rank = self.engine.mesh.tensor, self.engine.mesh.replicas.rank, dist.get_rank()
        pieces, tensors = [], {}
        on_gpu = self.engine.device.type == "cuda"
        for part in _parts(self.engine):
            other_has_it = (tensor.rank and cut_of(part.parameter) is None) or (self.engine.stage == 0 and replica)
            if not part.size or other_has_it:
                continue
            pieces.append((part.name, Piece(tensor.rank, part.start, part.size, rank)))
            for key in ("", *MOMENTS):
                name, values = stored_name(part.name, key), part.read(key)
                if name not in self._host:
                    shape = part.shape if part.size == part.shape.numel() else (part.size,)
                    self._host[name] = torch.empty(shape, dtype=torch.float32, pin_memory=on_gpu)
                tensors[name] = self._host[name].copy_(values.view(self._host[name].shape), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize(self.engine.device)
        return pieces, tensors

    def _run(
        self, pieces: list, tensors: dict[str, Tensor], state: dict[str, Any], began: float, waited: float
    ) -> None:
        path, warning = self.folder / f"step_{state['step']:08d}", ""
        try:
            failure = self._write(path, pieces, tensors, state)
            if not failure and self.keep_last is not None and dist.get_rank() == 0:
                warning = _attempt(lambda: prune(self.folder, self.keep_last))
            self._ended = Saved(state["step"], path, failure, warning, waited, time.perf_counter() - began)
        except BaseException as error:  # nothing of the disk's: it is raised where the run asks for the end
            self._ended = error

    def _write(self, path: Path, pieces: list, tensors: dict[str, Tensor], state: dict[str, Any]) -> str:
        """Write the checkpoint together with the other ranks; return why there is none, or ""."""
        rank, tell = dist.get_rank(), self._exchange
        temporary, entry = path.with_name(f".{path.name}.tmp"), {}

        def begin() -> None:
            _sweep(self.folder, path)
            temporary.mkdir(parents=True)

        def write() -> None:
            entry.update(write_tensors(temporary / file_of(rank), tensors))

        def commit() -> None:
            size = self.engine.mesh.tensor.size
            index = {name: index_entry(p, size) for name, p in self.engine.module.named_parameters()}
            for _, said in told:
                for name, piece in said:
                    index[name]["pieces"].append(piece)
            files = {file_of(number): entry for number, (entry, _) in enumerate(told)}
            write_rest(temporary, index, state, files)
            publish(temporary, path)

        failure = tell.first(_attempt(begin) if rank == 0 else "")
        if not failure:
            failure = tell.first(_attempt(write))
        if not failure:
            told = tell.to_rank_0((entry, pieces))
            failure = tell.first(_attempt(commit) if rank == 0 else "")
        if failure and rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        return failure


class Exchange:
    """Words between all ranks, spoken by a thread of their own while training goes on."""

    def __init__(self) -> None:
        self._size = dist.get_world_size()
        # On GPUs too the words are the host's: NCCL's streams belong to training.
        self._group = dist.new_group(backend="gloo") if self._size > 1 else None

    def first(self, word: str) -> str:
        """Return the first word that is not empty, the same on every rank. Collective."""
        told: list[Any] = [word] * self._size
        if self._group is not None:
            dist.all_gather_object(told, word, group=self._group)
        return next(filter(None, told), "")

    def to_rank_0(self, word: Any) -> list[Any]:
        """Return, on rank 0, what each said. Collective."""
        told: list[Any] = [word] * self._size
        if self._group is not None:
            dist.gather_object(word, told if dist.get_rank() == 0 else None, group=self._group)
        return told


def _attempt(action: Callable[[], None]) -> str:
    """Return why the operating system refused, or ""."""
    try:
        action()
    except OSError as error:
        return str(error)
    return ""


def load(engine: Engine, folder: Path) -> dict[str, Any]:
    """Put a checkpoint's weights and optimizer state into the engine, and return the state it was saved with.

    Every rank must call it together; each reads what it needs from the shared files.

    Raises:
        UserError: the checkpoint is of another model or format.
    """
    reader = CheckpointReader(folder)
    _make_optimizer_state(engine, reader.state["optimizer_steps"])
    keys = ("", *MOMENTS) if reader.has_optimizer_state else ("",)
    tensor = engine.mesh.tensor
    with torch.no_grad():
        for part in _parts(engine):
            where = cut_of(part.parameter), tensor.rank, tensor.size
            for key in keys if part.size else ():
                part.write(key, reader.run(part.name, key, *where, part.start, part.start + part.size))
            # Stages 1 and 2 have all of the weight on every replica, stage 3 that of a small parameter.
            if engine.stage in (1, 2) or (engine.stage == 3 and part.parameter.numel() == part.shape.numel()):
                whole = reader.run(part.name, "", *where, 0, part.shape.numel())
                part.parameter.data.copy_(whole.view(part.shape))
    return reader.state


def prune(folder: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the one with the lowest held-out loss."""
    found = list(checkpoints(folder))
    losses = {}
    for path in found:
        with contextlib.suppress(OSError, ValueError):
            losses[path] = json.loads((path / "state.json").read_text(encoding="utf-8")).get("eval_loss")
    measured = {path: loss for path, loss in losses.items() if loss is not None}
    best = min(measured, key=measured.__getitem__) if measured else None
    for path in found[keep_last:]:
        if path != best:
            doomed = path.with_name("." + path.name + ".old")
            path.rename(doomed)  # first, so that a half-deleted one is never taken for a checkpoint
            shutil.rmtree(doomed)


def _sweep(folder: Path, path: Path) -> None:
    """Remove what an earlier process left unfinished, and a damaged checkpoint of the same step."""
    for left in (*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")):
        shutil.rmtree(left, ignore_errors=True)
    if path.exists():
        path.rename(path.with_name("." + path.name + ".old"))


@dataclasses.dataclass(frozen=True)
class _Part:
    """What this rank holds of a parameter: `size` elements from `start` on of its flattened tensor of `shape`.

    read(key) returns them, flat and in fp32, of the master weight (key "") or of a moment; write(key, values) puts them there.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    start: int
    size: int
    read: Callable[[str], Tensor]
    write: Callable[[str, Tensor], None]


def _parts(engine: Engine) -> Iterator[_Part]:
    """Yield this rank's part of every parameter."""
    kind = {0: _unpartitioned, 3: _of_stage_3}.get(engine.stage, _of_stages_1_and_2)
    for name, parameter in engine.module.named_parameters():
        yield kind(engine, name, parameter)


def _unpartitioned(engine: Engine, name: str, parameter: nn.Parameter) -> _Part:
    def read(key: str) -> Tensor:
        return (engine.optimizer.state[parameter][key] if key else parameter.data).view(-1)

    def write(key: str, values: Tensor) -> None:
        read(key).copy_(values)

    return _Part(name, parameter, parameter.shape, 0, parameter.numel(), read, write)


def _of_stages_1_and_2(_: Engine, name: str, parameter: nn.Parameter) -> _Part:
    mapping = parameter._hp_mapping  # None where other replicas have all of it
    address = mapping.lp_fragment_address if mapping else None

    def read(key: str) -> Tensor:
        return mapping.get_hp_fragment(key or None).view(-1)

    def write(key: str, values: Tensor) -> None:
        read(key).copy_(values)

    start, size = (address.start, address.numel) if address else (0, 0)
    return _Part(name, parameter, parameter.shape, start, size, read, write)


def _of_stage_3(engine: Engine, name: str, parameter: nn.Parameter) -> _Part:
    partition, numel = parameter.ds_tensor.numel(), parameter.ds_numel  # the last one is padded
    start = min(engine.mesh.replicas.rank * partition, numel)
    size = min(partition, numel - start)

    def read(key: str) -> Tensor:
        own = safe_get_local_optimizer_state(parameter, key) if key else safe_get_local_fp32_param(parameter)
        return own.view(-1)[:size]

    def write(key: str, values: Tensor) -> None:
        padded = torch.zeros(partition, device=engine.device)
        padded[:size] = values
        if key:
            safe_set_local_optimizer_state(parameter, padded, key)
            return
        safe_set_local_fp32_param(parameter, padded)
        parameter.ds_tensor.data.copy_(padded)  # setting the master leaves the weight that the model uses alone

    return _Part(name, parameter, parameter.ds_shape, start, size, read, write)


def _flat_parameters(engine: Engine) -> list[Tensor]:
    """Return the tensors that the inner optimizer steps: the model's own, or ZeRO's flat fp32 partitions of them."""
    if engine.stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]


def _inner(engine: Engine) -> torch.optim.Optimizer:
    return engine.optimizer if engine.stage == 0 else engine.optimizer.optimizer


def _optimizer_steps(engine: Engine) -> int:
    states = (_inner(engine).state[flat] for flat in _flat_parameters(engine))
    return max(int(state["step"]) for state in states if "step" in state)


def _make_optimizer_state(engine: Engine, steps: int) -> None:
    """Create the moments, which the optimizer would make in its first step, and let DeepSpeed find them."""
    inner = _inner(engine)
    for flat in _flat_parameters(engine):
        state = inner.state[flat]
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(flat)
    _link(engine)


def _link(engine: Engine) -> None:
    """Let ZeRO-1 and 2's fragments find the optimizer state of every parameter group.

    DeepSpeed links parameters to their state once, in the step of its first group, when the later groups have none yet.
    """
    if engine.stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
