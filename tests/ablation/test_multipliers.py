"""Compute multipliers: known curves, what is refused, intervals that cover, and the order of arms over horizons."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ablation.figures import scaling
from ablation.manifest import read_manifest
from ablation.measures import multiplier_over_horizons
from ablation.multipliers import Series, log_by_seed, log_multiplier, multipliers, series
from ablation.plan import Plan, PlannedRun
from ablation.rank_agreement import agreements, rank_agreement
from ablation.report import page
from ablation.results import read_results
from kernels.common.errors import UserError
from tests.ablation.made import make, plan_of

WORDS = ["ablation=glu_variants", "ablation.arms=[relu,gelu,swiglu]", "tokens=1200000", "ablation.seeds=[0,1,2]"]
HORIZONS = "ablation.horizons=[0.25,0.5,1]"


def curve(compute: np.ndarray, worth: float, asymptote: float = 0.0) -> np.ndarray:
    """Return losses of an arm that needs 1 / worth of the compute of the others."""
    return asymptote + (8.0 - asymptote) * (compute * worth / 1e12) ** -0.15


def points(asymptote: float = 0.0, noise: float = 0.0, seeds: int = 5, **worth: float) -> Series:
    compute, chance = np.array([2.5e14, 5e14, 1e15]), np.random.default_rng(0)
    losses = {
        arm: {s: curve(compute, w, asymptote) + chance.normal(0, noise, 3) for s in range(seeds)}
        for arm, w in worth.items()
    }
    return Series("nano", ["a", "b", "c"], dict.fromkeys(worth, compute), losses)


@pytest.mark.parametrize("asymptote", [0.0, 1.5])
@pytest.mark.parametrize("worth", [0.5, 0.9, 1.0, 1.3, 3.0])
def test_a_known_multiplier_is_found(worth, asymptote):
    of = points(asymptote, base=1.0, arm=worth)
    assert list(np.exp(list(log_by_seed(of, "arm", "base", asymptote).values()))) == pytest.approx([worth] * 5)
    assert list(np.exp(list(log_by_seed(of, "base", "arm", asymptote).values()))) == pytest.approx([1 / worth] * 5)


def rule_of(plan: Plan, worth: dict[str, float], asymptote: float = 0.0, scatter: float = 0.0):
    def loss(planned: PlannedRun) -> float:
        compute = np.array(float(plan.arms[planned.size][planned.arm].flops))
        chance = np.random.default_rng([planned.seed, len(planned.arm), len(planned.size)])
        of_rate = 0.05 * math.log2(planned.lr / 4e-3) ** 2
        return float(curve(compute, worth.get(planned.arm, 1.0), asymptote)) + of_rate + chance.normal(0, scatter)

    return loss


def test_the_multiplier_of_a_plan_is_that_of_its_curves(tmp_path):
    plan = plan_of(*WORDS, HORIZONS)
    assert list(plan.arms) == ["nano_x0.25", "nano_x0.5", "nano"]
    assert [plan.arms[place]["relu"].batch.steps for place in plan.arms] == [73, 146, 292] or (
        [plan.arms[place]["relu"].batch.steps / plan.arms["nano"]["relu"].batch.steps for place in plan.arms]
        == pytest.approx([0.25, 0.5, 1], abs=0.01)
    )
    results = read_results(make(plan, tmp_path, rule_of(plan, {"swiglu": 1.5, "gelu": 0.8}, asymptote=1.0)))
    assert (results.sizes, results.places) == (["nano"], list(plan.arms))
    [of] = series(results)
    found = multipliers(results, of)
    for arm, worth in {"swiglu": 1.5, "gelu": 0.8}.items():
        fixed, free = found[arm]
        assert free.factor == pytest.approx(worth, rel=0.01)
        assert free.asymptote == pytest.approx(1.0, abs=0.02)
        assert fixed.asymptote == 0.0
        assert fixed.factor == pytest.approx(worth, rel=0.1)
        assert (free.reason, fixed.reason) == ("", "")
    # An arm has as many FLOPs as others, but for what rounding its width leaves.
    by_seed = multiplier_over_horizons(results, "nano", "swiglu", "relu").by_seed
    assert by_seed == pytest.approx({seed: math.log(found["swiglu"][0].factor) for seed in (0, 1, 2)})
    assert all(c.arm in ("gelu", "swiglu") for c in results.comparisons("nano"))  # horizons are no family


def test_what_would_be_extrapolated_is_refused(tmp_path):
    plan = plan_of(*WORDS, HORIZONS)
    results = read_results(make(plan, tmp_path, rule_of(plan, {"swiglu": 5.0, "gelu": 0.1})))
    found = multipliers(results, series(results)[0])
    for both, front, back in ((found["swiglu"], "swiglu", "relu"), (found["gelu"], "relu", "gelu")):
        for m in both:
            assert math.isnan(m.factor)
            assert (
                m.reason
                == f"{front} is as good as {back} with less compute than its shortest run: add a shorter horizon"
            )


def test_an_interval_that_covers_1_is_said_so(tmp_path):
    plan = plan_of(*WORDS, HORIZONS)
    results = read_results(make(plan, tmp_path, rule_of(plan, {}, scatter=0.05)))
    found = multipliers(results, series(results)[0])
    assert {m.reason for both in found.values() for m in both} == {"the interval covers 1"}
    assert all(m.interval[0] < 1 < m.interval[1] for both in found.values() for m in both)


def test_rates_and_documents_widen_the_interval(tmp_path):
    plan = plan_of(*WORDS, HORIZONS)
    folder = make(plan, tmp_path, rule_of(plan, {"swiglu": 1.3}, scatter=0.01))
    [of] = series(read_results(folder))
    whole = multipliers(read_results(folder), of)["swiglu"][0]
    for path in folder.glob("runs/*/documents.json"):
        path.unlink()
    less = multipliers(read_results(folder), of)["swiglu"][0]
    assert less.factor == whole.factor
    assert whole.interval[0] < less.interval[0] < less.interval[1] < whole.interval[1]
    results = read_results(folder)
    values = np.array(list(log_by_seed(of, "swiglu", "relu").values()))
    alone = values.std(ddof=1) / math.sqrt(3)
    reach = (math.log(less.interval[1]) - math.log(less.interval[0])) / 2 / 4.302653
    losses = np.mean(list(of.losses["relu"].values()), 0)[-1]
    own = np.mean(list(of.losses["swiglu"].values()), 0)
    slope = -np.polyfit(np.log(of.compute["swiglu"]), np.log(own), 1)[0]
    regret = math.hypot(*(results.regrets("nano")[arm] for arm in ("relu", "swiglu"))) / (slope * losses)
    assert reach == pytest.approx(math.hypot(alone, regret), rel=1e-4)


def test_sizes_are_points_too_and_two_give_no_asymptote(tmp_path):
    sizes = "ablation.sizes={deep: model=nano model.n_layers=8, nano: model=nano}"
    plan = plan_of(*WORDS, sizes)
    results = read_results(make(plan, tmp_path, rule_of(plan, {"swiglu": 1.3})))
    [of] = series(results)
    assert (of.name, of.places) == ("all sizes", ["nano", "deep"])
    fixed, free = multipliers(results, of)["swiglu"]
    assert fixed.factor == pytest.approx(1.3, rel=0.01)
    assert free.reason == "an asymptote needs 3 points, there are 2"
    of_sizes = multiplier_over_horizons(results, "deep", "swiglu", "relu")
    assert (of_sizes.by_seed, of_sizes.refused) == ({}, "the plan has one horizon (ablation.horizons)")


def test_no_curve_goes_through_sizes_of_equal_compute_whose_orders_are_compared_all_the_same(tmp_path):
    plan = plan_of(*WORDS, "ablation.sizes={adamw: model=nano, muon: model=nano optim=muon}")
    worth = {"adamw": {"swiglu": 1.3, "gelu": 1.1}, "muon": {"swiglu": 0.8, "gelu": 0.9}}
    rules = {size: rule_of(plan, of_size) for size, of_size in worth.items()}
    results = read_results(make(plan, tmp_path, lambda planned: rules[planned.size](planned)))
    assert series(results) == []
    [found] = agreements(results)
    assert (found.one, found.other, found.tau) == ("adamw", "muon", -1.0)
    text = page(results, [])
    assert "pairs that change places" in text
    assert "multiplier, E = 0" not in text


@pytest.mark.parametrize(
    ("muon_lengths", "curves", "compared"),
    [
        (["muon", "muon_long"], {"adamw, adamw_long": 1.3, "muon, muon_long": 0.8}, ("adamw_long", "muon_long")),
        (["muon"], {"adamw, adamw_long": 1.3}, ("adamw", "muon")),
        (["muon_longer"], {"adamw, adamw_long": 1.3}, ("adamw_long", "muon_longer")),
    ],
)
def test_a_curve_goes_through_the_sizes_of_each_optimizer_and_orders_are_compared_at_equal_compute(
    tmp_path, muon_lengths, curves, compared
):
    tokens = {"": 1_200_000, "_long": 2_400_000, "_longer": 4_800_000}
    sizes = {
        name: f"optim={name.partition('_')[0]} tokens={tokens[name.removeprefix('adamw').removeprefix('muon')]}"
        for name in ["adamw", "adamw_long", *muon_lengths]
    }
    others = (word for word in WORDS if not word.startswith("tokens="))
    plan = plan_of(*others, f"ablation.sizes={{{', '.join(f'{name}: {words}' for name, words in sizes.items())}}}")
    worth = {"adamw": {"swiglu": 1.3, "gelu": 1.1}, "muon": {"swiglu": 0.8, "gelu": 0.9}}
    rules = {size: rule_of(plan, worth[size.partition("_")[0]]) for size in sizes}
    results = read_results(make(plan, tmp_path, lambda planned: rules[planned.size](planned)))
    assert [of.name for of in series(results)] == list(curves)
    factors = [multipliers(results, of)["swiglu"][0].factor for of in series(results)]
    assert factors == pytest.approx(list(curves.values()), rel=0.01)
    within = [tuple(name.split(", ")) for name in curves]
    assert [(found.one, found.other, found.tau) for found in agreements(results)] == [
        *((one, other, 1.0) for one, other in within),
        (*compared, -1.0),
    ]


def test_a_diverged_or_missing_point_leaves_no_multiplier(tmp_path):
    plan = plan_of(*WORDS, HORIZONS)
    rule = rule_of(plan, {"swiglu": 1.3})
    diverges = lambda p: math.nan if (p.arm, p.size, p.seed) == ("swiglu", "nano_x0.5", 1) else rule(p)  # noqa: E731
    results = read_results(make(plan, tmp_path, diverges))
    assert set(multipliers(results, series(results)[0])) == {"gelu"}
    one = read_results(make(plan_of(*WORDS), tmp_path / "one", rule_of(plan_of(*WORDS), {})))
    assert series(one) == []


def test_intervals_cover_as_often_as_they_say():
    """Of seeds alone: 95% of 400 simulated pairs, within 3 standard errors."""
    covered, tries, worth = 0, 400, 1.2
    compute = np.array([2.5e14, 5e14, 1e15])
    for number in range(tries):
        chance = np.random.default_rng(number)
        losses = {
            arm: {s: curve(compute, w) + chance.normal(0, 0.01, 3) for s in range(5)}
            for arm, w in {"base": 1.0, "arm": worth}.items()
        }
        of = Series("", ["a", "b", "c"], dict.fromkeys(losses, compute), losses)
        values = np.array(list(log_by_seed(of, "arm", "base").values()))
        covered += abs(values.mean() - math.log(worth)) < 2.776445 * values.std(ddof=1) / math.sqrt(5)
    assert covered / tries == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / tries))


def test_the_order_of_arms_and_how_sure_it_is():
    smaller = {"a": {0: 3.0, 1: 3.02}, "b": {0: 3.1, 1: 3.12}, "c": {0: 3.2, 1: 3.22}}
    larger = {"c": {0: 2.7, 1: 2.71}, "a": {0: 2.5, 1: 2.51}, "b": {0: 2.8, 1: 2.81}, "d": {0: 1.0, 1: 1.0}}
    found = rank_agreement(smaller, larger, "small", "large")
    assert found.swapped == [("b", "c")]
    assert found.tau == pytest.approx(1 / 3)
    assert found.interval == pytest.approx((1 / 3, 1 / 3))  # the order of each seed is that of the means
    near = {"a": {0: 3.0, 1: 3.1}, "b": {0: 3.1, 1: 3.02}}
    assert rank_agreement(near, near, "", "").tau == 1.0
    assert rank_agreement(near, near, "", "").interval == (-1.0, 1.0)
    assert math.isnan(rank_agreement({"a": {0: 1.0}}, {"a": {0: 1.0}}, "", "").tau)
    diverged = rank_agreement(smaller | {"a": {0: 3.0, 1: math.nan}}, larger, "", "")
    assert diverged.swapped == [("b", "c")]
    assert diverged.tau == -1.0


def test_the_report_shows_the_multipliers_and_before_them_the_order(tmp_path):
    plan = plan_of(*WORDS, HORIZONS)
    results = read_results(make(plan, tmp_path, rule_of(plan, {"swiglu": 1.5}, scatter=0.002)))
    assert [(a.one, a.other) for a in agreements(results)] == [("nano_x0.25", "nano"), ("nano_x0.5", "nano")]
    text = page(results, [figure := scaling(results)])
    assert text.index("pairs that change places") < text.index("multiplier, E = 0") < text.index("loss at equal time")
    assert "nano, over its horizons: relu needs 1.5" in text
    assert figure.name == "scaling"
    assert "speed-up" not in text.lower()


def test_horizons_are_added_to_a_plan_like_sizes(tmp_path):
    from tests.ablation.test_growth import grow

    folder = make(plan_of("ablation=glu_variants", "tokens=600000", "ablation.arms=[relu,swiglu]", "ablation.seeds=[0,1,2]"),
                  tmp_path, lambda planned: 3.0 + math.log2(planned.lr / 4e-3) ** 2)  # fmt: skip
    results = grow(folder, lambda planned: 3.0 + math.log2(planned.lr / 4e-3) ** 2, horizons="[0.5,1]")
    assert results.manifest.amendments[0]["added"] == {"horizons": [0.5]}
    assert read_manifest(folder).sizes == ["nano"]
    assert results.places == ["nano_x0.5", "nano"]


@pytest.mark.parametrize(
    ("horizons", "message"),
    [
        ("0.5", r"ablation\.horizons=0\.5 is no list"),
        ("[0.5]", r"must end with 1"),
        ("[0.5,2]", r"must end with 1"),
        ("[]", r"must end with 1"),
        ("[0.5,0.5,1]", r"must be distinct fractions"),
        ("[-0.5,1]", r"must be distinct fractions"),
        ("[half,1]", r"must be distinct fractions"),
    ],
)
def test_impossible_horizons_are_refused(horizons, message):
    with pytest.raises(UserError, match=message):
        plan_of(*WORDS, f"ablation.horizons={horizons}")


@pytest.mark.parametrize(("reached", "shortest", "refused"), [(1.2, 1.5, True), (1.3, 1.0, False)])
def test_what_is_reached_is_compute_of_the_arm_that_is_ahead(reached, shortest, refused):
    """The arms' compute differs by half; `reached` and `shortest` are the arm's, in 1e15 FLOPs."""
    cheap, dear = 1e15 * np.array([1.0, 2.0, 4.0]), 1.5e15 * np.array([1.0, 2.0, 4.0])
    compute = {"arm": dear, "base": cheap} if shortest == 1.5 else {"arm": cheap, "base": dear}
    at = {"arm": reached * 1e15, "base": compute["base"][-1]}  # where each has the loss 3
    losses = {
        side: {seed: 3.0 * (of / at[side]) ** -0.1 + 0.001 * seed for seed in range(3)} for side, of in compute.items()
    }
    found = log_multiplier(Series("all", ["a", "b", "c"], compute, losses), "arm", "base")
    assert bool(found.refused) == refused
