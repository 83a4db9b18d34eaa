"""The manifest of a checkpoint: every file with its size and hash, and what the checkpoint is of.

    {"version": 2, "step": 12, "world": 2, "run": ID, "config": HASH, "corpus": HASH, "tokenizer": HASH,
     "files": {NAME: {"bytes": SIZE, "blake2b": HASH}}, "digest": HASH}

`digest` is the hash of everything else. Version 1 has `files` alone. `step`, `run`, `config`, `corpus` and `tokenizer` are
those of state.json. Each rank's file repeats step and run in its header, with its rank and the hash of its pieces: a file of
another checkpoint does not fit, even under a manifest that was rewritten for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernels.common.errors import UserError
from kernels.common.files import naming
from kernels.common.json_files import digest, open_regular, read_object

VERSION = 2
NAME = "manifest.json"
_LIMIT = 1 << 26  # bytes of a manifest: those of 100,000 ranks are shorter
_RANK_FILE = re.compile(r"rank_([0-9]{5,7})\.safetensors")
_KEYS = {"version", "step", "world", "run", "config", "corpus", "tokenizer", "files", "digest"}
_HASH = re.compile(r"[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class CheckpointManifest:
    """A manifest that holds together. What one of version 1 does not say is None."""

    files: dict[str, tuple[int, str]]  # name -> (bytes, BLAKE2b)
    version: int = 1
    step: int | None = None
    run: str | None = None
    config: str | None = None
    corpus: str | None = None
    tokenizer: str | None = None

    @property
    def world(self) -> int:
        """How many ranks' files there are."""
        return len(self.files) - 2


def file_of(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def file_hash(path: Path, watch: Callable[[bytes], object] | None = None) -> str:
    """Return the BLAKE2b hash of a regular file, in hexadecimal.

    Args:
        watch: is given each block of the file, in order.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    result = hashlib.blake2b(digest_size=16)
    with open_regular(path) as file:
        while block := file.read(1 << 22):
            result.update(block)
            if watch is not None:
                watch(block)
    return result.hexdigest()


def bytes_hash(content: bytes) -> str:
    """Return the hash that `file_hash` gives of a file with this content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write_manifest(folder: Path, state: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write manifest.json.

    Args:
        state: what state.json holds.
        files: {name: {"bytes": size, "blake2b": hash}} of every other file of the checkpoint.
    """
    content = {"version": VERSION, "world": len(files) - 2, **of_state(state), "files": files}
    content["digest"] = digest(content, 16)
    with naming(folder / NAME):
        (folder / NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def of_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest says about a checkpoint with this state."""
    settings = state.get("settings")
    return {
        "step": state.get("step"),
        "run": state.get("run_id"),
        "config": None if settings is None else digest(settings),
        "corpus": state.get("corpus_hash"),
        "tokenizer": state.get("tokenizer_hash"),
    }


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read a checkpoint's manifest.

    Raises:
        ValueError: why it cannot be trusted.
        UserError: a later version wrote it.
    """
    try:
        content = read_object(folder / NAME, _LIMIT)
        files = {name: (entry["bytes"], entry["blake2b"]) for name, entry in content["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} is missing or unreadable") from error
    if content.keys() == {"files"}:  # version 1
        _check_files(files)
        return CheckpointManifest(files)
    rest = {key: value for key, value in content.items() if key != "digest"}
    if content.get("digest") != digest(rest, 16):
        raise ValueError(f"{NAME} does not have the contents that were saved")
    if content.get("version") != VERSION:
        raise UserError(
            f"{folder} has a manifest of version {content.get('version')}, and this version reads up to {VERSION}: "
            "continue with the version that wrote it, or start a run of another name (run=NAME)"
        )
    texts = {key: content.get(key) for key in ("run", "config", "corpus", "tokenizer")}
    right = all(value is None or isinstance(value, str) for value in texts.values())
    if content.keys() != _KEYS or not right or type(content["step"]) is not int:
        raise ValueError(f"{NAME} is missing or unreadable")
    _check_files(files)
    manifest = CheckpointManifest(files, VERSION, content["step"], **texts)
    if manifest.world != content["world"]:
        raise ValueError(f"{NAME} lists the files of {manifest.world} ranks, not of {content['world']}")
    return manifest


def run_of(folder: Path) -> str | None:
    """Return the run that a checkpoint belongs to; None if it does not say, or not in a way that can be trusted."""
    try:
        return read_manifest(folder).run
    except (ValueError, UserError):
        return None


def _check_files(files: dict[str, tuple[Any, Any]]) -> None:
    """Refuse a list that is not index.json, state.json and the files of ranks 0, 1, ..., or whose entries are no entries.

    Raises:
        ValueError: what is wrong.
    """
    ranks = [int(match[1]) for match in map(_RANK_FILE.fullmatch, files) if match]
    expected = {"index.json", "state.json", *(file_of(rank) for rank in range(len(ranks)))}
    if missing := sorted(expected - files.keys()):
        raise ValueError(f"{NAME} does not list {missing[0]}")
    if strange := sorted(files.keys() - expected):
        raise ValueError(f"{NAME} lists {strange[0]!r}, which is no file of a checkpoint")
    for name, (size, blake2b) in files.items():
        if type(size) is not int or size < 0 or not isinstance(blake2b, str) or not _HASH.fullmatch(blake2b):
            raise ValueError(f"{NAME} gives {name} no size and hash")
