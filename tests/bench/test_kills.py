"""The campaign of kills: what counts as a fault of the code, and a kill of two ranks from end to end."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from bench.faults.kills import Killed, last_step, lines, verdict
from tests.training.tiny import command

KILLED = Killed("save", "all", 24, 10, 0)


def test_a_verdict_says_what_is_wrong():
    assert verdict(KILLED, 10) == ""  # that of step 20 was being written
    assert verdict(dataclasses.replace(KILLED, newest=20), 20) == ""
    assert verdict(dataclasses.replace(KILLED, newest=0, steps=9), 0) == ""
    assert verdict(dataclasses.replace(KILLED, left=2), 10) == "2 processes had not ended 60 s after it"
    assert verdict(KILLED, None) == "it did not start again"
    assert verdict(KILLED, 20) == "it went on after step 20, its newest checkpoint is of 10"
    assert verdict(dataclasses.replace(KILLED, steps=30), 10) == "after step 30 it went on after step 10"


def test_the_steps_of_a_run_are_read_while_it_writes_them(tmp_path):
    assert (lines(tmp_path), last_step(tmp_path)) == ([], 0)
    text = '{"kind": "train", "step": 4, "tokens": 9, "loss": 2.5, "grad_norm": 1.5}\n{"kind": "train", "step": 5, "to'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert (lines(tmp_path), last_step(tmp_path)) == ([("train", 4, 2.5, 1.5)], 5)


@pytest.mark.slow
def test_a_killed_run_ends_as_the_undisturbed_one(tmp_path):
    done = command(sys.executable, "-m", "bench.faults", "campaign=kills", "cases=1", f"folder={tmp_path / 'f'}")
    assert done.status == 0, done.out + done.err
    assert "parallel.tensor=2, deepspeed: 1 kills" in done.out
    assert done.out.endswith("1 kills, 0 wrong\n")
