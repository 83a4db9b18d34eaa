"""`optim.scaling=mup`: the table of its factors, and that they are 1 at the base's shape."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from conf.load import load
from conf.schema import OptimConfig
from conf.shape import shape_of
from conf.validate import validate
from kernels.common.errors import UserError
from model.decoder import Decoder
from model.initialise import initialise
from model.scaling import Scaling, scaling_of
from tests.selection import quick
from training.coordinates import config_of, exponent, main, movement
from training.engine import parameter_groups

MUP = OptimConfig(scaling="mup", base_width=32, base_layers=2, lr=0.01, weight_decay=0.1)


def decoder_of(config, scaling: Scaling | None = None) -> Decoder:
    shape = shape_of(config)
    decoder = Decoder(shape, config.model, "sdpa")
    initialise(decoder, shape, 0, config.model.init_std, scaling)
    return decoder


def groups_by_name(decoder: Decoder, optim: OptimConfig) -> dict[str, tuple[float, float]]:
    """Return {name: (learning rate, weight decay)}."""
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    groups = parameter_groups(decoder, optim, scaling_of(optim, decoder.shape))
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("arm", ["swiglu", "swish"])
def test_rates_and_decays_are_those_of_the_table(tiny_config, arm):
    config = tiny_config(arm, d_model=128, n_layers=6, n_heads=4, qk_norm=True)
    w, depth = 4.0, 3.0
    found = groups_by_name(decoder_of(config), MUP)
    assert len(found) == len(list(decoder_of(config).parameters()))
    for name, (rate, decay) in found.items():
        factor = 1.0
        if name.endswith(("attention.qkv", "ffn.up")) or name.startswith("head"):
            factor = 1 / w
        elif name.endswith(("attention.out", "ffn.down")):
            factor = 1 / (w * depth)
        assert rate == pytest.approx(0.01 * factor, rel=1e-12), name
        vector = name.endswith("norm.weight") or ".learned." in name
        assert decay == (0.0 if vector else pytest.approx(0.1 / factor, rel=1e-12)), name


def test_initial_weights_are_those_of_the_table(tiny_config):
    small = decoder_of(tiny_config("swiglu", d_model=32, n_layers=2, n_heads=1, vocab_size=512))
    config = tiny_config("swiglu", d_model=128, n_layers=6, n_heads=4, d_ff_gated=512, vocab_size=512)
    large = decoder_of(config, scaling_of(MUP, shape_of(config)))
    base = dict(small.named_parameters())
    w, depth = 4.0, 3.0
    factors = {"embedding.weight": 1.0, "head.weight": 1 / w, "layers.0.attention.qkv": 1 / math.sqrt(w),
               "layers.0.ffn.up": 1 / math.sqrt(w), "layers.0.attention.out": 1 / (math.sqrt(w) * depth),
               "layers.0.ffn.down": 1 / (math.sqrt(w) * depth)}  # fmt: skip
    found = dict(large.named_parameters())
    for name, factor in factors.items():
        counts = base[name].numel(), found[name].numel()
        error = math.sqrt(sum(1 / (2 * count) for count in counts))  # relative standard error of the quotient
        assert float(found[name].std() / base[name].std()) == pytest.approx(factor, rel=5 * error), name


def test_at_the_base_nothing_is_scaled(tiny_config):
    config = tiny_config("swiglu", d_model=64, n_layers=3, n_heads=4)
    optim = dataclasses.replace(MUP, base_width=64, base_layers=3)
    plain, scaled = decoder_of(config), decoder_of(config, scaling_of(optim, shape_of(config)))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))
    none = OptimConfig(lr=0.01, weight_decay=0.1)
    assert groups_by_name(plain, optim) == groups_by_name(plain, none)
    groups = parameter_groups(plain, none, scaling_of(none, plain.shape))
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.01, 0.1), (0.01, 0.0)]


@pytest.mark.parametrize(
    ("arm", "optim"),  # the arms differ in the layers between, whose factors the tables above hold
    quick(
        [("swiglu", "adamw"), ("relu", "adamw"), ("relu2", "adamw"), ("swiglu", "muon")],
        *(("swiglu", "adamw"), ("swiglu", "muon")),
    ),
)
def test_what_a_step_changes_does_not_depend_on_the_width(arm, optim):
    """The coordinate check of Yang et al. 2022: without the scaling it grows with the root of the width or faster."""
    widths = (32, 64, 128)
    found = {
        scaling: exponent(
            widths, [movement(config_of(arm, width, scaling, 3e-5, 32, optim=optim), 8) for width in widths]
        )
        for scaling in ("none", "mup")
    }
    assert found["none"] > (0.5 if optim == "adamw" else 0.4)  # Muon's steps grow with the root alone
    assert abs(found["mup"]) < 0.3


def test_nor_does_it_grow_with_depth_for_long():
    found = {
        scaling: movement(config_of("swiglu", 64, scaling, 1e-4, 32, 16), 4)
        / movement(config_of("swiglu", 64, scaling, 1e-4, 32, 4), 4)
        for scaling in ("none", "mup")
    }
    assert found["none"] > 1.8
    assert found["mup"] < 1.5


def test_the_command_prints_a_row_per_arm_and_scaling(capsys):
    assert main(["arms=relu", "widths=32,64", "steps=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["relu", "none"], ["relu", "mup"]]
    for wrong in ("widths=32", "widths=33,64", "widths=a,b", "widths=0,32"):
        with pytest.raises(UserError, match="widths="):
            main([wrong])


def test_tied_embeddings_are_refused():
    with pytest.raises(UserError, match=r"optim\.scaling=mup .* with model\.tie_embeddings=true they are one matrix"):
        validate(load(["optim.scaling=mup", "model.tie_embeddings=true"]), 1)
    for key in ("base_width=0", "base_layers=-1"):
        with pytest.raises(UserError, match="are the shape of a model: at least 1"):
            validate(load(["optim.scaling=mup", f"optim.{key}"]), 1)
