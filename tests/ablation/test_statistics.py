"""Verdicts: published tables, simulations with and without a difference, and each rule by itself."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from ablation import statistics
from ablation.looks import Looks
from ablation.statistics import Comparison, Pair, Verdict, at_every_size, compare, pairs_with
from ablation.ttest import ALPHA, POWER, _detectable, detectable_difference, holm, welch_test

# Shazeer 2020 (arXiv 2002.05202), table 1: held-out log-perplexity after 65,536 steps, mean and deviation of 4 runs.
SHAZEER = {
    "relu": (1.997, 0.005), "gelu": (1.983, 0.005), "swish": (1.994, 0.003), "glu": (1.982, 0.006),
    "bilinear": (1.960, 0.005), "geglu": (1.942, 0.004), "swiglu": (1.944, 0.010), "reglu": (1.953, 0.003),
}  # fmt: skip
CEILING = math.log(4096)


def published(runs: int, baseline: str, smallest_effect: float = 0.02) -> dict:
    """The comparisons of these arms by Welch's test: nothing is paired."""
    summaries = {arm: (*figures, runs) for arm, figures in SHAZEER.items()}
    others = [arm for arm in summaries if arm != baseline]
    tested = [statistics._TestedArm(arm, 0, 0, welch_test(summaries[arm], summaries[baseline])) for arm in others]
    return {found.arm: found for found in statistics._judge(tested, smallest_effect)}


def losses(generator: np.random.Generator, arms: int = 8, seeds: int = 5, deviation: float = 0.005) -> dict:
    """Losses of equally good arms: what a seed does to all of them, and what it does to each."""
    shared = generator.normal(3.0, 0.05, seeds)
    own = generator.normal(0.0, deviation / math.sqrt(2), (arms, seeds))  # so that differences have this deviation
    return {f"arm{arm}": dict(enumerate(shared + own[arm])) for arm in range(arms)}


def compared(data: dict, smallest_effect: float = 0.01, ceiling: float = CEILING, **more) -> list[Comparison]:
    return compare(pairs_with("arm0", data, ceiling, **more), smallest_effect)


def verdicts(data: dict, smallest_effect: float = 0.02, **more) -> dict[str, Verdict]:
    return {found.arm: found.verdict for found in compared(data, smallest_effect, **more)}


# ------------------------------------------------------------------------------------------------------ published tables


def test_shazeers_table_after_holm():
    against_relu = published(4, "relu")
    better = {arm for arm, found in against_relu.items() if found.verdict == Verdict.BETTER}
    assert better == {"gelu", "glu", "bilinear", "geglu", "swiglu", "reglu"}
    assert against_relu["swish"].verdict == Verdict.EQUIVALENT  # within 0.02
    assert published(4, "swiglu")["geglu"].verdict not in (Verdict.BETTER, Verdict.WORSE)


@pytest.mark.parametrize(
    ("arm", "p"),
    [
        ("gelu", 0.0075),
        ("swish", 0.35),
        ("glu", 0.009),
        ("bilinear", 5e-5),
        ("geglu", 4e-6),
        ("swiglu", 4e-4),
        ("reglu", 3e-5),
    ],
)
def test_the_p_values_of_that_table(arm, p):
    assert published(4, "relu")[arm].p == pytest.approx(p, rel=0.2)  # known to one or two digits


def test_geglu_and_swiglu_are_not_told_apart():
    assert published(4, "swiglu")["geglu"].p == pytest.approx(0.73, abs=0.01)


@pytest.mark.parametrize("runs", [1, 2])
def test_one_or_two_seeds_are_too_few(runs):
    assert {found.verdict for found in published(runs, "relu").values()} == {Verdict.UNDECIDED}


@pytest.mark.parametrize(
    ("seeds", "paired", "expected"),
    [
        (2, False, 5.65),
        (3, False, 3.07),
        (5, False, 2.03),
        (10, False, 1.33),
        (3, True, 3.26),
        (5, True, 1.68),
        (10, True, 1.0),
    ],
)
def test_the_smallest_detectable_difference(seeds, paired, expected):
    assert detectable_difference(seeds, paired=paired) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("alpha", [ALPHA, ALPHA / 50])
@pytest.mark.parametrize("freedom", [1.0, 1.3, 4.0, 8.0, 1000.0])
def test_its_power_is_that_of_the_noncentral_t(freedom, alpha):
    """Where SciPy's is no nan."""
    critical = stats.t.isf(alpha / 2, freedom)
    assert stats.nct.sf(critical, freedom, _detectable(freedom, alpha, POWER)) == pytest.approx(POWER, abs=1e-6)


