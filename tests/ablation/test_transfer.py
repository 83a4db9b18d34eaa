"""Learning rates over sizes: shifts that are there and that are not, and sizes that take another's sweep."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from ablation import slurm
from ablation.manifest import read_manifest
from ablation.plan import Plan, PlannedRun
from ablation.progress import sweep_progress
from ablation.report import page
from ablation.results import read_results
from ablation.status import Watcher
from ablation.transfer import main, shifts
from kernels.common.errors import UserError
from tests.ablation.made import make, plan_of, write_run

SIZES = "ablation.sizes={narrow: model=nano, wide: model=nano model.d_model=384 optim.lr=0.002}"
WORDS = ["ablation=glu_variants", "ablation.arms=[relu,swiglu]", SIZES, "tokens=600000", "ablation.seeds=[0,1,2]"]


def rule(moved: dict[str, float], scatter: float = 0.002):
    """Losses whose best learning rate at `wide` lies some factors of two above that of `narrow`, by arm."""

    def loss(planned: PlannedRun) -> float:
        best = {"narrow": 4e-3, "wide": 2e-3 * 2.0 ** moved.get(planned.arm, 0.0)}[planned.size]
        chance = random.Random(planned.name).gauss(0, scatter)
        return 3.0 + 0.1 * math.log2(planned.lr / best) ** 2 + chance

    return loss


@pytest.mark.parametrize(
    ("moved", "verdict"), [(0.0, "transfers"), (0.9, "does not transfer"), (-0.9, "does not transfer")]
)
def test_a_shift_is_found_where_there_is_one(tmp_path, moved, verdict):
    results = read_results(make(plan_of(*WORDS), tmp_path, rule({"swiglu": moved})))
    found = {shift.arm: shift for shift in shifts(results, "narrow")}
    assert found["relu"].verdict == "transfers"
    assert found["swiglu"].verdict == verdict
    assert found["swiglu"].shift == pytest.approx(moved, abs=0.1)
    assert found["swiglu"].interval[0] < moved < found["swiglu"].interval[1]
    assert found["swiglu"].cost == pytest.approx(0.1 * moved**2, abs=0.02)
    back = {shift.arm: shift.shift for shift in shifts(results, "wide")}
    assert back["swiglu"] == pytest.approx(-found["swiglu"].shift)


def test_intervals_cover_as_often_as_they_say(tmp_path):
    """Of 60 plans, whose noise is that of both sweeps: 95%, where 52 or fewer come by chance in 1 of 100 cases."""
    plan, covered = plan_of(*WORDS), 0
    results = read_results(make(plan, tmp_path, rule({})))
    for number in range(60):
        chance = random.Random(number)
        losses = {name: rule({}, 0.0)(run.planned) + chance.gauss(0, 0.01) for name, run in results.runs.items()}
        runs = {
            name: dataclasses.replace(run, outcome=dataclasses.replace(run.outcome, loss=losses[name]))
            for name, run in results.runs.items()
        }
        [found] = [s for s in shifts(dataclasses.replace(results, runs=runs), "narrow") if s.arm == "swiglu"]
        covered += found.interval[0] < 0 < found.interval[1]
    assert covered > 52


def test_what_scatters_much_is_undecided_and_an_edge_is_no_rate(tmp_path):
    noisy = read_results(make(plan_of(*WORDS), tmp_path / "noisy", rule({}, scatter=0.1)))
    assert "undecided" in {shift.verdict for shift in shifts(noisy, "narrow")}
    far = read_results(make(plan_of(*WORDS), tmp_path / "far", rule({"swiglu": 6.0}, scatter=0.0)))
    found = {shift.arm: shift for shift in shifts(far, "narrow")}
    assert found["swiglu"].verdict == "no best learning rate at wide: it is the highest tried"
    assert math.isnan(found["swiglu"].shift)


def test_the_command_begins_with_the_smallest_size(tmp_path, in_process):
    folder = make(plan_of(*WORDS), tmp_path, rule({"swiglu": 0.9}))
    result = in_process(main, str(folder))
    assert result.status == 0
    lines = result.out.splitlines()
    assert lines[0] == "how far the best learning rate lies above that of narrow, in factors of two"
    assert [line.split()[:2] for line in lines[2:]] == [["relu", "wide"], ["swiglu", "wide"]]
    assert lines[3].rstrip().endswith("does not transfer")
    assert in_process(main, str(folder), "from=deep").status == 2


def finish(plan: Plan, folder, loss) -> list[str]:
    """Train what a plan asks for, one sweep and one seed after another."""
    trained = []
    for pair in plan.size_arm_pairs():
        while pending := sweep_progress(plan, folder, *pair).pending:
            for planned in pending:
                write_run(plan, planned, folder, loss(planned))
                trained.append(planned.name)
    for pair in plan.size_arm_pairs():
        for planned in plan.final_runs(*pair, sweep_progress(plan, folder, *pair).best_lr):
            write_run(plan, planned, folder, loss(planned))
            trained.append(planned.name)
    return trained


def test_sizes_take_the_learning_rates_of_the_one_that_sweeps(tmp_path):
    plan = plan_of(*WORDS, "ablation.sweep_at=narrow", "ablation.horizons=[0.5,1]")
    loss = lambda planned: 3.0 + 0.1 * math.log2(planned.lr / (5e-3 if "narrow" in planned.size else 2e-3)) ** 2  # noqa: E731
    folder = make(plan, tmp_path, loss, [])
    assert all("wide" not in task for task in slurm._open_tasks(plan, folder)["sweep"])
    assert len(slurm._open_tasks(plan, folder)["sweep"]) == 2 * 2
    trained = finish(plan, folder, loss)
    assert len(trained) == len(set(trained)) == plan.count_runs() == 2 * 2 * 3 * 2 + 4 * 2 * 3
    results = read_results(folder)
    assert results.notes == ()
    assert results.best_lr("narrow", "swiglu") == 5e-3
    assert results.best_lr("wide", "swiglu") == results.best_lr("wide_x0.5", "relu") == 2.5e-3
    assert results.sweep("wide", "relu").rise == results.sweep("narrow", "relu").rise
    assert results.regrets("wide").keys() == {"relu", "swiglu"}
    assert not results.blocked("wide")
    assert len(results.comparisons("wide")) == 1
    assert Watcher(folder).snapshot().done
    assert "of the sweep at narrow (ablation.sweep_at)" in page(results, [])
    with pytest.raises(UserError, match="swept at narrow alone"):
        shifts(results, "narrow")
    assert read_manifest(folder).plan.sweep_at == "narrow"


def test_an_unknown_size_cannot_sweep():
    with pytest.raises(UserError, match=r"unknown ablation\.sweep_at 'nano'"):
        plan_of(*WORDS, "ablation.sweep_at=nano")
