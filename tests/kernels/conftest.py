"""The process in which Triton's kernels are interpreted."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator

import pytest


def interpret_quickly() -> None:
    """Let Triton's interpreter replace what a module sees of `triton.language` once, not at each call of each function.

    It undoes that rarely, and this process only interprets; it took a third of the time of these tests.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    replace, seen = interpreter._patch_lang, set()

    def once(function: Callable) -> object:
        if function.__module__ not in seen:
            seen.add(function.__module__)
            replace(function)
        return interpreter._LangPatchScope()  # of no changes, so there are none to undo

    interpreter._patch_lang = once


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[concurrent.futures.Executor]:
    """A process in which kernels are interpreted, with a cache of its own: the interpreter replaces the compiler there."""
    before = {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "XDG_CACHE_HOME", "OMP_NUM_THREADS")}
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("c"))}
    executor = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), interpret_quickly)
    try:
        executor.submit(int).result()  # it has started, with these variables
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
