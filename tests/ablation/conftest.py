"""Folders of a module's plan: one that all of its tests read, and a copy that a test may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.ablation.made import make


@pytest.fixture(scope="module")
def whole(request, plan, tmp_path_factory) -> Path:
    """The folder of the module's fixture `plan`, whose runs have all ended with the losses of its `RULE`."""
    return make(plan, tmp_path_factory.mktemp("made"), request.module.RULE)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))
