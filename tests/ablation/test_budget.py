"""Widths at equal cost: Shazeer's eight arms at every preset, every meaning of cost, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest

from ablation.budget import BUDGETS, WARN, match
from conf.keys import choices
from conf.load import load
from conf.schema import Config
from conf.shape import shape_of
from kernels.common.errors import UserError
from launch.estimate.counts import ffn_saved_bytes, flops_per_token, parameters
from tests.selection import quick

SHAZEER = ("relu", "gelu", "silu", "glu", "bilinear", "reglu", "geglu", "swiglu")


@functools.cache
def configuration(*overrides: str) -> Config:
    return load(list(overrides))


def arms(*names: str, overrides: tuple[str, ...] = ()) -> dict[str, Config]:
    return {name: configuration(f"ffn={name}", *overrides) for name in names}


@pytest.mark.parametrize("preset", quick(choices("model"), "nano", "llama_1b", "llama3_70b"))
def test_shazeers_eight_cost_the_same_at_every_preset_and_tensor_size(preset):
    configs = arms(*SHAZEER, overrides=(f"model={preset}",))
    for tensor in (1, 2, 4, 8):
        widths, warnings = match(configs, "relu", tensor=tensor)
        found = [width.parameters for width in widths.values()]
        assert max(found) / min(found) - 1 <= WARN
        assert warnings == []
        assert all(width.d_ff % (width.tile * tensor) == 0 for width in widths.values())


@pytest.mark.parametrize("baseline", quick(["swiglu", "relu", "xielu"], "swiglu", "xielu"))
@pytest.mark.parametrize("budget", quick(["parameters", "flops", "memory"], "parameters", "memory"))
def test_the_whole_catalogue_costs_what_the_baseline_costs(baseline, budget):
    names = [name for name in choices("ffn") if name != "custom"]
    widths, _ = match(arms(*names, overrides=("model=llama_125m",)), baseline, budget, tokens=4096)
    assert all(abs(width.mismatch) <= WARN for width in widths.values())


def with_width(config, d_ff):
    return shape_of(dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=d_ff)))


def test_each_budget_equals_what_it_names():
    configs = arms("swiglu", "relu", overrides=("model=llama_125m",))
    tokens = 16 * 2048
    by_budget = {
        b: match(configs, "swiglu", b, tokens=tokens)[0]["relu"].d_ff for b in ("parameters", "flops", "memory")
    }
    swiglu = shape_of(configs["swiglu"])
    relu = {budget: with_width(configs["relu"], d_ff) for budget, d_ff in by_budget.items()}
    assert parameters(relu["parameters"])["ffn"] == pytest.approx(parameters(swiglu)["ffn"], rel=WARN)
    assert flops_per_token(relu["flops"], 2048)["ffn"] == pytest.approx(flops_per_token(swiglu, 2048)["ffn"], rel=WARN)

    def kept(shape):
        return 16 * parameters(shape)["ffn"] + sum(tokens * ffn_saved_bytes(layer) for layer in shape.ffn)

    assert kept(relu["memory"]) == pytest.approx(kept(swiglu), rel=WARN)
    # 3 matrices and 2 streams against 2 and 1: an ungated arm has half the activations per channel, so memory lets it be wider.
    assert by_budget["memory"] > by_budget["parameters"] == swiglu.ffn[0].d_ff * 3 // 2


def test_a_layer_keeps_what_ffn_save_says():
    for save, elements in (("packed", 2), ("output", 1), ("everything", 3), ("input", 0)):
        layer = shape_of(load(["ffn=swiglu", f"ffn.save={save}", "model.d_ff=512"])).ffn[0]
        assert ffn_saved_bytes(layer) == 2 * elements * 512
    assert ffn_saved_bytes(shape_of(load(["ffn=relu", "model.d_ff=512"])).ffn[0], width=4) == 4 * 512


def test_wallclock_uses_the_measured_seconds():
    configs = arms("swiglu", "relu", overrides=("model=llama_125m",))
    seconds = {"swiglu": lambda d_ff: 1 + 3e-4 * d_ff, "relu": lambda d_ff: 1 + 1e-4 * d_ff}
    widths, _ = match(configs, "swiglu", "wallclock", seconds=lambda arm, d_ff: seconds[arm](d_ff))
    assert widths["swiglu"].d_ff == 2048
    assert widths["relu"].d_ff == pytest.approx(3 * 2048, rel=2 * WARN)


def test_without_a_budget_all_have_the_baselines_width_and_the_mismatch_is_visible():
    widths, warnings = match(arms("relu", "swiglu"), "relu", "none")
    assert widths["swiglu"].d_ff == widths["relu"].d_ff
    assert widths["swiglu"].mismatch == pytest.approx(0.5)
    assert warnings == []


def test_learned_parameters_per_channel_count():
    overrides = (
        "ffn.formula=a*relu(x)",
        "ffn.parameters={a: {init: 1.0, share: channel}}",
        "model.d_model=64",
        "model.d_ff=100",
    )
    configs = {"base": load(["ffn=custom", *overrides]), "relu": load(["ffn=relu", "model.d_model=64"])}
    widths, _ = match(configs, "base", tile=1)
    assert widths["relu"].d_ff == 101  # 100 x (2 x 64 + 1) = 100.78 x 128


def test_the_tile_is_the_coarsest_that_comes_close_enough():
    configs = arms("swiglu", "relu", overrides=("model=llama2_7b",))
    widths, _ = match(configs, "swiglu", tile=256)
    assert (widths["relu"].d_ff, widths["relu"].tile) == (16384 + 128, 128)  # 16384 + 256 and 16384 are 0.8% off
    assert match(configs, "swiglu", tile=8)[0]["relu"].tile == 8


def test_a_mismatch_warns_and_then_refuses():
    small = ("model.d_model=64", "model.n_heads=4")
    configs = arms("swiglu", overrides=(*small, "model.d_ff=56")) | arms("relu", overrides=small)
    close, warnings = match(configs, "swiglu", tensor=4, tile=1)  # 84 exactly
    assert (close["relu"].d_ff, warnings) == (84, [])
    with pytest.raises(
        UserError, match=r"relu: d_ff=80 differs by -4.76% from the baseline's parameters, more than the 1.00% allowed"
    ):
        match(configs, "swiglu", tensor=8, tile=1)
    widths, warnings = match(configs, "swiglu", tensor=8, tile=1, allowed=0.05)
    assert widths["relu"].d_ff == 80
    assert warnings == ["relu: d_ff=80 differs by -4.76% from the baseline's parameters"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"budget": "parameter"}, "unknown budget 'parameter': did you mean 'parameters'?"),
        ({"baseline": "rleu"}, "unknown baseline 'rleu': did you mean 'relu'?"),
        ({"budget": "memory"}, "budget=memory needs the tokens per micro-batch"),
        ({"budget": "wallclock"}, "budget=wallclock needs measured step times"),
        ({"tensor": 5}, "parallel.tensor=5 does not divide d_ff=768 of the baseline 'relu'"),
    ],
)
def test_what_is_refused(more, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        match(arms("relu", "swiglu"), **({"baseline": "relu"} | more))


def test_every_budget_is_supported():
    for budget in BUDGETS:
        assert (
            match(arms("relu"), "relu", budget, tokens=1, seconds=lambda _, d_ff: float(d_ff))[0]["relu"].mismatch == 0
        )
