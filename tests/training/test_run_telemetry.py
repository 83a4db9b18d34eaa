"""Telemetry of a run: its figures do not depend on ranks, ZeRO and accumulation, and it does not change training."""

from __future__ import annotations

import itertools
import json
import math
import sys

import pytest
import torch

from bench.formulas import formulas
from kernels import activation
from tests.selection import quick
from tests.training.tiny import command, overrides
from training.engine import GradientFragment
from training.telemetry import ActivityWindow, add_signs

# Sums of fp32 numbers in another order, as in test_parity.py.
FP32 = 1e-5
STEPS = 3


def sampled(pool, corpus, **changes) -> tuple[list[float], list[dict]]:
    """Return the losses, and the figures of each step."""
    arguments = overrides(corpus, **{"telemetry_every": 1} | changes)
    results = pool.run("script", arguments=arguments, steps=[["train", STEPS]])
    assert all(each["telemetry"] == results[0]["telemetry"] for each in results), "ranks have different figures"
    assert [step for step, _ in results[0]["telemetry"]] == list(range(1, len(results[0]["telemetry"]) + 1))
    return results[0]["losses"], [figures for _, figures in results[0]["telemetry"]]


@pytest.fixture(scope="module")
def reference(one_rank, corpus):
    """The figures of one rank without ZeRO; the second of two layers is ungated."""
    return sampled(one_rank, corpus, zero="0", **MIXED)


MIXED = {"ffn": "reglu", "ffn__per_layer": "{last: relu2}"}
EXACT = ("dead", "revived", "window_tokens")


