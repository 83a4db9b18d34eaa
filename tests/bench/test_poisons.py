"""Poisons and spikes: a few cases from end to end, and what counts as a fault of the code."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from bench.faults.poisons import PLACES, PoisonCase, PoisonedEnding, cases, judge
from tests.training.tiny import command

CASE = PoisonCase("weight", "NaN", 1, "bf16", 2)


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])  # tests/training/test_skipped_steps.py
def test_a_few_poisons_are_noticed(tmp_path, count):
    # A spike of a gradient, the loss of one of two ranks, and the master that one of them holds; ZeRO 1, 2 and 3.
    result = command(
        sys.executable,
        "-m",
        "bench.faults",
        "campaign=poisons",
        f"folder={tmp_path / 'f'}",
        f"cases={count}",
        "seed=67",
    )
    assert result.status == 0, result.out
    assert result.out.endswith(f"{count} poisons and spikes, 0 wrong\n")
    assert result.out.count(": noticed\n") == count


def test_the_cases_differ_and_are_those_of_their_seed():
    some = cases(70, 0)
    assert len(set(some)) == 70
    assert some == cases(70, 0) != cases(70, 1)
    assert {case.place for case in some} == set(PLACES)
    assert {(case.zero, case.precision) for case in some} == {
        *((stage, "fp32") for stage in range(4)),
        *((stage, "bf16") for stage in (1, 2, 3)),
    }


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that kept the checkpoint of step 4."""
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    return tmp_path


def write(run: Path, **line: object) -> None:
    told = {"kind": "event", "event": "skipped_step", "step": 5, "culprit": "rank 1 holds NaN in layers.1.ffn.down"}
    (run / "metrics.jsonl").write_text(json.dumps(told | line) + "\n", encoding="utf-8")


def test_a_verdict_says_what_is_wrong(run, monkeypatch):
    monkeypatch.setattr("model.health.damage", lambda _: "")
    ended = PoisonedEnding([3, 3], "")
    write(run)
    assert judge(CASE, run, ended) == []
    (hung,) = judge(CASE, run, PoisonedEnding([3, None], "the output"))
    assert hung == "ended with [3, None]: the output"
    assert judge(CASE, run, PoisonedEnding([0, 0], "")) == ["the last checkpoint is missing"]
    write(run, step=6)
    assert judge(CASE, run, ended) == ["noticed in step 6"]
    assert judge(dataclasses.replace(CASE, place="moment"), run, ended) == []
    write(run, step=4)
    assert judge(CASE, run, ended) == ["nothing was noticed"]
    write(run, culprit="rank 0 holds NaN in layers.1.ffn.down")
    assert "the culprit is told as" in judge(CASE, run, ended)[0]
    write(run, culprit="rank 1 holds inf in layers.1.ffn.down")
    assert judge(CASE, run, ended) == ["NaN is told as 'rank 1 holds inf in layers.1.ffn.down'"]
    assert judge(dataclasses.replace(CASE, value="x50"), run, ended) == ["nothing was noticed"]
    write(run, event="spike")
    assert judge(dataclasses.replace(CASE, value="x50"), run, ended) == []
    monkeypatch.setattr("model.health.damage", lambda _: "it holds NaN")
    assert judge(dataclasses.replace(CASE, value="x50"), run, ended) == ["step_00000004 is kept and it holds NaN"]
    (run / "checkpoints" / "step_00000004").rename(run / "checkpoints" / "step_00000002")
    monkeypatch.setattr("model.health.damage", lambda _: "")
    assert judge(dataclasses.replace(CASE, value="x50"), run, ended) == ["the checkpoint of step 4 is gone"]
