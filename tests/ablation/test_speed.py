"""Equal wall-clock time: widths follow from step times, which are measured once."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ablation import speed
from ablation.growth import continue_plan
from ablation.manifest import write_manifest
from ablation.plan import read_plan
from ablation.resolve import resolve
from kernels.common.errors import UserError
from tests.training.tiny import TINY, shared_corpus

PLAN = ["ablation=glu_variants", "ablation.arms=[relu,swiglu]", "ablation.budget=wallclock", "ablation.tile=1"]


def kept(folder, swiglu=(0.11, 0.15)) -> None:
    times = {"nano": {"relu": {576: 0.10, 960: 0.14}, "swiglu": {384: swiglu[0], 640: swiglu[1]}}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / speed.NAME).write_text(json.dumps(times), encoding="utf-8")


def test_widths_take_the_time_of_the_baseline(tmp_path):
    kept(tmp_path)
    config, overrides = read_plan(PLAN)
    seconds = speed.step_time(config, overrides, tmp_path)
    plan = resolve(config, overrides, seconds)
    assert plan.arms["nano"]["relu"].width.d_ff == 768
    own = plan.arms["nano"]["swiglu"].width.d_ff
    assert seconds("nano", "relu", 768) == pytest.approx(0.12)
    assert seconds("nano", "swiglu", own) == pytest.approx(0.12, rel=0.005)
    assert own == 448  # 384 + 256 * (0.12 - 0.11) / (0.15 - 0.11)
    write_manifest(plan, tmp_path)
    again = continue_plan(resolve(config, overrides, speed.step_time(config, overrides, tmp_path)), tmp_path)
    assert again.plan == plan


def test_unusable_times_are_refused(tmp_path):
    config, overrides = read_plan(PLAN)
    kept(tmp_path, swiglu=(0.15, 0.11))
    with pytest.raises(UserError, match="swiglu at nano is not slower with d_ff=640 than with 384"):
        resolve(config, overrides, speed.step_time(config, overrides, tmp_path))
    (tmp_path / speed.NAME).write_text('{"nano": {"relu": {"576": 0.1, "960": 0.14}}}', encoding="utf-8")
    with pytest.raises(UserError, match="no step times of swiglu at nano"):
        resolve(config, overrides, speed.step_time(config, overrides, tmp_path))
    (tmp_path / speed.NAME).write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="has no step times; remove it"):
        speed.step_time(config, overrides, tmp_path)


@pytest.mark.slow
def test_step_times_are_measured_by_runs(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    folder = shared_corpus(tmp_path_factory)
    tiny = {k: v for k, v in TINY.items() if k != "steps"} | {"tokens": 12 * 8 * 32}
    data = ["data=text", f"data.path={folder / 'corpus'}", f"data.prepared={folder / 'prepared'}"]
    config, overrides = read_plan([*PLAN, *data, *(f"{key}={value}" for key, value in tiny.items())])
    plan = resolve(dataclasses.replace(config, budget="parameters"), overrides)
    relu = plan.arms["nano"]["relu"].width.d_ff
    times = speed.measure(plan, tmp_path)
    assert set(times) == {"nano"}
    assert set(times["nano"]) == {"relu", "swiglu"}
    assert sorted(times["nano"]["relu"]) == [round(relu * 0.75), round(relu * 1.25)]
    assert all(0 < t < 60 for of_arm in times["nano"].values() for t in of_arm.values())
