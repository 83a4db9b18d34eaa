"""Which documents are held out, what of each counts, and what is not trained on beside them."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data.prepare
from conf.schema import DataConfig
from data.batches import open_dataset
from data.blend import Blend
from data.documents import documents
from data.folder import folder_of
from data.held_out import NEAR, WINDOW, Selection, window_hashes
from data.prepare import prepare
from data.shards import read_index
from kernels.common.errors import UserError
from tests.data.test_prepare import content, decoded

WORDS = [
    "gate",
    "up",
    "down",
    "layer",
    "weight",
    "token",
    "loss",
    "step",
    "rate",
    "norm",
    "head",
    "query",
    "value",
    "shard",
]


def text(chance: random.Random, lines: int) -> str:
    return "".join(" ".join(chance.choices(WORDS, k=9)) + f" {chance.random()}\n" for _ in range(lines))


@pytest.fixture
def files(tmp_path):
    """A function that writes texts as files of one corpus and returns its configuration."""

    def write(texts: list[str], **keys) -> DataConfig:
        folder = tmp_path / "texts"
        folder.mkdir()
        for number, each in enumerate(texts):
            (folder / f"{number:04}.txt").write_text(each, encoding="utf-8")
        return DataConfig(name="text", source="text", path=str(folder), prepared=str(tmp_path / "prepared"), **keys)

    return write


def sides(config: DataConfig, texts: list[str]) -> list[str]:
    selection = Selection(config)
    return [selection.part(each, each.encode()).split for each in texts]


@pytest.mark.parametrize(("documents", "asked", "held_out"), [(200, 30, 30), (200, 100, 100), (40, 30, 20), (3, 30, 1)])
def test_as_many_documents_as_asked_are_held_out_but_never_more_than_half(files, documents, asked, held_out):
    chance = random.Random(0)
    texts = [text(chance, 5) for _ in range(documents)]
    found = sides(files(texts + texts[:1], held_out_files=asked), texts)  # a second copy is no other document
    assert found.count("held_out") == held_out
    assert found.count("train") == documents - held_out


def test_a_piece_of_a_held_out_document_counts_whole_lines_from_some_place(files):
    chance = random.Random(1)
    texts = [text(chance, 400) for _ in range(60)] + ["é" * 5000, "short\n"]
    config = files(texts, held_out_files=30, held_out_kib=3)
    selection = Selection(config)
    places = []
    for each in texts:
        part = selection.part(each, each.encode())
        if part.split == "held_out" and each in texts[:60]:
            assert part.text in each
            assert 1024 <= len(part.text) <= 3 << 10
            assert set(part.text.splitlines()) <= set(each.splitlines())
            places.append(each.index(part.text) / len(each))
        elif part.split == "held_out":
            assert part.text in each
        else:
            assert part.text == each
    assert len(places) >= 28
    assert 0.3 < np.mean(places) < 0.7
    assert np.std(places) > 0.15


def test_what_nearly_repeats_a_held_out_document_is_not_trained_on(files):
    chance = random.Random(2)
    texts = [text(chance, 40) for _ in range(80)]
    config = files(texts, held_out_files=20, held_out_kib=64)
    found = sides(config, texts)
    held_out = [each for each, side in zip(texts, found, strict=True) if side == "held_out"]
    selection = Selection(config)

    def side(each: str) -> str:
        return selection.part(each, each.encode()).split

    for number, original in enumerate(held_out):
        lines = original.splitlines(keepends=True)
        near = "".join(lines[:30]) + text(chance, 400)  # three quarters of it, in a document ten times as long
        far = "".join(lines[:10]) + text(chance, 30)
        indented = original.replace(" ", "  ").replace("\n", "\n\n") + str(number)
        expected = {near: "", far: "train", indented: ""}
        for changed, kept in expected.items():
            assert side(changed) in (kept, "held_out")  # by its own hash it may be held out as well
    assert all(side(each) == "train" for each, found in zip(texts, found, strict=True) if found == "train")


def test_windows_are_those_of_the_text_wherever_they_stand():
    chance = random.Random(3)
    common = text(chance, 30)
    one, other = (set(window_hashes((text(chance, 7) + common + text(chance, 5)).encode()).tolist()) for _ in range(2))
    own = set(window_hashes(common.encode()).tolist())
    assert own <= one & other
    assert len(one & other) <= len(own) + 2 * WINDOW
    assert len(own) == pytest.approx((len(common) - WINDOW) / 4, rel=0.2)
    assert not len(window_hashes(b"x" * (WINDOW - 1)))
    assert len(window_hashes(bytes(chance.randrange(33, 127) for _ in range(WINDOW + 200)))) > 20
    assert NEAR == 0.5


def test_a_prepared_corpus_has_the_pieces_and_not_the_near_duplicates(files, corpus):
    chance = random.Random(4)
    texts = [text(chance, 120) for _ in range(60)]
    _, tokenizer = corpus
    tokenizer = replace(tokenizer, vocab_size=300)
    plain = files(texts)
    config = replace(plain, held_out_files=20, held_out_kib=1)
    held_out = [each for each, side in zip(texts, sides(config, texts), strict=True) if side == "held_out"]
    selection = Selection(config)
    copy = next(
        changed
        for number in range(100)
        if selection.part(changed := held_out[0] + f"\n{number}\n", changed.encode()).split == ""
    )
    Path(str(plain.path), "9999.txt").write_text(copy)
    folder = prepare(config, tokenizer)
    assert folder != folder_of(plain, tokenizer)
    dataset = open_dataset(folder)
    assert read_index(folder)["near_duplicates"] == 1
    assert sorted(decoded(dataset, dataset.parts[0].train)) == sorted(set(texts) - set(held_out))
    pieces = decoded(dataset, dataset.held_out)
    assert len(pieces) == 20
    assert all(any(piece in original for original in held_out) for piece in pieces)
    assert max(map(len, pieces)) <= 1024
    assert dataset.held_out.text_bytes == sum(map(len, pieces))
    assert read_index(prepare(replace(config, held_out_kib=2), tokenizer))["corpus_hash"] != dataset.corpus_hash


@pytest.fixture
def overlapping(tmp_path):
    """A function that returns a blend: a part of 40 documents, and one of these and 300 others."""
    chance = random.Random(6)
    texts = [text(chance, 4) for _ in range(340)]

    def blend(files: list[str] = texts[40:], **keys) -> DataConfig:
        config = {}
        for name, own in (("small", texts[:40]), ("big", [*texts[:40], *files])):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps({"text": each}) + "\n" for each in own))
            config[name] = {"source": "jsonl", "path": str(path)} | keys.pop(name, {})
        prepared = str(tmp_path / "prepared")
        return DataConfig(name="blend", source="blend", prepared=prepared, workers=1, parts=config, **keys)

    return blend


@pytest.mark.parametrize(
    "keys",
    [
        {"held_out": 0.001},  # which gives each part one document, not the same
        {"held_out": 0.1, "big": {"held_out": 0.3}},
        {"held_out_files": 15},
        {"held_out": 0, "small": {"held_out": 0.3}},
        {"held_out": 0.1, "small": {"held_out_files": 15, "held_out_kib": 1}},
    ],
    ids=["one each", "fractions", "files", "one part", "files of one part"],
)
def test_no_part_of_a_blend_trains_on_what_another_one_holds_out(overlapping, corpus, monkeypatch, keys):
    sampled: list[str] = []
    train = data.prepare.train_sentencepiece
    monkeypatch.setattr(
        data.prepare, "train_sentencepiece", lambda texts, *rest: sampled.extend(texts) or train(texts, *rest)
    )
    blend = overlapping(**keys)
    dataset = open_dataset(prepare(blend, replace(corpus[1], vocab_size=300)))
    held_out = decoded(dataset, dataset.held_out)
    trained = [each for part in dataset.parts for each in decoded(dataset, part.train)]
    assert held_out
    assert not [each for each in held_out if any(each in other for other in [*trained, *sampled])]
    assert len(set(trained) | set(held_out)) == 340 == len(set(trained)) + len(set(held_out))
    left_out = sum(read_index(part.folder)["near_duplicates"] for part in dataset.parts)
    assert len(trained) + len(held_out) + left_out == 380


def test_parts_with_nothing_in_common_are_as_they_are_alone(overlapping, corpus):
    tokenizer = replace(corpus[1], vocab_size=300)
    blend = overlapping(held_out_files=15)
    other = random.Random(7)
    path = Path(blend.parts["big"]["path"])
    path.write_text("".join(json.dumps({"text": text(other, 4)}) + "\n" for _ in range(300)))
    dataset = open_dataset(prepare(blend, tokenizer))
    tokenizer = replace(tokenizer, path=str(dataset.folder / "tokenizer.model"))
    for part in dataset.parts:
        keys = blend.parts[part.name]
        alone = prepare(replace(blend, name=part.name, parts={}, **keys), tokenizer)
        assert alone != part.folder  # which depends on the other part
        assert content(alone) == content(part.folder)


def test_the_folder_of_a_part_depends_on_what_the_others_hold_out(overlapping, corpus):
    def names(**keys) -> dict[str, str]:
        blend = Blend(overlapping(**keys))
        return {part.name: folder_of(part, corpus[1], blend.beside[part.name]).name for _, part in blend.parts.values()}

    before = names(held_out_files=15)
    other = names(held_out_files=15, small={"held_out_kib": 1})
    assert (before["small"] != other["small"], before["big"] != other["big"]) == (True, True)
    text_changed = names(held_out_files=15, files=["another text"])
    assert (before["small"] != text_changed["small"], before["big"] != text_changed["big"]) == (True, True)
    alone = overlapping(held_out=0, small={"held_out": 0.1})
    assert [bool(mark) for mark in Blend(alone).beside.values()] == [False, True]


def test_a_single_document_is_cut_into_enough_pieces(files):
    config = files([text(random.Random(5), 2500)], held_out_files=50)
    found = sides(config, [document.text for document in documents(config)])
    assert found.count("held_out") == 50
    assert found.count("train") > 300


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"held_out": 0.6}, "held_out=0.6 must be a fraction of at most 0.5; 0 trains without evaluation"),
        ({"held_out": math.nan}, "held_out=nan is not a finite number"),
        ({"held_out_files": -1}, "held_out_files=-1 must not be negative"),
        ({"held_out_files": 3, "held_out_kib": 0}, "held_out_kib=0 must be positive"),
        ({"held_out_by": "foldr"}, "held_out_by 'foldr': did you mean 'folder'? choose from document, folder"),
        ({"shard_megabytes": 0}, "shard_megabytes=0 must be positive"),
    ],
)
def test_impossible_values_are_refused_of_a_corpus_and_of_a_part_of_a_blend(files, corpus, keys, sentence):
    whole = files(["a", "b"], **keys)
    part = {"source": "text", "path": whole.path} | keys
    blend = replace(whole, source="blend", parts={"own": part}, **{key: getattr(DataConfig(), key) for key in keys})
    for config, key in ((whole, "data"), (blend, "data.parts.own")):
        with pytest.raises(UserError, match=rf"^(unknown )?{re.escape(f'{key}.{sentence}')}$"):
            prepare(config, corpus[1])
    assert not Path(whole.prepared).exists()


def test_equal_documents_cannot_be_split(files):
    with pytest.raises(UserError, match="have the same text"):
        Selection(files(["the same\n"] * 3, held_out_files=1))
