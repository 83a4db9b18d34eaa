"""Readers of text: one per source, each an iterator of documents in an order that never changes.

This module also has the fingerprint of a corpus and the parts of a blend. Finding and unpacking files is in `files.py`;
`prepare.py` turns documents into shards.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from conf.load import typed
from conf.schema import DataConfig
from conf.urls import entries_of, is_url
from data.files import BOM, PACKED, File, content_hash, find_files, not_utf8, read_chunks, read_lines, stamp
from data.packages import need
from data.remote import RemoteFile
from kernels.common.errors import UserError, unknown

SOURCES = ("stdlib", "installed", "text", "jsonl", "parquet", "hf", "blend")
SUFFIXES = {"text": None, "jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet", ".pq")}
PYTHON = ("stdlib", "installed")  # sources that are no files of the user's
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
GENERATED = ("__editable__", "_virtualenv")  # by installers, with the paths of this machine
# A text file is one document up to WHOLE bytes. A longer one is split at line ends into documents of about SPLIT bytes:
# memory stays bounded, and a fraction of a corpus that is one large file can be held out.
WHOLE = 256 << 10
SPLIT = 64 << 10
# A corpus of a single document is cut at line ends into about PIECES, so that a fraction of it can be held out; or into so many
# times the documents that are to be held out.
PIECES = 32
PIECES_PER_FILE = 8
SHORTEST = 64  # characters of such a piece
_BATCH = 256  # rows that are read at once
HASHED = 256 << 20  # bytes of a corpus whose files are hashed whole to recognise it: a quarter of a second


class Document(NamedTuple):
    """One document."""

    name: str  # where it comes from: file, file:line, file row, ...
    text: str  # not empty, valid Unicode
    fraction: float  # of the source read up to its end, 0 to 1, for a progress bar
    group: str = ""  # the folder or package that it belongs to; "" where a source has none
    file: int = 0  # number of its file among those of the source; of hf: of its batch of rows


def documents(config: DataConfig, skipped: Callable[[], None] | None = None, first_file: int = 0) -> Iterator[Document]:
    """Iterate over the documents of a source (not of a blend: see `parts`); empty ones are left out.

    A single document is cut into several if a fraction of them is to be held out.

    Args:
        skipped: called for every record whose text is null or empty.
        first_file: begin with the documents of this file (`Document.file`); those before it are not opened.

    Raises:
        UserError: a file is missing, empty, unreadable, damaged, not UTF-8 (with the byte offset), or has not the
            field; or there is no text at all.
    """
    readers = {"stdlib": _python, "installed": _python, "text": _text, "jsonl": _jsonl, "parquet": _parquet, "hf": _hf}
    if config.source not in readers:
        raise unknown("data source", config.source, readers)
    found = _not_empty(readers[config.source](config, first_file), skipped)
    if first_file:  # of a corpus of several documents: pieces of a single one are all of file 0
        yield from found
        return
    first = next(found, None)
    if first is None:
        raise UserError(f"there is no text in data={config.name}" + (f" ({config.path})" if config.path else ""))
    second = next(found, None)
    if second is None:
        pieces = PIECES_PER_FILE * config.held_out_files or PIECES
        yield from _cut(first, pieces) if config.held_out else [first]
        return
    yield first
    yield second
    del first, second  # they may be large
    yield from found


def _not_empty(found: Iterator[Document], skipped: Callable[[], None] | None) -> Iterator[Document]:
    for document in found:
        if document.text:
            yield document
        elif skipped is not None:
            skipped()


def _cut(document: Document, pieces: int) -> Iterator[Document]:
    """Cut a document after line ends, or within a line that is much longer than a piece."""
    text, start = document.text, 0
    size = max(SHORTEST, min(SPLIT, len(text) // pieces))
    while start < len(text):
        end = text.find("\n", start + size - 1, start + 8 * size) + 1 or start + size
        yield Document(f"{document.name} at character {start}", text[start:end], document.fraction, document.group)
        start = end


def fingerprint(config: DataConfig) -> str:
    """Return what identifies a corpus wherever it lies: equal when its documents are, without reading large files.

    stdlib, installed: a hash of the content. Files: a hash of the content up to HASHED bytes in all; beyond, of both ends of
    each, with its size and time of change. Remote files: `RemoteFile.stamp`, URL included. hf: names, and the data set's own
    fingerprint. Where folders are held out, also the folder that each file belongs to.
    Raises UserError as `documents` does for what is missing.
    """
    return _identity(config, _identities)


def stamps(config: DataConfig) -> str:
    """Return what changes when a file of a corpus is written or moved; else like `fingerprint`, and cheaper."""
    return _identity(config, lambda files: [stamp(path) for path in files])


def _identities(files: list[File]) -> list[Any]:
    known = [stamp(file) for file in files]
    local = [(file, mark) for file, mark in zip(files, known, strict=True) if isinstance(file, Path)]
    whole = sum(size for _, (_, size, _) in local) <= HASHED
    hashes = {file: content_hash(file, whole) for file, _ in local}
    return [
        mark if isinstance(file, RemoteFile) else hashes[file] if whole else [*mark[1:], hashes[file]]
        for file, mark in zip(files, known, strict=True)
    ]


def _identity(config: DataConfig, identify: Callable[[list[File]], list[Any]]) -> str:
    if config.source == "blend":
        known: Any = {name: [weight, _identity(part, identify)] for name, (weight, part) in parts(config).items()}
    elif config.source in PYTHON:
        digest = hashlib.blake2b(digest_size=16)
        for name, path in _python_files(config.source):
            raw = path.read_bytes()
            digest.update(f"{name}\0{len(raw)}\0".encode() + raw)
        known = digest.hexdigest()
    elif config.source == "hf":
        known = [str(config.path).rstrip("/"), config.subset, config.split, config.field, _load_hf(config)._fingerprint]
    elif config.source in SUFFIXES:
        files = _files(config)
        known = [config.field if config.source != "text" else None, *identify(files)]
        if config.held_out and config.held_out_by == "folder":  # the names of folders decide what is held out
            known.append([_group_of(file, config) for file in files])
    else:
        raise unknown("data source", config.source, SOURCES)
    return json.dumps([config.source, known], sort_keys=True)


def most_bytes(config: DataConfig) -> int | None:
    """Return how many bytes of text a source has at most, by the sizes of its files; None where these do not say it.

    Raises:
        UserError: as `documents` does for what is missing.
    """
    if config.source in PYTHON:
        return sum(path.stat().st_size for _, path in _python_files(config.source))
    if config.source not in ("text", "jsonl"):
        return None
    files = _files(config)
    sizes = [stamp(path)[1] for path in files]
    return None if None in sizes or any(path.suffix.lower() in PACKED for path in files) else sum(sizes)


def parts(config: DataConfig) -> dict[str, tuple[float, DataConfig]]:
    """Return the parts of a blend: their fraction of the samples (fractions sum to 1) and their own configuration.

    A part's source is its key `source`, or its name where that is a source; keys that it does not set are the blend's.

    Raises:
        UserError: no parts, an unknown key or source, a weight that is no positive number.
    """
    if not isinstance(config.parts, dict) or not config.parts:
        raise UserError(
            "data=blend needs its parts: data.parts.NAME.weight=W data.parts.NAME.path=PATH for each of them"
        )
    allowed = {f.name for f in fields(DataConfig)} - {"parts", "name", "prepared", "workers", "max_epochs"}
    found = {}
    for name, values in config.parts.items():
        if not isinstance(values, dict):
            raise UserError(f"data.parts.{name} must hold keys such as weight, source and path, not {values!r}")
        values = dict(values)
        weight = values.pop("weight", 1.0)
        good = (
            isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight) and weight > 0
        )
        if not good:
            raise UserError(f"data.parts.{name}.weight must be a positive number, not {weight!r}")
        for wrong in sorted(set(values) - allowed):
            raise unknown(f"key of data.parts.{name}", wrong, allowed | {"weight"})
        source = str(values.pop("source", name))
        if source not in SOURCES or source == "blend":
            raise unknown(
                f"source of the part {name!r} (set data.parts.{name}.source)", source, set(SOURCES) - {"blend"}
            )
        base = replace(config, name=str(name), source=source, path=None, parts={})
        found[str(name)] = (float(weight), replace(base, **typed(DataConfig, values, f"data.parts.{name}")))
    total = sum(weight for weight, _ in found.values())
    return {name: (weight / total, part) for name, (weight, part) in found.items()}


def _files(config: DataConfig) -> list[File]:
    if not config.path or config.path == "???":
        raise UserError(f"data={config.name} needs data.path: a file, a glob, a folder, or a list of them")
    return find_files(config.path, SUFFIXES[config.source])


class _Sized(NamedTuple):
    """A file of a corpus."""

    number: int  # of the file, from 0
    path: File
    size: int  # bytes, at least 1
    before: float  # fraction of the corpus before it
    own: float  # and in it
    group: str


def _sized(config: DataConfig, first: int) -> Iterator[_Sized]:
    """Yield every file from number `first` on."""
    files = _files(config)
    sizes = [stamp(path)[1] for path in files]
    total, before = max(1, sum(size or 0 for size in sizes)), 0
    named = set(entries_of(config.path))
    for number, (path, size) in enumerate(zip(files, sizes, strict=True)):
        # A text file in a folder may well be empty (an __init__.py); not one that was named or should hold records.
        if size == 0 and (config.source != "text" or str(path) in named):
            raise UserError(f"{path} is empty")
        size = size or 0  # a server may not say it
        if number >= first:
            yield _Sized(number, path, max(1, size), before / total, size / total, _group_of(path, config))
        before += size


def _python_files(source: str) -> list[tuple[str, Path]]:
    """Return the sources of the standard library, and of the packages beside it if asked for: (name, path), by name."""
    places = ["stdlib"] if source == "stdlib" else ["stdlib", "purelib", "platlib"]
    roots = dict.fromkeys(Path(sysconfig.get_path(place)).resolve() for place in places)
    found: dict[str, Path] = {}
    for root in roots:
        for where, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
            for name in names:
                path = Path(where, name)
                inside = not path.is_symlink() or path.resolve().is_relative_to(root)
                if name.endswith(".py") and not name.startswith(GENERATED) and inside and path.is_file():
                    found.setdefault(path.relative_to(root).as_posix(), path)
    if not found:
        raise UserError(
            f"this Python has no library sources in {next(iter(roots))}; choose another corpus, such as data=text"
        )
    return sorted(found.items())


def _python(config: DataConfig, first: int) -> Iterator[Document]:
    files = _python_files(config.source)
    for i, (name, path) in enumerate(files[first:], start=first):
        try:
            text = path.read_bytes().removeprefix(BOM).decode("utf-8")
        except UnicodeDecodeError:
            continue  # only tests of codecs are not UTF-8, and the default corpus must not stop a run
        if text:
            yield Document(name, text, (i + 1) / len(files), name.partition("/")[0], i)


def _group_of(path: File, config: DataConfig) -> str:
    """Return the folder that a file belongs to: the first one below the entry of data.path that it was found by, or itself."""
    if isinstance(path, RemoteFile):
        return path.group
    for entry in entries_of(config.path):
        parts = Path(entry).expanduser().parts
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
        if path != fixed and path.is_relative_to(fixed):
            return path.relative_to(fixed).parts[0]
    return path.name


def _text(config: DataConfig, first: int) -> Iterator[Document]:
    for i, path, size, before, own, group in _sized(config, first):
        buffer, offset, splitting = b"", 0, False
        for chunk, read in read_chunks(path):
            buffer += chunk
            splitting = splitting or len(buffer) > WHOLE
            while splitting and len(buffer) > 2 * SPLIT:
                end = _line_end(buffer)
                fraction = before + own * read / size
                yield Document(f"{path} at byte {offset}", _decode(path, buffer[:end], offset), fraction, group, i)
                buffer, offset = buffer[end:], offset + end
        if buffer:
            name = f"{path} at byte {offset}" if offset else str(path)
            yield Document(name, _decode(path, buffer, offset), before + own, group, i)


def _line_end(buffer: bytes) -> int:
    """Return where to split: after the last line feed of the first SPLIT bytes, or else between two characters."""
    end = buffer.rfind(b"\n", 0, SPLIT) + 1
    if end == 0:
        end = SPLIT
        while end > SPLIT - 4 and buffer[end] & 0xC0 == 0x80:  # 10xxxxxx continues a character
            end -= 1
    return end


def _decode(path: File, raw: bytes, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error, offset) from error
    return text if offset else text.removeprefix("\ufeff")  # a byte-order mark


def _jsonl(config: DataConfig, first: int) -> Iterator[Document]:
    for i, path, size, before, own, group in _sized(config, first):
        offset = 0
        for number, (line, read) in enumerate(read_lines(path), start=1):
            text = _decode(path, line, offset)
            offset += len(line) + 1
            if not text.strip():
                continue
            record = _record(text, f"{path} line {number}")
            if config.field not in record:
                raise _no_field(config.field, f"{path} line {number}", record)
            value = _text_of(record[config.field], config.field, f"{path} line {number}")
            if "\\u" in text:  # only an escape can put half of a surrogate pair into a string
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError as error:
                    half = f"\\u{ord(value[error.start]):04x}"
                    raise UserError(f"{path} line {number} holds half of a surrogate pair ({half}), no text") from error
            yield Document(f"{path} line {number}", value, before + own * read / size, group, i)


def _record(line: str, where: str) -> dict[str, Any]:
    """Parse a line of JSON."""
    try:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number of more digits than Python converts; only the text matters
            record = json.loads(line, parse_int=lambda _: 0)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON: {error.msg} at column {error.colno}; data=jsonl takes one JSON object per line"
        ) from error
    except RecursionError:
        raise UserError(
            f"{where} nests brackets too deeply to be read; a record has a few levels: leave this line out"
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f"{where} is a JSON {type(record).__name__}, not an object with fields; data=jsonl takes one JSON object per line"
        )
    return record


def _text_of(value: Any, field: str, where: str) -> str:
    """Return the text of a record's field; null is no text, as an empty one."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: the field {field!r} holds {type(value).__name__}, not text")
    return value or ""