def test_a_detectable_difference_is_detected_as_often_as_it_says():
    generator, tries, seeds = np.random.default_rng(1), 20_000, 5
    sample = generator.normal(detectable_difference(seeds), 1.0, (tries, seeds))
    found = float((stats.ttest_1samp(sample, 0.0, axis=1).pvalue < ALPHA).mean())
    assert found == pytest.approx(POWER, abs=4 * math.sqrt(POWER * (1 - POWER) / tries))


# ----------------------------------------------------------------------------------------------------------- simulations


@pytest.mark.slow
def test_where_nothing_differs_hardly_anything_is_found():
    generator = np.random.default_rng(2)
    wrong = sum(Verdict.BETTER in verdicts(losses(generator)).values() for _ in range(1000))
    assert wrong <= 50  # 5%


@pytest.mark.slow
@pytest.mark.parametrize("level", [ALPHA, ALPHA / 7])  # of one test, and of the strictest step of Holm
def test_an_arm_that_is_better_by_two_detectable_differences_is_found(level):
    generator, found = np.random.default_rng(3), 0
    difference = 2 * 0.005 * detectable_difference(5, alpha=level)
    for _ in range(300):
        data = losses(generator)
        data["arm3"] = {seed: loss - difference for seed, loss in data["arm3"].items()}
        found += verdicts(data)["arm3"] == Verdict.BETTER
    assert found >= 240  # 80%


# ------------------------------------------------------------------------------------------------------------- the rules


def fixed(*differences: float, arm: str = "arm1") -> dict:
    shared = [3.0, 3.1, 2.9, 3.05, 2.95][: len(differences)]
    return {"arm0": dict(enumerate(shared)), arm: {s: shared[s] + d for s, d in enumerate(differences)}}


def test_the_test_is_scipys_paired_one_and_the_interval_its_own():
    data = fixed(-0.010, -0.020, -0.012, -0.017, -0.014)
    [found] = compared(data)
    expected = stats.ttest_rel([*data["arm1"].values()], [*data["arm0"].values()])
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert found.difference == pytest.approx(-0.0146)
    assert found.verdict == Verdict.BETTER


def p_of_t(difference: float, error: float, freedom: float) -> float:
    return float(2 * stats.t.sf(abs(difference) / error, freedom))


def test_p_is_that_of_the_t_distribution_to_15_digits():
    generator = np.random.default_rng(5)
    for seeds in (3, 4, 5, 10):
        differences = generator.normal(-0.01, 0.01, seeds)
        pair = Pair("arm1", dict(enumerate(3.0 + differences)), dict.fromkeys(range(seeds), 3.0))
        differences = np.array([loss - 3.0 for loss in pair.own.values()])
        [found] = compare([pair], 0.01)
        error = differences.std(ddof=1) / math.sqrt(seeds)
        assert found.p == pytest.approx(p_of_t(differences.mean(), error, seeds - 1), rel=2e-15, abs=0)
    mean0, deviation0 = SHAZEER["relu"]
    for arm, found in published(4, "relu").items():
        mean, deviation = SHAZEER[arm]
        variances = [deviation**2 / 4, deviation0**2 / 4]
        freedom = sum(variances) ** 2 / sum(v**2 / 3 for v in variances)
        expected = p_of_t(mean - mean0, math.sqrt(sum(variances)), freedom)
        assert found.p == pytest.approx(expected, rel=2e-15, abs=0)


def test_a_regret_widens_the_interval_and_more_seeds_do_not_help():
    data, regrets = fixed(-0.010, -0.020, -0.012, -0.017, -0.014), {"arm0": 0.003, "arm1": 0.004, "other": 1.0}
    [plain], [found] = compared(data), compared(data, regrets=regrets)
    error = math.hypot(found.deviation / math.sqrt(5), 0.005)
    assert (found.regret, found.difference, found.deviation) == (0.005, plain.difference, plain.deviation)
    assert found.p == pytest.approx(p_of_t(found.difference, error, 4))
    reach = stats.t.isf(0.025, 4) * error
    assert found.interval == pytest.approx((found.difference - reach, found.difference + reach))
    assert found.detectable == pytest.approx(plain.detectable * error * math.sqrt(5) / found.deviation)
    same = fixed(-0.01, -0.01, -0.01)
    assert compared(same)[0].p == 0.0
    assert compared(same, regrets=regrets)[0].p == pytest.approx(p_of_t(0.01, 0.005, 2))


