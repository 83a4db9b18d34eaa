"""Find the files that a path means, and read them in chunks, compressed or not.

A path is a file, a glob, a folder, or a list of them. `.gz` and `.zst` are unpacked on the way. Every refusal is one
sentence that names the file. Parsing their content is in `documents.py`.
"""

from __future__ import annotations

import glob
import gzip
import importlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from kernels.common.errors import UserError, suggest

CHUNK = 1 << 20  # bytes read at once
PACKED = (".gz", ".zst")


def need(package: str, why: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.partition(".")[0]
        raise UserError(f"{why} needs the package {top}: pip install {top}") from error


def find_files(paths: Any, suffixes: tuple[str, ...] | None) -> list[Path]:
    """List the files that `paths` means: sorted within a folder or glob, each file once.

    Args:
        paths: a file, a glob (`**` descends), a folder (searched to the bottom, hidden names left out), or a list of
            them.
        suffixes: what a folder is searched for, before `.gz` and `.zst`; None: every file.

    Raises:
        UserError: one of them means no file.
    """
    entries = [str(entry) for entry in (paths if isinstance(paths, (list, tuple)) else [paths])]
    found: dict[Path, None] = {}
    for entry in entries:
        path = Path(entry).expanduser()
        if path.is_dir():
            files = list(_walk(path, suffixes))
            if not files:
                kinds = "files" if suffixes is None else " or ".join(suffixes) + " files"
                raise UserError(f"the folder {path} holds no {kinds}")
        elif path.exists():
            files = [path]
        elif glob.has_magic(entry):
            files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
            if not files:
                raise UserError(f"no file matches {entry}")
        else:
            siblings = os.listdir(path.parent) if path.parent.is_dir() else []
            near = suggest(path.name, siblings).strip()
            raise UserError(f"there is no file or folder {path}" + (f": {near}" if near else ""))
        found.update(dict.fromkeys(files))
    return list(found)


def _walk(folder: Path, suffixes: tuple[str, ...] | None) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            plain = Path(name)
            plain = plain.with_suffix("") if plain.suffix in PACKED else plain
            if not name.startswith(".") and (suffixes is None or plain.suffix.lower() in suffixes):
                yield Path(where, name)


def stamp(path: Path) -> list[Any]:
    """Return what identifies a file without reading it: absolute path, size in bytes, modification time in ns."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def read_chunks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the unpacked content of a file in chunks, each with the count of bytes read from the file itself so far.

    Raises:
        UserError: the file cannot be read, or its compressed data is damaged or truncated.
    """
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    while chunk := unpacked.read(CHUNK):
                        yield chunk, raw.tell()
            elif path.suffix == ".zst":
                for chunk in _unpack_zst(raw, path):
                    yield chunk, raw.tell()
            else:
                while chunk := raw.read(CHUNK):
                    yield chunk, raw.tell()
    except EOFError as error:
        raise UserError(f"{path} is truncated: its gzip data ends early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a valid gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _unpack_zst(raw: Any, path: Path) -> Iterator[bytes]:
    # Frame by frame: a stream reader takes a truncated file for a complete one.
    zstandard = need("zstandard", f"reading {path}")
    unpacker = zstandard.ZstdDecompressor()
    frame = None
    try:
        while chunk := raw.read(CHUNK):
            while chunk:
                frame = frame or unpacker.decompressobj()
                if unpacked := frame.decompress(chunk):
                    yield unpacked
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is not a valid zstd file: {error}") from error
    if frame is not None:
        raise UserError(f"{path} is truncated: its zstd data ends early")


def read_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the lines of a file, without line feeds, each with the count of bytes read from the file so far."""
    rest, read = b"", 0
    for chunk, read in read_chunks(path):
        lines = (rest + chunk).split(b"\n") if b"\n" in chunk else [rest + chunk]
        rest = lines.pop()
        for line in lines:
            yield line, read
    if rest:
        yield rest, read


def not_utf8(path: Path, error: UnicodeDecodeError, before: int = 0) -> UserError:
    """Build the error for bytes that are no UTF-8; `before` is the offset at which the decoded stretch starts."""
    where = before + error.start
    content = "unpacked content" if path.suffix in PACKED else "file"
    hint = "; it looks like UTF-16" if before == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    return UserError(
        f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {where} of the {content}{hint}; "
        f"convert it (iconv -t UTF-8) or leave it out"
    )
