"""Save and load checkpoints under ZeRO and tensor parallelism. The format, independent of topology, is in `model/weights.py`.

DeepSpeed's own files are pickles tied to a ZeRO stage and a number of ranks, and it names the newest checkpoint before all
ranks have written theirs. Its universal checkpoint gives every parameter group the first one's weight decay under ZeRO-3, and
does not load into tensor ranks there. PyTorch's distributed checkpoint requires DTensors, which ZeRO's partitions are not.

So each rank copies its fragments of the fp32 masters and of the optimizer's moments to host memory, which is all that training
waits for. A thread then writes them to a file. All ranks write at once and communicate only whether they succeeded. When all
files are synced, rank 0 adds the index and renames the folder, so a folder called `step_N` is complete. bf16 weights are not
stored: they are the masters, rounded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.identity import changed_settings
from kernels.common.errors import ExitStatus, UserError
from kernels.common.files import problem_of, publish, status_of
from kernels.common.json_files import read_object
from model.finite import find
from model.health import Inspector
from model.manifest import file_of, read_manifest
from model.parallel import shard_spec
from model.weights import (
    CheckpointReader,
    Piece,
    checkpoints,
    header_of,
    index_entry,
    step_of,
    stored_name,
    write_rest,
    write_tensors,
)
from training import watchdog
from training.engine import Engine
from training.fragments import (
    Fragment,
    create_optimizer_state,
    fragments,
    inner_optimizer,
    link_optimizer_state,
    optimizer_steps,
    row_states,
)
from training.metrics_file import periodic_losses
from training.resume import remove_leftovers

NamedPieces = list[tuple[str, Piece]]  # (parameter's name, the piece of it that a rank stores)


@dataclasses.dataclass(frozen=True)
class SaveResult:
    """How a save ended; the same on every rank."""

    step: int
    path: Path
    failure: str  # why it could not be written; "": it could
    status: int  # the exit status of a run that ends without another save
    refused: str  # why it was not to be kept: something is not finite; "": nothing is
    poisoned: bool  # whether that is a weight or a moment, which no later step makes finite again
    warning: str  # why older checkpoints could not be removed; "": they were
    blocked_seconds: float  # for which training stood still
    seconds: float  # until the checkpoint was complete


@dataclasses.dataclass(frozen=True)
class WriteFailure:
    """Why a rank could not write."""

    text: str = ""  # "": it could
    status: int = ExitStatus.FAILED  # of a run that ends for it


_WRITTEN = WriteFailure()


class Saver:
    """Save checkpoints of a run in the background, one at a time. Every rank has a saver; all call its methods together.

    Args:
        folder: holds the run's checkpoints.
        collectives: those that the savers of all ranks communicate through.
        keep_last: how many of the newest healthy checkpoints to keep, beside the best one; None: all.
        inspector: knows which checkpoints are healthy, on rank 0; None: a new one.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        collectives: CheckpointCollectives,
        keep_last: int | None = None,
        inspector: Inspector | None = None,
    ) -> None:
        self.engine, self.folder, self.keep_last = engine, folder, keep_last
        self._collectives, self._inspector = collectives, inspector or Inspector()
        self._run_id: str | None = None
        self._host_buffers: dict[str, Tensor] = {}  # reused by every save
        self._thread: threading.Thread | None = None
        self._result: SaveResult | BaseException | None = None

    def start(self, state: dict[str, Any], doubt: str = "") -> None:
        """Copy this rank's fragments to host memory, and start to write them as `step_N` for N = state["step"].

        Nothing is written where a weight or a moment is not finite on some rank: the copies are checked by the thread.
        The result of the previous save must have been taken.

        Args:
            state: what else is needed to resume, as JSON.
            doubt: why this rank would not keep a checkpoint of this step, as "its loss is NaN".
        """
        assert self._thread is None, "the result of the previous save has not been taken"
        started = time.perf_counter()
        if not inner_optimizer(self.engine).state:  # no step has been applied yet
            create_optimizer_state(self.engine, 0)
        link_optimizer_state(self.engine)
        pieces, tensors = self._copy_to_host(row_states(self.engine))
        state = {**state, "optimizer_steps": optimizer_steps(self.engine)}
        self._run_id = state.get("run_id")
        blocked_seconds = time.perf_counter() - started
        arguments = (pieces, tensors, state, doubt, started, blocked_seconds)
        self._thread = threading.Thread(target=self._run, args=arguments, name="saver", daemon=True)
        self._thread.start()

    def take_result(self, wait: bool = False) -> SaveResult | None:
        """Return the result of the last save, once; None if there is none, or, without `wait`, if it is still running."""
        if self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self._thread.join()
        self._thread, result = None, self._result
        if isinstance(result, BaseException):
            raise result
        return result

    def prune(self) -> str:
        """Delete all checkpoints but the newest and the best, as rank 0 does after a save; return why that failed, or ""."""
        keep_last = self.keep_last
        if keep_last is None or dist.get_rank() > 0:
            return ""
        return _failure_of(
            lambda: prune(self.folder, keep_last, self._inspector.problem, self._run_id), self.folder
        ).text

    def _copy_to_host(self, by_rows: dict[str, dict[str, Tensor]]) -> tuple[NamedPieces, dict[str, Tensor]]:
        """Return the pieces that this rank stores, and their tensors in host buffers that the next save overwrites.

        Args:
            by_rows: {parameter: {state: one number per row}}, which rank 0 stores.
        """
        tensor, data_context_rank, rank = self.engine.mesh.tensor, self.engine.mesh.data_context.rank, dist.get_rank()
        pieces, tensors = [], {}
        on_gpu = self.engine.device.type == "cuda"
        for fragment in fragments(self.engine):
            replicated = shard_spec(fragment.parameter) is None
            stored_elsewhere = (tensor.rank and replicated) or (self.engine.stage == 0 and data_context_rank)
            if not fragment.size or stored_elsewhere:
                continue
            pieces.append((fragment.name, Piece(tensor.rank, fragment.start, fragment.size, rank)))
            for key in ("", *fragment.states):
                name, values = stored_name(fragment.name, key), fragment.read(key)
                if name not in self._host_buffers:
                    complete = fragment.size == fragment.shape.numel()
                    shape = fragment.shape if complete else (fragment.size,)
                    self._host_buffers[name] = torch.empty(shape, dtype=torch.float32, pin_memory=on_gpu)
                buffer = self._host_buffers[name]
                tensors[name] = buffer.copy_(values.view(buffer.shape), non_blocking=on_gpu)
        for name, states in by_rows.items() if rank == 0 else ():
            tensors |= {stored_name(name, key): values.to("cpu", copy=True) for key, values in states.items()}
        if on_gpu:
            torch.cuda.synchronize(self.engine.device)
        return pieces, tensors

    def _run(
        self,
        pieces: NamedPieces,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        doubt: str,
        started: float,
        blocked_seconds: float,
    ) -> None:
        path = self.folder / f"step_{state['step']:08d}"
        failure, warning = _WRITTEN, ""
        watchdog.saving(state["step"])
        try:
            poison = self._first("holds", find(tensors.items()))
            refused = poison or self._first("has", doubt)
            if not refused:
                failure = self._write(path, pieces, tensors, state)
            if not refused and not failure.text:
                warning = self.prune()
            seconds = time.perf_counter() - started
            outcome = (failure.text, failure.status, refused, bool(poison), warning)
            self._result = SaveResult(state["step"], path, *outcome, blocked_seconds, seconds)
        except BaseException as error:  # not an error of the disk: `take_result` raises it in the training thread
            self._result = error
        finally:
            watchdog.saving(None)

    def _first(self, verb: str, what: str) -> str:
        """Return the first rank's `what` that is not empty, as "rank R VERB WHAT"; "": there is none. Collective."""
        return self._collectives.first_failure(
            WriteFailure(f"rank {dist.get_rank()} {verb} {what}" if what else "")
        ).text

    def _write(
        self, path: Path, pieces: NamedPieces, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> WriteFailure:
        """Write the checkpoint together with the other ranks; return why that failed, if it did."""
        rank, collectives = dist.get_rank(), self._collectives
        temporary = path.with_name(f".{path.name}.tmp")
        manifest_entry: dict[str, Any] = {}
        gathered: list[tuple[dict[str, Any], NamedPieces]] = []  # by rank

        def create_folder() -> None:
            remove_leftovers(self.folder)
            temporary.mkdir(parents=True)

        def write_own_tensors() -> None:
            header = header_of(state, rank, pieces)
            manifest_entry.update(write_tensors(temporary / file_of(rank), tensors, header))

        def commit() -> None:
            tensor_ranks = self.engine.mesh.tensor.size
            index = {
                each.name: index_entry(each.parameter, tensor_ranks, each.states, each.row_states)
                for each in fragments(self.engine)
            }
            for _, rank_pieces in gathered:
                for name, piece in rank_pieces:
                    index[name]["pieces"].append(piece)
            files = {file_of(number): entry for number, (entry, _) in enumerate(gathered)}
            write_rest(temporary, index, state, files)
            _make_way(path, self._run_id)
            publish(temporary, path)
            self._inspector.record(path)
            remove_leftovers(self.folder)

        failure = collectives.first_failure(_failure_of(create_folder, path) if rank == 0 else _WRITTEN)
        if not failure.text:
            watchdog.saving(state["step"])
            failure = collectives.first_failure(_failure_of(write_own_tensors, path))
        if not failure.text:
            watchdog.saving(state["step"])
            gathered = collectives.gather_to_rank_0((manifest_entry, pieces))
            failure = collectives.first_failure(_failure_of(commit, path) if rank == 0 else _WRITTEN)
        if failure.text and rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        return failure


class CheckpointCollectives:
    """Gloo collectives issued from the checkpoint thread, while training continues."""

    def __init__(self) -> None:
        self._size = dist.get_world_size()
        # Gloo on GPUs too: NCCL's streams belong to training.
        self._group: dist.ProcessGroup | None = None
        if self._size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup), "every rank is a member"
            self._group = group

    def first_failure(self, failure: WriteFailure) -> WriteFailure:
        """Return the failure of the first rank that has one; the same on every rank. Collective."""
        failures: list[Any] = [failure] * self._size
        if self._group is not None:
            dist.all_gather_object(failures, failure, group=self._group)
        return next((each for each in failures if each.text), _WRITTEN)

    def gather_to_rank_0(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order, on rank 0; other ranks must not use the result. Collective."""
        values: list[Any] = [value] * self._size
        if self._group is not None:
            dist.gather_object(value, values if dist.get_rank() == 0 else None, group=self._group)
        return values


def _failure_of(action: Callable[[], None], path: Path) -> WriteFailure:
    """Run `action`; return the failure that the OSError makes which it raised, about `path` if that names nothing."""
    try:
        action()
    except OSError as error:
        return WriteFailure(problem_of(error, path), status_of(error))
    return _WRITTEN


def load(engine: Engine, folder: Path) -> dict[str, Any]:
    """Load a checkpoint's weights and optimizer state into the engine; return the state it was saved with. Collective.

    Each rank reads what it needs from the shared files. The optimizer starts anew where `resume_optimizer=fresh` lets it.

    Raises:
        UserError: the checkpoint is of another model or format, or of another optimizer.
    """
    reader = CheckpointReader(folder)
    fresh = engine.config.resume_optimizer == "fresh" and _of_another_optimizer(reader, engine)
    create_optimizer_state(engine, 0 if fresh else reader.state["optimizer_steps"])
    tensor, by_rows = engine.mesh.tensor, row_states(engine)
    with torch.no_grad():
        for fragment in fragments(engine):
            name, parameter, numel = fragment.name, fragment.parameter, fragment.shape.numel()
            shard = shard_spec(parameter), tensor.rank, tensor.size
            if not fresh and (other := _other_states(reader, fragment)):
                raise UserError(
                    f"{folder} holds the state of another optimizer ({other}) of {name}: "
                    "resume_optimizer=fresh starts one anew"
                )
            keys = ("", *(() if fresh else reader.states(name)))
            for key, values in reader.row_states(name).items() if len(keys) > 1 else ():
                by_rows[name][key].copy_(values)
            if fragment.size:
                for key in keys:
                    fragment.write(
                        key, reader.shard_range(name, key, *shard, fragment.start, fragment.start + fragment.size)
                    )
            # Under stages 1 and 2 each data x context rank holds the whole weight; under stage 3, that of a small parameter.
            if engine.stage in (1, 2) or (engine.stage == 3 and parameter.numel() == numel):
                weight = reader.shard_range(name, "", *shard, 0, numel)
                parameter.data.copy_(weight.view(fragment.shape))
    return reader.state


def _of_another_optimizer(reader: CheckpointReader, engine: Engine) -> bool:
    """Return whether a checkpoint was trained with another `optim`, or holds other states than the run keeps."""
    kept = dataclasses.replace(engine.config, resume_optimizer="keep")
    changed = changed_settings(reader.state.get("settings"), kept)
    return any(each.startswith("optim.") for each in changed) or any(
        _other_states(reader, fragment) for fragment in fragments(engine)
    )


def _other_states(reader: CheckpointReader, fragment: Fragment) -> str:
    """Return the states that a checkpoint holds of a parameter where they are not those that the run keeps; "": they are."""
    stored, by_row = reader.states(fragment.name), reader.row_states(fragment.name).keys()
    same = not stored or ({*stored}, {*by_row}) == ({*fragment.states}, {*fragment.row_states})
    return "" if same else ", ".join((*stored, *by_row))


def prune(folder: Path, keep_last: int, problem: Callable[[Path], str], run_id: str | None = None) -> None:
    """Delete all checkpoints but the newest `keep_last` healthy ones and the best one, that with the lowest held-out loss.

    A damaged checkpoint is deleted only when it is older than these, and one of another run never.

    Losses compare only on the same number of held-out tokens. So the figure of a step is its periodic evaluation; if
    `eval_tokens` was changed on the way, the best one of each number is kept.

    Args:
        problem: what is wrong with a checkpoint; "": it is healthy.
        run_id: of this run; None: all checkpoints are its own.
    """
    own = [path for path in checkpoints(folder) if _may_be_of(path, run_id)]
    healthy = list(itertools.islice((path for path in own if not problem(path)), keep_last))
    if len(healthy) < keep_last:
        return
    kept = {*own[: own.index(healthy[-1]) + 1], *_best(own, problem)}
    for path in own:
        if path not in kept:
            renamed = path.with_name("." + path.name + ".old")
            path.rename(renamed)  # first, so that a half-deleted folder is never taken for a checkpoint
            shutil.rmtree(renamed)


def _may_be_of(path: Path, run_id: str | None) -> bool:
    """Return whether a checkpoint does not say that it belongs to another run, or was written by a later version."""
    try:
        return run_id is None or read_manifest(path).run in (None, run_id)
    except ValueError:
        return True
    except UserError:
        return False


def _best(newest_first: list[Path], problem: Callable[[Path], str]) -> Iterator[Path]:
    """Yield the healthy checkpoint with the lowest held-out loss, of each number of held-out tokens."""
    losses: dict[int | None, list[tuple[float, Path]]] = {}  # by number of held-out tokens; None: all
    periodic = periodic_losses(newest_first[0].parents[1])
    for path in newest_first:
        tokens, loss = periodic.get(step_of(path), (None, None))
        if loss is None:
            with contextlib.suppress(OSError, ValueError):
                loss = read_object(path / "state.json").get("eval_loss")
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            losses.setdefault(tokens, []).append((loss, path))
    for candidates in losses.values():
        for _, path in sorted(candidates, key=lambda candidate: candidate[0]):
            if not problem(path):
                yield path
                break


def _make_way(path: Path, run_id: str | None) -> None:
    """Rename what has the name of a new checkpoint: a damaged one of the same step, to be deleted, or one of another run."""
    if path.exists():
        other = "" if _may_be_of(path, run_id) else f"{path.name}.of_another_run"
        path.rename(path.with_name(other or f".{path.name}.old"))
