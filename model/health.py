"""What a checkpoint is worth: whether its files are those that were saved, and fit together.

`outline_problem` reads all but the tensors: the manifest, index.json, state.json, and the headers of the ranks' files.
`contents_problem` hashes files of tensors, and so reads all of them: no number in them may be NaN or infinite. A checkpoint is
healthy when neither finds anything.
What version 1 of the manifest does not say is not checked.
"""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kernels.common.json_files import digest, parse, read_bytes
from model.finite import FileScan
from model.manifest import CheckpointManifest, bytes_hash, file_hash, file_of, of_state, read_manifest
from model.weights import FORMAT, MOMENTS, step_of, stored_name

_LIMIT = 1 << 31  # bytes of index.json and state.json; their size is in the manifest
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)


def outline_problem(folder: Path) -> str:
    """Return what is wrong with a checkpoint as far as it shows without reading tensors; "" if nothing is.

    Raises:
        UserError: a later version wrote it.
    """
    try:
        manifest = read_manifest(folder)
        return _outline_problem(folder, manifest)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def contents_problem(folder: Path, names: Iterable[str] | None = None) -> str:
    """Return what is wrong with the contents of a checkpoint whose outline is right.

    "" if they are those that were saved, and finite.

    Args:
        names: the files to hash; None: all that hold tensors.
    """
    try:
        files = read_manifest(folder).files
    except ValueError as error:
        return str(error)
    for name in tensor_files(files) if names is None else names:
        try:
            scan = FileScan()
            if file_hash(folder / name, scan.add) != files[name][1]:
                return f"{name} does not have the contents that were saved"
            if scan.found:
                return f"{name} holds {scan.found}"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint; "": it is healthy.

    Raises:
        UserError: a later version wrote it.
    """
    return outline_problem(folder) or contents_problem(folder)


def skipped(path: Path, problem: str) -> str:
    """Return the warning about a damaged checkpoint."""
    return f"checkpoint {path} is damaged and was skipped: {problem}"


def tensor_files(files: Iterable[str]) -> list[str]:
    """Return the names of a manifest's files that hold tensors."""
    return [name for name in files if name.endswith(".safetensors")]


