"""Shards: reading across their borders, and finding every bit that is not what was written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data.shards
from data.batches import open_dataset
from data.shards import ShardSet, finished_group, open_shards, read_index, token_dtype, write_shard
from data.train_tokenizer import train_sentencepiece
from data.verify import verify
from kernels.common.errors import UserError
from kernels.common.json_files import digest

EOS = 9


def some_shards(folder: Path, vocab_size: int = 300) -> tuple[ShardSet, np.ndarray]:
    chance = np.random.default_rng(0)
    shards, all_tokens = [], []
    for number in range(5):
        documents = [chance.integers(10, vocab_size, size).tolist() for size in chance.integers(0, 12, 4)]
        shards.append((folder, write_shard(folder, "train", number, documents, 100, EOS, vocab_size)))
        all_tokens += [token for ids in documents for token in [*ids, EOS]]
    return ShardSet(shards, token_dtype(vocab_size)), np.array(all_tokens)


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_reads_at_every_place_across_shards_and_round_the_ring(tmp_path, vocab_size):
    shards, tokens = some_shards(tmp_path, vocab_size)
    assert shards.tokens == len(tokens)
    assert (tmp_path / "train-00000.bin").stat().st_size % (2 if vocab_size == 300 else 4) == 0
    ring = np.concatenate([tokens, tokens, tokens])
    for start in range(-1, len(tokens) + 2):
        for count in (0, 1, 7, 30, len(tokens) + 3):
            found = shards.read(start, count)
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, ring[start % len(tokens) :][:count])
    assert shards.read(-1, 1)[0] == EOS


def test_document_ends(tmp_path):
    shards, tokens = some_shards(tmp_path)
    ends = shards.document_ends()
    assert len(ends) == shards.documents
    assert ends[-1] == shards.tokens
    np.testing.assert_array_equal(ends - 1, np.flatnonzero(tokens == EOS))
    assert not len(ShardSet([], shards.dtype).document_ends())


def test_the_hash_of_a_set_is_that_of_its_tokens_and_documents(tmp_path):
    def hash_of(name: str, *documents: list[int]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        shard = write_shard(folder, "train", 0, documents, 100, EOS, 300)
        return ShardSet([(folder, shard)], np.dtype("<u2")).hash

    assert hash_of("a", [1, 2], [3]) == hash_of("b", [1, 2], [3])
    assert hash_of("c", [1, 2], [4]) != hash_of("d", [1, 2], [3])


@pytest.fixture
def copy(prepared, tmp_path):
    """A prepared folder that may be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def flip(path: Path, at: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_a_sound_folder_is_sound(copy, capsys):
    assert verify(copy) == []
    out = capsys.readouterr().out
    assert out.count("ok  ") == len(read_index(copy)["shards"]) + 1


@pytest.mark.parametrize("name", ["train-00002.bin", "train-00002.idx", "held_out-00001.bin", "tokenizer.model"])
def test_one_flipped_bit_is_found_by_name(copy, name):
    path = copy / name
    flip(path, path.stat().st_size // 2)
    (problem,) = verify(copy)
    assert path.stem in problem or "tokenizer" in problem
    with pytest.raises(UserError, match=re.escape(path.stem)):
        open_dataset(copy)


def test_a_large_set_is_opened_by_sizes_and_its_bits_are_left_to_verify(copy, monkeypatch):
    monkeypatch.setattr(data.shards, "VERIFY_AT_OPEN", 10)
    flip(copy / "train-00000.bin")
    open_dataset(copy)
    assert len(verify(copy)) == 1
    with open(copy / "train-00000.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"train-00000\.bin has \d+ bytes and should have \d+"):
        open_dataset(copy)
    os.unlink(copy / "train-00000.bin")
    with pytest.raises(UserError, match=r"train-00000\.bin cannot be read \(No such file"):
        open_dataset(copy)


def test_a_shard_that_the_disk_does_not_give_is_one_sentence(copy, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(data.shards, "shard_checksum", broken)
    with pytest.raises(
        UserError, match=r"broken shard: .*train-00000\.bin or \.idx cannot be read \(Input/output error\)"
    ):
        open_dataset(copy)


def test_another_tokenizer_is_refused(copy):
    train_sentencepiece(["some text, some more text"] * 9, 275).save(copy)
    with pytest.raises(UserError, match="not the one that made the shards"):
        open_dataset(copy)


def test_tokens_and_boundaries_that_make_no_sense_are_found(tmp_path):
    from data.verify import check_shard

    good = write_shard(tmp_path, "train", 0, [[1, 2], [3]], 9, EOS, 300)
    assert check_shard(tmp_path, good, 300, EOS) is None
    assert "does not end with the end-of-text token" in check_shard(tmp_path, good, 300, 8)
    wide = write_shard(tmp_path, "train", 1, [[1, 2], [299]], 9, EOS, 300)
    assert "holds token 299, beyond the vocabulary of 280" in check_shard(tmp_path, wide, 280, EOS)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shards, "OPEN_FILES", 2)
    shards, tokens = some_shards(tmp_path)
    np.testing.assert_array_equal(shards.read(0, len(tokens)), tokens)
    assert shards._file.cache_info().currsize == 2


def test_a_shard_that_becomes_shorter_while_it_is_read_is_one_sentence(copy):
    train = open_dataset(copy).parts[0].train
    expected = train.read(0, 3)
    path = copy / f"{train.shards[0][1].name}.bin"
    os.truncate(path, 4 * train.dtype.itemsize)
    np.testing.assert_array_equal(train.read(0, 3), expected)
    sentence = rf"the shard {re.escape(str(path))} was cut off at {4 * train.dtype.itemsize} bytes while it was read"
    with pytest.raises(UserError, match=sentence):
        train.read(3, 2)
    with pytest.raises(UserError, match=rf"{path.name} has \d+ bytes and should have \d+"):
        open_dataset(copy)


@pytest.mark.parametrize("key", ["bytes", "tokens", "split", "lossy", "xz_bits_per_byte", "held_out", "eos_id"])
def test_an_index_that_was_changed_is_refused(copy, key):
    index = json.loads((copy / "index.json").read_text())
    target = index if key in index else index["shards"][-1]
    target[key] = "train" if key == "split" else (target[key] or 0) + 1
    (copy / "index.json").write_text(json.dumps(index))
    for check in (open_dataset, verify):
        with pytest.raises(UserError, match=r"index\.json was changed since it was written"):
            check(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../train-00000"), ("split", "held_out"), ("tokens", "9"), ("tokens", -1), ("documents", 10**400),
        ("documents", 1.0), ("bytes", None), ("checksum", 5), ("lossy", 10**6), ("other", 1),
        ("vocab_size", "300"), ("vocab_size", 0), ("eos_id", [2]), ("tokenizer_hash", None), ("corpus_hash", {}),
        ("xz_bits_per_byte", "x"), ("xz_bits_per_byte", 10**400), ("skipped", 0.5), ("shards", 3), ("shards", [[]]),
        ("parts", 3), ("parts", []), ("parts", [{"name": "a", "folder": "."}]),
        ("parts", [{"name": "a", "folder": "\0", "weight": 1.0}]), ("parts", [{"name": "a", "folder": ".", "weight": "1"}]),
        ("parts", [{"name": "a", "folder": ".", "weight": 0.5}]),
        ("parts", [{"name": "a", "folder": ".", "weight": 0.5}] * 2),
    ],
)  # fmt: skip
def test_an_index_of_impossible_values_is_refused_whatever_its_digest(copy, key, value):
    index = json.loads((copy / "index.json").read_text())
    shard = index["shards"][0]
    (shard if key in shard or key == "other" else index)[key] = value
    del index["digest"]
    for content in (index, index | {"digest": digest(index, 16)}):
        (copy / "index.json").write_text(json.dumps(content))
        for check in (open_dataset, verify):
            with pytest.raises(UserError, match=r"index\.json is damaged \(.+\); delete it"):
                check(copy)


def test_held_out_documents_without_text_say_nothing_per_byte(copy):
    index = json.loads((copy / "index.json").read_text())
    del index["digest"]
    held_out = [shard for shard in index["shards"] if shard["split"] == "held_out"]
    for shard in held_out:
        shard["bytes"] = 0
    (copy / "index.json").write_text(json.dumps(index))
    dataset = open_dataset(copy)
    empty = sum(shard["documents"] for shard in held_out)
    assert (dataset.why_no_bits, dataset.xz_bits_per_byte) == (f"all {empty} held-out documents are empty", None)


def test_an_index_without_a_list_of_shards_or_nested_too_deeply_is_refused(copy):
    index = json.loads((copy / "index.json").read_text())
    del index["shards"], index["digest"]
    for text in (json.dumps(index), '{"a":' * 100_000, "[" * 100_000, "\ufeff{}", "null"):
        (copy / "index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json is damaged"):
            open_dataset(copy)


def test_a_blend_is_no_part_of_a_blend(copy):
    index = json.loads((copy / "index.json").read_text())
    del index["shards"], index["digest"]
    blend = copy.with_name("blend")
    blend.mkdir()
    (blend / "tokenizer.model").write_bytes((copy / "tokenizer.model").read_bytes())
    (blend / "index.json").write_text(
        json.dumps(index | {"parts": [{"name": "a", "weight": 1.0, "folder": "../blend"}]})
    )
    for check in (open_dataset, verify):
        with pytest.raises(UserError, match="is a blend, so it cannot be a part of one"):
            check(blend)


def test_a_record_of_shards_with_impossible_values_is_none(copy):
    path = copy / "group-00000.json"
    record = json.loads(path.read_text())
    arguments = (copy, 0, record["text_hash"], record["tokenizer_hash"], token_dtype(300))
    assert finished_group(*arguments)
    for value in ("9", {}, -1, None):
        path.write_text(json.dumps(record | {"shards": [record["shards"][0] | {"tokens": value}]}))
        assert finished_group(*arguments) is None


def test_an_index_of_an_earlier_version_has_no_digest(copy):
    index = json.loads((copy / "index.json").read_text())
    del index["digest"], index["xz_bits_per_byte"]
    (copy / "index.json").write_text(json.dumps(index))
    assert open_dataset(copy).held_out.tokens
    assert verify(copy) == []


def test_what_is_not_prepared_is_said(tmp_path):
    with pytest.raises(UserError, match=r"is missing; run python -m data\.prepare"):
        read_index(tmp_path / "nothing")
    with pytest.raises(UserError, match="not completely prepared"):
        read_index(tmp_path)
    with pytest.raises(IndexError):
        open_shards(tmp_path, {"vocab_size": 3, "shards": []}, "train").read(0, 1)


def test_the_command(copy):
    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "data.verify", *arguments],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    assert run(str(copy)) == (0, "")
    flip(copy / "train-00003.bin")
    status, complaint = run(str(copy))
    assert status == 1
    assert complaint.startswith("error: ")
    assert "train-00003" in complaint
    status, complaint = run(str(copy / "no"))
    assert status == 2
    assert complaint.count("\n") == 1
