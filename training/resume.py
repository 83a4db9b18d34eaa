"""Which checkpoint a run goes on from: the newest one that is healthy and of this run.

Rank 0 decides and tells the others. Each file of tensors is hashed once on each node, by one of the node's ranks: nodes may see
different bytes, and none trains on what it cannot read. A checkpoint that is damaged or of another run is passed over for the
one before it. Where none is left, a folder that has held a run is refused: starting over is never implicit.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.identity import changed_settings, how_to_go_on
from conf.schema import Config
from conf.shape import Shape
from data.batches import Dataset
from data.ranges import SampleRanges
from kernels.common.errors import UserError
from launch.ranks import Ranks
from model.decoder import Decoder
from model.health import contents_problem, outline_problem, skipped, tensor_files
from model.manifest import read_manifest, run_of
from model.weights import CheckpointReader, check_shapes, checkpoints
from training.machine import dtype_name

_STATE = {  # what the loop reads of state.json, and its types
    "batches_hash": (int,),
    "course": (str, type(None)),
    "corpus_hash": (str, type(None)),
    "dtype": (str, type(None)),
    "eval_loss": (int, float, type(None)),
    "evaluation_missed": (bool,),
    "optimizer_steps": (int,),
    "settings": (dict, type(None)),
    "skipped_samples": (list,),
    "spikes": (dict,),
    "step": (int,),
    "steps": (int, type(None)),
    "tokenizer_hash": (str,),
    "wall_seconds": (int, float),
    "warmup_steps": (int, type(None)),
}
_MOST = 1 << 53  # steps, or seconds
# Version 0.1 did not write settings, steps and warmup_steps; version 0.2 nothing of samples and spikes; version 0.3 no dtype.
_OPTIONAL = ("course", "dtype", "settings", "skipped_samples", "spikes", "steps", "warmup_steps")


@dataclasses.dataclass(frozen=True)
class Decision:
    """What rank 0 decided, the same on every rank."""

    checkpoint: Path | None = None  # to go on from; None: the run starts
    run_id: str = ""  # the name of the run in its checkpoints
    previous_steps: int | None = None  # length of the run before this session; None: it is new
    finished: bool = False  # the run has ended, and there is nothing to do
    refusal: UserError | None = None  # why it must not go on


def decide_together(ranks: Ranks, decide: Callable[[Callable[[Path], str]], Decision]) -> Decision:
    """Run `decide` on rank 0 and return its decision on every rank. Collective where there are several ranks.

    Args:
        decide: takes a function that verifies the contents of a checkpoint, on all nodes, and returns what is wrong with them.

    Raises:
        UserError: `decide` raised it, on every rank.
    """
    if ranks.world_size == 1:
        return decide(contents_problem)
    if ranks.rank:
        return _follow(ranks)
    try:
        decision = decide(lambda path: _verify_together(ranks, path))
    except UserError as error:
        _tell(Decision(refusal=type(error)(str(error))))
        raise
    _tell(decision)
    return decision


def _follow(ranks: Ranks) -> Decision:
    while isinstance(order := _tell(None), Path):
        _verify_share(ranks, order)
    if order.refusal is not None:
        raise order.refusal
    return order


def _tell(value: Any) -> Any:
    """Return rank 0's value. Collective."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _verify_together(ranks: Ranks, path: Path) -> str:
    _tell(path)
    return _verify_share(ranks, path)


def _verify_share(ranks: Ranks, path: Path) -> str:
    """Hash this rank's share of a checkpoint's files; return what some rank found wrong, the same on every rank. Collective."""
    outline = outline_problem(path) if ranks.local_rank == 0 and ranks.rank else ""  # what this node sees
    try:
        names = tensor_files(read_manifest(path).files)[ranks.local_rank :: ranks.local_world_size]
        problem = outline or contents_problem(path, names)
    except ValueError as error:
        problem = str(error)
    problems: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(problems, problem)
    rank, problem = next(((rank, each) for rank, each in enumerate(problems) if each), (0, ""))
    return f"rank {rank} finds that {problem}" if rank else problem