class Inspector:
    """Finds what checkpoints are worth, and reads none twice that has not changed since."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[Any, str]] = {}

    def problem(self, path: Path) -> str:
        """Return what `damage` does."""
        signature = _signature(path)
        known = self._known.get(path)
        if known is None or known[0] != signature:
            known = self._known[path] = signature, damage(path)
        return known[1]

    def record(self, path: Path, problem: str = "") -> None:
        """Remember what is wrong with a checkpoint as it is now: it has just been written, or verified."""
        self._known[path] = _signature(path), problem


def _signature(folder: Path) -> Any:
    """Return what changes when a file of a folder is written."""
    try:
        with os.scandir(folder) as entries:
            stats = {entry.name: entry.stat() for entry in entries}
    except OSError:
        return None
    return sorted((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())


def _outline_problem(folder: Path, manifest: CheckpointManifest) -> str:
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing" if not os.path.lexists(path) else f"{name} is not a regular file"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    contents: dict[str, Any] = {}
    for name in ("index.json", "state.json"):
        try:
            text = read_bytes(folder / name, min(manifest.files[name][0], _LIMIT))
            if bytes_hash(text) != manifest.files[name][1]:
                return f"{name} does not have the contents that were saved"
            contents[name] = parse(text)
        except (OSError, ValueError) as error:
            return f"{name} cannot be read: {error}"
    state, index = contents["state.json"], contents["index.json"]
    if not isinstance(state, dict) or not isinstance(index, dict):
        return "index.json or state.json does not hold an object"
    if state.get("format") != FORMAT:  # `CheckpointReader` refuses it
        return ""
    return _state_problem(folder, state, manifest) or _pieces_problem(folder, index, manifest, state)


def _state_problem(folder: Path, state: dict[str, Any], manifest: CheckpointManifest) -> str:
    """Return how state.json contradicts the manifest, or the name of the folder."""
    for key in ("step", "optimizer_steps"):
        if type(state.get(key)) is not int or state[key] < 0:
            return f"state.json gives no {key}"
    if state["step"] != step_of(folder):
        return f"state.json is of step {state['step']}"
    if manifest.version == 1:
        return "manifest.json is older than state.json" if state.get("run_id") is not None else ""
    for key, value in of_state(state).items():
        if getattr(manifest, key) != value:
            return f"manifest.json and state.json differ in {key}"
    return ""


def _pieces_problem(folder: Path, index: dict[str, Any], manifest: CheckpointManifest, state: dict[str, Any]) -> str:
    """Return how index.json and the files of the ranks contradict each other, or what is missing of a parameter."""
    of_rank: dict[int, list[tuple[str, list[int]]]] = collections.defaultdict(list)
    try:
        if not index:
            return "index.json is empty"
        for name, entry in index.items():
            if problem := _entry_problem(name, entry):
                return problem
            for piece in entry["pieces"]:
                of_rank[piece[3]].append((name, piece))
    except _UNREADABLE:
        return "index.json is no index"
    with_state = None
    for rank in range(manifest.world):
        problem, has_state = _file_problem(folder, rank, of_rank.pop(rank, []), index, manifest, state)
        if problem:
            return problem
        with_state = has_state if with_state is None else with_state
        if has_state is not None and has_state != with_state:
            return f"{file_of(rank)} and {file_of(0)} do not both hold the state of the optimizer"
    return f"index.json names a file of rank {min(of_rank)}, which manifest.json does not list" if of_rank else ""


def _entry_problem(name: str, entry: Any) -> str:
    """Return what is wrong with a parameter of the index: its pieces must cover each of its shards once."""
    shape, tensor, cut = list(entry["shape"]), entry["tensor"], entry["cut"]
    for states in (entry.get("states", []), entry.get("row_states", [])):
        if not isinstance(states, list) or any(type(each) is not str for each in states):
            return f"index.json: {name} has states that are none"
    numbers = [*shape, tensor, *(number for piece in entry["pieces"] for number in piece)]
    if any(type(number) is not int or not 0 <= number < 1 << 53 for number in numbers) or tensor < 1:
        return f"index.json: {name} has a size that is none"
    if cut is None and tensor != 1:
        return f"index.json: {name} has {tensor} shards and no axis"
    if cut is not None:
        sections = [cut["dim"], *cut["sections"]]
        if any(type(number) is not int or number < 0 for number in sections) or shape[cut["dim"]] % tensor:
            return f"index.json: {name} does not divide into {tensor} shards"
    covered = [0] * min(tensor, len(entry["pieces"]))
    for shard, start, size, _ in sorted(map(tuple, entry["pieces"])):
        if shard >= len(covered) or start != covered[shard]:
            return f"index.json: the pieces of {name} overlap, or leave a gap"
        covered[shard] += size
    numel = math.prod(shape) // tensor
    complete = len(covered) == tensor and all(size == numel for size in covered)
    return "" if complete else f"index.json does not cover {name}"


def _file_problem(
    folder: Path,
    rank: int,
    pieces: list[tuple[str, list[int]]],
    index: dict[str, Any],
    manifest: CheckpointManifest,
    state: dict[str, Any],
) -> tuple[str, bool | None]:
    """Return how a rank's file contradicts the index or the manifest, and whether it holds state of the optimizer."""
    name = file_of(rank)
    try:
        with safe_open(folder / name, framework="pt") as file:
            header = file.metadata() or {}
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            stored = {key: (part.get_dtype(), math.prod(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError, ValueError):
        return f"{name} does not have the contents that were saved", None
    expected = {"step": str(state["step"]), "rank": str(rank), "run": str(manifest.run), "pieces": digest(pieces)}
    if manifest.version > 1 or header:
        for key, value in expected.items():
            if header.get(key) != value:
                return f"{name} is of another {'checkpoint' if key == 'pieces' else key}", None
    has_state = any(key.endswith(f".{moment}") for moment in MOMENTS for key in stored)
    wanted = {}
    for parameter, (_, _, size, _) in pieces:
        # Version 0.2 had one optimizer, and no list.
        listed = index[parameter].get("states", MOMENTS if has_state else ())
        wanted |= {stored_name(parameter, key): ("F32", size) for key in ("", *listed)}
    for parameter, entry in index.items() if rank == 0 else ():
        rows = math.prod(entry["shape"][:-1])
        wanted |= {stored_name(parameter, key): ("F32", rows) for key in entry.get("row_states", [])}
    if all("states" in entry for entry in index.values()):
        has_state = None  # nothing is to be compared with other files
    if stored != wanted:
        strange = min(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
        return f"{name} and index.json differ in {strange}", None
    return "", has_state if stored else None
