"""Sweeps: the vertex and when it counts, extensions, and what missing the best learning rate costs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ablation.learning_rates import Noise, arm_noises, mean_losses, next_learning_rate, sweep_result


def one_seed(**losses: float) -> dict:
    """Losses of one seed by learning rate, written r2e3 for 2e-3."""
    return {float(f"{name[1]}e-{name[3]}"): {1000: loss} for name, loss in losses.items()}


def valley(rates: list[float], best: float = 3e-3, rise: float = 0.06, noise: float = 0.0, seed: int = 0) -> dict:
    """Losses of two seeds on a parabola, with what a seed adds to all rates and noise."""
    chance = np.random.default_rng(seed)
    of_seeds = chance.normal(0, 0.05, 2)
    return {
        lr: {
            1000 + i: 3.0 + of_seeds[i] + rise * math.log2(lr / best) ** 2 + chance.normal(0, noise or 1e-30)
            for i in (0, 1)
        }
        for lr in rates
    }


def test_the_seeds_run_at_the_vertex():
    found = sweep_result(valley([2e-3, 4e-3, 8e-3], best=3e-3))
    assert (found.best_lr, found.edge, found.distance) == (3e-3, "", 0.0)
    assert found.rise == pytest.approx(0.06)
    assert found.loss == pytest.approx(np.mean(list(valley([3e-3])[3e-3].values())), abs=1e-6)
    assert sweep_result(valley([2e-3, 4e-3, 8e-3], best=3.3333e-3)).best_lr == 3.333e-3  # the digits of a run's name


def test_a_vertex_inside_counts_although_the_best_rate_is_the_lowest():
    found = sweep_result(valley([2e-3, 4e-3, 8e-3], best=2.2e-3))
    assert (found.best_lr, found.edge) == (2.2e-3, "")


@pytest.mark.parametrize(("best", "edge", "lr"), [(1.5e-3, "lowest", 2e-3), (9e-3, "highest", 8e-3)])
def test_a_vertex_outside_is_an_edge(best, edge, lr):
    found = sweep_result(valley([2e-3, 4e-3, 8e-3], best=best))
    assert (found.best_lr, found.edge) == (lr, edge)
    assert math.isnan(found.regret(Noise(0.03, 1.0)))


def test_an_almost_straight_line_has_its_vertex_far_outside():
    """So far that its learning rate is no float."""
    losses = one_seed(r2e3=3.0, r4e3=3.1, r8e3=3.2 + 1e-15)
    assert sweep_result(losses).edge == "lowest"


def test_finer_rates_all_join_the_fit_and_distant_ones_do_not():
    fine = [2e-3, 2.83e-3, 4e-3, 5.66e-3, 8e-3]
    coarse = sweep_result(valley([2e-3, 4e-3, 8e-3], best=4e-3))
    found = sweep_result(valley(fine, best=4e-3))
    assert found.best_lr == coarse.best_lr == 4e-3
    assert found.slope_variance < coarse.slope_variance
    steep = valley([*fine, 32e-3], best=4e-3) | {32e-3: {1000: 9.0, 1001: 9.0}}  # no parabola reaches that far
    assert sweep_result(steep) == found


def test_where_finer_rates_fit_no_minimum_the_neighbours_of_the_best_do():
    losses = one_seed(r2e3=3.0, r3e3=3.3, r4e3=3.25, r5e3=3.3, r8e3=3.0) | {3.9e-3: {1000: 2.99}, 4.1e-3: {1000: 3.4}}
    found = sweep_result(losses)
    assert found.edge == ""
    assert 3e-3 < found.best_lr < 4e-3


def test_a_rate_that_diverged_is_no_neighbour_of_a_parabola():
    """The optimum may lie between it and the best rate: the sweep goes half-way."""
    diverged = one_seed(r1e3=3.3, r2e3=3.1, r4e3=3.0, r8e3=math.nan)
    found = sweep_result(diverged)
    assert (found.best_lr, found.edge) == (4e-3, "highest")
    assert next_learning_rate(diverged, 4e-3, "highest") == 5.657e-3
    assert sweep_result(diverged | one_seed(r6e3=3.2)).edge == ""
    low = one_seed(r1e3=math.inf, r2e3=3.0, r4e3=3.1)
    assert next_learning_rate(low, 2e-3, sweep_result(low).edge) == 1.414e-3


def test_one_seed_that_diverged_takes_its_rate_out():
    losses = {1e-3: {0: 3.2, 1: 3.3}, 2e-3: {0: 3.0, 1: math.nan}, 4e-3: {0: 3.1, 1: 3.2}}
    assert mean_losses(losses) == pytest.approx({1e-3: 3.25, 2e-3: math.nan, 4e-3: 3.15}, nan_ok=True)
    assert sweep_result(losses).best_lr == 4e-3


def test_a_sweep_extends_by_the_ratio_at_its_edge():
    assert next_learning_rate([1e-3, 2e-3, 4e-3], 4e-3, "highest") == 8e-3
    assert next_learning_rate([4e-3, 1e-3, 2e-3], 1e-3, "lowest") == 5e-4
    assert next_learning_rate([1e-3, 3e-3, 4e-3], 1e-3, "lowest") == pytest.approx(1e-3 / 3, rel=1e-5)


@pytest.mark.parametrize("vertex", [True, False])
def test_no_finite_loss_is_an_error(vertex):
    with pytest.raises(ValueError, match="no learning rate"):
        sweep_result(one_seed(r1e3=math.inf), vertex)


# ------------------------------------------------------------------------------------------ the best of those tried (0.2)


def test_the_best_of_those_tried_is_inside_or_at_an_edge():
    found = sweep_result(one_seed(r1e3=3.2, r2e3=3.0, r4e3=3.1), vertex=False)
    assert (found.best_lr, found.loss, found.edge) == (2e-3, 3.0, "")
    assert found.rise == pytest.approx(0.15)  # the parabola's: (0.2 + 0.1) / 2
    assert found.distance == pytest.approx(math.log2(2e-3 / 2.245e-3))
    assert sweep_result(one_seed(r1e3=3.0, r2e3=3.1, r4e3=3.2), vertex=False).edge == "lowest"
    assert sweep_result(one_seed(r1e3=3.2, r2e3=3.1, r4e3=3.0), vertex=False).edge == "highest"
    assert sweep_result(one_seed(r1e3=3.0), vertex=False).edge == "lowest"


def test_a_rate_that_diverged_is_a_neighbour_of_the_best_tried():
    found = sweep_result(one_seed(r1e3=3.2, r2e3=3.0, r4e3=math.nan), vertex=False)
    assert (found.best_lr, found.edge) == (2e-3, "")
    assert math.isnan(found.rise)
    assert math.isnan(found.regret(Noise(0.03, 1.0)))


# ------------------------------------------------------------------------------------------------------------- the regret


@pytest.mark.parametrize("vertex", [True, False])
def test_the_regret_is_the_root_mean_square_of_what_was_lost(vertex):
    """Simulated: the optimum is missed by noise, and under the old rule by the grid too."""
    noise, rise, squares, told = 0.004, 0.06, [], []
    best = 4.6e-3
    for seed in range(3000):
        found = sweep_result(valley([2e-3, 4e-3, 8e-3], best, rise, noise, seed), vertex)
        squares.append((rise * math.log2(found.best_lr / best) ** 2) ** 2)
        told.append(found.regret(Noise(noise, 1.0)) ** 2)
    # `told` uses the curvature and the distance as fitted, which scatter too: 5% of the curvature here.
    assert math.sqrt(np.mean(told)) == pytest.approx(math.sqrt(np.mean(squares)), rel=0.15)


def test_noise_is_what_is_left_between_rows_and_seeds():
    """In the mean over 400 plans, whose three arms scatter by 0.1, 0.1 and 0.4."""
    chance, scatters = np.random.default_rng(1), {"one": 0.1, "other": 0.1, "wide": 0.4}
    variances = {arm: [] for arm in scatters}
    for _ in range(400):
        seeds = chance.normal(0.0, 1.0, 7)
        rows = {arm: chance.normal(3.0, 1.0, (4, 1)) + chance.normal(0.0, s, (4, 7)) for arm, s in scatters.items()}
        sweeps = {
            arm: {float(lr): dict(enumerate(row + seeds[5:])) for lr, row in enumerate(drawn[:3, 5:])}
            for arm, drawn in rows.items()
        }
        noises = arm_noises(sweeps, {arm: dict(enumerate(drawn[3, :5] + seeds[:5])) for arm, drawn in rows.items()})
        for arm, noise in noises.items():
            assert noise.freedom == pytest.approx(2 + 4 * 2 / 3)
            variances[arm].append(noise.deviation**2)
    of_compared = {arm: (s**2 + 0.18 / 3) / 2 for arm, s in scatters.items()}  # half is the mean of all
    for arm, scatter in scatters.items():
        expected = (2 * scatter**2 + 8 / 3 * of_compared[arm]) / (2 + 8 / 3)
        # A variance of about 4.7 degrees of freedom has a relative error of 0.65, and its mean over 400 plans of 0.033.
        assert np.mean(variances[arm]) == pytest.approx(expected, rel=4 * 0.033)


def test_noise_leaves_out_what_diverged_and_takes_that_of_all_where_an_arm_has_none():
    sweep = {1.0: {0: 3.0, 1: 3.2}, 2.0: {0: 3.1, 1: 3.1}}
    diverged = {1.0: {0: 3.0, 1: math.nan}, 2.0: {}}
    noises = arm_noises({"one": sweep, "none": diverged}, {"one": {0: 3.0}, "none": {0: 3.0}})
    assert noises["one"] == noises["none"] == Noise(pytest.approx(0.1), 1.0)
    partly = sweep | {4.0: {0: 3.0, 1: math.nan}}
    assert arm_noises({"one": partly}, {})["one"] == noises["one"]
    unknown = arm_noises({"one": {1.0: {0: 1.0}, 2.0: {0: 2.0}}}, {"one": {0: 1.0, 1: 2.0}})["one"]
    assert math.isnan(unknown.deviation)
    assert unknown.freedom == 0.0
