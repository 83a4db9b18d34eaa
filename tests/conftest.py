"""What all tests share: the order of their files (the longest first, the others beside them), signals, commands in-process."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

from kernels.common.commands import run_command
from tests.training.tiny import Result

_FIRST = ("tests/slurm/", "tests/training/test_parallel.py", "tests/test_train.py", "tests/ablation/test_run.py")


# Under nohup, or in the background of a script, these are ignored, also by every process that is started: commands that tests
# interrupt would go on. A handler that does nothing ignores them here alone.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file: with `--no-loadscope-reorder` the workers take files in this order."""
    items.sort(key=lambda item: next((i for i, name in enumerate(_FIRST) if item.nodeid.startswith(name)), len(_FIRST)))


@pytest.fixture
def set_time(monkeypatch) -> Callable[..., None]:
    """A function that gives one module other functions of `time`; all else, other threads too, keeps the real ones."""

    def replace(module: ModuleType, **functions: Callable) -> None:
        monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | functions))

    return replace


@pytest.fixture
def in_process(capsys, monkeypatch) -> Callable[..., Result]:
    """A function that runs the `main` of a command here, not in a new interpreter, and returns what came of it."""

    def run(main: Callable[[list[str]], int | None], *words: object) -> Result:
        monkeypatch.setattr("sys.argv", ["", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        printed = capsys.readouterr()
        return Result(int(ended.value.code or 0), printed.out, printed.err)

    return run
