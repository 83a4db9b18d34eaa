"""The shape that a configuration resolves to, and the tensor and context sizes that do not divide it."""

from __future__ import annotations

import dataclasses
import re

import pytest

from conf.arms import default_d_ff
from conf.schema import Config, ParallelConfig
from conf.shape import check_divisibility, shape_of
from kernels import parse
from kernels.common.errors import UserError
from tests.model.conftest import config_of


@pytest.mark.parametrize(("formula", "width"), [("silu(gate)*up", 688), ("relu(x)**2", 1032)])
def test_an_ungated_arm_is_half_as_wide_again(formula, width):
    assert default_d_ff(688, parse(formula)) == width


def test_the_shape_resolves_every_null():
    config = Config()
    config.model = dataclasses.replace(config.model, d_model=96, n_heads=6)
    shape = shape_of(config, 1000)
    assert (shape.n_kv_heads, shape.head_dim, shape.ffn[0].d_ff, shape.vocab_size) == (6, 16, 688, 1024)
    assert shape_of(config).vocab_size == 4096
    assert shape_of(config, 1024).vocab_size == 1024
    config.model = dataclasses.replace(config.model, n_kv_heads=2, head_dim=8, d_ff=100, vocab_size=1001)
    shape = shape_of(config, 1000)
    assert (shape.n_kv_heads, shape.head_dim, shape.ffn[0].d_ff, shape.vocab_size) == (2, 8, 100, 1001)


@pytest.mark.parametrize(
    ("model", "tensor", "context", "sentence"),
    [
        ({}, 3, 1, "parallel.tensor=3 does not divide the 4 heads: this model can be sharded over 1 or 2 rank(s)"),
        (
            {},
            4,
            1,
            "parallel.tensor=4 does not divide the 2 key/value heads: this model can be sharded over 1 or 2 rank(s)",
        ),
        (
            {"d_ff": 45, "n_kv_heads": 4},
            2,
            1,
            "does not divide the d_ff=45 of ffn=swiglu: this model can be sharded over 1 rank(s)",
        ),
        ({"vocab_size": 65, "n_kv_heads": 4}, 2, 1, "parallel.tensor=2 does not divide the vocabulary of 65 rows"),
        ({}, 1, 4, "parallel.context=4 does not divide the 2 key/value heads: around attention"),
        ({}, 2, 2, "does not divide the 2 key/value heads, of which a tensor rank has 1: around attention"),
        ({"n_heads": 8, "n_kv_heads": 8}, 2, 3, "takes an equal number of heads; 1, 2 or 4 would do"),
    ],
)
def test_what_ranks_cannot_share_is_refused_with_what_they_could(model, tensor, context, sentence):
    parallel = ParallelConfig(tensor=tensor, context=context)
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_divisibility(shape_of(config_of(**model)), parallel)
