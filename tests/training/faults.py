"""Faults that a worker runs under, by name: errors of a file system and of memory, NaN and spikes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from training.engine import Engine
from training.fragments import fragments


def _raise(number: int) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


def _no_memory(*_: Any) -> Any:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory")


@contextlib.contextmanager
def _together(*faults: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter faults one after the other: each replaces what the earlier ones have replaced."""
    with contextlib.ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault())
        yield


@contextlib.contextmanager
def _broken_text(number: int, ending: str) -> Iterator[None]:
    original = Path.write_text

    def write(path: Path, *arguments: Any, **named: Any) -> int:
        if path.name.endswith(ending):
            raise OSError(number, os.strerror(number))
        return original(path, *arguments, **named)

    with mock.patch.object(Path, "write_text", write):
        yield


def _bug(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug, or a lack of memory")


def _poisoned(step: int, key: str, factor: float = 0.0) -> contextlib.AbstractContextManager[Any]:
    """After a step of a run, set an element of a weight (key "") or moment to NaN, or multiply all elements of all of them."""
    original, taken = Engine.train_step, itertools.count(1)

    def train_step(engine: Engine, *arguments: Any) -> Any:
        result = original(engine, *arguments)
        if next(taken) == step:
            for fragment in fragments(engine):
                if factor:
                    fragment.read(key).mul_(factor)
                elif fragment.name == "layers.1.ffn.down":
                    fragment.read(key)[3] = float("nan")
        return result

    return mock.patch.object(Engine, "train_step", train_step)


def _scaled(step: int, factor: float, stopped: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Scale a gradient in a step of a session; `stopped`: in which this process receives SIGTERM, too."""
    original, taken = Engine.train_step, itertools.count(1)

    def train_step(engine: Engine, *arguments: Any) -> Any:
        due = next(taken) == step
        if due and stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        scale = factor if due else 1.0
        hook = engine.module.get_parameter("layers.0.ffn.down").register_hook(lambda gradient: gradient * scale)
        result = original(engine, *arguments)
        hook.remove()
        return result

    return mock.patch.object(Engine, "train_step", train_step)


# Errors of a file system and of other parts, by where they occur.
FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "tensors on a full disk": lambda: mock.patch("training.checkpoint.write_tensors", _raise(errno.ENOSPC)),
    "manifest on a full disk": lambda: _broken_text(errno.ENOSPC, "manifest.json"),
    "rename refused": lambda: mock.patch("os.replace", _raise(errno.ENOSPC)),
    "folder refused": lambda: mock.patch.object(Path, "mkdir", _raise(errno.EACCES)),
    "read-only": lambda: mock.patch.object(Path, "mkdir", _raise(errno.EROFS)),
    "evaluation": lambda: mock.patch("training.loop.evaluate", _bug),
    "sampling": lambda: mock.patch("training.loop.generate", _bug),
    "full disk": lambda: mock.patch("os.replace", _raise(errno.ENOSPC)),
    "NaN in a moment after step 5": lambda: _poisoned(5, "exp_avg_sq"),
    "NaN in a weight after step 5": lambda: _poisoned(5, ""),
    "weights scaled by 1e8 after step 5": lambda: _poisoned(5, "", 1e8),
    "a gradient scaled by 1e8 in step 7": lambda: _scaled(7, 1e8),
    "SIGTERM in step 5": lambda: _scaled(5, 1.0, stopped=True),
    "SIGTERM and an infinite gradient in step 5": lambda: _scaled(5, float("inf"), stopped=True),
    "NaN in a weight after step 5, and SIGTERM in step 6": lambda: _together(
        lambda: _poisoned(5, ""), lambda: _scaled(6, 1.0, stopped=True)
    ),
    "bf16 instructions": lambda: mock.patch("training.machine._cpu_has_bf16", return_value=True),
    "no memory": lambda: mock.patch.object(Engine, "train_step", _no_memory),
}
