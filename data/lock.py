"""The lock of a folder that is being prepared: a whole preparation excludes all others, and parts of one exclude only it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from data.progress import ProgressReporter
from kernels.common.errors import UserError
from kernels.common.files import explain_os_errors


@contextlib.contextmanager
def locked(folder: Path, progress: ProgressReporter, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing; wait for the processes that exclude this one.

    The kernel releases it with its process, however that ends.

    Args:
        shared: others may hold it as well, if they share it too.

    Raises:
        UserError: the folder or the lock's file cannot be written, or the file system has no locks.
    """
    with explain_os_errors("create the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            with explain_os_errors("lock", path):
                # Over NFS an exclusive lock needs a file that is open for writing, and a shared one for reading.
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                held.callback(os.close, descriptor)
                _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, folder, progress)
        except OSError as error:
            raise UserError(
                f"cannot lock {path} ({error.strerror}); set data.prepared to a folder on another file system"
            ) from error
        yield


def _lock(descriptor: int, mode: int, folder: Path, progress: ProgressReporter) -> None:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        progress.print(f"waiting for the process that prepares {folder}")
        fcntl.flock(descriptor, mode)
