"""Prompts of samples: typed ones, Python for the standard library, and beginnings of held-out documents."""

from __future__ import annotations

import dataclasses

import pytest

from conf.load import load
from data.batches import open_dataset
from data.prepare import prepare
from data.shards import ShardSet
from tests.training.tiny import overrides
from training.prompts import PYTHON, prompts_of


@pytest.fixture(scope="module")
def dataset(corpus):
    config = load(overrides(corpus))
    return open_dataset(prepare(config.data, config.tokenizer))


def test_prompts_come_from_held_out_documents(corpus, dataset):
    config = load(overrides(corpus, prompts=None))
    prompts = prompts_of(config, dataset)
    texts = [path.read_text() for path in (corpus / "corpus").glob("*.txt")]
    assert len(prompts) == 3
    for prompt in prompts:
        assert any(text.startswith(prompt + " ") for text in texts)  # whole words


def test_a_corpus_without_held_out_text_has_no_prompts(corpus, dataset):
    config = load(overrides(corpus, prompts=None))
    without = dataclasses.replace(dataset, held_out=ShardSet([], dataset.held_out.dtype))
    assert prompts_of(config, without) == []


def test_the_standard_library_is_prompted_with_python_and_typed_prompts_win(dataset):
    assert prompts_of(load([]), dataset) == list(PYTHON)
    assert prompts_of(load(["prompts=[a,b]"]), dataset) == ["a", "b"]
