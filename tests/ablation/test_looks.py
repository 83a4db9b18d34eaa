"""Looks: what each may spend, published bounds, and how often sequences of t-tests err."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ablation.looks import _EDGES, SPENDINGS, Looks, _spent, _transition
from ablation.statistics import Pair, Verdict, compare


def looks(*counts: int, planned: int = 0, reserve: float = 0.0, spending: str = "obrien_fleming") -> Looks:
    return Looks(tuple(range(counts[-1])), counts, planned or counts[-1], reserve, spending)


@pytest.mark.parametrize("n", [3, 9])
def test_a_further_seed_leaves_the_distribution_of_t_as_it_is(n):
    """Where no look has decided anything, t of n + 1 seeds is distributed as t."""
    tails = 2 * stats.norm.sf(_EDGES)
    found = np.append(tails[:-1] - tails[1:], tails[-1]) @ _transition(n)
    above = np.cumsum(found[::-1])[::-1]
    assert above[_EDGES < 6] == pytest.approx(tails[_EDGES < 6], rel=0.01)
    assert above[_EDGES < 2.5] == pytest.approx(tails[_EDGES < 2.5], rel=3e-3)


def test_what_a_spending_function_spends():
    assert [_spent(n, 10, 0.0, "obrien_fleming", 0.05) for n in (5, 10)] == pytest.approx([0.00557, 0.05], abs=1e-5)
    assert [_spent(n, 10, 0.0, "pocock", 0.05) for n in (5, 10)] == pytest.approx([0.0310, 0.05], abs=1e-4)
    assert [_spent(n, 4, 0.2, "pocock", 0.05) for n in (4, 8, 400)] == pytest.approx([0.04, 0.045, 0.0499])


def test_a_single_look_has_the_whole_level_but_for_the_reserve():
    assert looks(5).level(0.05, 5) == pytest.approx(0.05, rel=1e-12)
    assert looks(5).paid(0.02, 5) == 0.02
    assert looks(3, 5, 15).paid(0.0, 5) == pytest.approx(0.0, abs=1e-4)  # the same difference in every seed
    kept = looks(5, reserve=0.1)
    assert kept.level(0.05, 5) == pytest.approx(0.045, rel=1e-12)
    assert kept.paid(0.009, 5) == pytest.approx(0.01)
    assert kept.paid(0.99, 5) == 1.0


def test_what_is_left_after_the_planned_looks_is_the_reserve():
    grown = looks(5, 10, planned=5, reserve=0.1)
    assert grown.level(0.05, 5) == pytest.approx(0.045, rel=1e-12)
    assert grown.level(0.05, 10) > 0.05 * 0.1 / 2  # more than is spent: looks share seeds
    nothing = looks(5, 10, planned=5)
    assert nothing.level(0.05, 10) == 0.0
    assert nothing.paid(1e-30, 10) == 1.0
    more = looks(5, 10, planned=5, reserve=0.4)
    assert more.level(0.05, 5) < grown.level(0.05, 5)
    assert more.level(0.05, 10) > grown.level(0.05, 10)


@pytest.mark.parametrize("spending", SPENDINGS)
def test_a_p_value_that_is_paid_for_rejects_where_its_level_does(spending):
    for look in (looks(5, 10, spending=spending), looks(4, 6, 9, planned=6, reserve=0.1, spending=spending)):
        for count in look.counts:
            for alpha in (0.05, 0.05 / 7, 1e-4):
                level = look.level(alpha, count)
                assert look.paid(level, count) == pytest.approx(alpha, rel=5e-3)
            paid = [look.paid(p, count) for p in (1e-20, 1e-12, 1e-6, 1e-3, 0.04, 0.3, 0.9, 1.0)]
            assert paid == sorted(paid)
            assert paid[-1] == pytest.approx(1.0)
            assert all(p <= 1.02 * after for p, after in zip((1e-20, 1e-12, 1e-6, 1e-3, 0.04), paid, strict=False))
            assert math.isnan(look.paid(math.nan, count))


def errors(look: Looks, alpha: float, plans: int, seed: int) -> float:
    """Return how many of so many plans without a difference have a t-test that rejects at any look."""
    samples = np.random.default_rng(seed).normal(size=(plans, look.counts[-1]))
    rejected = np.zeros(plans, bool)
    for count in look.counts:
        t = samples[:, :count].mean(1) / samples[:, :count].std(1, ddof=1) * math.sqrt(count)
        rejected |= np.abs(t) > stats.t.isf(look.level(alpha, count) / 2, count - 1)
    return float(rejected.mean())


@pytest.mark.parametrize(
    "look",
    [
        looks(5, 10),
        looks(3, 5, planned=3, reserve=0.1),
        looks(*range(3, 9), planned=5, reserve=0.1),
        looks(*range(5, 11), reserve=0.1, spending="pocock"),
        looks(*range(3, 21)),
    ],
    ids=lambda look: f"{look.counts[0]}-{look.counts[-1]}-{look.spending}",
)
def test_t_tests_at_all_looks_err_as_often_as_they_may(look):
    plans, last = 200_000, look.counts[-1]
    for alpha in (0.05, 0.01):
        spent = _spent(last, look.planned, look.reserve, look.spending, alpha)
        assert spent <= alpha
        assert errors(look, alpha, plans, 0) == pytest.approx(spent, rel=0.01, abs=3 * math.sqrt(spent / plans))


def test_a_comparison_pays_for_its_look_and_stops_at_it():
    base = {0: 3.0, 1: 3.1, 2: 2.9, 3: 3.05, 4: 2.95, 5: 3.0}
    shifts = (-0.010, -0.020, -0.012, -0.017, -0.014, 5.0)
    pair = Pair("arm", {seed: base[seed] + shift for seed, shift in enumerate(shifts)}, base)
    five = Pair("arm", {seed: pair.own[seed] for seed in range(5)}, base)
    look = Looks((5, 4, 3, 2, 1, 0), (2, 5), 5, 0.0)
    [found] = compare([pair], 0.01, looks=look)
    assert (found.seeds, found.verdict) == (5, Verdict.UNDECIDED)  # the outlier is among the first
    ordered = Looks(tuple(range(6)), (5, 8), 8, 0.0)
    [found], [alone] = compare([pair], 0.01, looks=ordered), compare([five], 0.01)
    assert found.difference == alone.difference
    assert found.p == ordered.paid(alone.p, 5) > alone.p
    assert found.interval[0] < alone.interval[0] < alone.interval[1] < found.interval[1]
    assert (found.interval[1] < 0) == (found.p < 0.05)
    assert found.verdict is Verdict.BETTER
    [early] = compare([pair], 0.01, looks=Looks(tuple(range(9)), (7, 9), 9, 0.0))
    assert (early.verdict, early.withheld, early.seeds) == (Verdict.UNDECIDED, True, 6)
    assert early.reason == "withheld until 7 seeds have ended: 6 have"
    assert math.isnan(early.p_holm)
    [spent] = compare([five], 0.01, looks=Looks(tuple(range(5)), (3, 5), 3, 0.0))
    assert (spent.verdict, spent.p_holm) == (Verdict.UNDECIDED, 1.0)
    assert spent.reason == "its earlier verdicts spent the whole error probability (ablation.reserve=0)"


def test_a_look_to_come_has_at_least_what_the_others_leave():
    plan = looks(3, 5, reserve=0.1)
    for alpha in (0.05, 0.05 / 7):
        assert plan.level_to_come(alpha, 3, 0) == plan.level_to_come(alpha, 2, 0) == pytest.approx(plan.level(alpha, 3))
        assert plan.level_to_come(alpha, 2, 3) == plan.level_to_come(alpha, 3, 3) == plan.level(alpha, 3)
        for count in (5, 8, 40):
            exact = Looks(plan.seeds, tuple(sorted({3, 5, count})), 5, 0.1).level(alpha, count)
            reached = 3 if count == 5 else 5
            assert 0 < plan.level_to_come(alpha, count, reached) <= exact * (1 + 1e-9)
        assert plan.level_to_come(alpha, 40, 5) == pytest.approx(exact, rel=0.15)
    assert looks(5).level_to_come(0.05, 6, 5) == 0.0  # without a reserve nothing is left
    assert [plan.at_least(count) for count in (1, 3, 4, 5, 6)] == [3, 3, 5, 5, 6]


def test_the_seeds_that_would_decide_are_those_of_a_look_and_paid_for():
    def found(when: Looks | None):
        base, own = dict.fromkeys(range(5), 3.0), {s: 3.005 + 0.0061 * (-1) ** s for s in range(5)}
        [comparison] = compare([Pair("a", own, base)], 0.01, looks=when)
        return comparison.needed

    assert found(None) < found(looks(5, reserve=0.1)) < math.inf
    assert found(looks(5, 40, reserve=0.1)) == 40
    assert found(looks(5)) == math.inf
