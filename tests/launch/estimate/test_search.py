"""What is estimated of a configuration, which others fit, and what would have to change when none does."""

from __future__ import annotations

import dataclasses
import re

import pytest

from conf.cluster_schema import ClusterConfig, HardwareConfig
from conf.group import read_group
from conf.load import load
from launch.estimate.counts import parameters
from launch.estimate.search import estimate, fast_then_small, overrides_of, search, what_would_fit

H100, _ = read_group("cluster", ClusterConfig, ["cluster=h100"], "cluster")
LLAMA = load(["model=llama3_8b", "ffn=swiglu"])


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


def test_the_dtype_is_that_of_training():
    by_words = {words: estimate(load(["model=llama_125m", *words]), H100, 8, 8) for words in (
        ("zero=0",), ("zero=0", "precision=fp32"), ("zero=1",), ("zero=1", "precision=bf16"), ("zero=1", "precision=fp8"),
    )}  # fmt: skip
    assert [each.precision for each in by_words.values()] == ["fp32", "fp32", "bf16", "bf16", "fp8"]
    auto, fp32 = by_words["zero=0",], by_words["zero=0", "precision=fp32"]
    assert (auto.memory, auto.step) == (fp32.memory, fp32.step)
    assert all(each.precision == "bf16" for each in search(load(["model=llama_125m", "zero=0"]), H100, 8, 8))
    without = dataclasses.replace(H100, hardware=dataclasses.replace(H100.hardware, bf16_flops=0.0))
    assert estimate(load(["model=llama_125m"]), without, 8, 8).precision == "fp32"


@pytest.mark.parametrize(
    "words", [["zero=0"], ["zero=1"], ["zero=2", "zero.offload_optimizer=true"], ["zero=3"], ["zero=offload"]]
)
def test_the_overrides_of_a_candidate_give_its_estimate(words):
    found = sorted(search(load(["model=llama3_8b", *words]), H100, 2, 2), key=fast_then_small)
    found = found or list(search(load(["model=llama_1b", *words]), H100, 2, 2))
    for candidate in (found[0], next(each for each in found if each.config.parallel.tensor == 2)):
        model = f"model={candidate.config.model.name}"
        for beside in ([], words):  # typed in their place, or behind them
            again = estimate(load([model, *beside, *overrides_of(candidate)]), H100, 2, 2)
            assert again.memory == candidate.memory
            assert again.step.total == candidate.step.total


def test_a_model_fits_whose_weights_are_on_the_host():
    words = ["model=llama3_70b", "zero=3", "zero.offload_optimizer=true"]
    within, offloaded = (estimate(load([*words, *more]), H100, 8, 8) for more in ([], ["zero.offload_parameters=true"]))
    saved = sum(within.memory.values()) - sum(offloaded.memory.values())
    own = sum(parameters(within.shape).values())
    assert saved == pytest.approx(2 * own / 8, rel=1e-3)
    assert (within.fits, offloaded.fits) == (False, True)
    assert within.host_memory == {"optimizer": pytest.approx(12 * own, rel=1e-3)}  # of the eight together
    assert offloaded.host_memory["weights"] == pytest.approx(2 * own, rel=1e-3)
    assert estimate(LLAMA, H100, 8, 8).host_memory == {}
    on_cpus, _ = read_group("cluster", ClusterConfig, ["cluster=cpu"], "cluster")
    assert estimate(load([*words, "zero.offload_parameters=true"]), on_cpus, 4, 4).host_memory == {}


@pytest.mark.parametrize(
    ("cluster", "gpus", "per_node", "watts"),
    [("cpu", 4, 4, 40), ("cpu", 8, 4, 80), ("cpu", 2, 2, 40), ("h100", 8, 8, 10200), ("h100", 4, 4, 5100)],
)
def test_energy_is_that_of_the_nodes(cluster, gpus, per_node, watts):
    of, _ = read_group("cluster", ClusterConfig, [f"cluster={cluster}"], "cluster")
    found = estimate(load(["model=llama_125m", "micro_batch_size=1"]), of, gpus, per_node)
    assert found.megawatt_hours == pytest.approx(found.hours * watts / 1e6)