def test_the_order_of_seeds_does_not_matter_and_only_common_ones_count():
    data = fixed(-0.010, -0.020, -0.012, -0.017)
    turned = {"arm0": data["arm0"], "arm1": dict(reversed(data["arm1"].items())) | {9: 7.0}}
    assert compared(turned) == compared(data)


def test_two_seeds_that_agree_are_still_too_few():
    [found] = compared(fixed(-0.5, -0.5))
    assert found.verdict == Verdict.UNDECIDED
    assert "2 seed(s)" in found.reason


def test_an_arm_that_differs_by_nothing_at_all_is_equivalent():
    [found] = compared(fixed(0.0, 0.0, 0.0))
    assert (found.verdict, found.p, found.p_equivalent, found.detectable) == (Verdict.EQUIVALENT, 1.0, 0.0, 0.0)
    [found] = compared(fixed(0.02, 0.02, 0.02))
    assert (found.verdict, found.p_equivalent) == (Verdict.WORSE, 1.0)


def test_equivalence_is_that_of_two_one_sided_tests():
    data = fixed(-0.003, 0.002, 0.001, -0.002, 0.0015)
    [found] = compared(data, 0.01)
    differences = [data["arm1"][seed] - data["arm0"][seed] for seed in range(5)]
    above = stats.ttest_1samp(differences, -0.01, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, 0.01, alternative="less").pvalue
    assert found.p_equivalent == pytest.approx(max(above, below))
    assert (found.verdict, found.reason) == (Verdict.EQUIVALENT, "the difference is smaller than 0.01 nats")
    assert compared(data, 0.001)[0].verdict == Verdict.UNDECIDED
    data |= {f"arm{i}": {seed: loss + 0.5 for seed, loss in data["arm0"].items()} for i in (2, 3)}
    assert compared(data, 0.01)[0].p_equivalent == pytest.approx(3 * max(above, below))  # one of three


def test_a_difference_that_is_shown_but_smaller_than_asked_for_is_said_so():
    [found] = compared(fixed(-0.010, -0.012, -0.011, -0.013, -0.012), 0.02)
    assert (found.verdict, found.reason) == (Verdict.BETTER, "by less than the 0.02 nats asked for")
    [found] = compared(fixed(0.010, 0.012, 0.011, 0.013, 0.012), 0.02)
    assert (found.verdict, found.reason) == (Verdict.WORSE, "by less than the 0.02 nats asked for")
    assert compared(fixed(-0.010, -0.012, -0.011, -0.013, -0.012), 0.01)[0].reason == ""


@pytest.mark.slow
def test_arms_that_differ_by_the_smallest_effect_are_hardly_ever_called_equivalent():
    generator, wrong = np.random.default_rng(6), 0
    for _ in range(1000):
        data = losses(generator, deviation=0.004)
        shifted = {arm: {s: loss + 0.02 * (arm != "arm0") for s, loss in of.items()} for arm, of in data.items()}
        wrong += Verdict.EQUIVALENT in verdicts(shifted, 0.02).values()
    assert wrong <= 50  # 5%


def test_what_would_not_have_been_found_is_undecided_and_the_seeds_that_decide_are_told():
    data = fixed(-0.03, 0.02, 0.01, -0.02, 0.015)
    [found] = compared(data)
    assert found.verdict == Verdict.UNDECIDED
    assert found.detectable == pytest.approx(found.deviation * detectable_difference(5))
    seeds = int(found.needed)
    assert found.deviation * detectable_difference(seeds) <= 0.01 < found.deviation * detectable_difference(seeds - 1)
    assert found.reason == (
        f"differences below {found.detectable:.3g} nats are not detectable here, 0.01 was asked for, which takes about "
        f"{seeds} seeds"
    )
    [found] = compared(data, regrets={"arm1": 0.01})
    assert found.needed == math.inf
    assert found.reason.endswith(", which takes a finer or repeated sweep")
    assert compared(data, 1.0)[0].verdict == Verdict.EQUIVALENT


