"""False verdicts of simulated plans: a few of those of `python -m bench.verdicts`, and that the simulation is what it says."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from ablation.statistics import Verdict
from bench.verdicts import (
    DEVIATION,
    EFFECT,
    FULL,
    GRID,
    LOOKED,
    LOSS,
    TEXTS,
    UNEQUAL,
    SimulatedPlan,
    judge,
    main,
    simulate,
    verdicts,
)
from tests.training.tiny import ROOT


def test_a_seed_adds_the_same_to_every_run_and_losses_correlate_as_asked():
    chance, losses = np.random.default_rng(0), []
    for _ in range(2000):
        plan = SimulatedPlan(chance, 2, 0.6, EFFECT)
        best = [2.0 ** plan._best[arm] for arm in plan.arms]
        losses.append([plan.run(arm, lr, 7) for arm, lr in zip(plan.arms, best, strict=True)])
    one, other = zip(*losses, strict=True)
    # The standard errors: of a mean 0.03 / sqrt(2000), of a deviation 1 / sqrt(2 * 2000) of it, of r (1 - r^2) / sqrt(2000).
    assert statistics.mean(one) == pytest.approx(LOSS, abs=4 * DEVIATION / math.sqrt(2000))
    assert statistics.mean(other) == pytest.approx(LOSS - EFFECT, abs=4 * DEVIATION / math.sqrt(2000))
    assert statistics.stdev(one) == pytest.approx(DEVIATION, rel=4 / math.sqrt(4000))
    assert statistics.correlation(one, other) == pytest.approx(0.6, abs=4 * 0.64 / math.sqrt(2000))


def test_missed_learning_rates_make_false_verdicts_and_the_vertex_with_its_regret_does_not():
    """Of 40 plans: 47% expected of the grid, at most 5% here, where 7 or more come by chance in 3 of 1,000 cases."""
    before, after = (simulate(method, 10, 0.6, plans=40, arms=8, sizes=1, seed=1) for method in (GRID, FULL))
    assert before.false > 0.25
    assert after.false <= 6 / 40
    assert after.found >= 37 / 40  # 99% expected: 4 or more are missed by chance in 3 of 1,000 cases
    assert after.width < 1.2 * before.width


def test_an_arm_that_scatters_does_not_hide_what_the_others_show():
    """Of 40 plans, any of whose eight arms scatters ten times as much: 28 and 59% expected to find the better one."""
    pooled, own = (simulate(method, 5, 0.6, plans=40, arms=8, sizes=1, seed=1) for method in UNEQUAL[2:])
    assert own.found > pooled.found
    assert own.width < 0.7 * pooled.width
    assert own.false <= 6 / 40


def test_looks_that_are_not_paid_for_make_false_verdicts_and_those_that_are_do_not():
    """Of one arm, where 8.5% of plans are expected if looks are not paid for, and 5% if they are."""
    plans = 200
    found = [simulate(method, 10, 0.06, plans, arms=2, sizes=1, seed=2) for method in LOOKED[:2]]
    assert found[0].false >= 0.06 > found[1].false
    assert all(row.found > 0.9 for row in found)


def test_what_is_found_on_one_text_is_said_to_hold_for_others_only_where_it_does():
    here, elsewhere = (simulate(method, 10, 0.6, plans=100, arms=4, sizes=1, seed=3) for method in TEXTS[:2])
    assert here.false > 0.12
    assert elsewhere.false <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 100)
    assert elsewhere.found == 1.0
    assert elsewhere.width > here.width


def test_an_arm_at_the_edge_is_blocked_in_the_simulation_too():
    plan = SimulatedPlan(np.random.default_rng(0), 3, 0.6)
    plan._best = {"arm0": 0.0, "arm1": 40.0, "arm2": 0.1}
    [comparisons] = verdicts([plan], FULL, 5)
    found = {c.arm: c.verdict for c in comparisons}
    assert found["arm1"] is Verdict.BLOCKED
    assert found["arm2"] is not Verdict.BLOCKED


def test_the_product_adjusts_over_all_sizes():
    plans = [SimulatedPlan(np.random.default_rng(size), 3, 0.6) for size in (0, 1)]
    for method, family in ((GRID, 2), (FULL, 4)):
        [found] = verdicts(plans, method, 5)
        assert len(found) == 4
        smallest = min(found, key=lambda c: c.p)
        assert smallest.p_holm == pytest.approx(min(1.0, family * smallest.p))


def test_the_command_prints_a_row_per_method_correlation_and_number_of_seeds(capsys):
    main(["plans=1", "arms=2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + 3 * 2 * 3 + 4 * 2 * 3 + 4 * 2 + 4 * 2
    assert all(len(line) <= 80 for line in lines)


def test_of_the_runs_of_version_0_2_six_verdicts_stand():
    """As bench/results/glu_variants/README.md and the README say."""
    judged = list(judge(ROOT / "bench/results/glu_variants/results.csv", "relu"))
    better = sorted((size, c.arm) for size, *_, c in judged if c.verdict is Verdict.BETTER)
    at_nano, at_small = ("bilinear", "geglu", "swiglu"), ("geglu", "reglu", "swiglu")
    assert better == [*(("nano", arm) for arm in at_nano), *(("small", arm) for arm in at_small)]
    assert sum(c.verdict in (Verdict.BETTER, Verdict.WORSE) for *_, c, _ in judged) == 5 + 7
    text = (ROOT / "bench/results/glu_variants/README.md").read_text(encoding="utf-8")
    for size, sweep, regret, one, other in judged:
        cells = [size, one.arm, f"{sweep.best_lr:g}, {sweep.best_lr / 2**sweep.distance:.3g}", f"{regret:.3f}"]
        cells += [f"{c.interval[0]:+.3f} to {c.interval[1]:+.3f}, {c.p_holm:.2g}" for c in (one, other)]
        assert f"| {' | '.join(cells)} |" in text
