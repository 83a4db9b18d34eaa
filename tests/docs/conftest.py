"""A folder that looks like a checkout after `make setup`, in which shown commands run and leave what they write."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tests.training.tiny import command, overrides, write_corpus

_LEFT_OUT = {".git", ".venv", "runs", "ablations", "prepared", "wandb", "build", "dist"}


def checkout(folder: Path) -> Path:
    """Make `folder` a checkout by links, with a `.venv` that `make` takes for up to date."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in _LEFT_OUT and not path.name.endswith(("_cache", ".egg-info")):
            (folder / path.name).symlink_to(path)
    venv = folder / ".venv"
    venv.mkdir()
    for path in Path(sys.prefix).iterdir():
        if not path.name.startswith(".installed"):
            (venv / path.name).symlink_to(path)
    for name in (".installed", ".installed-test"):
        (venv / name).touch()
    return folder


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Return what makes another checkout in which nothing has run."""
    return lambda: checkout(tmp_path_factory.mktemp("fresh") / "formula-ffn")


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout that the commands of all pages share, with a tiny trained run called `nano`."""
    folder = checkout(tmp_path_factory.mktemp("docs") / "formula-ffn")
    write_corpus(folder / "corpus")
    words = overrides(folder, runs="runs", run="nano", ffn="swiglu", eval_every=0, save_every=0, telemetry_every=0)
    trained = command(sys.executable, "train.py", *words, cwd=folder)
    assert trained.status == 0, trained.err
    return folder
