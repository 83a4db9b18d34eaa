"""Readers: what they read, in which order, and the sentence for what they cannot read."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import shutil
import socket
import sysconfig
from pathlib import Path
from unittest import mock

import pytest

from conf.schema import DataConfig
from data import documents as module
from data.documents import documents, fingerprint, parts, stamps
from data.files import find_files
from kernels.common.errors import UserError

zstandard = pytest.importorskip("zstandard")


def texts(source: str, path, **keys) -> list[str]:
    return [document.text for document in documents(DataConfig(name=source, source=source, path=path, **keys))]


def refusal(source: str, path, **keys) -> str:
    with pytest.raises(UserError) as error:
        texts(source, path, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_text_from_files_globs_folders_and_packed_files(tmp_path):
    (tmp_path / "b.txt").write_bytes("b\r\nü\r".encode())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("c")
    (tmp_path / "sub" / ".hidden").write_text("no")
    (tmp_path / "sub" / "empty.txt").write_text("")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first ") + gzip.compress(b"second"))
    (tmp_path / "z.txt.zst").write_bytes(zstandard.compress(b"x" * 3_000_00) + zstandard.compress(b"y"))
    packed = "x" * 3_000_00 + "y"
    assert "".join(texts("text", str(tmp_path / "z.txt.zst"))) == packed
    assert texts("text", str(tmp_path / "b.txt")) == ["b\r\nü\r"]
    assert texts("text", str(tmp_path / "*.txt*"))[:2] == ["first second", "b\r\nü\r"]
    assert "".join(texts("text", str(tmp_path))) == "first secondb\r\nü\r" + packed + "c"
    assert texts("text", str(tmp_path / "**/*.md")) == ["c"]
    listed = [str(tmp_path / "sub"), str(tmp_path / "b.txt"), str(tmp_path / "sub/c.md")]
    assert texts("text", listed) == ["c", "b\r\nü\r"]  # in the order of the list, each file once
    fractions = [d.fraction for d in documents(DataConfig(source="text", path=str(tmp_path)))]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(fractions))
    assert fractions[-1] == pytest.approx(1)


@pytest.mark.parametrize("line", ["ä" * 70 + "\n", "äöü漢🙂"], ids=["lines", "one line"])
def test_a_large_text_is_cut_into_documents_without_loss(tmp_path, line):
    whole = line * (1_500_000 // len(line.encode()))
    (tmp_path / "large.txt").write_text(whole, encoding="utf-8")
    found = texts("text", str(tmp_path / "large.txt"))
    assert "".join(found) == whole
    assert len(found) > 10
    assert max(len(text.encode()) for text in found) <= 2 * module.SPLIT
    if "\n" in line:
        assert all(text.endswith("\n") for text in found)


def test_text_that_is_not_utf8_is_refused_with_its_offset(tmp_path):
    early, late, packed = tmp_path / "early.txt", tmp_path / "late.txt", tmp_path / "packed.txt.gz"
    early.write_bytes(b"abc\xe9def")
    late.write_bytes(b"line\n" * 200_000 + b"\xff")
    packed.write_bytes(gzip.compress(b"ab\xff"))
    assert f"{early} is not UTF-8: byte 0xe9 at offset 3" in refusal("text", str(early))
    assert "offset 1000000 " in refusal("text", str(late))
    assert "offset 2 of the unpacked content" in refusal("text", str(packed))
    early.write_text("hello", encoding="utf-16")
    assert "UTF-16" in refusal("text", str(early))


def test_missing_empty_and_damaged_files_are_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty").mkdir()
    assert "did you mean 'notes.txt'?" in refusal("text", str(tmp_path / "note.txt"))
    assert "there is no file or folder" in refusal("text", str(tmp_path / "no/such"))
    assert "no file matches" in refusal("text", str(tmp_path / "*.csv"))
    assert "empty.txt is empty" in refusal("text", str(tmp_path / "empty.txt"))
    assert "holds no files" in refusal("text", str(tmp_path / "empty"))
    assert "holds no .jsonl" in refusal("jsonl", str(tmp_path))
    assert "needs data.path" in refusal("text", None)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text" * 100)[:-12])
    (tmp_path / "cut.txt.zst").write_bytes(zstandard.compress(bytes(range(256)) * 999)[:-5])
    (tmp_path / "fake.txt.gz").write_bytes(b"plain text")
    (tmp_path / "fake.txt.zst").write_bytes(b"plain text")
    assert "cut.txt.gz is truncated" in refusal("text", str(tmp_path / "cut.txt.gz"))
    assert "cut.txt.zst is truncated" in refusal("text", str(tmp_path / "cut.txt.zst"))
    assert "fake.txt.gz is not a valid gzip file" in refusal("text", str(tmp_path / "fake.txt.gz"))
    assert "fake.txt.zst is not a valid zstd file" in refusal("text", str(tmp_path / "fake.txt.zst"))

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert "cannot read" in refusal("text", str(tmp_path / "notes.txt"))


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\nline"}\n\n{"text": ""}\n{"text": "two \\ud83d\\ude42"}', encoding="utf-8")
    assert texts("jsonl", str(path)) == ["one\nline", "two 🙂"]
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'{"body": "three"}\n'))
    (tmp_path / "ignored.csv").write_text("no")
    assert texts("jsonl", str(tmp_path / "b.json.gz"), field="body") == ["three"]
    many = [json.dumps({"text": "é" * n}) for n in range(1, 2000)]  # lines across the borders of what is read at once
    (tmp_path / "c.jsonl").write_text("\n".join(many), encoding="utf-8")
    assert [len(text) for text in texts("jsonl", str(tmp_path / "c.jsonl"))] == list(range(1, 2000))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": 1}', "line 2: the field 'text' holds int, not text"),
        (b'{"body": "x"}', "line 2 has no field 'text'; its fields are body: set data.field"),
        (b'{"text": "x"', "line 2 is not JSON"),
        (b"[1]", "line 2 is a JSON list, not an object with fields; data=jsonl takes one JSON object per line"),
        (b'{"text": "\xff"}', "is not UTF-8: byte 0xff at offset 25 "),
        (b'{"text": "a\\ud800b"}', "line 2 holds half of a surrogate pair (\\ud800)"),
    ],
)
def test_jsonl_refuses_a_bad_line(tmp_path, line, sentence):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n' + line + b"\n")
    assert f"{path}" in refusal("jsonl", str(path))
    assert sentence in refusal("jsonl", str(path))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "", "two"], "id": [1, 2, 3, 4]}), path)
    assert texts("parquet", str(tmp_path)) == ["one", "two"]
    assert "no field 'body'; its fields are text, id" in refusal("parquet", str(path), field="body")
    assert "row 1: the field 'id' holds int, not text" in refusal("parquet", str(path), field="id")
    (tmp_path / "broken.parquet").write_bytes(path.read_bytes()[:-9])
    assert "broken.parquet as parquet" in refusal("parquet", str(tmp_path / "broken.parquet"))
    raw = pyarrow.array([b"good", b"bad \xff"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": raw}), path)
    assert "row 2 is not UTF-8: byte 0xff at offset 4" in refusal("parquet", str(path))


def test_hf_reads_a_local_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two", None, ""], "id": [1, 2, 3, 4]})
    rows.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert texts("hf", str(tmp_path / "plain")) == ["one", "two"]
    assert texts("hf", str(tmp_path / "splits"), split="test") == ["two"]
    assert "no split 'dev'; it has train, test" in refusal("hf", str(tmp_path / "splits"), split="dev")
    assert "no field 'body'; its fields are text, id" in refusal("hf", str(tmp_path / "plain"), field="body")
    assert "cannot load the data set" in refusal("hf", str(tmp_path / "nothing"))
    config = DataConfig(source="hf", path=str(tmp_path / "plain"))
    assert fingerprint(config) == fingerprint(config)
    rows.select([0]).save_to_disk(str(tmp_path / "other"))
    assert fingerprint(DataConfig(source="hf", path=str(tmp_path / "other"))) != fingerprint(config)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "pip install datasets" in refusal("hf", "x")


def test_stdlib_is_the_library_of_this_python_without_its_tests(tmp_path, monkeypatch):
    for name in ("b.py", "a.py", "pkg/x.py", "test/t.py", "pkg/tests/t.py", "site-packages/s.py", "data.txt"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(f"# {name}\n")
    (tmp_path / "lib" / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "outside.py").write_text("no")
    (tmp_path / "lib" / "link.py").symlink_to(tmp_path / "outside.py")
    real = DataConfig()
    names = {document.name for document in documents(real)}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any(set(Path(name).parts[:-1]) & {"test", "tests", "site-packages"} for name in names)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    assert [d.name for d in documents(real)] == ["a.py", "b.py", "pkg/x.py"]
    before = fingerprint(real)
    assert fingerprint(real) == before
    (tmp_path / "lib" / "a.py").write_text("# other")
    assert fingerprint(real) != before


@pytest.mark.parametrize("hashed", [module.HASHED, 0], ids=["small", "large"])
def test_a_corpus_is_known_by_its_content_wherever_it_lies(tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(module, "HASHED", hashed)
    first = tmp_path / "first"
    first.mkdir()

    def known(folder: object) -> str:
        return fingerprint(DataConfig(source="text", path=str(folder)))

    (first / "a.txt").write_text("text")
    seen = [known(first)]
    (first / "a.txt").write_text("long")
    os.utime(first / "a.txt", ns=(1, 1))
    seen.append(known(first))
    (first / "c.txt").write_text("more")
    seen.append(known(first))
    assert len(set(seen)) == 3
    assert {known(f"{first}/"), known(f"{first}/*"), known(os.path.relpath(first))} == {seen[-1]}
    shutil.copytree(first, tmp_path / "second")
    assert known(tmp_path / "second") == seen[-1]
    assert stamps(DataConfig(source="text", path=str(tmp_path / "second"))) != stamps(
        DataConfig(source="text", path=str(first))
    )


def test_parts_of_a_blend():
    keys = {"stdlib": {"weight": 3}, "web": {"source": "jsonl", "path": "x", "field": "body", "weight": 1}}
    found = parts(DataConfig(name="blend", source="blend", held_out=0.1, parts=keys))
    assert found["stdlib"][0] == 0.75
    web = found["web"][1]
    assert (web.source, web.path, web.field, web.held_out, web.name) == ("jsonl", "x", "body", 0.1, "web")
    [(_, large)] = parts(DataConfig(source="blend", parts={"text": {"shard_megabytes": "1k", "path": ["x"]}})).values()
    assert (large.shard_megabytes, large.path) == (1000, ["x"])


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, "needs its parts"),
        ({"text": {"weight": 0, "path": "x"}}, "data.parts.text.weight must be a positive number, not 0"),
        ({"text": {"weight": "much"}}, "positive number"),
        ({"text": {"pth": "x"}}, "did you mean 'path'?"),
        ({"code": {"path": "x"}}, "set data.parts.code.source"),
        ({"blend": {"path": "x"}}, "unknown source"),
        ({"text": 3}, "must hold keys"),
        ({"text": {"held_out": "much"}}, "data.parts.text.held_out=much: expected a number"),
        ({"text": {"held_out": None}}, "data.parts.text.held_out=null: expected a value"),
        ({"text": {"shard_megabytes": "1.5"}}, "data.parts.text.shard_megabytes=1.5: expected a whole number"),
        ({"text": {"source": ["text"]}}, "unknown source"),
        ({"text": {"source": 3}}, "unknown source"),
    ],
)
def test_parts_that_are_wrong_are_refused(keys, sentence):
    with pytest.raises(UserError, match=r".") as error:
        parts(DataConfig(source="blend", parts=keys))
    assert sentence in str(error.value)


def test_linked_folders_are_read_once_each(tmp_path):
    for where in ("data/own", "elsewhere"):
        (tmp_path / where).mkdir(parents=True)
        (tmp_path / where / "a.txt").write_text(where)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "own" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "own" / "around").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b.txt").symlink_to(tmp_path / "data" / "own" / "a.txt")
    assert sorted(texts("text", str(tmp_path / "data"))) == ["data/own", "elsewhere"]
    both = [str(tmp_path / "data"), str(tmp_path / "elsewhere" / "a.txt"), os.path.relpath(tmp_path / "data")]
    assert sorted(texts("text", both)) == ["data/own", "elsewhere"]


def test_a_glob_descends_into_each_real_folder_once(tmp_path):
    def names(pattern: str) -> list[str]:
        return [os.path.relpath(str(file), tmp_path) for file in find_files(str(tmp_path / pattern), None)]

    for where in ("own/deep", "outside"):
        (tmp_path / where).mkdir(parents=True)
        (tmp_path / where / "a.txt").write_text(where)
    (tmp_path / "own" / "around").symlink_to(tmp_path / "own")
    (tmp_path / "own" / "linked").symlink_to(tmp_path / "outside")
    assert names("own/**/*.txt") == ["own/deep/a.txt", "own/linked/a.txt"]  # not own/around/around/...
    (tmp_path / "own" / "deep" / "up").symlink_to(tmp_path)  # in all orders of two links a search would never end
    (tmp_path / "own" / "deep" / "and").symlink_to(tmp_path / "own")
    assert names("own/**/*.txt") == ["own/deep/a.txt", "own/deep/up/outside/a.txt"]
    assert names("**/deep/**/a.*") == ["own/deep/a.txt", "own/deep/and/linked/a.txt"]
    assert names("**/**") == ["outside/a.txt", "own/deep/a.txt"]
    assert names("*/**/deep/*") == ["own/deep/a.txt"]


@pytest.fixture
def with_a_pipe(tmp_path, monkeypatch):
    """A folder with a text, a pipe and a link to it; opening either is an error here, where it would wait for a writer."""
    (tmp_path / "a.txt").write_text("words")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to("pipe.txt")
    unchecked = open

    def checked(path, *arguments, **keys):
        assert isinstance(path, int) or not Path(path).is_fifo()
        return unchecked(path, *arguments, **keys)

    monkeypatch.setattr("builtins.open", checked)
    return tmp_path


def test_pipes_and_sockets_in_a_folder_are_left_out(with_a_pipe, monkeypatch):
    monkeypatch.chdir(with_a_pipe)  # the name of a socket has a hundred bytes at most
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("socket.txt")
        for path in (".", "*.txt", "**/*.txt"):
            assert texts("text", path) == ["words"]
    config = DataConfig(source="text", path=".")
    assert fingerprint(config) == fingerprint(DataConfig(source="text", path="a.txt"))


@pytest.mark.parametrize("name", ["pipe.txt", "link.txt", "/dev/null"])
def test_a_pipe_or_device_that_is_named_is_refused(with_a_pipe, name):
    path = with_a_pipe / name
    expected = f"{path} is a pipe, socket or device, and text is read several times: write it into a file"
    assert refusal("text", str(path)) == expected
    assert refusal("parquet", str(path)) == expected


def test_a_pipe_behind_a_url_of_this_machine_is_left_out_or_refused(with_a_pipe):
    pytest.importorskip("fsspec")
    assert texts("text", f"file://{with_a_pipe}") == ["words"]
    assert "is a pipe, socket or device" in refusal("text", f"file://{with_a_pipe}/pipe.txt")


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "cannot read the folder" in refusal("text", str(tmp_path))


def test_packed_files_of_every_kind_and_in_capitals(tmp_path):
    line = json.dumps({"text": "words"}).encode() + b"\n"
    window = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    long = zstandard.ZstdCompressor(compression_params=window).compressobj()  # of unknown size: its window is not cut
    for name, packed in {
        "a.jsonl.GZ": gzip.compress(line),
        "b.jsonl.bz2": bz2.compress(line),
        "c.jsonl.XZ": lzma.compress(line),
        "d.jsonl.zst": long.compress(line) + long.flush(),
        "e.jsonl.zst": b"".join(zstandard.compress(line[i : i + 1]) for i in range(len(line))),
    }.items():
        (tmp_path / name).write_bytes(packed)
        assert texts("jsonl", str(tmp_path / name)) == ["words"]
    assert texts("jsonl", str(tmp_path)) == ["words"] * 5
    for name, packed in (("x.bz2", bz2.compress(line)), ("y.xz", lzma.compress(line))):
        (tmp_path / name).write_bytes(packed[:-4])
        assert "is truncated" in refusal("text", str(tmp_path / name))
        (tmp_path / name).write_bytes(b"never packed")
        assert "is not a valid" in refusal("text", str(tmp_path / name))


@pytest.mark.parametrize(
    ("start", "advice"),
    [
        (gzip.compress(b"a"), "gzip data: give its name the ending .gz"),
        (bz2.compress(b"a" * 999), "bzip2 data: give its name the ending .bz2"),
        (b"PK\x03\x04\xff\xfe", "a zip archive: unpack it first"),
        (b"PAR1\xff", "a parquet file: read it with data=parquet"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"\x89PNG\r\n", "convert it (iconv -t UTF-8) or leave it out"),
    ],
    ids=["gzip", "bzip2", "zip", "parquet", "UTF-16", "other"],
)
def test_bytes_that_are_no_text_get_the_advice_that_helps(tmp_path, start, advice):
    (tmp_path / "a.txt").write_bytes(start)
    assert advice in refusal("text", str(tmp_path))


def test_an_archive_is_not_read_as_text(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path, "a.txt")
    assert "is a tar archive: unpack it" in refusal("text", str(tmp_path / "packed.tar.gz"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("words", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n{"text": "\ufeff"}', encoding="utf-8-sig")
    assert texts("text", str(tmp_path / "a.txt")) == ["words"]
    assert texts("jsonl", str(tmp_path / "a.jsonl")) == ["words", "\ufeff"]  # what a record holds is its own


def test_jsonl_reads_only_what_it_needs(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "words"})[:-1] + f', "number": {"1" * 5000}}}\n')
    assert texts("jsonl", str(path)) == ["words"]
    assert "the field 'number' holds int, not text" in refusal("jsonl", str(path), field="number")
    path.write_text('{"text": "a"}\n{"text": "b", "other": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert "line 2 nests brackets too deeply" in refusal("jsonl", str(path))


def test_a_line_of_many_chunks_is_put_together_once(tmp_path, monkeypatch):
    monkeypatch.setattr("data.files.CHUNK", 16)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": letter * 1_000_000}) for letter in "ab"))
    assert texts("jsonl", str(tmp_path / "a.jsonl")) == ["a" * 1_000_000, "b" * 1_000_000]


def test_records_without_text_are_left_out_and_counted_in_every_source(tmp_path):
    values = ["one", None, "", "two", None]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    for source in ("jsonl", "parquet"):
        skip = mock.Mock()
        config = DataConfig(source=source, path=str(tmp_path / f"a.{source}"))
        assert [document.text for document in documents(config, skip)] == ["one", "two"]
        assert skip.call_count == 3