def choose_checkpoint(
    folder: Path,
    run_id: str | None,
    contents: Callable[[Path], str],
    fits: Callable[[Path], str],
    only: Path | None = None,
) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is healthy and of this run, and a warning for each newer one that was skipped.

    Args:
        folder: holds the run's checkpoints.
        run_id: of this run; None: unknown.
        contents: what is wrong with the contents of a checkpoint whose outline is right.
        fits: why a checkpoint cannot be of this configuration.
        only: the checkpoint to take; None: the newest.

    Raises:
        UserError: there are checkpoints and none can be used, or the newest one was trained with other settings or text.
    """
    warnings: list[str] = []
    unfit: list[tuple[Path, str]] = []
    for path in checkpoints(folder) if only is None else [only]:
        problem = outline_problem(path) or _state_problem(path)
        run = run_of(path)
        if not problem and run_id is not None and run not in (None, run_id):
            warnings.append(f"checkpoint {path} belongs to another run and was skipped")
            continue
        problem = problem or contents(path)
        if problem:
            warnings.append(skipped(path, problem))
        elif reason := fits(path):
            unfit.append((path, reason))
        else:
            for other, reason in unfit:
                if None in (run, theirs := run_of(other)) or run == theirs:
                    raise UserError(reason)
                warnings.append(f"checkpoint {other} belongs to another run and was skipped: {reason}")
            return path, warnings
    if unfit:
        raise UserError(unfit[0][1])
    if only is not None:
        raise UserError(f"resume_from={only.name}: {warnings[0].replace(' and was skipped', '')}")
    if warnings:
        first = warnings[0].replace(" and was skipped", "")
        others = f"; {len(warnings) - 1} more cannot either" if len(warnings) > 1 else ""
        raise UserError(
            f"no checkpoint in {folder} can be used ({first}{others}): bring one back, give this run another name "
            f"(run=NAME), or delete {folder.parent} to train it again"
        )
    return None, []


def _state_problem(path: Path) -> str:
    """Return what state.json lacks that a run needs to resume; "": nothing, or another format, which the reader refuses."""
    state = CheckpointReader(path).state
    for key, kinds in _STATE.items():
        if type(state.get(key)) not in kinds and not (key in _OPTIONAL and key not in state):
            return f"state.json gives no {key}"
    for key in ("optimizer_steps", "step", "steps", "warmup_steps", "wall_seconds"):
        if (value := state.get(key)) is not None and not 0 <= value <= _MOST:
            return f"state.json gives no {key}"
    try:
        SampleRanges.of(state.get("skipped_samples", []))
    except (ValueError, TypeError):
        return "state.json gives no skipped_samples"
    return ""


def why_unfit(path: Path, dataset: Dataset, shape: Shape, config: Config) -> str:
    """Return why a checkpoint cannot be of this model, text and configuration; "" if it can."""
    reader = CheckpointReader(path)
    try:
        with torch.device("meta"):
            check_shapes(Decoder(shape, config.model, "sdpa"), reader)
    except UserError as error:
        return str(error)
    another = "give this run another name (run=NAME)"
    if reader.state["tokenizer_hash"] != dataset.tokenizer.hash:
        if config.tokenizer.path is None:  # trained on the corpus, so it is the text that differs
            return (
                f"{path} was trained on other text than what data={config.data.name} holds today, whose tokenizer differs: "
                f"bring the text back, or {another}"
            )
        return f"{path} was trained with another tokenizer than the one in {dataset.folder}"
    if reader.state["corpus_hash"] not in (None, dataset.corpus_hash):  # None: an imported model
        return f"{path} was trained on other text than what is in {dataset.folder}: {another}"
    changed = changed_settings(reader.state.get("settings"), config)
    return f"{path} was trained with other settings ({'; '.join(changed)}): {how_to_go_on(changed)}" if changed else ""


def dtype_change(state: dict[str, Any], dtype: torch.dtype) -> str:
    """Return what to warn of where a run goes on in another dtype than its checkpoint was trained in; "": in the same, or in
    one that the checkpoint does not tell.

    Only `precision=auto` lets it change: it is not refused, since a run may move to another machine or another ZeRO stage.
    """
    before, now = state.get("dtype"), dtype_name(dtype)
    if before in (None, now):
        return ""
    return (
        f"the run was trained in {before} up to step {state['step']} and goes on in {now}: "
        "precision=auto follows the machine and the ZeRO stage"
    )


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted process left of checkpoints that it was saving, replacing or deleting."""
    for leftover in (*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")):
        shutil.rmtree(leftover, ignore_errors=True)


def unknown_origin(path: Path) -> str:
    """Return what cannot be checked about a checkpoint that an earlier version wrote; "" if all can."""
    if read_manifest(path).version > 1:
        return ""
    return f"{path} is of an earlier version: it does not tell its run and its settings, so they were not checked"
