"""Atomic files and folders: written under a temporary name beside the target, synced, renamed.

A partial file never has its final name, neither for a concurrent reader nor after a crash or on a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import TryAgain, UserError


@contextlib.contextmanager
def explain_os_errors(what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert errors of the operating system to a `UserError` about `path`; of a full disk to a `TryAgain`.

    Args:
        what: the attempted action, such as "write".
    """
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again",
            errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
            errno.EACCES: "permission denied; make the folder writable or name another one",
            errno.EPERM: "permission denied; make the folder writable or name another one",
            errno.EROFS: "the file system is read-only; name another folder",
            errno.ENOTDIR: "a part of that path is a file, not a folder",
            errno.EEXIST: "a file of that name is in the way",
            errno.ENOENT: "there is no such file or folder",
            errno.EISDIR: "that is a folder, not a file",
        }
        if error.errno not in reasons:
            raise
        kind = TryAgain if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
        raise kind(f"cannot {what} {os.fspath(path)}: {reasons[error.errno]}") from error


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
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
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(folder)
    os.replace(temporary, path)
    sync_folder(path.parent)
