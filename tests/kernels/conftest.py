"""The process in which Triton's kernels are interpreted."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterator

import pytest

from tests.kernels.interpreted import interpret_quickly


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[concurrent.futures.Executor]:
    """A process in which kernels are interpreted, with a cache of its own: the interpreter replaces the compiler there."""
    before = {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "XDG_CACHE_HOME", "OMP_NUM_THREADS")}
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("c"))}
    executor = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), interpret_quickly)
    try:
        try:
            executor.submit(int).result()  # it has started, with these variables
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
