"""Speed-ups within curves, and ranks at two sizes."""

from __future__ import annotations

import math

import pytest

from ablation.curves import effective_speed_up, loss_at, rank_stability


def test_a_speed_up_is_read_off_the_baselines_own_curve():
    compute = [1.0, 2.0, 4.0, 8.0]
    curve = [4.0, 3.5, 3.0, 2.5]  # half a nat a doubling
    same = effective_speed_up(compute, curve, 2.5, 8.0)
    assert (same.factor, same.extrapolated) == (pytest.approx(1.0), False)
    assert effective_speed_up(compute, curve, 3.0, 2.0).factor == pytest.approx(2.0)
    assert effective_speed_up(compute, curve, 3.25, 2.0).factor == pytest.approx(2**1.5 / 2)
    beyond = effective_speed_up(compute, curve, 2.25, 8.0)
    assert (beyond.factor, beyond.extrapolated) == (pytest.approx(2**0.5), True)
    assert math.isnan(effective_speed_up(compute, curve, 0.5, 8.0).factor)  # more than 4 times: a guess
    assert math.isnan(effective_speed_up(compute, curve, 4.5, 8.0).factor)  # before its first point
    assert math.isnan(effective_speed_up(compute, curve, math.nan, 8.0).factor)
    assert math.isnan(
        effective_speed_up(compute, curve, 3.0, 0.0).factor
    )  # an arm whose last evaluation is of no tokens


def test_a_loss_that_rises_again_counts_when_it_was_reached():
    assert effective_speed_up([1, 2, 4, 8], [4.0, 3.0, 3.2, 2.0], 3.0, 2.0).factor == pytest.approx(1.0)


def test_the_loss_at_a_place_of_a_curve():
    assert loss_at([10, 20], [3.0, 2.0], 15) == 2.5
    assert math.isnan(loss_at([10, 20], [3.0, 2.0], 21))
    assert math.isnan(loss_at([], [], 1))


def test_ranks_that_change_between_sizes_are_named():
    found = rank_stability({"a": 3.0, "b": 3.1, "c": 3.2}, {"c": 2.7, "a": 2.5, "b": 2.8, "d": 1.0})
    assert found.swapped == [("b", "c")]
    assert found.tau == pytest.approx(1 / 3)
    assert rank_stability({"a": 1.0, "b": 2.0}, {"a": 0.5, "b": 0.6}).tau == 1.0
    assert math.isnan(rank_stability({"a": 1.0}, {"a": 1.0}).tau)
