"""Atomic files and folders: written under a temporary name beside the target, synced, renamed.

A partial file never has its final name, neither for a concurrent reader nor after a crash or on a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import ExitStatus, TryAgain, UserError

# What is wrong with a disk, and what to do about it before the same command can succeed.
_DISK = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space"),
    errno.EIO: ("the disk reports an error", "check the disk (dmesg has its errors)"),
    errno.ESTALE: ("the file server has lost it", "check the mount"),
}
_READ_ONLY = "the file system is read-only"
_REFUSALS = {
    errno.EACCES: "permission denied; make the folder writable or name another one",
    errno.EPERM: "permission denied; make the folder writable or name another one",
    errno.EROFS: f"{_READ_ONLY}; name another folder",
    errno.ENOTDIR: "a part of that path is a file, not a folder",
    errno.EEXIST: "a file of that name is in the way",
    errno.ENOENT: "there is no such file or folder",
    errno.EISDIR: "that is a folder, not a file",
}


@contextlib.contextmanager
def explain_os_errors(what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert errors of the operating system to a `UserError` about `path`; of a disk that is full or fails to a `TryAgain`.

    Args:
        what: the attempted action, such as "write".
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK:
            cause, remedy = _DISK[error.errno]
            raise TryAgain(
                f"cannot {what} {os.fspath(path)}: {cause}; {remedy} and run the same command again"
            ) from error
        if error.errno not in _REFUSALS:
            raise
        raise UserError(f"cannot {what} {os.fspath(path)}: {_REFUSALS[error.errno]}") from error


def is_of_disk(error: BaseException) -> bool:
    """Return whether a disk is the cause of an exception: it is full, fails, or is read-only."""
    return isinstance(error, OSError) and (error.errno in _DISK or error.errno == errno.EROFS)


def status_of(error: OSError) -> ExitStatus:
    """Return the exit status for an error: to try again where a disk may have space again, or be mended, else failed."""
    return ExitStatus.TRY_AGAIN if error.errno in _DISK else ExitStatus.FAILED


def problem_of(error: OSError, path: str | os.PathLike[str] = "") -> str:
    """Return which path an error is about, what is wrong there, and what to do: "PATH: the disk is full; free some space".

    Args:
        path: what to name where the error names nothing.
    """
    if error.errno in _DISK:
        reason = "; ".join(_DISK[error.errno])
    else:
        reason = f"{_READ_ONLY}; make it writable" if error.errno == errno.EROFS else error.strerror or str(error)
    name = error.filename if error.filename is not None else path
    name = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else ""
    return f"{name}: {reason}" if name else reason


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let errors of reads, writes and syncs name `path`: the operating system names no file there."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def sync(path: str | os.PathLike[str]) -> None:
    """Make what a file holds, or the renames inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success sync it and rename it to `path`, on failure remove it.

    Args:
        path: the final name. Its folder must exist.
        mode: "w" for UTF-8 text, "wb" for bytes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def make_folder_of(path: str | os.PathLike[str]) -> None:
    """Make the folder of a file that is written later: what takes minutes should not end for want of it.

    Raises:
        UserError: it cannot be made, or `path` is a folder itself.
    """
    if Path(path).is_dir():
        raise UserError(f"{os.fspath(path)} is a folder: name a file in it")
    with explain_os_errors("write", path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def print_and_write(lines: Iterable[str], path: str | os.PathLike[str]) -> None:
    """Print lines as they come, then write them to a file."""
    kept = []
    for line in lines:
        print(line, flush=True)
        kept.append(line)
    with atomic_write(path) as file:
        file.write("\n".join(kept) + "\n")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success sync its files and rename it, on failure remove it.

    Raises:
        FileExistsError: `path` exists; nothing has been written.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Sync every file below the folder `temporary` and rename it to `path`, which must not exist."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)
    os.replace(temporary, path)
    sync(path.parent)
