"""The held-out loss equals that of plain torch, under any ranks and ZeRO stage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conf.load import load
from data.batches import open_dataset
from data.prepare import prepare
from launch.estimate.counts import shape_of
from model.decoder import Decoder
from model.weights import load_weights
from training.evaluation import HeldOut


@pytest.fixture(scope="module")
def plain(trained):
    """A function that measures the first `windows` windows with cross_entropy over full logits."""
    run = trained(1, "1")
    config = load(run.arguments)
    dataset = open_dataset(prepare(config.data, config.tokenizer))
    model = Decoder(shape_of(config, dataset.vocab_size), config.model, "sdpa")
    load_weights(model, run.end)
    model.double()
    tokens, length = dataset.held_out.tokens, config.sequence_length
    text = np.concatenate(([dataset.eos_id], dataset.held_out.read(0, tokens)))

    def measure(windows: int | None = None) -> tuple[float, int]:
        nats = count = 0
        for start in range(0, tokens if windows is None else windows * length, length):
            stretch = torch.from_numpy(text[start : start + length + 1])
            with torch.no_grad():
                logits = model(stretch[None, :-1])[0]
            nats += float(torch.nn.functional.cross_entropy(logits, stretch[1:], reduction="sum"))
            count += len(stretch) - 1
        return nats / count, count

    assert tokens % length, "the last window should be a short one"
    return measure


@pytest.mark.parametrize("zero", ["1", "3"])
def test_the_loss_is_that_of_plain_torch(trained, plain, ranks, zero):
    # 96 tokens are 3 windows, which two ranks cannot divide evenly. A micro-batch of 3 does not divide the windows either.
    arguments = [*trained(1, "1").arguments, "global_batch_size=6", f"zero={zero}"]
    arguments = [
        argument for argument in arguments if not argument.startswith(("micro_batch", "zero=1", "global_batch_size=8"))
    ]
    load_it = ["load", str(trained(1, "1").end)]
    steps = [load_it, ["evaluate"], ["evaluate", 96], ["evaluate", 1], ["evaluate", 10**9]]
    for rank in ranks.run("script", arguments=[*arguments, "micro_batch_size=3"], steps=steps):
        complete, three, one, more = rank["evaluations"]
        # Two means over thousands of terms, of fp32 and of fp64 logits: relative rounding of 2^-24 each way.
        for measured, (loss, count) in ((complete, plain()), (three, plain(3)), (one, plain(1))):
            assert measured[1] == count
            assert measured[0] == pytest.approx(loss, rel=1e-6)
        assert more == complete


def test_bits_per_byte_and_perplexity():
    assert HeldOut(math.log(2), 10).bits_per_byte(1.0) == 1.0
    assert HeldOut(3 * math.log(2), 10).bits_per_byte(4.0) == 0.75
    assert HeldOut(math.log(7), 10).perplexity == pytest.approx(7)
    assert HeldOut(1e6, 10).perplexity < math.inf
