"""Initial weights: a function of (name, seed) alone, with the scales that the docstring promises."""

from __future__ import annotations

import contextlib

import pytest
import torch

from conf.shape import shape_of
from model.decoder import Decoder
from model.initialise import initialise


def weights(config, seed: int = 0, init_std: float | None = None) -> dict[str, torch.Tensor]:
    shape = shape_of(config)
    decoder = Decoder(shape, config.model, "sdpa")
    initialise(decoder, shape, seed, init_std)
    return {name: parameter.detach() for name, parameter in decoder.named_parameters()}


def test_the_same_name_and_seed_give_the_same_weights(tiny_config):
    first, second = weights(tiny_config()), weights(tiny_config())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_global_generator_is_neither_used_nor_moved(tiny_config):
    torch.manual_seed(1)
    first = weights(tiny_config())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = weights(tiny_config())
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_seeds_and_other_names_give_other_weights(tiny_config):
    first, second = weights(tiny_config(), seed=0), weights(tiny_config(), seed=1)
    matrices = [name for name in first if not name.endswith("norm.weight")]
    assert not any(torch.equal(first[name], second[name]) for name in matrices)
    assert not torch.equal(first["layers.0.attention.qkv"], first["layers.1.attention.qkv"])
    assert not torch.equal(first["embedding.weight"], first["head.weight"])
    gate, up = first["layers.0.ffn.up"]
    assert not torch.equal(gate, up)


@pytest.mark.parametrize("seed", [-1, 0, 2**40, 10**30])
def test_any_whole_number_is_a_seed(tiny_config, seed):
    assert weights(tiny_config(), seed=seed)["embedding.weight"].std() > 0


def test_everything_but_the_feed_forward_layers_is_the_same_for_every_arm(tiny_config, arm):
    here, there = weights(tiny_config(arm), seed=5), weights(tiny_config("swiglu"), seed=5)
    outside = [name for name in there if ".ffn." not in name]
    assert outside == [name for name in here if ".ffn." not in name]
    assert all(torch.equal(here[name], there[name]) for name in outside)


def test_other_depths_share_their_layers(tiny_config):
    """Only the residual projections depend on the depth, by their scale."""
    shallow, deep = weights(tiny_config(n_layers=2)), weights(tiny_config(n_layers=8))
    for name, weight in shallow.items():
        scale = 0.5 if name.endswith(("attention.out", "ffn.down")) else 1.0
        torch.testing.assert_close(scale * weight, deep[name], rtol=2**-22, atol=0)


@pytest.mark.parametrize("init_std", [None, 0.05])
def test_the_scales_are_those_that_are_promised(tiny_config, init_std):
    config = tiny_config(d_model=64, d_ff_gated=256, n_layers=3, vocab_size=512, qk_norm=True)
    std = 64**-0.5 if init_std is None else init_std
    for name, weight in weights(config, init_std=init_std).items():
        if name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        expected = std / 6**0.5 if name.endswith(("attention.out", "ffn.down")) else std
        # Five standard errors of a standard deviation and of a mean of so many normal numbers.
        count = weight.numel()
        assert abs(weight.std() / expected - 1) < 5 / (2 * count) ** 0.5, name
        assert abs(weight.mean()) < 5 * expected / count**0.5, name


def test_bf16_weights_are_the_fp32_ones_rounded(tiny_config):
    config = tiny_config()
    shape = shape_of(config)
    decoder = Decoder(shape, config.model, "sdpa").bfloat16()
    initialise(decoder, shape, 0)
    exact = weights(config)
    assert all(torch.equal(parameter, exact[name].bfloat16()) for name, parameter in decoder.named_parameters())


def test_each_parameter_is_gathered_once_and_written_inside(tiny_config):
    config = tiny_config()
    shape = shape_of(config)
    decoder = Decoder(shape, config.model, "sdpa")
    gathered = []

    @contextlib.contextmanager
    def gather(parameter):
        parameter.data.fill_(torch.nan)
        gathered.append(parameter)
        yield
        assert not parameter.isnan().any()

    initialise(decoder, shape, 0, gather=gather)
    assert [id(parameter) for parameter in gathered] == [id(parameter) for parameter in decoder.parameters()]
