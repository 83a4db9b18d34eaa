"""The time of a step: what it is made of, and that better hardware never makes it longer."""

from __future__ import annotations

import dataclasses

import pytest

from conf.load import load, read_group
from conf.schema import ClusterConfig, ParallelConfig
from launch.estimate.counts import flops_per_token, rank_parameters, shape_of, tensor_traffic, zero_traffic
from launch.estimate.step_time import GEMM_EFFICIENCY, NETWORK_EFFICIENCY, ParallelLayout, step_time

H100, _ = read_group("cluster", ClusterConfig, ["cluster=h100"], "cluster")
LLAMA = load(["model=llama3_8b", "ffn=swiglu"])


def test_a_step_is_made_of_what_is_counted():
    shape, hardware = shape_of(LLAMA), H100.hardware
    layout = ParallelLayout(shape, 8192, 16, 8, ParallelConfig(tensor=2, sequence=True), 1, 2, 4)
    step = step_time(layout, hardware)
    tokens = 2 * 4 * 8192
    flops = sum(flops_per_token(shape, 8192).values()) * tokens / 2
    assert step.products == pytest.approx(flops / (hardware.bf16_flops * GEMM_EFFICIENCY))
    sent = 4 * sum(tensor_traffic(shape, layout.parallel, 2 * 8192, 2).values())
    assert step.tensor == pytest.approx(sent / (hardware.node_bandwidth * NETWORK_EFFICIENCY))
    assert layout.dp_cp == 8  # of 16 ranks have the same part; 4 of these are on a node, with a network card each
    total = sum(zero_traffic(rank_parameters(shape, 2), 8, 1, 4, 2).values())
    assert step.data == pytest.approx(total / (4 * hardware.network_bandwidth * NETWORK_EFFICIENCY))
    assert layout.tokens == 8 * tokens
    overlapped = step_time(dataclasses.replace(layout, overlap=1.0), hardware)
    assert overlapped.data == 0
    assert overlapped.products == step.products


def test_more_power_memory_and_network_are_never_slower():
    layout = ParallelLayout(shape_of(LLAMA), 8192, 64, 8, stage=3, recompute=1.0)
    slow = step_time(layout, H100.hardware).total
    for key, factor in (("bf16_flops", 2), ("memory_bandwidth", 2), ("network_bandwidth", 2), ("network_latency", 0.5)):
        faster = dataclasses.replace(H100.hardware, **{key: getattr(H100.hardware, key) * factor})
        assert step_time(layout, faster).total < slow, key
    limited = step_time(layout, dataclasses.replace(H100.hardware, watts=350.0))
    assert limited.products == pytest.approx(step_time(layout, H100.hardware).products * 2 ** (1 / 3))
