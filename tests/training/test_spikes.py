"""Spikes of loss and gradient norm: what is one, and what becomes of the step and of the samples."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch

from model.weights import MOMENTS, CheckpointReader
from tests.selection import quick
from tests.training.tiny import overrides
from training.spikes import SpikeDetector

SPIKE = "a gradient scaled by 1e8 in step 7"


def detector(values: list[float], window: int = 32, sigmas: float = 6.0) -> SpikeDetector:
    result = SpikeDetector(window, sigmas)
    assert not any(result.check(value, 1.0) for value in values)
    return result


def test_a_value_is_measured_in_robust_standard_deviations():
    # The median of 1 .. 31 is 16, and the median distance from it 8: a sigma is 1.4826 x 8.
    values = [float(n) for n in range(1, 32)]
    random.Random(0).shuffle(values)
    below, above = (16 + sigmas * 1.4826 * 8 for sigmas in (5.99, 6.01))
    assert detector(values, sigmas=6).check(below, 1.0) is None
    spike = detector(values, sigmas=6).check(above, 1.0)
    assert (spike.name, spike.value, spike.median) == ("loss", above, 16)
    assert spike.sigmas == pytest.approx(6.01, rel=1e-12)
    assert str(spike) == f"loss {above:.4g}, 6.0 sigmas above the median of 16"


def test_a_norm_is_measured_by_its_logarithm():
    result = SpikeDetector(32, 6)
    norms = [2.0, 0.5] * 16  # logarithms: 0 +- log 2
    assert not any(result.check(1.0, norm) for norm in norms)
    sigmas = math.log(1000) / (1.4826 * math.log(2))
    spike = result.check(1.0, 1000.0)
    assert (spike.name, spike.value) == ("grad_norm", 1000.0)
    assert (spike.median, spike.sigmas) == (pytest.approx(1.0), pytest.approx(sigmas))


def test_a_fall_is_no_spike_and_neither_is_a_small_rise_of_equal_values():
    assert detector([5.0] * 32).check(1.0, 1e-9) is None
    assert detector([5.0] * 32).check(5.1, 2.0) is None  # 5 times the least sigma of a loss, 4.6 times that of a norm
    assert detector([5.0] * 32).check(5.13, 1.0)


def test_nothing_is_a_spike_before_a_quarter_of_the_window():
    assert detector([5.0] * 7).check(1e9, 1e9) is None
    assert detector([5.0] * 8).check(1e9, 1e9)


def test_spikes_do_not_hide_those_that_follow_and_a_new_level_is_accepted():
    result = detector([5.0] * 32)
    found = [result.check(100.0, 1.0) is not None for _ in range(32)]
    assert found == [True] * 16 + [False] * 16  # until half of the window is of the new level


def test_what_is_not_finite_is_left_to_others():
    result = detector([5.0] * 32)
    assert result.check(math.nan, math.inf) is None
    assert result.check(5.0, 1.0) is None
    assert all(map(math.isfinite, itertools.chain(*result.state().values())))


def test_the_window_survives_a_checkpoint():
    result, other = detector([float(n) for n in range(20)], sigmas=1e9), SpikeDetector(32, 6)
    other.load(json.loads(json.dumps(result.state())))
    assert other.state() == result.state()
    assert other.check(1e6, 1.0)
    for nothing in (None, [], {"loss": 5}, {"loss": {"a": 1}}, {"loss": ["a", None, math.nan, math.inf, 10**400]}):
        other.load(nothing)
        assert other.state() == {"loss": [], "grad_norm": []}
        assert other.check(1e6, 1.0) is None


CASES = [("0", "fp32", 1), ("1", "fp32", 2), ("2", "fp32", 1), ("3", "fp32", 2)]
CASES += [("1", "bf16", 1), ("1", "bf16", 2), ("2", "bf16", 1), ("3", "bf16", 1)]


@pytest.mark.parametrize(
    ("zero", "precision", "accumulation"), quick(CASES, ("0", "fp32", 1), ("2", "bf16", 1), ("3", "fp32", 2))
)
def test_a_step_that_is_left_out_changes_nothing(corpus, two_ranks, tmp_path, zero, precision, accumulation):
    arguments = overrides(corpus, zero=zero, precision=precision, micro_batch_size=4 // accumulation)
    steps = [["train", 2], ["save", tmp_path], ["refuse"], ["save", tmp_path], ["train", 1]]
    results = two_ranks.run("script", arguments=arguments, steps=steps)
    rank = results[0]
    assert [each["applied"] for each in results] == [[True, True, False, True]] * 2
    assert results[1]["values"] == rank["values"]  # every rank decides by the same numbers
    ((loss, norm),) = rank["values"]
    assert loss == pytest.approx(rank["losses"][2], rel=1e-6)
    assert norm == rank["norms"][2]
    before, after = (CheckpointReader(tmp_path / f"step_{step:08d}") for step in (2, 3))
    for name, key in itertools.product(before.shapes(), ("", *MOMENTS)):
        assert after.tensor(name, key).equal(before.tensor(name, key)), (name, key)
    usual = two_ranks.run("script", arguments=arguments, steps=[["train", 3]])[0]
    assert usual["norms"][2] == pytest.approx(norm, rel=1e-5 if precision == "fp32" else 1e-2)


@pytest.fixture
def train(no_group):
    """A function that runs train.py and returns its status and output."""

    def run(arguments: list[str], fault: str | None = None) -> dict:
        return no_group.run("command", module="train", arguments=arguments, fault=fault)[0]

    return run


def lines_of(run: Path, **what: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if what.items() <= line.items()]


def settings(corpus: Path, runs: Path, name: str, **changes) -> list[str]:
    few = {"guard.spike_window": 8, "guard.spike_sigmas": 15, "steps": 10, "save_every": 2, "eval_every": 0}
    return overrides(corpus, runs, run=name, **{**few, **changes})


def test_a_spike_is_reported_at_the_next_log_line(train, corpus, tmp_path):
    result = train(settings(corpus, tmp_path, "a"), SPIKE)
    assert result["status"] == 0, result
    assert "warning: spike at step 7: gradient norm " in result["out"]
    assert "sigmas above the median of " in result["out"]
    (event,) = lines_of(tmp_path / "a", event="spike")
    assert (event["step"], event["what"], event["action"]) == (7, "grad_norm", "report")
    assert event["sigmas"] > 15
    usual = train(settings(corpus, tmp_path, "b", guard__spike_window=10**6))
    assert "warning: spike" not in usual["out"]


def test_skip_leaves_the_step_out(train, corpus, tmp_path):
    result = train(settings(corpus, tmp_path, "a", guard__spike="skip"), SPIKE)
    assert result["status"] == 0, result
    (event,) = lines_of(tmp_path / "a", event="spike")
    assert (event["step"], event["action"]) == (7, "skip")
    assert lines_of(tmp_path / "a", event="skipped_step") == []
    state = CheckpointReader(tmp_path / "a" / "checkpoints" / "step_00000010").state
    assert state["optimizer_steps"] == 9


def test_rewind_is_as_if_the_samples_had_never_been_there(train, corpus, tmp_path):
    result = train(settings(corpus, tmp_path, "a", guard__spike="rewind", save_every=4), SPIKE)
    assert result["status"] == 0, result
    assert "resuming" in result["out"]
    (event,) = lines_of(tmp_path / "a", event="rewound")
    assert (event["step"], event["from_step"], event["skipped_samples"]) == (4, 7, "32:56")
    assert [line["step"] for line in lines_of(tmp_path / "a", kind="train")] == list(range(1, 11))
    never = train(settings(corpus, tmp_path, "b", save_every=4, guard__skip_samples="32:56"))
    assert never["status"] == 0, never
    one, other = (CheckpointReader(tmp_path / run / "checkpoints" / "step_00000010") for run in "ab")
    for name, key in itertools.product(one.shapes(), ("", *MOMENTS)):
        assert torch.equal(one.tensor(name, key), other.tensor(name, key)), (name, key)
    assert one.state["skipped_samples"] == other.state["skipped_samples"] == [[32, 56]]
    assert one.state["batches_hash"] == other.state["batches_hash"]


def test_what_cannot_be_done_is_refused(train, corpus, tmp_path):
    result = train(settings(corpus, tmp_path, "a", guard__spike="skip", zero="offload"))
    assert (result["status"], "guard.spike=skip needs the gradient on the device" in result["err"]) == (2, True)
    result = train(settings(corpus, tmp_path, "a", guard__spike="rewind", save_every=0))
    assert (result["status"], "save_every=0 saves none: set save_every=N" in result["err"]) == (2, True)
