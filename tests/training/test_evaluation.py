"""The held-out loss equals that of plain torch, under any ranks and ZeRO stage."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conf.load import load
from conf.shape import shape_of
from data.batches import open_dataset
from data.prepare import prepare
from kernels.common.json_files import DOCUMENTS, read_document_losses
from model.decoder import Decoder
from model.weights import load_weights
from training.evaluation import MOST_DOCUMENTS, HeldOut, LossByDocument, evaluate


@pytest.fixture(scope="module")
def plain(trained):
    """A function that returns the nats of each token of the first `windows` windows, with cross_entropy over full logits."""
    run = trained(1, "1")
    config = load(run.arguments)
    dataset = open_dataset(prepare(config.data, config.tokenizer))
    model = Decoder(shape_of(config, dataset.vocab_size), config.model, "sdpa")
    load_weights(model, run.end)
    model.double()
    tokens, length = dataset.held_out.tokens, config.sequence_length
    text = np.concatenate(([dataset.eos_id], dataset.held_out.read(0, tokens)))

    def measure(windows: int | None = None) -> np.ndarray:
        nats = []
        for start in range(0, tokens if windows is None else windows * length, length):
            stretch = torch.from_numpy(text[start : start + length + 1])
            with torch.no_grad():
                logits = model(stretch[None, :-1])[0]
            nats.append(torch.nn.functional.cross_entropy(logits, stretch[1:], reduction="none"))
        return torch.cat(nats).numpy()

    assert tokens % length, "the last window should be a short one"
    measure.ends = np.flatnonzero(text[1:] == dataset.eos_id) + 1
    return measure


@pytest.mark.parametrize("zero", [pytest.param("1", marks=pytest.mark.slow), "3"])
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
        for measured, nats in ((complete, plain()), (three, plain(3)), (one, plain(1))):
            assert measured[1] == len(nats)
            assert measured[0] == pytest.approx(nats.mean(), rel=1e-6)
        assert more == complete
        nats, tokens = rank["documents"]
        assert tokens == np.diff(plain.ends, prepend=0).tolist()
        np.testing.assert_allclose(nats, [part.sum() for part in np.split(plain(), plain.ends[:-1])], rtol=1e-6)


@pytest.mark.parametrize("ranks_of", ["parallel.context=2", "parallel.tensor=2"])
def test_each_document_has_its_loss_over_ranks_that_share_a_sequence(trained, one_rank, two_ranks, ranks_of):
    arguments = [*trained(1, "1").arguments, "model.d_ff=44"]  # which two tensor ranks can shard
    alone, *_ = one_rank.run("script", arguments=arguments, steps=[["evaluate"]])
    for rank in two_ranks.run("script", arguments=[*arguments, ranks_of], steps=[["evaluate"]]):
        np.testing.assert_allclose(rank["documents"], alone["documents"], rtol=1e-6)
        assert sum(rank["documents"][0]) == pytest.approx(math.prod(rank["evaluations"][0][:2]), rel=1e-6)


@pytest.mark.parametrize(("parts", "windows"), [(1, [0, 1, 2, 3]), (2, [0, 2, 5, 7])])
def test_a_blend_is_measured_in_all_of_its_parts(monkeypatch, parts, windows):
    held_out = SimpleNamespace(tokens=80, read=lambda start, count: np.arange(start, start + count))
    dataset: Any = SimpleNamespace(held_out=held_out, parts=[None] * parts, eos_id=0)
    seen = []

    def measure(_, targets):  # of a model whose loss on a token is its place in the text
        seen.extend((targets[:, 0] // 8).tolist())
        return targets.sum(), torch.tensor(targets.numel()), targets.float()

    data, whole = SimpleNamespace(rank=0, size=1), SimpleNamespace(group=None)
    mesh, batch = SimpleNamespace(data=data, data_context=whole), SimpleNamespace(micro_batch=3)
    engine: Any = SimpleNamespace(mesh=mesh, batch=batch, device=torch.device("cpu"), evaluate=measure)
    monkeypatch.setattr("training.evaluation.dist.all_reduce", lambda *_, **__: None)
    measured = evaluate(engine, dataset, 8, tokens=4 * 8)
    assert (seen, measured.tokens) == (windows, 32)
    assert measured.loss == np.mean([np.arange(8 * k, 8 * k + 8) for k in windows])


def test_documents_json_adds_up_neighbours_of_too_many_documents(tmp_path):
    chance = np.random.default_rng(0)
    tokens = chance.integers(1, 100, 2 * MOST_DOCUMENTS + 7)
    losses = LossByDocument("the text", tokens * chance.uniform(1, 9, len(tokens)), tokens)
    (tmp_path / DOCUMENTS).write_text(json.dumps({"step": 7} | losses.as_json()))
    read = read_document_losses(tmp_path)
    assert (read.step, read.held_out) == (7, "the text")
    assert len(read.tokens) == len(read.nats) == MOST_DOCUMENTS
    assert sum(read.tokens) == tokens.sum()
    assert sum(read.nats) == pytest.approx(losses.nats.sum(), abs=1e-4 * MOST_DOCUMENTS)
    few = LossByDocument("the text", losses.nats[:3], tokens[:3]).as_json()
    assert few["tokens"] == tokens[:3].tolist()
    np.testing.assert_allclose(few["nats"], losses.nats[:3], atol=5e-5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"step": 1, "held_out": "a"}',
        '{"step": 1, "held_out": 1, "nats": [], "tokens": []}',
        '{"step": 1, "held_out": "a", "nats": [1.0], "tokens": [0]}',
        '{"step": 1, "held_out": "a", "nats": [1.0, 2.0], "tokens": [3]}',
        '{"step": 1, "held_out": "a", "nats": ["x"], "tokens": [3]}',
        '{"step": -1, "held_out": "a", "nats": [1.0], "tokens": [3]}',
    ],
)
def test_a_documents_json_that_is_damaged_is_none(tmp_path, text):
    assert read_document_losses(tmp_path) is None
    (tmp_path / DOCUMENTS).write_text(text)
    assert read_document_losses(tmp_path) is None


def test_bits_per_byte_and_perplexity():
    assert HeldOut(math.log(2), 10).bits_per_byte(1.0) == 1.0
    assert HeldOut(3 * math.log(2), 10).bits_per_byte(4.0) == 0.75
    assert HeldOut(math.log(7), 10).perplexity == pytest.approx(7)
    assert HeldOut(1e6, 10).perplexity < math.inf
