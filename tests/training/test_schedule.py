"""Learning-rate schedules: where they start, peak and end."""

from __future__ import annotations

import itertools
import math

import pytest

from conf.schema import ScheduleConfig
from training.schedule import lr_scale

STEPS = 100


def scales(steps: int = STEPS, **settings) -> list[float]:
    return [lr_scale(ScheduleConfig(**settings), step, steps) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_warm_up_is_linear_to_the_peak(name):
    values = scales(name=name, warmup=0.1)
    assert values[:10] == pytest.approx(
        [step / 10 for step in range(1, 11)]
    )  # not 0 at the first step, which would be wasted
    assert max(values) == values[9] == 1.0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_final_scale(name, final):
    values = scales(name=name, warmup=0.1, final=final)
    assert values[-1] == pytest.approx(final, abs=1e-15)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[9:]))


def test_cosine_and_linear_between():
    # Halfway between the end of warm-up (10 steps) and the last step: step 55 of 100.
    assert scales(name="cosine", warmup=0.1, final=0.2)[54] == pytest.approx(0.6)
    assert scales(name="linear", warmup=0.1, final=0.2)[54] == pytest.approx(0.6)
    quarter = 0.5 * (1 + math.cos(math.pi / 4))
    assert scales(104, name="cosine", warmup=4 / 104, final=0.0)[28] == pytest.approx(quarter)
    assert scales(104, name="linear", warmup=4 / 104, final=0.0)[28] == pytest.approx(0.75)


def test_wsd_is_flat_then_decays_linearly():
    values = scales(name="wsd", warmup=0.1, decay=0.2, final=0.5)
    assert values[9:80] == [1.0] * 71
    assert values[80:] == pytest.approx([1 - 0.5 * step / 20 for step in range(1, 21)])


def test_wsd_without_decay_stays_at_the_peak():
    assert scales(name="wsd", warmup=0.1, decay=0.0)[9:] == [1.0] * 91
    assert scales(20, name="wsd", warmup=0.0, decay=0.01) == [1.0] * 20  # less than half a step


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_changed_length_brings_no_other_warm_up(name):
    schedule = ScheduleConfig(name=name, warmup=0.1)
    assert lr_scale(schedule, 50, 10_000) < 0.06
    assert lr_scale(schedule, 50, 10_000, warmup=10) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_short_runs_have_scales_too(name, steps, warmup):
    values = scales(steps, name=name, warmup=warmup, decay=1 - warmup)
    assert all(0 <= value <= 1 for value in values)