def assert_same(measured: list[dict], expected: list[dict]) -> None:
    assert len(measured) == len(expected) == STEPS
    for one, other in zip(measured, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            for a, b in zip(*(v if isinstance(v, list) else [v] for v in (one[name], other[name])), strict=True):
                if name in EXACT or a is None or b is None:
                    assert a == b, name
                else:
                    # A pre-activation at a threshold may change a count; a mean near 0 is a difference of large sums.
                    assert a == pytest.approx(b, rel=100 * FP32, abs=1e-4), name


@pytest.mark.parametrize("zero", [pytest.param("1", marks=pytest.mark.slow), "2", "3"])
def test_zero_does_not_change_the_figures(one_rank, corpus, reference, zero):
    losses, figures = sampled(one_rank, corpus, zero=zero, **MIXED)
    assert losses == pytest.approx(reference[0], rel=FP32)
    assert_same(figures, reference[1])


@pytest.mark.parametrize("zero", ["0", *(pytest.param(zero, marks=pytest.mark.slow) for zero in "12"), "3"])
def test_two_ranks_have_the_figures_of_one(two_ranks, corpus, reference, zero):
    assert_same(sampled(two_ranks, corpus, zero=zero, **MIXED)[1], reference[1])


def test_accumulation_does_not_change_the_figures(two_ranks, corpus, reference):
    assert_same(sampled(two_ranks, corpus, zero="2", micro_batch_size=2, **MIXED)[1], reference[1])


def test_a_recomputed_layer_is_not_counted_twice(one_rank, corpus, reference):
    _, figures = sampled(one_rank, corpus, zero="1", model__activation_checkpointing=True, **MIXED)
    assert_same(figures, reference[1])


def test_figures_of_a_gated_and_of_an_ungated_layer(reference):
    first = reference[1][0]
    assert all(len(value) == 2 for value in first.values() if isinstance(value, list))
    assert first["gate_mean"][0] > 0
    assert first["gate_mean"][1] is None
    assert first["zeros"] == pytest.approx(
        [0.5, 0.5], abs=0.1
    )  # nothing is learned yet: pre-activations are about normal
    assert first["gradient_first_over_last"] == pytest.approx(
        first["gradient_norm"][0] / first["gradient_norm"][1], rel=1e-5
    )
    assert all(0 < value < 1 for value in first["sign_agreement"])


# Whole gradients are kept where they are accumulated, fragments where they are not, each wrapper of DeepSpeed in its own way.
FRAGMENTS = {("0", "fp32", 2), ("1", "fp32", 4), ("1", "bf16", 2), ("2", "bf16", 4), ("3", "fp32", 2), ("3", "bf16", 4)}


@pytest.mark.parametrize(
    ("zero", "precision", "micro_batch_size"),
    [
        pytest.param(zero, precision, micro, marks=() if (zero, precision, micro) in FRAGMENTS else pytest.mark.slow)
        for zero, precision in (("0", "fp32"), *itertools.product("123", ("fp32", "bf16")))
        for micro in (2, 4)
    ],
)
def test_the_fragments_are_the_whole_gradient_once(two_ranks, corpus, zero, precision, micro_batch_size):
    arguments = overrides(corpus, zero=zero, precision=precision, micro_batch_size=micro_batch_size)
    for results in two_ranks.run("script", arguments=arguments, steps=[["add_up_fragments"]]):
        assert math.sqrt(results["values"][0]) == pytest.approx(results["norms"][0], rel=FP32)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_the_same_with_and_without_telemetry(two_ranks, corpus, precision):
    with_it, figures = sampled(two_ranks, corpus, precision=precision)
    without, none = sampled(two_ranks, corpus, precision=precision, telemetry_every=0)
    assert with_it == without
    assert (len(figures), none) == (STEPS, [])


def test_samples_are_taken_every_telemetry_every_steps(one_rank, corpus):
    arguments = overrides(corpus, telemetry_every=2)
    results = one_rank.run("script", arguments=arguments, steps=[["train", 5]])[0]["telemetry"]
    assert [step for step, _ in results] == [2, 4]
    assert [figures["window_tokens"] for _, figures in results] == [256, 512]


def test_the_held_out_set_decides_which_units_are_dead(two_ranks, corpus):
    arguments = overrides(corpus, telemetry_every=1, ffn="custom", ffn__formula="'max(x-100, 0)'", ffn__init_scale=1)
    results = two_ranks.run("script", arguments=arguments, steps=[["evaluate"]])
    assert [each["evaluations"][0][2] for each in results] == [[1.0, 1.0]] * 2
    arguments = overrides(corpus, telemetry_every=1, ffn="relu")
    results = two_ranks.run("script", arguments=arguments, steps=[["evaluate"]])
    assert [each["evaluations"][0][2] for each in results] == [[0.0, 0.0]] * 2


def test_the_lines_of_a_run(corpus, tmp_path):
    arguments = overrides(corpus, runs=tmp_path, run="r", telemetry_every=4, steps=10, save_every=5, eval_every=0)
    ended = command(sys.executable, "train.py", *arguments)
    assert ended.status == 0, ended.err
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    sampled_lines = [line for line in lines if line["kind"] == "telemetry"]
    tokens = 8 * 32
    assert [(line["step"], line["tokens"]) for line in sampled_lines] == [(4, 4 * tokens), (8, 8 * tokens)]
    assert {"zeros", "saturated", "kurtosis", "dead", "gate_mean", "gradient_norm", "sign_agreement"} <= sampled_lines[
        0
    ].keys()
    places = {(line["kind"], line.get("event"), line["step"]): place for place, line in enumerate(lines)}
    # A run resumed from the checkpoint of step 5 would not write the line of step 4 again.
    assert places["telemetry", None, 4] < places["event", "saved", 5]
    # Saves complete during later steps; their lines carry the step that was saved.
    saved = [line for line in lines if line.get("event") == "saved"]
    assert [(line["step"], line["path"]) for line in saved] == [(5, "step_00000005"), (10, "step_00000010")]
    assert [line for line in lines if line["kind"] == "eval"][-1]["dead"] == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------------------ definitions


def test_a_unit_is_dead_after_a_whole_window_without_activity():
    window = ActivityWindow(300)

    def units(*active: int) -> list[torch.Tensor]:
        return [torch.tensor(active, dtype=torch.float64)]

    results = [window.update(each, 100) for each in (units(1, 0, 3, 1), units(1, 0, 0, 1), units(1, 0, 0, 1))]
    assert [each["dead"] for each in results] == [[0.25]] * 3  # the second unit, over all tokens so far
    assert [each["window_tokens"] for each in results] == [100, 200, 300]
    assert [each["revived"] for each in results] == [[None], [0.0], [0.0]]
    fourth = window.update(units(1, 0, 0, 1), 100)  # 300 tokens since the third unit was active
    assert (fourth["dead"], fourth["window_tokens"]) == ([0.5], 300)
    fifth = window.update(units(0, 2, 0, 1), 100)
    assert (fifth["dead"], fifth["revived"]) == ([0.25], [0.25])


@pytest.mark.parametrize("cuts", [[0, 35], [0, 3, 35], [0, 7, 14, 35], [0, 1, 2, 20, 34, 35]])
def test_signs_of_fragments_add_up_to_those_of_the_matrix(cuts):
    gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    gradient[2, 3] = 0
    totals = torch.zeros(5, dtype=torch.float64)
    for start, end in itertools.pairwise(cuts):
        add_signs(totals, GradientFragment("w", gradient.shape, start, gradient.flatten()[start:end]))
    assert torch.equal(totals, gradient.sign().sum(1).double())


def expected_agreement(mean_over_std: float, units: int = 256) -> float:
    """Return E|mean of the signs of `units` gradients| where every h has this mean over std, for normal gradients of outputs.

    Given an output's gradients over tokens, the sum of h's mean times them is normal, and each sign is positive with the
    probability that noise of h's own does not turn it.
    """
    count = torch.arange(units + 1, dtype=torch.float64)
    ways = torch.lgamma(torch.tensor(units + 1.0).double()) - torch.lgamma(count + 1) - torch.lgamma(units - count + 1)
    z = torch.arange(-8, 8, 1 / 64, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / 64
    positive = torch.special.ndtr(mean_over_std * z)[:, None].clamp(1e-300, 1 - 1e-16)
    chance = torch.exp(ways + count * positive.log() + (units - count) * torch.log1p(-positive))
    return float((weight[:, None] * chance * (2 * count / units - 1).abs()).sum())


PUBLISHED = ("sigmoid", "relu", "tanh", "swiglu")
OTHERS = ("leaky_relu", "gelu", "silu", "relu2", "glu")


@pytest.mark.parametrize("name", quick([*PUBLISHED, *OTHERS], "relu", "swiglu"))
def test_known_sign_agreement_for_normal_pre_activations(name):
    """4096 tokens, 256 units: published as 0.76 for sigmoid, 0.38 for ReLU, 0.05 for tanh and the gated ones."""
    function = activation(*formulas()[name])
    total, outputs = 0.0, 4096
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        shape = (4096, 2, 256) if function.formula.gated else (4096, 256)
        h = function.forward(torch.randn(shape, generator=generator), [])
        gradient = torch.randn(outputs, 4096, generator=generator) @ h
        signs = torch.zeros(outputs, dtype=torch.float64)
        add_signs(signs, GradientFragment("down", gradient.shape, 0, gradient.flatten()))
        total += float(signs.abs().mean() / 256)
    ratio = {"sigmoid": 2.3957, "relu": 0.6830, "leaky_relu": 0.6737, "gelu": 0.4809, "silu": 0.3700, "relu2": 0.4472}
    assert total / 6 == pytest.approx(expected_agreement(ratio.get(name, 0.0)), rel=0.02)
