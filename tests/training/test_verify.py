"""`python -m training.verify` says what a run folder is worth."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from bench.faults.corruptions import checkpoint_of, fit_manifest
from conf.load import load
from kernels.common.errors import UserError
from tests.bench.test_corruptions import write_run
from tests.training.tiny import overrides
from training.verify import main


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the runs `a`, and `b` of another seed."""
    root = tmp_path_factory.mktemp("verify")
    config = load(overrides(root, root, run="a"))
    write_run(config, "a")
    write_run(dataclasses.replace(config, seed=1), "b")
    return root


@pytest.fixture
def verify(written, tmp_path, monkeypatch, capsys):
    """A function that verifies runs by name, and returns the status and the lines; in a copy of the runs."""
    shutil.copytree(written, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)

    def run(*names: str) -> tuple[int, list[str]]:
        return main(list(names)), capsys.readouterr().out.splitlines()

    return run


def test_healthy_runs(verify):
    lines = [f"runs/{run}: step {step}: healthy" for run in "ab" for step in (9, 6, 3)]
    assert verify("a", "b") == (0, lines)
    assert verify("runs/a") == (0, lines[:3])


def test_what_is_wrong_with_each_checkpoint(verify, tmp_path):
    a, b = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    for step in (6, 3):
        shutil.rmtree(checkpoint_of(a, step))
    shutil.copytree(checkpoint_of(b, 6), checkpoint_of(a, 6))
    shutil.copytree(checkpoint_of(a, 9), checkpoint_of(a, 12))
    fit_manifest(checkpoint_of(a, 12))
    manifest = checkpoint_of(a, 9) / "manifest.json"
    manifest.write_text(json.dumps({"files": {}}))
    status, lines = verify("a")
    assert status == 1
    assert lines == [
        "runs/a: step 12: damaged: state.json is of step 9",
        "runs/a: step 9: damaged: manifest.json does not list index.json",
        "runs/a: step 6: of another run",
    ]
    (a / "run_id").unlink()
    assert verify("a")[1][2] == "runs/a: step 6: trained with other settings than config.yaml has: seed: 1 -> 0"


def test_the_other_files_of_a_run(verify, tmp_path):
    a = tmp_path / "runs" / "a"
    (a / "config.yaml").unlink()
    (a / "run_id").write_text("?")
    (a / "summary.json").write_text("[" * 100_000)
    with open(a / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\n[1]\n{"kind": "train", "st')  # the last is of a process that is writing it
    shutil.rmtree(a / "checkpoints")
    status, lines = verify("a")
    assert status == 1
    assert [line.removeprefix("runs/a: ") for line in lines] == [
        "config.yaml is missing",
        "run_id cannot be read",
        "there is no checkpoint",
        "metrics.jsonl: 2 line(s) cannot be read",
        "summary.json cannot be read: it is not the summary of a run",
    ]


def test_a_run_that_does_not_exist(verify):
    with pytest.raises(UserError, match="there is no run 'c' in runs/: choose from a, b"):
        verify("c")
    with pytest.raises(UserError, match="name one or more runs"):
        verify()
