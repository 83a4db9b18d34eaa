"""Find the files that a path means, and read them in chunks, compressed or not.

A path is a file, a glob, a folder, or a list of them, on this machine or behind a URL (`remote.py`). `.gz`, `.zst`, `.bz2` and
`.xz` are unpacked on the way. Every refusal is one sentence that names the file. Parsing their content is in `documents.py`.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import itertools
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conf.urls import entries_of, is_url
from data.packages import need
from data.remote import RemoteFile, find_remote
from kernels.common.errors import UserError, suggest

File = Path | RemoteFile

CHUNK = 1 << 20  # bytes read at once
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}  # in capitals too
LARGEST_WINDOW = 1 << 31  # bytes: what `zstd --long=31` asks for; the library's own limit is 128 MiB
SLICE = 1 << 14  # bytes of zstd data unpacked at once: each frame that ends in a slice copies the rest of it
BOM = b"\xef\xbb\xbf"  # byte-order mark of UTF-8, no part of the text
# How files begin that are no text, and what to do about them.
BINARY = (
    (b"\x1f\x8b", "gzip data: give its name the ending .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data: give its name the ending .zst"),
    (b"BZh", "bzip2 data: give its name the ending .bz2"),
    (b"\xfd7zXZ\x00", "xz data: give its name the ending .xz"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"PAR1", "a parquet file: read it with data=parquet"),
    (b"\xff\xfe", "UTF-16: convert it (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16: convert it (iconv -f UTF-16 -t UTF-8)"),
)


def find_files(paths: Any, suffixes: tuple[str, ...] | None) -> list[File]:
    """List the files that `paths` means: sorted within a folder or glob, each file once.

    Args:
        paths: a file, a glob (`**` descends), a folder (searched to the bottom, links followed, hidden names left out), the
            URL of any of these, or a list of them. Pipes, sockets and devices are left out of globs and folders.
        suffixes: what a folder is searched for, before `.gz` and the like; None: every file.

    Raises:
        UserError: one of them means no file, or no regular one, or a folder cannot be read.
    """
    kinds = "files" if suffixes is None else " or ".join(suffixes) + " files"
    found: dict[str, File] = {}  # by the file that a path leads to
    for entry in entries_of(paths):
        if is_url(entry):
            for file in find_remote(entry, lambda name: _wanted(name, suffixes), kinds):
                found.setdefault(file.url, file)
        else:
            for path in _find_local(entry, suffixes, kinds):
                found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _find_local(entry: str, suffixes: tuple[str, ...] | None, kinds: str) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_dir():
        files = list(_walk(path, suffixes))
        if not files:
            raise UserError(f"the folder {path} holds no {kinds}")
        return files
    if path.exists():
        if is_special(path):
            raise UserError(f"{path} is a pipe, socket or device, and text is read several times: write it into a file")
        return [path]
    if glob.has_magic(entry):
        files = sorted({Path(name) for name in _matches(path.parts) if os.path.isfile(name)})
        if not files:
            raise UserError(f"no file matches {entry}")
        return files
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    near = suggest(path.name, siblings).strip()
    raise UserError(f"there is no file or folder {path}" + (f": {near}" if near else ""))


def _wanted(name: str, suffixes: tuple[str, ...] | None) -> bool:
    """Return whether a file of a folder is read, by its name."""
    plain = Path(name)
    plain = plain.with_suffix("") if plain.suffix.lower() in PACKED else plain
    return not name.startswith(".") and (suffixes is None or plain.suffix.lower() in suffixes)


def is_special(path: Path) -> bool:
    """Return whether a path leads to a pipe, a socket or a device: opening a pipe may wait for a writer for ever."""
    try:
        mode = path.stat().st_mode
    except OSError:  # whoever opens it says why it cannot be read
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _walk(folder: Path, suffixes: tuple[str, ...] | None) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for where, names in _folders(folder, refuse):
        for name in names:
            path = Path(where, name)
            if _wanted(name, suffixes) and not is_special(path):
                yield path


def _folders(folder: str | Path, refuse: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and those below it, links followed, each real one once and hidden ones not: its path, and names of files.

    Args:
        refuse: called with the error of a folder that cannot be read; None: it is left out.
    """
    seen: set[tuple[int, int]] = set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in seen:  # reached before, by another link
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield where, sorted(names)