def test_the_adjusted_interval_holds_for_all_pairs_together():
    data = losses(np.random.default_rng(7), arms=8)
    for found in compared(data):
        error = found.deviation / math.sqrt(5)
        for interval, alpha in ((found.interval, ALPHA), (found.adjusted, ALPHA / 7)):
            reach = stats.t.isf(alpha / 2, 4) * error
            assert interval == pytest.approx((found.difference - reach, found.difference + reach))


def test_how_losses_scatter_is_noted():
    own, base = [3.00, 3.30, 2.80, 3.10, 2.90], [3.01, 3.02, 3.00, 3.03, 2.99]
    [found] = compare([Pair("a", dict(enumerate(own)), dict(enumerate(base)))], 0.01)
    scatter = found.scatter
    assert (scatter.own, scatter.base) == pytest.approx((np.std(own, ddof=1), np.std(base, ddof=1)))
    assert scatter.correlation == pytest.approx(stats.pearsonr(own, base).statistic)
    assert scatter.p_unpaired == pytest.approx(stats.ttest_ind(own, base, equal_var=False).pvalue)
    assert scatter.notes == ("its losses scatter 12 times as much as the baseline's",)
    [found] = compare([Pair("a", dict(enumerate(base)), dict(enumerate(own)))], 0.01)
    assert found.scatter.notes == ("the baseline's losses scatter 12 times as much as its own",)
    [found] = compared(fixed(-0.010, -0.011, -0.0105, -0.012, -0.150))
    assert found.scatter.notes == ("its differences are skewed: one or two seeds decide",)
    [found] = compared(fixed(-0.010, -0.011, -0.0105, -0.012, -0.0095))
    assert found.scatter.notes == ("unpaired, the difference is not significant: it rests on the pairing of seeds",)
    [found] = compared(fixed(-0.010, 0.011, -0.0105, 0.012, 0.001))
    assert found.scatter.notes == ()


def test_a_diverged_seed_counts_and_its_arm_is_not_better():
    data = fixed(-0.010, -0.011, -0.010, -0.012, math.nan)
    [found] = compared(data)
    assert (found.seeds, found.diverged) == (5, 1)
    assert found.difference > 1
    assert found.verdict == Verdict.UNDECIDED
    assert "1 of 5 seeds diverged" in found.reason


def test_an_arm_that_always_diverges_is_worse():
    [found] = compared(fixed(*[math.inf] * 5))
    assert (found.verdict, found.reason) == (Verdict.WORSE, "5 of 5 seeds diverged")


def test_an_arm_with_a_diverged_seed_is_not_better_whatever_its_mean():
    data = fixed(-7.0, -7.1, -7.2, -7.0, -7.1)
    data["arm0"] = dict.fromkeys(data["arm0"], 11.0)
    data["arm1"][4] = math.nan
    [found] = compared(data, 100.0, ceiling=4.0)
    assert found.verdict != Verdict.BETTER


def test_a_blocked_arm_has_no_verdict_and_a_blocked_baseline_leaves_none():
    data = losses(np.random.default_rng(4), arms=3)
    assert verdicts(data, blocked={"arm1": "edge"})["arm1"] == Verdict.BLOCKED
    assert verdicts(data, blocked={"arm1": "edge"})["arm2"] != Verdict.BLOCKED
    found = compared(data, blocked={"arm0": "the baseline's best rate is the lowest", "arm1": "own"})
    assert {c.arm: c.reason for c in found} == {"arm1": "own", "arm2": "the baseline's best rate is the lowest"}


def test_pairs_have_their_own_baselines_and_are_adjusted_for_all_of_them():
    one, other = {0: 1.00, 1: 1.02, 2: 0.97}, {0: 1.50, 1: 1.53, 2: 1.49}
    own, others = {0: 1.10, 1: 1.13, 2: 1.06}, {0: 1.40, 1: 1.44, 2: 1.40}
    found = {c.arm: c for c in compare([Pair("a", one, own), Pair("b", other, others), Pair("none", {}, {})], 0.01)}
    [alone] = compare(pairs_with("base", {"a": one, "base": own}, 9.0), 0.01)
    assert (found["a"].difference, found["a"].p) == (alone.difference, alone.p)
    assert found["b"].difference == pytest.approx(0.28 / 3)
    first = min(found["a"], found["b"], key=lambda c: c.p)
    assert first.p_holm == pytest.approx(3 * first.p)  # one without seeds counts
    assert (found["none"].seeds, found["none"].verdict) == (0, Verdict.UNDECIDED)


