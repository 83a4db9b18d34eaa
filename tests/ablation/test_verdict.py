"""The verdict sentence: it follows from the comparison, and no arm is called better without a verdict."""

from __future__ import annotations

import math
import re
import shutil

import pytest

from ablation.results import read_results
from ablation.statistics import Verdict
from ablation.verdict import sentences
from tests.ablation.made import all_planned, losses, make, plan_of

ARMS = "ablation.arms=[relu,gelu,silu,swiglu]"


@pytest.fixture(scope="module")
def plan():
    return plan_of("ablation=glu_variants", ARMS, "tokens=600000")


def test_better_worse_and_equivalent(plan, tmp_path):
    rule = losses({"swiglu": -0.05, "gelu": 0.04}, noise=0.001)
    results = read_results(make(plan, tmp_path, rule))
    found = {c.arm: abs(c.difference) for c in results.comparisons("nano")}
    assert sentences(results) == [
        f"At nano, over 5 seeds, in nats per token: better than relu: swiglu by {found['swiglu']:.4f}; "
        f"worse than relu: gelu by {found['gelu']:.4f}; equivalent to relu within 0.01: silu."
    ]


def test_a_difference_that_is_smaller_than_asked_for_is_said_so(tmp_path):
    plan = plan_of("ablation=glu_variants", ARMS, "tokens=600000", "ablation.smallest_effect=0.08")
    (sentence,) = sentences(read_results(make(plan, tmp_path, losses({"swiglu": -0.05, "gelu": 0.2}, noise=0.001))))
    assert re.search(r"better than relu: swiglu by 0\.0\d+ \(less than the 0\.08 asked for\); ", sentence)
    assert re.search(r"worse than relu: gelu by [\d.]+; equivalent to relu within 0\.08: silu\.$", sentence)


def test_the_largest_difference_comes_first(plan, tmp_path):
    rule = losses({"silu": -0.03, "gelu": -0.02, "swiglu": -0.05}, noise=0.001)
    (sentence,) = sentences(read_results(make(plan, tmp_path, rule)))
    assert re.search(r"better than relu: swiglu by [\d.]+, silu by [\d.]+ and gelu by [\d.]+\.$", sentence)


def test_no_winner_without_a_verdict(plan, tmp_path):
    for name, rule in {
        "noisy": losses({"swiglu": -0.05}, noise=0.05),  # undecided
        "edge": losses({"swiglu": -0.5}, best=4.0),  # blocked
        "alike": losses({}, noise=0.001),  # equivalent
    }.items():
        results = read_results(make(plan, tmp_path / name, rule))
        assert all(c.verdict not in (Verdict.BETTER, Verdict.WORSE) for c in results.comparisons("nano"))
        (sentence,) = sentences(results)
        assert "in nats per token: no arm is shown to be better than relu; " in sentence
        assert not re.search(r"(better|worse) than relu:", sentence)
        assert all(c.arm in sentence for c in results.comparisons("nano"))
    edge = "its best learning rate, 0.008, is the highest that was tried"
    (sentence,) = sentences(read_results(tmp_path / "edge" / "glu_variants"))
    assert "no verdict: " in sentence
    assert edge in sentence


def test_missing_seeds_are_counted(plan, tmp_path):
    folder = make(plan, tmp_path, losses({"swiglu": -0.05}, noise=0.001))
    shutil.rmtree(folder / "runs" / "nano-swiglu-lr0.004-seed3")
    (sentence,) = sentences(read_results(folder))
    assert "over 5 seeds, in nats per token: better than relu: swiglu (4 seeds) by " in sentence
    shutil.rmtree(folder / "runs" / "nano-relu-lr0.004-seed3")
    (sentence,) = sentences(read_results(folder))
    assert "over 4 of 5 seeds, in nats per token: better than relu: swiglu by " in sentence


def test_a_diverged_seed_is_counted(plan, tmp_path):
    rule = losses({"swiglu": -0.05}, noise=0.001)
    results = read_results(
        make(
            plan, tmp_path, lambda planned: math.nan if (planned.arm, planned.seed) == ("swiglu", 2) else rule(planned)
        )
    )
    assert "1 of 5 seeds diverged" in sentences(results)[0]


def test_before_there_is_anything_to_compare(plan, tmp_path):
    rule = losses({})
    planned_runs = [planned for planned in all_planned(plan, rule) if planned.stage == "sweep"]
    expected = ["At nano, nothing is known yet: no arm shares a seed with relu."]
    assert sentences(read_results(make(plan, tmp_path, rule, planned_runs))) == expected
    one = [
        *planned_runs,
        next(planned for planned in all_planned(plan, rule) if (planned.stage, planned.arm) == ("final", "relu")),
    ]
    assert sentences(read_results(make(plan, tmp_path / "one", rule, one))) == expected


def test_every_size_has_its_sentence(tmp_path):
    sizes = "ablation.sizes={small: model=nano, deep: model=nano model.n_layers=6}"
    plan = plan_of("ablation=glu_variants", "ablation.arms=[relu,swiglu]", sizes, "tokens=600000")
    results = read_results(make(plan, tmp_path, losses({"swiglu": -0.05}, noise=0.001)))
    assert [sentence.split(",")[0] for sentence in sentences(results)] == ["At small", "At deep"]
