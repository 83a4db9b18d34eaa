"""Second derivatives of the decoder's functions are refused, and do not come out as zeros."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conf.schema import FFNConfig
from conf.shape import FFNShape
from kernels import parse
from model.attention_blocks import causal_attention
from model.feed_forward import FeedForward
from model.loss import linear_cross_entropy

X = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0))
WEIGHT, TARGETS = torch.randn(11, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([[0, 3, 10], [1, 1, 2]])


def feed_forward(x: Tensor) -> Tensor:
    config = FFNConfig(formula="gelu(x)")
    layer = FeedForward(FFNShape(config, parse(config.formula), 16), 8)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    return layer(x.flatten(2))


FUNCTIONS = {
    "queries": lambda x: causal_attention(x, X, X),
    "keys": lambda x: causal_attention(X, x, X),
    "loss": lambda x: linear_cross_entropy(x.flatten(2), WEIGHT, TARGETS)[0],
    "weight of a loss": lambda x: linear_cross_entropy(X.flatten(2), WEIGHT + x.sum(), TARGETS)[0],
    "feed-forward": feed_forward,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_refused(name):
    with pytest.raises(RuntimeError, match=r" can be differentiated once: .* for second derivatives$"):
        torch.autograd.functional.hessian(lambda x: FUNCTIONS[name](x).sum(), X)
