"""ablation.measures: the figures of a run, as claims compare them."""

from __future__ import annotations

import json

import pytest

from ablation.measures import by_seed
from ablation.results import read_results
from tests.ablation.made import losses, make, plan_of


def test_figures_of_a_run_are_what_its_lines_say(tmp_path):
    of_plan = plan_of("ablation=glu_variants", "ablation.arms=[relu,swiglu]", "ablation.seeds=[0,1,2]", "tokens=600000")
    made = make(of_plan, tmp_path, losses({"swiglu": -0.05}, noise=0.0))
    results = read_results(made)
    runs = results.final_runs("nano", "swiglu")
    [path] = (made / "runs").glob("nano-swiglu-*-seed0")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    samples = [line for line in lines if line["kind"] == "telemetry"]
    assert by_seed("max", runs)[0] == max(samples[-1]["max"])
    assert by_seed("kurtosis", runs)[0] == pytest.approx(sum(samples[-1]["kurtosis"]) / 4)
    assert by_seed("gradient_first_over_last", runs)[0] == samples[-1]["gradient_first_over_last"]
    again, dead = sum(sum(sample["revived"]) / 4 for sample in samples[5:]), sum(samples[-1]["dead"]) / 4
    assert by_seed("recovered", runs)[0] == pytest.approx(again / (again + dead))
    assert by_seed("no such figure", runs) == {}
    assert by_seed("final_eval_loss", runs) == results.losses("nano")["swiglu"]