def test_an_arm_is_better_at_every_size_by_its_largest_p():
    base = dict(enumerate([3.0, 3.01, 3.02, 2.99, 3.005]))

    def arm(name: str, difference: float, scatter: float = 0.001, **more) -> Pair:
        own = {seed: loss + difference + scatter * (-1) ** seed for seed, loss in base.items()}
        return Pair(name, own, base, **more)

    def at(*pairs: Pair) -> list[Comparison]:
        return compare(pairs, 0.01)

    small = at(arm("a", -0.1), arm("b", -0.1), arm("c", 0.1), arm("d", -0.1), arm("e", -0.1), arm("f", -0.1))
    large = at(arm("a", -0.05), arm("b", 0.1), arm("c", 0.2), arm("d", -0.1, blocked="why"), arm("e", -0.01, 0.05))
    assert at_every_size([small, large]) == {"c": Verdict.WORSE, "a": Verdict.BETTER}
    assert at_every_size([]) == at_every_size([small, []]) == {}
    diverged = arm("a", -0.05)
    large = at(Pair("a", dict(diverged.own) | {0: math.nan}, base, 8.0))
    assert "a" not in at_every_size([small, large])


def test_equal_arms_are_hardly_ever_better_at_every_size():
    plans, false = 100, 0
    for number in range(plans):
        chance = np.random.default_rng(number)
        found = [compare(pairs_with("arm0", losses(chance), math.inf), 0.001) for _ in range(2)]
        # Each arm differs at one size and at the other not: a claim about both is false.
        better = [dataclasses.replace(c, difference=-1.0, p=1e-9) for c in found[0]]
        false += bool(at_every_size([better, found[1]]))
    assert false <= 0.05 * plans + 3 * math.sqrt(0.05 * 0.95 * plans)


def test_a_margin_moves_what_better_and_worse_are_beside():
    pair = Pair("a", {0: 1.0, 1: 1.1, 2: 1.2}, {0: 1.101, 1: 1.199, 2: 1.3})  # better by 0.1
    verdicts = [compare([pair], 0.001, margin)[0].verdict for margin in (0.0, 0.05, 0.15)]
    assert verdicts == [Verdict.BETTER, Verdict.BETTER, Verdict.WORSE]


def test_a_missing_baseline_is_an_error():
    with pytest.raises(ValueError, match="no losses of the baseline 'relu'"):
        pairs_with("relu", {"arm0": {0: 1.0}}, CEILING)


def test_holms_own_steps():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    adjusted = holm([math.nan, 0.02])
    assert math.isnan(adjusted[0])
    assert adjusted[1] == pytest.approx(0.04)  # a test that could not be made counts


# ---------------------------------------------------------------------------------------- compute and sizes


def test_where_both_diverged_nothing_is_equivalent_and_a_common_seed_makes_no_arm_better():
    diverged = dict.fromkeys(range(5), math.nan)
    [found] = compare([Pair("a", diverged, diverged, 8.0)], 0.01)
    assert (found.verdict, found.reason) == (Verdict.UNDECIDED, "5 of 5 seeds diverged")
    base = {0: math.nan, 1: 3.0, 2: 3.01, 3: 3.02, 4: 3.0}
    [found] = compare([Pair("a", {seed: loss - 0.2 for seed, loss in base.items()}, base, 8.0)], 0.01)
    assert (found.verdict, found.reason) == (Verdict.UNDECIDED, "1 of 5 seeds diverged")
    [found] = compare([Pair("a", base | {0: 3.0}, base, 3.0 + 1e-4)], 0.01)
    assert (found.verdict, found.reason) == (Verdict.UNDECIDED, "1 of the baseline's 5 seeds diverged")


@pytest.mark.parametrize("first", [True, False])
def test_a_size_whose_verdict_is_withheld_says_nothing_of_every_size(first):
    base = dict(enumerate([3.0, 3.01, 3.02, 2.99, 3.005]))
    looks = Looks(tuple(range(5)), (5,), 5)
    whole = compare([Pair("a", {seed: loss - 0.1 for seed, loss in base.items()}, base)], 0.01, looks=looks)
    four = {seed: base[seed] for seed in range(4)}
    partial = compare([Pair("a", {seed: loss - 0.1 for seed, loss in four.items()}, four)], 0.01, looks=looks)
    assert partial[0].withheld
    assert at_every_size([whole, whole]) == {"a": Verdict.BETTER}
    assert at_every_size([partial, whole] if first else [whole, partial]) == {}