def _no_field(name: str, where: str, available: Any) -> UserError:
    listed = ", ".join(map(str, available)) or "none"
    return UserError(f"{where} has no field {name!r}; its fields are {listed}: set data.field")


def _parquet(config: DataConfig, first: int) -> Iterator[Document]:
    pyarrow = need("pyarrow", "data=parquet")
    parquet = need("pyarrow.parquet", "data=parquet")
    for i, path, _, before, own, group in _sized(config, first):
        row = 0
        # Of a remote file only the footer and the column are asked for.
        remote = path.open(ranges=True) if isinstance(path, RemoteFile) else None
        try:
            with remote or contextlib.nullcontext(), parquet.ParquetFile(remote or path) as file:
                if config.field not in file.schema_arrow.names:
                    raise _no_field(config.field, str(path), file.schema_arrow.names)
                total = max(1, file.metadata.num_rows)
                for batch in file.iter_batches(batch_size=_BATCH, columns=[config.field]):
                    for value in batch.column(0):
                        row += 1
                        text = _text_of(value.as_py(), config.field, f"{path} row {row}")
                        yield Document(f"{path} row {row}", text, before + own * row / total, group, i)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} row {row} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start} of it"
            ) from error
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"cannot read {path} as parquet: {reason}") from error


def _load_hf(config: DataConfig) -> Any:
    """Load the data set: one saved with `save_to_disk`, or anything that `datasets.load_dataset` takes."""
    datasets = need("datasets", "data=hf")
    if not config.path or config.path == "???":
        raise UserError(f"data={config.name} needs data.path: the name of a data set, or a folder that holds one")
    if is_url(config.path):
        raise UserError(
            "data=hf takes the name of a data set, or a folder; the files behind a URL are read by data=parquet, jsonl or text"
        )
    datasets.disable_progress_bars()
    folder = Path(str(config.path)).expanduser()
    try:
        if any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(folder))
            if hasattr(loaded, "keys"):
                if config.split not in loaded:
                    raise UserError(
                        f"{folder} has no split {config.split!r}; it has {', '.join(loaded)}: set data.split"
                    )
                loaded = loaded[config.split]
        else:
            loaded = datasets.load_dataset(
                str(folder) if folder.exists() else config.path, config.subset, split=config.split
            )
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen kinds of exceptions for a mistyped name
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the data set {config.path} (split {config.split}): {reason}") from error
    if config.field not in loaded.column_names:
        raise _no_field(config.field, f"the data set {config.path}", loaded.column_names)
    return loaded


def _hf(config: DataConfig, first: int) -> Iterator[Document]:
    rows = _load_hf(config).select_columns([config.field]).with_format(None)
    number = min(first * _BATCH, len(rows))
    left = rows.select(range(number, len(rows))) if number else rows
    for batch in left.iter(batch_size=_BATCH):
        file = number // _BATCH
        for text in batch[config.field]:
            number += 1
            name = f"{config.path} row {number}"
            yield Document(name, _text_of(text, config.field, name), number / len(rows), file=file)
