"""Opening a corpus: the made-up folder is a prepared one, the stages read little, the committed page is within its bounds."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bench.index import LARGEST_MIB, LARGEST_SECONDS, RESULT, STAGES, main, make_folder, stages_of
from data.batches import BatchStream, open_dataset
from data.shards import ShardSet
from tests.training.tiny import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("made")
    make_folder(made, 200_000_000, 1000)
    return made


def test_the_folder_opens_as_a_prepared_one(folder):
    dataset = open_dataset(folder)
    train, held_out = dataset.parts[0].train, dataset.held_out
    assert train.tokens + held_out.tokens == 200_000_000
    assert train.documents + held_out.documents == 200_000
    assert held_out.documents == pytest.approx(8_000, rel=0.01)
    assert (np.diff(held_out.document_ends(), prepend=0) == 1000).all()
    assert BatchStream(dataset, 16, 0).samples(0, 2).shape == (2, 17)


def test_the_stages_open_no_training_document_and_keep_no_list_of_documents(folder, monkeypatch):
    read = []
    fromfile = np.fromfile

    def noted(path, *arguments, **named):
        read.append(path.name)
        return fromfile(path, *arguments, **named)

    monkeypatch.setattr(np, "fromfile", noted)
    monkeypatch.setattr(ShardSet, "document_ends", lambda _: read.append("all"))
    assert list(stages_of(str(folder))) == list(STAGES)
    assert read == ["held_out-00000.idx", "all"]  # the prompts need the first shard, an evaluation every held-out one


def test_it_runs_and_writes_a_page(tmp_path):
    assert main(["tokens=2M", "rounds=1", f"out={tmp_path / 'page.md'}"]) == 0
    assert set(STAGES) < {
        line.split("|")[1].strip() for line in (tmp_path / "page.md").read_text().splitlines() if "|" in line
    }


def test_the_committed_page_is_of_10_billion_tokens_and_within_its_bounds():
    page = (ROOT / RESULT).read_text(encoding="utf-8")
    assert page.startswith("# Opening a corpus of 10,000,000,000 tokens")
    seconds, mib = map(float, re.findall(r"\| all \| ([0-9.]+) \| ([0-9.]+) \|", page)[0])
    assert seconds < LARGEST_SECONDS
    assert mib < LARGEST_MIB
