"""What a plan can find, said before it runs."""

from __future__ import annotations

import csv
import re
import statistics

import pytest

from ablation.power import MEASURED, power_lines
from ablation.results import read_results
from ablation.ttest import ALPHA, detectable_difference
from tests.ablation.made import all_planned, losses, make, plan_of
from tests.training.tiny import ROOT

WORDS = ("ablation=glu_variants", "ablation.arms=[relu,gelu,swiglu]", "tokens=600000", "ablation.smallest_effect=0.05")
LINE = re.compile(
    r"nano: 5 seeds find a difference of (\S+) nats in 80% of such plans, and 0\.05 takes about (\d+) seeds "
    r"\(SD of differences (\S+), (.*)\)"
)


def test_before_a_plan_has_run_the_scatter_is_that_of_the_committed_runs(tmp_path):
    [line] = power_lines(plan_of(*WORDS), tmp_path)
    found, seeds, deviation, source = LINE.fullmatch(line).groups()
    assert (deviation, source) == ("0.036", "measured at 3.3M parameters and 1M tokens")
    kept = 0.9 * ALPHA / 2  # two arms beside the baseline, and a tenth for seeds that are added
    assert float(found) == pytest.approx(0.0362 * detectable_difference(5, kept), rel=0.02)  # two digits
    assert 0.0362 * detectable_difference(int(seeds), kept) <= 0.05
    assert 0.0362 * detectable_difference(int(seeds) - 1, kept) > 0.05


def test_the_looks_of_a_plan_are_paid_for(tmp_path):
    def found(*words: str) -> float:
        [line] = power_lines(plan_of(*WORDS, *words), tmp_path)
        return float(LINE.fullmatch(line).group(1))

    whole, first = found("ablation.reserve=0"), found("ablation.looks=[5,10]")
    assert whole == pytest.approx(0.0362 * detectable_difference(5, ALPHA / 2), rel=0.02)
    assert whole < found() < first  # half of the planned seeds spend little


def test_the_measured_scatter_is_that_of_the_committed_runs():
    deviations: dict[str, list[float]] = {}
    with open(ROOT / "bench/results/glu_variants/comparisons.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            deviations.setdefault(row["size"], []).append(float(row["deviation"]))
    medians = [statistics.median(deviations[size]) for size in ("nano", "small")]
    assert list(MEASURED.values()) == pytest.approx(medians, abs=0.00005)


def test_runs_that_have_ended_say_it_themselves(tmp_path):
    plan, rule = plan_of(*WORDS), losses({}, noise=0.01)
    folder = make(plan, tmp_path, rule)
    [line] = power_lines(plan, folder)
    _, _, deviation, source = LINE.fullmatch(line).groups()
    assert source == "of the runs that have ended"
    median = statistics.median(c.deviation for c in read_results(folder).comparisons("nano"))
    assert float(deviation) == pytest.approx(median, rel=0.05)  # two digits
    two = [planned for planned in all_planned(plan, rule) if planned.stage == "sweep" or planned.seed < 2]
    [line] = power_lines(plan, make(plan, tmp_path / "two", rule, two))
    assert "measured at 3.3M parameters" in line


def test_of_another_metric_nothing_is_known_before_runs_have_ended(tmp_path):
    words = [*WORDS[:3], "ablation.metric=tokens_per_second", "ablation.smallest_effect=500"]
    plan = plan_of(*words)
    assert power_lines(plan, tmp_path) == [
        "nano: what its seeds find is known once 3 of an arm and the baseline have ended"
    ]
    [line] = power_lines(plan, make(plan, tmp_path, losses({})))
    assert re.match(r"nano: 5 seeds find a difference of \S+ tokens per second in 80% of such plans", line)
