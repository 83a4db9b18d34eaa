"""The order of the test files: those that take longest begin first, and the others fill the time beside them."""

from __future__ import annotations

import pytest

_FIRST = ("tests/slurm/", "tests/training/test_parallel.py", "tests/test_train.py", "tests/ablation/test_run.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file: with `--no-loadscope-reorder` the workers take files in this order."""
    items.sort(key=lambda item: next((i for i, name in enumerate(_FIRST) if item.nodeid.startswith(name)), len(_FIRST)))
