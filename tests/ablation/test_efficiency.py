"""What an arm is worth at equal time, read off the curves of its runs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from ablation.efficiency import curve, efficiency, loss_at
from ablation.plan import Plan
from ablation.results import Results, read_results
from tests.ablation.made import EASIER, losses, make, plan_of

RULE = losses({"gelu": -0.05}, noise=0.0)
SPEEDS = {"relu": 1000.0, "gelu": 800.0, "silu": 500.0}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of("ablation=glu_variants", "ablation.arms=[relu, gelu, silu]", "tokens=614400")


@pytest.fixture
def results(whole) -> Results:
    """The runs, each arm at a speed of its own."""

    def at_speed(run):
        lines = [
            line | ({"tokens_per_second": SPEEDS[run.planned.arm]} if line["kind"] == "train" else {})
            for line in run.lines
        ]
        return dataclasses.replace(run, lines=lines)

    read = read_results(whole)
    return dataclasses.replace(read, runs={name: at_speed(run) for name, run in read.runs.items()})


def test_a_curve_is_of_one_text_and_the_final_loss_of_all(results):
    own = curve(results, "nano", "gelu")
    finals = list(results.losses("nano")["gelu"].values())
    assert own.final == pytest.approx(np.mean(finals), rel=1e-12)
    assert own.mean[-1] == pytest.approx(own.final - EASIER, rel=1e-12)
    assert own.seconds[-1] == own.tokens[-1] / 800


def test_at_equal_time_the_fastest_arm_has_its_final_loss_and_others_that_of_a_shorter_run(results):
    found = efficiency(results, "nano")
    assert found["relu"].loss_at_equal_time == pytest.approx(curve(results, "nano", "relu").final, rel=1e-12)
    own = curve(results, "nano", "gelu")
    # 0.8 of its tokens: of the five evaluations of a run the fourth.
    assert own.tokens[3] == 0.8 * own.tokens[4]
    assert found["gelu"].loss_at_equal_time == pytest.approx(own.mean[3] + EASIER, rel=1e-12)


def test_the_loss_at_a_place_of_a_curve():
    assert loss_at([10, 20], [3.0, 2.0], 15) == 2.5
    assert math.isnan(loss_at([10, 20], [3.0, 2.0], 21))
    assert math.isnan(loss_at([], [], 1))


def test_a_loss_at_equal_memory_lies_between_sizes_of_one_recipe_and_length(tmp_path):
    sizes = "nano: model=nano, deep: model=nano model.n_layers=6, {}"
    memory = {"nano": 1.0, "deep": 1.4}

    def found(third: str) -> float:
        plan = plan_of(
            "ablation=glu_variants", "ablation.arms=[relu,gelu]", f"ablation.sizes={{{sizes.format(third)}}}"
        )
        more = lambda run: memory.get(run.size, 1.2) + 0.1 * (run.arm == "gelu")  # noqa: E731
        rule = lambda run: RULE(run) + {"nano": 0.0, "deep": -0.4}.get(run.size, 9.0)  # noqa: E731
        results = read_results(make(plan, tmp_path / third[:5], rule, figures=lambda run: {"memory_gib": more(run)}))
        return efficiency(results, "deep")["gelu"].loss_at_equal_memory - results.mean_losses("deep")["gelu"]

    # 0.1 of the 0.4 GiB between the sizes, in which the loss falls by 0.4.
    assert found("other: model=nano optim=muon optim.lr=4e-3") == pytest.approx(0.1)
    assert found("longer: model=nano tokens=2000000") == pytest.approx(0.1)
