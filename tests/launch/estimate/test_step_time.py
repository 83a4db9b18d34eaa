"""The time of a step: what it is made of, and that better hardware never makes it longer."""

from __future__ import annotations

import dataclasses

import pytest

from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from conf.load import load
from conf.schema import OptimConfig, ParallelConfig
from conf.shape import shape_of
from launch.estimate.counts import flops_per_token, logits_rows, rank_parameters, tensor_traffic, zero_traffic
from launch.estimate.optimizer import optimizer_flops
from launch.estimate.step_time import (
    GEMM_EFFICIENCY,
    NETWORK_EFFICIENCY,
    ParallelLayout,
    loss_bytes,
    overlapped,
    step_time,
    traffic,
)

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
    hidden = step_time(dataclasses.replace(layout, overlap=1.0), hardware)
    weights = zero_traffic(rank_parameters(shape, 2), 8, 1, 4, 2)[
        "weights"
    ]  # they are gathered after the optimizer step
    assert hidden.data == pytest.approx(weights / (4 * hardware.network_bandwidth * NETWORK_EFFICIENCY))
    assert hidden.products == step.products
    assert step_time(dataclasses.replace(layout, overlap=1.0, overlap_weights=True), hardware).data == 0


@pytest.mark.parametrize(
    ("stage", "bf16", "micro_batches", "expected"),
    [
        (0, False, 1, (0.0, False)),
        (1, True, 1, (2 / 3, False)),
        (1, True, 4, (0.0, False)),  # DeepSpeed's optimizer for fp32 sums reduces after backward
        (1, False, 4, (1 / 6, False)),
        (2, True, 4, (2 / 3, False)),
        (3, True, 4, (1.0, True)),
    ],
)
def test_overlap_is_credited_where_deepspeed_overlaps(stage, bf16, micro_batches, expected):
    fraction, weights = overlapped(stage, bf16, micro_batches)
    assert (pytest.approx(fraction), weights) == expected


@pytest.mark.parametrize("arm", ["swiglu", "relu2"])
def test_what_a_layer_drops_is_computed_again(arm):
    """`ffn.save=input` repeats the projections into the layer; `everything` spares writing h again."""
    step = {}
    for save in ("packed", "input", "everything"):
        shape = shape_of(load(["model=llama_1b", f"ffn={arm}", f"ffn.save={save}"]))
        step[save] = step_time(ParallelLayout(shape, 2048, 8, 8), H100.hardware)
    layer = shape.ffn[0]
    flops = 2 * (layer.matrices - 1) * shape.d_model * layer.d_ff * shape.n_layers * 2048
    more = flops / (H100.hardware.bf16_flops * GEMM_EFFICIENCY)
    assert step["input"].products - step["packed"].products == pytest.approx(more)
    assert step["input"].memory == step["packed"].memory
    less = 2 * layer.d_ff * shape.n_layers * 2048 / H100.hardware.memory_bandwidth
    assert step["packed"].memory - step["everything"].memory == pytest.approx(less)


def test_the_loss_costs_what_its_chunks_read_and_write():
    shape = shape_of(load(["model=llama_60m"]))
    entries = shape.vocab_size * shape.d_model
    gpu, cpu = (loss_bytes(shape, 65536, 2, 1, on_gpu) for on_gpu in (True, False))
    rows = logits_rows(65536, shape.vocab_size, False)
    logits = 6 * 2 * 65536 * shape.vocab_size
    assert gpu == logits + (8 * -(-65536 // logits_rows(65536, shape.vocab_size, True)) + 10) * entries
    assert cpu == logits + (8 * (65536 // rows) + 10) * entries
    assert cpu > 1.5 * gpu  # small chunks read and write the sum of the weight's gradient once each
    assert loss_bytes(shape, 65536, 2, 2, True) == pytest.approx(gpu / 2, rel=0.1)


def test_more_power_memory_and_network_are_never_slower():
    layout = ParallelLayout(shape_of(LLAMA), 8192, 64, 8, stage=3, recompute=1.0)
    slow = step_time(layout, H100.hardware).total
    for key, factor in (("bf16_flops", 2), ("memory_bandwidth", 2), ("network_bandwidth", 2), ("network_latency", 0.5)):
        faster = dataclasses.replace(H100.hardware, **{key: getattr(H100.hardware, key) * factor})
        assert step_time(layout, faster).total < slow, key
    limited = step_time(layout, dataclasses.replace(H100.hardware, watts=350.0))
    assert limited.products == pytest.approx(step_time(layout, H100.hardware).products * 2 ** (1 / 3))


def test_offloaded_weights_come_from_the_host_before_every_gather():
    shape, hardware = shape_of(LLAMA), H100.hardware
    layout = ParallelLayout(shape, 8192, 8, 8, stage=3, micro_batches=4)
    own = rank_parameters(shape, 1)
    for offload, times in ((False, 2 * 4 + 1), (True, 2 * 4)):  # an optimizer on the GPU writes its weights back
        host = dataclasses.replace(layout, offload=offload, offload_parameters=True)
        within, step = step_time(dataclasses.replace(layout, offload=offload), hardware), step_time(host, hardware)
        assert traffic(host)["host"] == times * 2 * own / 8
        assert step.host == pytest.approx(times * 2 * own / 8 / hardware.host_bandwidth)
        assert step.total == pytest.approx(within.total + step.host)
        assert step_time(dataclasses.replace(host, overlap=1.0, overlap_weights=True), hardware).host == 0
        assert (within.host, traffic(layout)["host"]) == (0, 0)
    slow = dataclasses.replace(hardware, host_bandwidth=1e6)
    hidden = step_time(dataclasses.replace(host, overlap=1.0, overlap_weights=True), slow)
    assert hidden.host == pytest.approx(step_time(host, slow).host - hidden.products - hidden.memory)


def test_muon_multiplies_matrices_and_brings_them_together():
    shape, hardware = shape_of(LLAMA), H100.hardware
    adamw, muon = (
        ParallelLayout(shape, 8192, 16, 8, ParallelConfig(tensor=2), stage=1, optim=OptimConfig(name=name))
        for name in ("adamw", "muon")
    )
    # q and out, k and v, gate, up and down of 32 layers: five steps of X X^T, its square, and a product with X.
    flops = (
        32
        * 5
        * sum(
            number * (4 * short**2 * long + 2 * short**3)
            for number, short, long in ((2, 4096, 4096), (2, 1024, 4096), (3, 4096, 14336))
        )
    )
    assert optimizer_flops(shape, muon.optim, 16) == flops / 16
    assert optimizer_flops(shape, adamw.optim, 16) == 0
    # More ranks than matrices: some rank has a whole one.
    assert optimizer_flops(shape, muon.optim, 10**6) == 5 * (4 * 4096**2 * 14336 + 2 * 4096**3)
    # There and back, in bf16, but for what a rank has itself.
    hidden = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    sent = traffic(muon)["optimizer"]
    assert sent == pytest.approx(2 * 2 * hidden / 16 * 15 / 16)
    assert traffic(adamw)["optimizer"] == 0
    longer = step_time(muon, hardware).optimizer - step_time(adamw, hardware).optimizer
    computing = flops / 16 / (hardware.bf16_flops * GEMM_EFFICIENCY)
    travelling = sent / (8 * hardware.network_bandwidth * NETWORK_EFFICIENCY)
    less = 4 * hidden / 2 / 8 / hardware.memory_bandwidth  # bytes of the second moment, read and written in part
    assert longer == pytest.approx(computing + travelling - less, rel=0.01)
    assert step_time(muon, hardware).products == step_time(adamw, hardware).products
