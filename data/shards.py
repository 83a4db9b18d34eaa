"""Shards: write the on-disk format (see `data/__init__.py`), check it, and read tokens across shards.

Every file is written atomically. Opening checks every size, and the digest of the index over itself. Checksums require reading
the whole set, so `open_shards` verifies them only where that takes well under a second; `python -m data.verify` always does: a
shard of a larger set that was overwritten in place shows there. `prepare.py` decides which documents go into which shard.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernels.common.errors import UserError
from kernels.common.files import atomic_write, explain_os_errors
from kernels.common.json_files import digest, is_count, read_object

FORMAT = 1  # of the folder; a folder of another format is prepared again beside it
INDEX = "index.json"
PLAN = "plan.json"  # of a preparation in parts; gone once it is complete
SPLITS: tuple[str, ...] = ("train", "held_out")
VERIFY_AT_OPEN = 256 << 20  # bytes of a set whose checksums every open verifies: a quarter of a second
_INDEX_BYTES = 1 << 30  # of the longest index that is read: of millions of shards
_SHARD_NAME = re.compile(r"(train|held_out)-[0-9]{5,9}")
_MOST = 1 << 53  # tokens, documents or bytes
OPEN_FILES = 256  # that a reader keeps open; 1024 descriptors are a common limit per process


@dataclass(frozen=True)
class Shard:
    """One shard, as the index records it."""

    name: str  # "train-00012", without .bin
    split: str  # train | held_out
    tokens: int  # with one end-of-text per document
    documents: int
    bytes: int  # of text, UTF-8
    checksum: str  # blake2b of the .bin, then the .idx
    lossy: int = 0  # held-out documents whose tokens do not decode to their text


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of tokens on disk: 2 bytes if every id fits, else 4."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_shard(
    folder: Path,
    split: str,
    number: int,
    documents: Sequence[Sequence[int] | np.ndarray],
    text_bytes: int,
    eos_id: int,
    vocab_size: int,
) -> Shard:
    """Write the tokens of documents, each followed by `eos_id`, as one shard, and return its record.

    Raises:
        UserError: the disk is full or the folder cannot be written; no file of the shard's name is left then.
    """
    name = f"{split}-{number:05d}"
    ends = np.cumsum([len(ids) + 1 for ids in documents], dtype="<i8")
    tokens = np.full(int(ends[-1]), eos_id, token_dtype(vocab_size))
    start = 0
    for ids, end in zip(documents, ends.tolist(), strict=True):
        tokens[start : end - 1] = ids
        start = end
    checksum = hashlib.blake2b(digest_size=16)
    for suffix, array in ((".bin", tokens), (".idx", ends)):
        path = folder / (name + suffix)
        checksum.update(array.data)
        with explain_os_errors("write", path), atomic_write(path, "wb") as file:
            file.write(array.data)
    return Shard(name, split, len(tokens), len(documents), text_bytes, checksum.hexdigest())


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically; UserError on a full disk or an unwritable folder."""
    with explain_os_errors("write", path), atomic_write(path) as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index of a folder that is complete, with a digest over everything in it: shards' sizes and hashes included.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    write_json(folder / INDEX, index | {"digest": digest(index, 16)})


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a complete folder. One that an earlier version wrote has no digest, and is not checked by it.

    Raises:
        UserError: there is none (the preparation has not finished), it is damaged or was changed, or of another format.
    """
    path = Path(folder) / INDEX
    try:
        index = read_object(path, _INDEX_BYTES)
    except FileNotFoundError as error:
        what = "not completely prepared" if Path(folder).is_dir() else "missing"
        raise UserError(f"{folder} is {what}; run python -m data.prepare with its data=... overrides") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and prepare the folder again") from error
    is_complete = {"vocab_size", "eos_id", "tokenizer_hash", "corpus_hash"} <= index.keys()
    if not is_complete or index.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}; delete the folder and prepare it again")
    stored = index.pop("digest", None)
    if stored is not None and stored != digest(index, 16):
        raise UserError(
            f"{path} was changed since it was written (its digest does not match); delete it and prepare the folder again"
        )
    if problem := _index_problem(index):
        raise UserError(f"{path} is damaged ({problem}); delete it and prepare the folder again")
    return index


def read_part(folder: Path) -> dict[str, Any]:
    """Read the index of a corpus that holds its shards itself, as a part of a blend must.

    Raises:
        UserError: as `read_index`, or it is a blend.
    """
    index = read_index(folder)
    if "shards" not in index:
        raise UserError(f"{folder} is a blend, so it cannot be a part of one; prepare the blend again")
    return index


def _index_problem(index: dict[str, Any]) -> str:
    """Return what is wrong with the values of an index; "" if nothing is."""
    for key in ("name", "tokenizer_hash", "corpus_hash"):
        if not isinstance(index.get(key), str):
            return f"{key} is no text"
    size, xz = index["vocab_size"], index.get("xz_bits_per_byte")
    if not _is_count(size) or not 0 < size <= 1 << 32 or not _is_count(index["eos_id"]):
        return "vocab_size or eos_id is no number of tokens"
    counts = (index.get(key, 0) for key in ("skipped", "near_duplicates"))
    if not all(map(_is_count, counts)) or not (xz is None or (isinstance(xz, (int, float)) and 0 <= xz < 1e9)):
        return "skipped, near_duplicates or xz_bits_per_byte is no number"
    groups = index.get("held_out_groups", [])
    if not isinstance(groups, list) or not all(_is_count(count) and count for count in groups):
        return "held_out_groups are no numbers of documents"
    try:
        if "parts" in index:
            return _parts_problem(index["parts"])
        for record in index["shards"]:
            shard_of(record)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return f"its list of shards or parts has no such form: {error}"
    return ""


def _parts_problem(parts: list[dict[str, Any]]) -> str:
    for part in parts:
        if not all(isinstance(part[key], str) and part[key].isprintable() for key in ("name", "folder")):
            return "a part has no name or no folder"
        if not isinstance(part["weight"], float) or not 0 < part["weight"] <= 1:
            return "the weight of a part is no fraction"
    names = {part["name"] for part in parts}
    whole = math.isclose(math.fsum(part["weight"] for part in parts), 1.0, abs_tol=1e-6)
    return "" if whole and len(names) == len(parts) else "its parts have one name, or weights that do not sum to 1"


def _is_count(value: Any) -> bool:
    return is_count(value, _MOST)


def shard_of(record: dict[str, Any]) -> Shard:
    """Return the shard that an index or a group's record describes.

    Raises:
        ValueError, TypeError: it describes none.
    """
    shard = Shard(**record)
    if not isinstance(shard.name, str) or not _SHARD_NAME.fullmatch(shard.name):
        raise ValueError("a shard has a name that none has")
    if not shard.name.startswith(f"{shard.split}-") or not isinstance(shard.checksum, str):
        raise ValueError(f"{shard.name} is of another split, or has no checksum")
    counts = shard.tokens, shard.documents, shard.bytes, shard.lossy
    if not all(map(_is_count, counts)) or not 1 <= shard.documents <= shard.tokens or shard.lossy > shard.documents:
        raise ValueError(f"{shard.name} has impossible numbers of tokens, documents or bytes")
    return shard


def shard_checksum(folder: Path, shard: Shard) -> str:
    """Return the checksum of a shard's files as they are now, in hexadecimal."""
    checksum = hashlib.blake2b(digest_size=16)
    for suffix in (".bin", ".idx"):
        with open(folder / (shard.name + suffix), "rb") as file:
            while chunk := file.read(1 << 22):
                checksum.update(chunk)
    return checksum.hexdigest()


