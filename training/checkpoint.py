"""Checkpoints that know no topology: whole tensors in safetensors, so that a run may go on under any number of ranks and stage.

DeepSpeed's own files are pickles tied to a ZeRO stage and a number of ranks, and it names the newest before all ranks have
written. Here the fp32 master weights and the optimizer's moments of every parameter are gathered one at a time through
DeepSpeed's documented `safe_*` access, and rank 0 writes them (model/weights.py has the format) into a temporary folder that is
synced and renamed: a folder called `step_N` is complete. bf16 weights are not stored, they are the masters rounded.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from conf.errors import UserError
from conf.files import atomic_folder
from model.weights import FORMAT, CheckpointReader, checkpoints, file_hash, from_disk, to_disk
from training.engine import Engine

_FILE_BYTES = 2 << 30  # tensors are gathered until a file has this size: bounds the memory of rank 0
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(engine: Engine, folder: Path, state: dict[str, Any]) -> Path:
    """Write the checkpoint `step_N` for N = state["step"]; every rank must call it together.

    Args:
        folder: that of the run's checkpoints.
        state: what else must be known to go on, as JSON.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: on rank 0, if it cannot be written; what was saved before is untouched.
    """
    path = folder / f"step_{state['step']:08d}"
    is_writer = dist.get_rank() == 0
    failure: OSError | None = None
    if not _inner(engine).state:  # no step was applied yet
        _make_optimizer_state(engine, 0)
    _link(engine)
    with contextlib.ExitStack() as stack:
        writer = None
        if is_writer:
            try:
                _sweep(folder, path)
                writer = _Writer(stack.enter_context(atomic_folder(path)))
            except OSError as error:
                failure = error
        for key in ("", *(f".{moment}" for moment in _MOMENTS)):
            for name, parameter in engine.module.named_parameters():
                # The gather is collective: a rank 0 that can no longer write still takes part in it.
                tensor = _gather(engine, parameter, key.removeprefix("."))
                if writer is not None and failure is None:
                    try:
                        writer.add(name, tensor, key)
                    except OSError as error:
                        failure = error
        if writer is not None and failure is None:
            try:
                writer.finish({**state, "format": FORMAT, "optimizer_steps": _optimizer_steps(engine)})
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure  # inside the stack: the temporary folder is removed
    return path


class _Writer:
    """Collects tensors into safetensors files of bounded size."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tensors, self.bytes, self.files = folder, {}, 0, 0

    def add(self, name: str, tensor: Tensor, suffix: str) -> None:
        for stored, part in to_disk(name, tensor).items():
            self.tensors[stored + suffix] = part.detach().to("cpu", torch.float32).contiguous()
            self.bytes += 4 * part.numel()
        if self.bytes >= _FILE_BYTES:
            self._flush()

    def finish(self, state: dict[str, Any]) -> None:
        self._flush()
        (self.folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        files = sorted(self.folder.iterdir())
        listed = {path.name: {"bytes": path.stat().st_size, "blake2b": file_hash(path)} for path in files}
        text = json.dumps({"format": FORMAT, "files": listed}, indent=2) + "\n"
        (self.folder / "manifest.json").write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        if self.tensors:
            self.files += 1
            path = self.folder / f"tensors-{self.files:05d}.safetensors"
            try:
                save_file(self.tensors, path)
            except Exception as error:  # the library wraps the operating system's error in its own
                raise OSError(f"cannot write {path}: {error}") from error
            self.tensors, self.bytes = {}, 0


def load(engine: Engine, folder: Path) -> dict[str, Any]:
    """Put a checkpoint's weights and optimizer state into the engine, and return the state it was saved with.

    Every rank must call it together; each reads what it needs from the shared files.

    Raises:
        UserError: the checkpoint is of another model or format.
    """
    reader = CheckpointReader(folder)
    if reader.state.get("format") != FORMAT:
        raise UserError(f"{folder} has checkpoint format {reader.state.get('format')}; this version reads {FORMAT}")
    _make_optimizer_state(engine, reader.state["optimizer_steps"])
    # One that was written before any step (`model.load`) may have no moments: they are the zeros just made.
    keys = ("", *_MOMENTS) if reader.state["optimizer_steps"] else ("",)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            for key in keys:
                suffix = f".{key}" if key else ""
                _scatter(engine, parameter, from_disk(name, shape, reader, suffix).to(engine.device), key)
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


def _gather(engine: Engine, parameter: nn.Parameter, key: str) -> Tensor:
    """Return the whole fp32 tensor: the master weight (key "") or a moment. Collective over the data-parallel ranks."""
    if engine.stage == 0:
        return engine.optimizer.state[parameter][key] if key else parameter.data
    return safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)


def _scatter(engine: Engine, parameter: nn.Parameter, whole: Tensor, key: str) -> None:
    """Write this rank's part of a whole tensor into the master weight (key "") or a moment."""
    if engine.stage == 0:
        (engine.optimizer.state[parameter][key] if key else parameter.data).copy_(whole)
    elif engine.stage == 3:
        # DeepSpeed's setter of whole tensors reads past the end where the ranks do not divide them: cut and pad here.
        part = torch.zeros(parameter.ds_tensor.numel(), dtype=whole.dtype, device=whole.device)
        rank = dist.get_rank()
        mine = whole.flatten()[rank * part.numel() : (rank + 1) * part.numel()]
        part[: mine.numel()] = mine
        if key:
            safe_set_local_optimizer_state(parameter, part, key)
            return
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)  # setting the master leaves the weight that the model uses alone
        if parameter.numel() == whole.numel():  # small parameters are kept whole on every rank
            parameter.data.copy_(whole)
    elif key:
        safe_set_full_optimizer_state(parameter, whole, key)
    else:
        safe_set_full_fp32_param(parameter, whole)
        parameter.data.copy_(whole)


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
        for moment in _MOMENTS:
            state[moment] = torch.zeros_like(flat)
    _link(engine)


def _link(engine: Engine) -> None:
    """Let `safe_*` find the optimizer state of every parameter group under ZeRO-1 and 2.

    DeepSpeed links parameters to their state once, in the step of its first group, when the later groups have none yet.
    """
    if engine.stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
