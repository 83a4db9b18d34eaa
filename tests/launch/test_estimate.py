"""Estimates: what they say of a configuration, what they find, and what they say when nothing fits."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest

from conf.errors import UserError
from conf.load import load, read_group
from conf.schema import ClusterConfig, HardwareConfig, ParallelConfig
from launch.estimate import estimate, main, search, what_would_fit
from launch.step_time import GEMM_EFFICIENCY, NETWORK_EFFICIENCY, Layout, step_time, traffic
from model.accounting import flops_per_token, rank_parameters, shape_of, tensor_traffic, zero_traffic
from tests.training.tiny import command

H100, _ = read_group("cluster", ClusterConfig, ["cluster=h100"], "cluster")
LLAMA = load(["model=llama3_8b", "ffn=swiglu"])


def test_a_step_is_made_of_what_is_counted():
    shape, hardware = shape_of(LLAMA), H100.hardware
    layout = Layout(shape, 8192, 16, 8, ParallelConfig(tensor=2, sequence=True), 1, 2, 4)
    step = step_time(layout, hardware)
    tokens = 2 * 4 * 8192
    flops = sum(flops_per_token(shape, 8192).values()) * tokens / 2
    assert step.products == pytest.approx(flops / (hardware.bf16_flops * GEMM_EFFICIENCY))
    sent = 4 * sum(tensor_traffic(shape, layout.parallel, 2 * 8192, 2).values())
    assert step.tensor == pytest.approx(sent / (hardware.node_bandwidth * NETWORK_EFFICIENCY))
    assert layout.replicas == 8  # of 16 ranks have the same part; 4 of these are on a node, with a network card each
    total = sum(zero_traffic(rank_parameters(shape, 2), 8, 1, 4, 2).values())
    assert step.data == pytest.approx(total / (4 * hardware.network_bandwidth * NETWORK_EFFICIENCY))
    assert layout.tokens == 8 * tokens
    hidden = step_time(dataclasses.replace(layout, hidden=1.0), hardware)
    assert hidden.data == 0
    assert hidden.products == step.products


def test_more_power_memory_and_network_are_never_slower():
    layout = Layout(shape_of(LLAMA), 8192, 64, 8, stage=3, recompute=1.0)
    slow = step_time(layout, H100.hardware).total
    for key, factor in (("bf16_flops", 2), ("memory_bandwidth", 2), ("network_bandwidth", 2), ("network_latency", 0.5)):
        faster = dataclasses.replace(H100.hardware, **{key: getattr(H100.hardware, key) * factor})
        assert step_time(layout, faster).total < slow, key
    limited = step_time(layout, dataclasses.replace(H100.hardware, watts=350.0))
    assert limited.products == pytest.approx(step_time(layout, H100.hardware).products * 2 ** (1 / 3))


def test_the_fastest_that_fits_is_found():
    found = list(search(LLAMA, H100, 8, 8))
    asked = estimate(LLAMA, H100, 8, 8)
    assert asked.fits
    assert asked.choice in {each.choice for each in found}
    fastest = min(found, key=lambda each: each.step.total)
    assert fastest.step.total <= asked.step.total
    assert all(each.fits for each in found)
    whole = {each.choice for each in search(LLAMA, dataclasses.replace(H100, hardware=_memory(1e9)), 8, 8)}
    assert {each.choice for each in found} < whole
    small = {each.choice for each in search(LLAMA, dataclasses.replace(H100, hardware=_memory(40)), 8, 8)}
    assert small < {each.choice for each in found}


def _memory(gib: float) -> HardwareConfig:
    return dataclasses.replace(H100.hardware, memory_gib=gib)


def test_arms_differ_in_what_they_compute_and_keep():
    common = ["model=llama3_8b", "zero=3", "model.activation_checkpointing=false"]
    by_arm = {arm: estimate(load([*common, f"ffn={arm}"]), H100, 64, 8) for arm in ("swiglu", "relu2")}
    gated, ungated = by_arm["swiglu"], by_arm["relu2"]
    assert gated.step.products == pytest.approx(ungated.step.products, rel=1e-6)  # the same FFN parameters
    # 2 x 14336 pre-activations against 21504.
    assert gated.memory["activations"] > ungated.memory["activations"]


@pytest.mark.parametrize(
    ("words", "gpus", "says"),
    [
        (["model=llama3_70b"], 8, r"nothing fits: the least is \d+\.\d GiB with .*, most of it optimizer; 4 nodes"),
        (
            ["model=llama_1b", "sequence_length=4194304", "global_batch_size=8", "micro_batch_size=1"],
            8,
            r"most of it .*; no number of nodes up to 16384 GPUs would do, or ",
        ),
    ],
)
def test_when_nothing_fits_it_says_what_would(words, gpus, says):
    config = load(words)
    assert list(search(config, H100, gpus, 8)) == []
    assert re.search(says, what_would_fit(estimate(config, H100, gpus, 8)))


def step_sent(said: str) -> float:
    """Return the gigabytes that a GPU sends in a step, as the command says."""
    return float(re.search(r"ZeRO's traffic.* ([\d.]+) *$", said, re.MULTILINE)[1])


def asked_traffic(words: list[str]) -> float:
    return traffic(estimate(load(words), H100, 16, 8).layout)["data"]


def test_the_command_says_it_all_and_draws(tmp_path, capsys):
    picture = tmp_path / "estimate.png"
    assert main(["cluster=h100", "nodes=2", "model=llama_1b", f"--plot={picture}"]) == 0
    said = capsys.readouterr().out
    sent = step_sent(said)
    assert sent == pytest.approx(asked_traffic(["model=llama_1b"]) / 1e9, rel=1e-3)
    for part in (
        "parameters",
        "weights",
        "optimizer",
        "fits",
        "matrix products",
        "MFU",
        "hours",
        "MWh",
        "$",
        "the first: ",
    ):
        assert part in said, part
    assert picture.read_bytes().startswith(b"\x89PNG")
    first = re.search(r"the first: (.*)", said)[1].split()
    config = load(["model=llama_1b", *first])
    assert estimate(config, H100, 16, 8).fits


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["model=nano"], "say which cluster: cluster=NAME"),
        (["cluster=h100", "nodes=3", "model=llama3_8b"], "cannot be shared evenly by 24"),
        (["cluster=h100", "ranks_per_node=9"], "a node of h100 has 8 GPUs"),
        (
            ["cluster=h100", "parallel.tensor=3", "ranks_per_node=3", "model=llama3_8b"],
            "parallel.tensor=3 does not divide",
        ),
        (["cluster=h100", "cluster.hardware.wats=3"], "wats"),
        (["cluster=cpu", "plot=/nowhere/e.png"], "cannot write the picture /nowhere/e.png"),
        (["cluster=cpu", "plot=/tmp/e.what"], "cannot write the picture /tmp/e.what"),
    ],
)
def test_bad_input_is_one_sentence(words, why):
    with pytest.raises(UserError, match=re.escape(why)):
        main(words)


def test_it_needs_neither_torch_nor_a_gpu():
    code = "import sys; from launch.estimate import main; main(['cluster=h100']); print('torch' in sys.modules)"
    result = command(sys.executable, "-c", code)
    assert result.status == 0, result.err
    assert result.out.splitlines()[-1] == "False"