def _matches(parts: tuple[str, ...]) -> Iterator[str]:
    """Yield the paths that match a glob, given in its parts; `**` descends into each real folder once.

    The library's own `**` follows a link to a folder above it as often as a path may have links, and two of them in all orders.
    """
    if "**" not in parts:
        yield from glob.iglob(os.path.join(*parts))
        return
    at = parts.index("**")
    rest = tuple(itertools.dropwhile(lambda part: part == "**", parts[at:])) or ("*",)
    for start in glob.iglob(os.path.join(*parts[:at])) if at else ["."]:
        for folder, _ in _folders(start):
            yield from _matches((glob.escape(folder), *rest))


def stamp(path: File) -> list[Any]:
    """Return what changes when a file is written: absolute path, size in bytes, modification time in ns.

    Of a remote one: URL, size in bytes or None, and what its store says of its content.
    """
    if isinstance(path, RemoteFile):
        return path.stamp()
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def open_file(path: File) -> Any:
    """Open a file to read its bytes from end to end."""
    return path.open() if isinstance(path, RemoteFile) else open(path, "rb")


def content_hash(path: Path, whole: bool) -> str:
    """Return a hash of a file's bytes: of all of them, or of its first and last CHUNK."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            if whole:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
            else:
                digest.update(file.read(CHUNK))
                file.seek(max(0, path.stat().st_size - CHUNK))
                digest.update(file.read(CHUNK))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def read_chunks(path: File) -> Iterator[tuple[bytes, int]]:
    """Yield the unpacked content of a file in chunks, each with the count of bytes read from the file itself so far.

    Raises:
        UserError: the file cannot be read, is a tar archive, or its compressed data is damaged or truncated.
    """
    kind = PACKED.get(path.suffix.lower(), "")
    first = True
    try:
        with open_file(path) as raw:
            for chunk in _unpack(raw, path, kind):
                if first and chunk[257:262] == b"ustar":
                    raise UserError(f"{path} is a tar archive: unpack it, and set data.path to the folder")
                first = False
                yield chunk, raw.tell()
    except EOFError as error:
        raise UserError(f"{path} is truncated: its {kind} data ends early") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is not a valid {kind} file: {error}") from error
    except OSError as error:
        if kind and error.errno is None:  # of the unpacker
            raise UserError(f"{path} is not a valid {kind} file: {error}") from error
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _unpack(raw: Any, path: File, kind: str) -> Iterator[bytes]:
    if kind == "zstd":
        yield from _unpack_zst(raw, path)
        return
    if kind == "gzip":
        raw = gzip.GzipFile(fileobj=raw)
    elif kind == "bzip2":
        raw = bz2.BZ2File(raw)
    elif kind == "xz":
        raw = lzma.LZMAFile(raw)
    while chunk := raw.read(CHUNK):
        yield chunk


def _unpack_zst(raw: Any, path: File) -> Iterator[bytes]:
    # Frame by frame: a stream reader takes a truncated file for a complete one.
    zstandard = need("zstandard", f"reading {path}")
    unpacker = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    frame = None
    try:
        while chunk := raw.read(SLICE):
            while chunk:
                frame = frame or unpacker.decompressobj()
                if unpacked := frame.decompress(chunk):
                    yield unpacked
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is not a valid zstd file: {error}") from error
    if frame is not None:
        raise EOFError


def read_lines(path: File) -> Iterator[tuple[bytes, int]]:
    """Yield the lines of a file, without line feeds, each with the count of bytes read from the file so far."""
    begun: list[bytes] = []  # of a line that no chunk has ended yet
    read = 0
    for chunk, read in read_chunks(path):
        lines = chunk.split(b"\n")
        if len(lines) > 1:
            lines[0] = b"".join([*begun, lines[0]])
            begun.clear()
        begun.append(lines.pop())
        for line in lines:
            yield line, read
    if rest := b"".join(begun):
        yield rest, read


def not_utf8(path: File, error: UnicodeDecodeError, before: int = 0) -> UserError:
    """Build the error for bytes that are no UTF-8; `before` is the offset at which the decoded stretch starts."""
    where = before + error.start
    content = "unpacked content" if path.suffix.lower() in PACKED else "file"
    kinds = [kind for magic, kind in BINARY if before == 0 and error.object.startswith(magic)]
    advice = f"it looks like {kinds[0]}" if kinds else "convert it (iconv -t UTF-8) or leave it out"
    return UserError(
        f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {where} of the {content}; {advice}"
    )
