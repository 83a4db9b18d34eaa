"""The end of a run: its weights are kept whatever fails after the last step, and a run may do without held-out text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.weights import newest_intact
from tests.training.tiny import overrides


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def lines_of(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture
def train(no_group):
    """A function that runs train.py and returns its status and output."""

    def run(arguments: list[str], fault: str | None = None) -> dict:
        return no_group.run("command", module="train", arguments=arguments, fault=fault)[0]

    return run


@pytest.mark.parametrize("fault", ["evaluation", "sampling"])
def test_a_failure_after_the_last_step_costs_no_weights(train, corpus, tmp_path, fault):
    arguments = overrides(corpus, tmp_path, run="a", steps=2, eval_every=0, save_every=0)
    assert "a bug, or a lack of memory" in train(arguments, fault)["status"]
    path, damaged = newest_intact(tmp_path / "a" / "checkpoints")
    assert (path and path.name, damaged) == ("step_00000002", [])
    assert summary(tmp_path / "a")["status"] == "failed"
    assert train(arguments)["status"] == 0  # only what failed is done again
    assert summary(tmp_path / "a")["status"] == "finished"
    assert summary(tmp_path / "a")["final_eval_loss"] > 0
    assert len(lines_of(tmp_path / "a", "train")) == 2
    assert (tmp_path / "a" / "samples.txt").read_text().startswith("-")


def test_without_held_out_text_a_run_is_trained_and_says_so(train, corpus, tmp_path):
    arguments = overrides(corpus, tmp_path, run="a", steps=4, eval_every=2, eval_tokens=64, data__held_out=0)
    result = train(arguments)
    assert result["status"] == 0, result
    assert "warning: no text of this corpus is held out: the run is trained without evaluation" in result["out"]
    assert "none held out" in result["out"]
    assert "held-out text: none, the run was trained without evaluation" in result["out"]
    assert (summary(tmp_path / "a")["status"], summary(tmp_path / "a")["final_eval_loss"]) == ("finished", None)
    assert lines_of(tmp_path / "a", "eval") == []
    assert newest_intact(tmp_path / "a" / "checkpoints")[0]
    assert "there is nothing to do" in train(arguments)["out"]
    assert "data.held_out=0.6" in train([*arguments, "data.held_out=0.6"])["err"]
