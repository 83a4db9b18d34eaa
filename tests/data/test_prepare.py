"""Preparation: the same result however it is reached; interrupted, run twice at once, on a full disk, on bad input."""

from __future__ import annotations

import errno
import json
import os
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

import data.folder
import data.groups
import data.pool
import data.prepare
from conf.schema import DataConfig, TokenizerConfig
from data.batches import open_dataset
from data.documents import stamps
from data.folder import folder_of
from data.prepare import prepare
from data.shards import INDEX, read_index
from data.train_tokenizer import train_sentencepiece
from data.verify import verify
from kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("small_shards")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def script(corpus, before: str = "", show: bool = False) -> str:
    """Python that prepares `corpus` in small shards, after the statements `before`."""
    config, tokenizer = corpus
    lines = f"""
        import os, signal, data.groups, data.prepare, data.pool, data.progress
        from conf.schema import DataConfig, TokenizerConfig
        data.groups.MEGABYTE = 8 << 10
        config, tokenizer = {config!r}, {tokenizer!r}
    """
    run = f"print(data.prepare.prepare(config, tokenizer, show={show}))"
    return "\n".join([textwrap.dedent(lines), textwrap.dedent(before), run])


def decoded(dataset, shards) -> list[str]:
    """The documents of a set of shards."""
    found, start = [], 0
    tokens = shards.read(0, shards.tokens) if shards.tokens else []
    for end in shards.document_ends().tolist():
        assert tokens[end - 1] == dataset.eos_id
        found.append(dataset.tokenizer.decode(tokens[start : end - 1].tolist()))
        start = end
    assert start == shards.tokens
    return found


def test_every_document_comes_back_on_one_side(corpus):
    config, tokenizer = corpus
    written = [path.read_text(encoding="utf-8") for path in sorted(Path(config.path).iterdir())]
    dataset = open_dataset(prepare(config, tokenizer))
    train, held_out = decoded(dataset, dataset.parts[0].train), decoded(dataset, dataset.held_out)
    assert sorted(train + held_out) == sorted(written)
    assert train == [text for text in written if text not in held_out]  # in order
    assert 3 <= len(held_out) <= 25
    assert dataset.held_out.text_bytes == sum(len(text.encode()) for text in held_out)
    assert len(dataset.parts[0].train.shards) > 5
    assert 1 < dataset.xz_bits_per_byte < 8


def test_equal_documents_fall_on_one_side_and_the_split_does_not_depend_on_order(corpus):
    config, tokenizer = corpus
    for path in list(Path(config.path).iterdir()):
        (path.parent / f"copy-{path.name}").write_bytes(path.read_bytes())
    dataset = open_dataset(prepare(config, tokenizer))
    train, held_out = decoded(dataset, dataset.parts[0].train), decoded(dataset, dataset.held_out)
    assert not set(train) & set(held_out)
    assert len(held_out) == 2 * len(set(held_out))


def test_few_documents_still_give_both_sides(more_corpus, tmp_path):
    for count, share in ((2, 0.0001), (2, 0.5), (3, 0.04)):  # by their hashes, 0.5 would hold out both
        path = more_corpus(tmp_path / f"{count}-{share}", count)
        config = DataConfig(source="text", path=str(path), prepared=str(tmp_path / "p"), held_out=share)
        dataset = open_dataset(prepare(config, TokenizerConfig(vocab_size=330)))
        assert dataset.held_out.documents >= 1
        assert dataset.parts[0].train.documents >= 1


def test_a_fraction_so_small_that_chance_holds_out_nothing_still_holds_out_a_document(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i} of many"}) + "\n" for i in range(1500)))
    for share in (1e-3, 1e-30):
        config = DataConfig(source="jsonl", path=str(path), prepared=str(tmp_path / "p"), held_out=share)
        dataset = open_dataset(prepare(config, TokenizerConfig(vocab_size=300)))
        assert dataset.held_out.documents >= 1
        assert dataset.parts[0].train.documents >= 1490