def shard_problem(folder: Path, shard: Shard, dtype: np.dtype, checksum: bool = True) -> str | None:
    """Return what is wrong with a shard as a clause ("FILE is ..."), or None if it is intact.

    Args:
        checksum: read the files and compare their checksum; else only compare their sizes.
    """
    for suffix, size in ((".bin", shard.tokens * dtype.itemsize), (".idx", shard.documents * 8)):
        path = folder / (shard.name + suffix)
        try:
            actual = path.stat().st_size
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if actual != size:
            return f"{path} has {actual} bytes and should have {size}"
    try:
        differs = checksum and shard_checksum(folder, shard) != shard.checksum
    except OSError as error:
        return f"{folder / shard.name}.bin or .idx cannot be read ({error.strerror})"
    if differs:
        return f"{folder / shard.name}.bin or .idx differs from what was written (its checksum does not match)"
    return None


class _TokenFile:
    """The tokens of one shard. It is read, not mapped: where a mapped file has become shorter, the process is killed."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path, self._dtype, self._descriptor = path, dtype, -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot read the shard {path}: {error}") from error

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens [start, start + count): (count,).

        Raises:
            UserError: the file does not hold them any more, or cannot be read.
        """
        size = self._dtype.itemsize
        parts, place, end = [], start * size, (start + count) * size
        try:
            while place < end and (part := os.pread(self._descriptor, end - place, place)):
                parts.append(part)
                place += len(part)
        except OSError as error:
            raise UserError(f"cannot read the shard {self._path}: {error}") from error
        if place < end:
            raise UserError(
                f"the shard {self._path} was cut off at {place} bytes while it was read: restore the file, or delete "
                f"{self._path.with_name(INDEX)} and prepare it again"
            )
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), self._dtype)


