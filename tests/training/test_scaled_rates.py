"""`optim.scaling=mup` learns the same on every number of ranks and ZeRO stage, and as plain PyTorch with its rates does."""

from __future__ import annotations

import math

import pytest
import torch

from conf.load import load
from conf.shape import shape_of
from data.batches import BatchStream, open_dataset
from data.prepare import prepare
from model.decoder import Decoder
from model.initialise import initialise
from model.scaling import scaling_of
from model.weights import CheckpointReader
from tests.training.test_parity import FP32
from tests.training.tiny import TINY, overrides
from training.schedule import lr_scale

STEPS = 6


@pytest.fixture(scope="module")
def train(corpus, one_rank, two_ranks, tmp_path_factory):
    """A function that trains some steps under mup: (arguments, losses, norms, checkpoint)."""
    folder = tmp_path_factory.mktemp("scaled")

    def run(world: int, zero: str, **more):
        micro = TINY["global_batch_size"] // world
        keys = {
            "optim.scaling": "mup",
            "optim.base_width": 11,
            "optim.base_layers": 1,
            "optim.weight_decay": 0.3,
        } | more
        arguments = [*overrides(corpus, zero=zero, micro_batch_size=micro), *(f"{k}={v}" for k, v in keys.items())]
        path = folder / f"{world}-{zero}-{len(more)}"
        pool = one_rank if world == 1 else two_ranks
        results = pool.run("script", arguments=arguments, steps=[["train", STEPS], ["save", str(path)]])
        losses = [sum(rank["losses"][i] for rank in results) / world for i in range(STEPS)]
        return arguments, losses, results[0]["norms"], path / f"step_{STEPS:08d}"

    return run


@pytest.fixture(scope="module")
def alone(train):
    return train(1, "0")


def test_one_rank_follows_plain_pytorch(alone):
    arguments, losses, norms, path = alone
    config = load(arguments)
    dataset = open_dataset(prepare(config.data, config.tokenizer))
    shape = shape_of(config, dataset.vocab_size)
    model = Decoder(shape, config.model, "sdpa")
    scaling = scaling_of(config.optim, shape)
    assert (scaling.width, scaling.depth) == (3.0, 2.0)
    initialise(model, shape, config.seed, None, scaling)
    rates = {name: scaling.rate(name) for name, _ in model.named_parameters()}
    assert set(rates.values()) == {1.0, 1 / 3, 1 / 6}
    groups = [
        {"params": [p], "weight_decay": 0.3 / rates[name] if p.ndim > 1 else 0.0, "lr": 0.01 * rates[name]}
        for name, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    peaks = [group["lr"] for group in optimizer.param_groups]
    stream = BatchStream(dataset, config.sequence_length, config.data_seed)
    for step in range(STEPS):
        tokens = torch.from_numpy(stream.samples(8 * step, 8))
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip))
        assert losses[step] == pytest.approx(float(loss.detach()), rel=FP32)
        assert norms[step] == pytest.approx(norm, rel=FP32)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_scale(config.schedule, step, config.steps)
        optimizer.step()
        optimizer.zero_grad()
    reader = CheckpointReader(path)
    for name, parameter in model.named_parameters():
        difference = (reader.tensor(name) - parameter.detach()).norm() / parameter.detach().norm()
        assert difference < 1e-4, name


@pytest.mark.parametrize(("zero", "tensor"), [("0", 1), ("1", 1), ("2", 1), ("3", 1), ("1", 2)])
def test_two_ranks_learn_what_one_does(train, alone, zero, tensor):
    more = {"parallel.tensor": 2, "model.d_ff": 46, "model.d_model": 33} if tensor == 2 else {}
    arguments, losses, norms, path = alone if tensor == 1 else train(1, "0", **{"model.d_ff": 46})
    if tensor == 2:
        more |= {"micro_batch_size": TINY["global_batch_size"]}
    _, found, found_norms, found_path = train(2, zero, **more)
    assert found == pytest.approx(losses, rel=FP32)
    assert found_norms == pytest.approx(norms, rel=FP32)
    one, other = CheckpointReader(path), CheckpointReader(found_path)
    config = load(arguments)
    names = [name for name, _ in Decoder(shape_of(config, 384), config.model, "sdpa").named_parameters()]
    squares = [(one.tensor(name).double() - other.tensor(name).double()).square().sum() for name in names]
    assert math.sqrt(float(torch.stack(squares).sum())) < 1e-3
