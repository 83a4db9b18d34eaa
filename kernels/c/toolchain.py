"""Compile C source with the machine's compiler and load the library, through a cache on disk.

The key of the cache is a hash of source, compiler, flags and CPU. A damaged library is rebuilt; processes that need the same
one build it once. Where the cache is not writable, or its disk is full or fails, a temporary folder replaces it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ..common.cache import folder as _cache
from ..common.cache import temporary_folder
from ..common.files import is_of_disk

FLAGS = ("-O2", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-x", "c", "-std=gnu11")
_OF_DISK = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)))


def build(text: str) -> ctypes.CDLL:
    """Return the loaded library of a C source, compiled unless it is in the cache.

    Raises:
        OSError: there is no compiler, or it failed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (cc, gcc or clang)")
    identity = "\n".join((text, compiler, _version(compiler), _cpu(), *FLAGS))
    name = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    try:
        return _build_in(_cache(), name, compiler, text)
    except OSError as error:
        # What the compiler says of a disk is a text.
        if not is_of_disk(error) and not any(reason in str(error) for reason in _OF_DISK):
            raise
        return _build_in(temporary_folder(), name, compiler, text)


def _build_in(folder: Path, name: str, compiler: str, text: str) -> ctypes.CDLL:
    path = folder / f"{name}.so"
    with _locked(folder / f"{name}.lock"):
        if not _intact(path):
            _compile(compiler, text, path)
    return ctypes.CDLL(str(path))


def find_compiler() -> str | None:
    """Return the path of the C compiler, the first that exists of `CC`, cc, gcc and clang; None without one."""
    return shutil.which(os.environ.get("CC", "")) or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def triton_problem() -> str:
    """Return why Triton could not compile the C launchers of its kernels, and the remedy; "" if nothing is missing.

    It needs a C compiler and Python.h, and looks for them at the first launch of each kernel.
    """
    if find_compiler() is None:
        return "there is no C compiler (apt install gcc, or module load gcc, or set CC)"
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    if not Path(paths["include"], "Python.h").exists():
        version = ".".join(platform.python_version_tuple()[:2])
        return f"{paths['include']} has no Python.h (apt install python{version}-dev)"
    return ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        yield


def _intact(path: Path) -> bool:
    """Whether a library matches its checksum: loading a truncated one can crash the process."""
    with contextlib.suppress(OSError):
        return path.with_suffix(".sum").read_text(encoding="utf-8") == _sum(path)
    return False


def _sum(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _compile(compiler: str, text: str, path: Path) -> None:
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, *FLAGS, "-", "-o", str(partial), "-lm"]
    try:
        with_openmp = [compiler, "-fopenmp", *command[1:]]
        done = subprocess.run(with_openmp, input=text, capture_output=True, text=True)
        if done.returncode:  # without OpenMP, kernels run on one thread
            done = subprocess.run(command, input=text, capture_output=True, text=True)
        if done.returncode:
            errors = done.stderr.strip().splitlines() or ["no message"]
            of_disk = (line for line in errors if any(reason in line for reason in _OF_DISK))
            raise OSError(f"{compiler} failed: {next(of_disk, errors[0])}")
        checksum = path.with_suffix(".sum")
        checksum.unlink(missing_ok=True)
        os.replace(partial, path)
        checksum.write_text(_sum(path), encoding="utf-8")
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@functools.lru_cache(maxsize=4)
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return done.stdout


@functools.lru_cache(maxsize=1)
def _cpu() -> str:
    """Return the CPU features that `-march=native` depends on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    return platform.machine() + platform.processor()