class ShardSet:
    """The tokens of several shards as one sequence.

    The sequence is a ring: after its end it continues at its beginning. Its last token is an end-of-text, and so is token
    -1, the one before the first: the wrap-around is an ordinary end of a document.

    Attributes:
        tokens: length of the sequence. documents, text_bytes: what it holds. lossy_documents: held-out ones whose tokens do
            not decode to their text.
    """

    def __init__(self, shards: Sequence[tuple[Path, Shard]], dtype: np.dtype) -> None:
        """Take shards in order, each with its folder, and their common dtype. `open_shards` checks them first."""
        self.shards, self.dtype = list(shards), dtype
        self._ends = np.cumsum([shard.tokens for _, shard in self.shards], dtype=np.int64)
        self.tokens = int(self._ends[-1]) if self.shards else 0
        self.documents = sum(shard.documents for _, shard in self.shards)
        self.text_bytes = sum(shard.bytes for _, shard in self.shards)
        self.lossy_documents = sum(shard.lossy for _, shard in self.shards)
        self._file = functools.lru_cache(OPEN_FILES)(self._open)

    def _open(self, number: int) -> _TokenFile:
        folder, shard = self.shards[number]
        return _TokenFile(folder / f"{shard.name}.bin", self.dtype)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens [start, start + count) of the ring: int64, (count,). Any `start` is valid, -1 included.

        Raises:
            UserError: a shard cannot be read, or has become shorter.
        """
        if self.tokens == 0:
            raise IndexError("a set without tokens")
        out = np.empty(count, np.int64)
        filled, position = 0, start % self.tokens
        while filled < count:
            number = int(np.searchsorted(self._ends, position, side="right"))
            first = int(self._ends[number]) - self.shards[number][1].tokens
            available = min(count - filled, int(self._ends[number]) - position)
            piece = self._file(number).read(position - first, available)
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            position = (position + len(piece)) % self.tokens
        return out

    def document_ends(self) -> np.ndarray:
        """Return where the documents end in the sequence, end-of-text included: int64, (documents,)."""
        ends, filled = np.empty(self.documents, np.int64), 0
        for of_shard in self.iter_document_ends():
            ends[filled : filled + len(of_shard)] = of_shard
            filled += len(of_shard)
        return ends

    def iter_document_ends(self) -> Iterator[np.ndarray]:
        """Yield `document_ends` shard by shard, for a reader of the first few: each int64, (documents of the shard,)."""
        for (folder, shard), end in zip(self.shards, self._ends.tolist(), strict=True):
            yield np.fromfile(folder / f"{shard.name}.idx", "<i8") + end - shard.tokens

    @property
    def hash(self) -> str:
        """A hash of all tokens and of where documents end, from the checksums of the shards."""
        checksums = "".join(shard.checksum for _, shard in self.shards)
        return hashlib.blake2b(checksums.encode(), digest_size=16).hexdigest()


def open_shards(folder: Path, index: dict[str, Any], split: str) -> ShardSet:
    """Open the shards of one split.

    Raises:
        UserError: a shard is missing, has the wrong size or, in a set of up to VERIFY_AT_OPEN bytes, checksum.
    """
    folder = Path(folder)
    dtype = token_dtype(index["vocab_size"])
    shards = [shard_of(record) for record in index["shards"] if record["split"] == split]
    small = sum(shard.tokens for shard in shards) * dtype.itemsize <= VERIFY_AT_OPEN
    for shard in shards:
        if problem := shard_problem(folder, shard, dtype, checksum=small):
            raise UserError(
                f"broken shard: {problem}; delete {folder / INDEX} and prepare it again, or restore the file"
            )
    return ShardSet([(folder, shard) for shard in shards], dtype)


def write_group(folder: Path, number: int, text_hash: str, tokenizer_hash: str, shards: Sequence[Shard]) -> None:
    """Record that the shards of group `number` are complete; written after them."""
    record = {"text_hash": text_hash, "tokenizer_hash": tokenizer_hash, "shards": [asdict(shard) for shard in shards]}
    write_json(folder / f"group-{number:05d}.json", record)


def finished_group(
    folder: Path, number: int, text_hash: str, tokenizer_hash: str, dtype: np.dtype
) -> list[Shard] | None:
    """Return the shards of group `number` if an earlier preparation finished them from the same text, else None."""
    path = folder / f"group-{number:05d}.json"
    try:
        record = read_object(path)
        same = (record["text_hash"], record["tokenizer_hash"]) == (text_hash, tokenizer_hash)
        shards = [shard_of(shard) for shard in record["shards"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # not written yet, or by a version with another record: prepared again
    intact = same and not any(shard_problem(folder, shard, dtype) for shard in shards)
    return shards if intact else None


def remove_leftovers(folder: Path, keep: set[str] | None = None) -> None:
    """Remove temporary files of killed processes and, if `keep` is given, the plan, and shards and records not named in it."""
    for path in folder.iterdir():
        temporary = path.name.startswith(".") and path.suffix == ".tmp"
        named = path.suffix in (".bin", ".idx") or path.name.startswith("group-")
        if temporary or (keep is not None and (path.name == PLAN or (named and path.stem not in keep))):
            os.unlink(path)
