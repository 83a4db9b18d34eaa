"""Models that are no neural networks: probabilities that sum to 1, and the losses of a slow implementation."""

from __future__ import annotations

import collections
import itertools
import json
import math
import random

import numpy as np
import pytest

from data.baselines import Bigram, baselines, count_pairs, main, unigram
from data.batches import BatchStream, open_dataset
from kernels.common.errors import UserError

VOCABULARY = 11


@pytest.fixture
def rows():
    chance = np.random.default_rng(0)
    return (chance.geometric(0.3, (40, 9)) - 1).clip(max=VOCABULARY - 2)  # one token is never seen


def pairs_of(rows) -> collections.Counter:
    return collections.Counter((int(v), int(w)) for row in rows for v, w in itertools.pairwise(row))


def discount_of(counts) -> float:
    once, twice = (sum(count == n for count in counts) for n in (1, 2))
    return min(0.95, max(0.05, once / max(1, once + 2 * twice)))


def test_pairs_are_counted_within_rows_and_over_blocks(rows):
    expected = pairs_of(rows)
    for blocks in ([rows], [rows[:7], rows[7:8], rows[8:]]):
        found = count_pairs(iter(blocks), VOCABULARY)
        pairs = zip(found.pairs // VOCABULARY, found.pairs % VOCABULARY, strict=True)
        assert dict(zip(pairs, found.counts.tolist(), strict=True)) == dict(expected)


def test_probabilities_sum_to_1_and_none_is_0(rows):
    counts = count_pairs(iter([rows]), VOCABULARY)
    assert unigram(counts).sum() == pytest.approx(1, rel=1e-12)
    assert (unigram(counts) > 0).all()
    every = np.arange(VOCABULARY)
    for before in every:
        p = Bigram(counts).probabilities(np.full(VOCABULARY, before), every)
        assert p.sum() == pytest.approx(1, rel=1e-12)
        assert (p > 0).all()


def test_the_bigram_model_is_that_of_kneser_and_ney(rows):
    counted = pairs_of(rows)
    d = discount_of(counted.values())
    follows = collections.Counter(w for _, w in counted)  # how many different tokens each follows
    d1, n1 = discount_of([follows.get(w, 0) for w in range(VOCABULARY)]), sum(follows.values())
    model = Bigram(count_pairs(iter([rows]), VOCABULARY))
    for v in range(VOCABULARY):
        total, different = sum(c for (a, _), c in counted.items() if a == v), sum(a == v for a, _ in counted)
        for w in range(VOCABULARY):
            backoff = (max(follows.get(w, 0) - d1, 0) + d1 * len(follows) / VOCABULARY) / n1
            seen = max(counted.get((v, w), 0) - d, 0) + d * different * backoff
            expected = seen / total if total else backoff
            assert model.probabilities(np.array([v]), np.array([w]))[0] == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def dataset(prepared):
    return open_dataset(prepared)


def test_they_learn_from_the_tokens_of_the_run_and_predict_each_held_out_one(dataset):
    found = baselines(dataset, 32, 3, 1000)
    assert found.tokens == 32 * 32  # whole samples
    rows = BatchStream(dataset, 32, 3).samples(0, 32)
    text = dataset.held_out.read(-1, dataset.held_out.tokens + 1)
    counts = count_pairs(iter([rows]), dataset.vocab_size)
    assert found.unigram == pytest.approx(-np.log(unigram(counts))[text[1:]].mean(), rel=1e-12)
    assert found.bigram == pytest.approx(-np.log(Bigram(counts).probabilities(text[:-1], text[1:])).mean(), rel=1e-12)
    assert found.held_out == dataset.held_out.hash
    assert found.xz / math.log(2) / dataset.bytes_per_token == pytest.approx(dataset.xz_bits_per_byte)
    more = baselines(dataset, 32, 3, 10_000)
    assert more.bigram < found.bigram < found.unigram < math.log(dataset.vocab_size)


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    chance = random.Random(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(30):
        words = " ".join(chance.choices(["gate", "up", "down", "layer"], k=80))
        (folder / f"{number}.txt").write_text(words)
    corpus = [f"data.path={folder}", f"data.prepared={tmp_path / 'p'}", "data.held_out=0.2", "tokenizer.vocab_size=280"]
    arguments = ["data=text", *corpus, "sequence_length=16", "tokens=2000", "data.max_epochs=100"]
    assert main([f"to={tmp_path / 'out' / 'nano.json'}", *arguments]) == 0
    written = json.loads((tmp_path / "out" / "nano.json").read_text())
    printed = capsys.readouterr().out
    for name in ("unigram", "bigram", "xz"):
        assert f"{written[name]:.4f} nats per token" in printed
    with pytest.raises(UserError, match="nothing to predict"):
        main([argument.replace("held_out=0.2", "held_out=0") for argument in arguments])
    (tmp_path / "a file").touch()
    for to in (tmp_path / "a file" / "nano.json", tmp_path):  # refused before the corpus is looked for
        with pytest.raises(UserError, match=r"cannot write .*nano\.json|is a folder: name a file in it"):
            main([f"to={to}", "data=text", "data.path=nowhere", "tokens=2000"])
