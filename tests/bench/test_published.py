"""The step-time model against published runs, and the count of live tensors that measures memory."""

from __future__ import annotations

import gc

import pytest
import torch

from bench.estimate import live_tensors, published
from launch.estimate.step_time import GEMM_EFFICIENCY, NETWORK_EFFICIENCY

RUNS = {run.name: run for run in published()}


@pytest.mark.parametrize("name", RUNS)
def test_the_estimate_of_a_published_run_is_within_15_percent(name):
    run = RUNS[name]
    assert run.predicted() == pytest.approx(run.value, rel=0.15)


def test_the_two_constants_fit_best():
    def worst(efficiency: float, network: float) -> float:
        return max(abs(run.predicted(efficiency, network) / run.value - 1) for run in RUNS.values())

    best = worst(GEMM_EFFICIENCY, NETWORK_EFFICIENCY)
    for moved in (-0.01, 0.01):
        assert worst(GEMM_EFFICIENCY + moved, NETWORK_EFFICIENCY) > best
    # Only two runs depend on the network: a change of 0.1 may improve the fit by at most half a percent.
    for moved in (-0.1, 0.1):
        assert worst(GEMM_EFFICIENCY, NETWORK_EFFICIENCY + moved) > best - 0.005


def test_live_tensors_are_counted_once_and_until_they_are_freed():
    gc.collect()
    with live_tensors()(set()) as live:
        a = torch.zeros(1000)  # 4000 bytes
        view = a[10:].view(-1)
        assert (live.live, live.peak) == (4000, 4000)
        b = a * view.sum()
        sum_bytes = 4
        assert live.peak == 8000 + sum_bytes
        assert live.live == 8000
        del a, view
        assert live.live == 4000
        c = torch.empty(500)
        assert live.live == 6000
        del b, c
    assert (live.live, live.peak) == (0, 8000 + sum_bytes)