def test_a_single_document_is_cut_so_that_a_part_of_it_can_be_held_out(more_corpus, tmp_path):
    text = "".join(path.read_text() for path in sorted(more_corpus(tmp_path / "some", 20).iterdir()))
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "line.txt").write_text(text.replace("\n", " "))
    for source, name in (("text", "one.txt"), ("jsonl", "one.jsonl"), ("text", "line.txt")):
        config = DataConfig(source=source, path=str(tmp_path / name), prepared=str(tmp_path / "p"))
        dataset = open_dataset(prepare(config, TokenizerConfig(vocab_size=330)))
        kept, held_out = decoded(dataset, dataset.parts[0].train), decoded(dataset, dataset.held_out)
        assert 20 <= len(kept) + len(held_out) <= 40
        assert len(held_out) >= 1
        if name != "line.txt":
            assert all(piece.endswith("\n") for piece in kept + held_out)
        whole = open_dataset(prepare(replace(config, held_out=0.0), TokenizerConfig(vocab_size=330)))
        assert (whole.held_out.tokens, whole.xz_bits_per_byte) == (0, None)
        assert decoded(whole, whole.parts[0].train) == [(tmp_path / name).read_text() if source == "text" else text]


def test_records_without_text_are_counted_at_the_end(tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    texts = [None, "", *(f"line {i} of some more" for i in range(40))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared = ["data=jsonl", f"data.path={path}", f"data.prepared={tmp_path / 'p'}", "tokenizer.vocab_size=300"]
    assert data.prepare.main(prepared) == 0
    out, err = capsys.readouterr()
    assert "2 records of jsonl have no text (null or empty) and were left out\n" in err
    assert "left out   2 records without text" in out


def test_a_corpus_that_moved_is_not_prepared_again(corpus, tmp_path, monkeypatch):
    config, tokenizer = corpus
    folder = prepare(config, tokenizer)
    Path(config.path).rename(tmp_path / "moved")
    monkeypatch.setattr(data.prepare, "_prepare_corpus", None)  # would fail if it were called
    assert prepare(replace(config, path=f"{tmp_path / 'moved'}/"), tokenizer) == folder
    # Folders of version 0.1 are named by the place of the files.
    named = data.folder._folder(replace(config, path=str(tmp_path / "moved")), tokenizer, stamps(
        replace(config, path=str(tmp_path / "moved"))
    ))  # fmt: skip
    folder.rename(named)
    assert prepare(replace(config, path=str(tmp_path / "moved")), tokenizer) == named


def test_a_corpus_below_a_shard_still_has_work_for_every_core(corpus, tmp_path):
    config, tokenizer = corpus
    folder = prepare(replace(config, shard_megabytes=64), tokenizer)
    groups = sorted(folder.glob("group-*.json"))
    assert 4 <= len(groups) <= 32
    other = replace(config, shard_megabytes=64, workers=2, prepared=str(tmp_path / "other"))
    assert content(prepare(other, tokenizer)) == content(folder)


def test_a_tokenizer_that_loses_text_is_noticed_on_the_held_out_documents(corpus, tmp_path):
    config, tokenizer = corpus
    for path in list(Path(config.path).iterdir())[::2]:
        path.write_text("漢字" * 50 + path.name)
    assert open_dataset(prepare(config, tokenizer)).why_no_bits == ""
    model = {
        "type": "BPE",
        "vocab": {chr(32 + i): i for i in range(96)} | {"\n": 96, "<|endoftext|>": 97},
        "merges": [],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    lossy = replace(tokenizer, kind="huggingface", path=str(tmp_path / "tokenizer.json"))
    dataset = open_dataset(prepare(config, lossy))
    lost = dataset.held_out.lossy_documents
    assert 0 < lost <= dataset.held_out.documents
    sentence = f"the tokenizer does not give back the text of {lost} of {dataset.held_out.documents} held-out documents"
    assert dataset.why_no_bits == sentence


def test_text_of_which_nothing_can_be_held_out_is_refused(tmp_path):
    path = tmp_path / "same.jsonl"
    path.write_text('{"text": "the same line"}\n' * 1500)
    config = DataConfig(source="jsonl", path=str(path), prepared=str(tmp_path / "p"))
    with pytest.raises(UserError, match=r"all documents of data=stdlib have the same text.*data\.held_out=0"):
        prepare(config, TokenizerConfig(vocab_size=300))


def test_the_second_call_does_nothing_and_workers_change_nothing(corpus, tmp_path, monkeypatch):
    config, tokenizer = corpus
    folder = prepare(config, tokenizer)
    parallel = prepare(replace(config, workers=2, prepared=str(tmp_path / "other")), tokenizer)
    assert folder.name == parallel.name
    assert content(folder) == content(parallel)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(data.prepare, "_prepare_corpus", None)  # would fail if it were called
    assert prepare(config, tokenizer) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_folder_depends_on_all_that_decides_its_content(corpus, tmp_path):
    config, tokenizer = corpus
    (train_sentencepiece(["some text, some more text"] * 9, 275)).save(tmp_path)
    folders = {
        folder_of(config, tokenizer),
        folder_of(replace(config, held_out=0.1), tokenizer),
        folder_of(config, replace(tokenizer, vocab_size=401)),
        folder_of(config, replace(tokenizer, path=str(tmp_path / "tokenizer.model"))),
        folder_of(replace(config, path=config.path + "/01*.txt"), tokenizer),
    }
    assert len(folders) == 5
    assert folder_of(replace(config, workers=7, shard_megabytes=9), tokenizer) in folders


def test_a_resume_with_shards_of_another_size_leaves_nothing_of_the_old(corpus, tmp_path):
    config, tokenizer = corpus
    folder = prepare(config, tokenizer)
    (folder / INDEX).unlink()
    larger = replace(config, shard_megabytes=4)
    assert prepare(larger, tokenizer) == folder
    assert content(folder) == content(prepare(replace(larger, prepared=str(tmp_path / "fresh")), tokenizer))


def test_processes_that_arrive_together_prepare_once(corpus, python):
    started = [python(script(corpus, show=True)) for _ in range(3)]
    done = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert {out for out, _ in done} == {f"{folder_of(*corpus)}\n"}
    assert sum("tokenizing" in err for _, err in done) == 1
    assert verify(folder_of(*corpus)) == []


def test_workers_import_neither_torch_nor_the_program(corpus, python, tmp_path):
    config, tokenizer = corpus
    (tmp_path / "program.py").write_text(
        "import os\n"
        "if __name__ != '__main__': raise SystemExit('a worker imported the program')\n"
        + script((replace(config, workers=2), tokenizer))
    )
    probe = """
        import runpy, sys, data.pool
        sys.modules["torch"] = None  # importing it fails from here on, in this process
    """
    process = python(textwrap.dedent(probe) + f"runpy.run_path({str(tmp_path / 'program.py')!r}, run_name='__main__')")
    out, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (0, "")
    assert out.strip() == str(folder_of(*corpus))


def test_a_full_disk_loses_nothing(corpus, monkeypatch):
    config, tokenizer = corpus
    other = prepare(config, replace(tokenizer, vocab_size=390))
    kept = content(other)
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*: the disk is full"):
        prepare(config, tokenizer)
    folder = folder_of(config, tokenizer)
    assert not (folder / INDEX).exists()
    assert not list(folder.glob(".*tmp"))
    assert len(list(folder.glob("train-*.bin"))) >= 1
    assert content(other) == kept
    monkeypatch.setattr(os, "fsync", fsync)
    prepare(config, tokenizer)
    assert verify(folder) == []


def test_a_folder_that_cannot_be_written_is_named(corpus, monkeypatch, tmp_path):
    config, tokenizer = corpus
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot create the folder .*file/.*: a part of that path is a file"):
        prepare(replace(config, prepared=str(tmp_path / "file")), tokenizer)

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(UserError, match=r"cannot create the folder .*: permission denied"):
        prepare(config, tokenizer)


def test_bad_settings_are_refused_before_anything_is_written(corpus, tmp_path):
    config, tokenizer = corpus
    for wrong, sentence in (
        ((replace(config, held_out=1.0), tokenizer), "data.held_out"),
        ((replace(config, workers=-1), tokenizer), "data.workers"),
        ((replace(config, shard_megabytes=0), tokenizer), "data.shard_megabytes"),
        ((replace(config, source="txt"), tokenizer), "did you mean 'text'"),
        ((replace(config, path=str(tmp_path / "no")), tokenizer), "no file or folder"),
        ((config, replace(tokenizer, kind="huggingface")), "tokenizer.path"),
        ((config, replace(tokenizer, path="no.model")), "cannot read the tokenizer"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            prepare(*wrong)
    assert not Path(config.prepared).exists()


def test_a_corpus_that_changes_while_it_is_read_is_refused(corpus, monkeypatch):
    config, tokenizer = corpus
    encode = data.pool.encode_group

    def touch(folder, model, group):
        os.utime(Path(config.path) / "000.txt", ns=(1, 1))
        return encode(folder, model, group)

    monkeypatch.setattr(data.pool, "encode_group", touch)
    with pytest.raises(UserError, match="was changed while it was read"):
        prepare(config, tokenizer)


def test_the_tokenizer_is_trained_on_an_even_sample_without_held_out_text(corpus):
    config, _ = corpus
    selection = data.held_out.Selection(config)
    progress = data.prepare.ProgressReporter(False)
    whole = data.prepare._sample(config, selection, 1 << 30, progress)
    some = data.prepare._sample(config, selection, 20_000, progress)
    dataset = open_dataset(prepare(*corpus))
    assert whole == decoded(dataset, dataset.parts[0].train)
    assert set(some) < set(whole)
    assert 16_000 < sum(len(text.encode()) for text in some) <= 20_000
    places = [whole.index(text) for text in some]
    assert places == sorted(places)
    assert max(places) > len(whole) * 0.6
    assert min(places) < len(whole) * 0.4


def test_a_blend_shares_one_tokenizer_and_its_parts_are_prepared_once(corpus, more_corpus, tmp_path):
    config, tokenizer = corpus
    second = more_corpus(tmp_path / "second", 30, seed=5)
    keys = {"text": {"weight": 3, "path": config.path}, "more": {"source": "text", "weight": 1, "path": str(second)}}
    blend = replace(config, name="blend", source="blend", path=None, parts=keys)
    folder = prepare(blend, tokenizer)
    dataset = open_dataset(folder)
    assert [(part.name, part.weight) for part in dataset.parts] == [("text", 0.75), ("more", 0.25)]
    assert {read_index(part.folder)["tokenizer_hash"] for part in dataset.parts} == {dataset.tokenizer.hash}
    assert dataset.held_out.documents == sum(open_dataset(part.folder).held_out.documents for part in dataset.parts)
    assert dataset.xz_bits_per_byte is not None
    assert verify(folder) == []
    other = prepare(
        replace(blend, parts=keys | {"text": {"path": config.path}}),
        replace(tokenizer, path=str(folder / "tokenizer.model")),
    )
    assert other != folder
    assert [part.folder for part in open_dataset(other).parts] == [part.folder for part in dataset.parts]
    # A part that was deleted is prepared again.
    for path in dataset.parts[1].folder.iterdir():
        path.unlink()
    assert prepare(blend, tokenizer) == folder
    assert open_dataset(folder).parts[1].train.tokens == dataset.parts[1].train.tokens


def test_a_damaged_index_is_refused_by_name(corpus):
    folder = prepare(*corpus)
    text = (folder / INDEX).read_text()
    for damaged in (text[:-20], "[]", json.dumps(json.loads(text) | {"format": 0})):
        (folder / INDEX).write_text(damaged)
        with pytest.raises(UserError, match=re.escape(str(folder / INDEX))):
            open_dataset(prepare(*corpus))
