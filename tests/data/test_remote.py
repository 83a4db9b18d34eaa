"""Text behind URLs: read as local text is, known by what its store says of it, refused in a sentence without secrets."""

from __future__ import annotations

import bz2
import gzip
import http.server
import json
import lzma
import os
import random
import sys
import threading
from collections import Counter
from dataclasses import replace

import pytest

import data.documents
import data.remote
from conf.schema import DataConfig, TokenizerConfig
from data.documents import documents, fingerprint, most_bytes, stamps
from data.files import find_files, read_chunks
from data.prepare import prepare
from kernels.common.errors import TryAgain, UserError

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


class Site(http.server.ThreadingHTTPServer):
    """A web server of the texts in `files`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}  # by path, "/a.txt"
        self.etags: dict[str, str] = {}
        self.ranges = True  # whether it sends parts of files
        self.broken = False  # whether it sends half of what it promises
        self.forbidden = False
        self.sent: Counter[str] = Counter()  # bytes, by path
        self.seen: list[str] = []  # paths with their queries

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Site
    protocol_version = "HTTP/1.1"  # connections stay open

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        path = self.path.partition("?")[0]
        body, status = self.server.files.get(path), 200
        if body is None and any(name.startswith(f"{path}/") for name in self.server.files):
            self.send_response(301)
            self.send_header("Location", f"{path}/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if body is None and path.endswith("/"):
            names = {name.removeprefix(path).partition("/") for name in self.server.files if name.startswith(path)}
            body = "".join(f'<a href="{first}{slash}">x</a>' for first, slash, _ in names).encode()
        if self.server.forbidden or body is None:
            self.send_error(403 if self.server.forbidden else 404)
            return
        if (asked := self.headers.get("Range")) and self.server.ranges:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            status, body = 206, body[first : last + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "text/html" if path.endswith("/") else "text/plain")
        if path in self.server.etags:
            self.send_header("ETag", self.server.etags[path])
        self.end_headers()
        if self.command == "GET":
            self.server.sent[path] += len(body)
            self.wfile.write(body[: len(body) // 2] if self.server.broken else body)
            self.close_connection = self.server.broken

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site():
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def memory():
    """Put files into fsspec's file system in memory, by path."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]

    def put(path: str, content: bytes) -> str:
        store.pipe_file(path, content)
        return f"memory://{path.lstrip('/')}"

    yield put
    store.store.clear()


def texts(source: str, path, **keys) -> list[str]:
    return [document.text for document in documents(DataConfig(name=source, source=source, path=path, **keys))]


def refusal(source: str, path, kind=UserError, **keys) -> str:
    with pytest.raises(kind) as error:
        texts(source, path, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def parquet_bytes(columns: dict[str, list], **keys) -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink, **keys)
    return sink.getvalue().to_pybytes()


def test_a_file_a_folder_a_glob_and_a_list_of_both_kinds(memory, tmp_path):
    (tmp_path / "own.txt").write_text("own")
    for name in ("b.txt", "a.txt", "sub/c.md", "sub/.hidden", "a/z.txt"):
        memory(f"/corpus/{name}", name.encode())
    assert texts("text", "memory://corpus/b.txt") == ["b.txt"]
    assert (
        texts("text", "memory://corpus")
        == texts("text", "memory://corpus/")
        == ["a.txt", "b.txt", "a/z.txt", "sub/c.md"]
    )
    assert texts("text", "memory://corpus/*.txt") == ["a.txt", "b.txt"]
    assert texts("text", "memory://corpus/**/*.txt") == ["a/z.txt", "a.txt", "b.txt"]
    both = ["memory://corpus/sub", str(tmp_path), "memory://corpus/b.txt", "memory://corpus/*.txt"]
    assert texts("text", both) == ["sub/c.md", "own", "b.txt", "a.txt"]  # each file once
    found = list(documents(DataConfig(source="text", path="memory://corpus")))
    assert [document.group for document in found] == ["a.txt", "b.txt", "a", "sub"]
    assert found[-1].fraction == pytest.approx(1)
    assert most_bytes(DataConfig(source="text", path="memory://corpus/*.txt")) == 10


def test_every_kind_of_file_over_http(site):
    line = json.dumps({"text": "words"}).encode() + b"\n"
    for name, content in {
        "a.jsonl": line,
        "b.jsonl.gz": gzip.compress(line),
        "c.jsonl.bz2": bz2.compress(line),
        "d.jsonl.xz": lzma.compress(line),
        "sub/e.json": line,
        "f.parquet": parquet_bytes({"text": ["words", None]}),
        "notes.txt": "ü".encode(),
    }.items():
        site.files[f"/corpus/{name}"] = content
    assert texts("jsonl", f"{site.url}/corpus/") == ["words"] * 5
    assert texts("jsonl", f"{site.url}/corpus") == ["words"] * 5
    assert texts("jsonl", f"{site.url}/corpus/*.gz") == ["words"]
    assert texts("jsonl", f"{site.url}/corpus/b.jsonl.gz?download=true") == ["words"]
    assert texts("parquet", f"{site.url}/corpus/f.parquet") == ["words"]
    assert texts("text", f"{site.url}/corpus/notes.txt") == ["ü"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_long_file_comes_whole_from_servers_with_and_without_ranges(site, monkeypatch, ranges):
    monkeypatch.setattr(data.remote, "READ_AHEAD", 1 << 16)
    lines = "".join(f"line {i}\n" for i in range(300_000))
    site.files["/a.txt"], site.ranges = lines.encode(), ranges
    site.files["/a.txt.gz"] = gzip.compress(lines.encode(), 1)
    assert "".join(texts("text", f"{site.url}/a.txt")) == lines
    assert "".join(texts("text", f"{site.url}/a.txt.gz")) == lines


def test_of_a_parquet_file_only_the_column_is_asked_for(site):
    noise = [random.Random(i).randbytes(500).hex() for i in range(1000)]
    content = parquet_bytes({"text": [f"text {i}" for i in range(1000)], "noise": noise}, use_dictionary=False)
    site.files["/a.parquet"] = content
    assert texts("parquet", f"{site.url}/a.parquet") == [f"text {i}" for i in range(1000)]
    assert len(content) > 300_000
    assert 0 < site.sent["/a.parquet"] < 150_000
    site.ranges = False
    assert "does not send parts of a file" in refusal("parquet", f"{site.url}/a.parquet")


@pytest.fixture
def few(more_corpus, tmp_path, prepared):
    """A small corpus and a tokenizer that exists already: (configuration, tokenizer, {name: content})."""
    folder = more_corpus(tmp_path / "corpus", 24)
    config = DataConfig(source="text", path=str(folder), prepared=str(tmp_path / "prepared"), workers=1, held_out=0.2)
    return (
        config,
        TokenizerConfig(path=str(prepared / "tokenizer.model")),
        {p.name: p.read_bytes() for p in folder.iterdir()},
    )


@pytest.mark.usefixtures("small_shards")
def test_the_same_text_has_the_same_shards_wherever_it_lies(few, memory, site):
    config, tokenizer, files = few
    for name, content in files.items():
        memory(f"/corpus/{name}", content)
        site.files[f"/corpus/{name}"] = content
    folders = [
        prepare(replace(config, name=name, path=where), tokenizer)
        for name, where in (("local", config.path), ("memory", "memory://corpus"), ("web", f"{site.url}/corpus/"))
    ]
    local, *others = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "index.json"} for folder in folders
    )
    assert len(local) > 5
    assert all(other == local for other in others)
    hashes = {json.loads((folder / "index.json").read_text())["corpus_hash"] for folder in folders}
    assert len(hashes) == 1


def test_a_remote_file_is_known_by_what_its_store_says(site, memory, tmp_path):
    def known(path) -> tuple[str, str]:
        config = DataConfig(source="text", path=path)
        return fingerprint(config), stamps(config)

    url = f"{site.url}/a.txt"
    site.files["/a.txt"], site.etags["/a.txt"] = b"text", '"1"'
    seen = [known(url)]
    assert known(url) == seen[0]
    assert site.sent["/a.txt"] == 0  # no content is read for it
    site.etags["/a.txt"] = '"2"'
    seen.append(known(url))
    del site.etags["/a.txt"]
    seen.append(known(url))
    site.files["/a.txt"] = b"longer"
    seen.append(known(url))
    assert len(set(seen)) == 4
    memory("/a.txt", b"text")
    first = known("memory://a.txt")
    memory("/a.txt", b"same")
    assert known("memory://a.txt") != first
    (tmp_path / "own.txt").write_text("own")
    own = json.loads(fingerprint(DataConfig(source="text", path=str(tmp_path))))[1][1]
    mixed = json.loads(fingerprint(DataConfig(source="text", path=["memory://a.txt", str(tmp_path)])))[1]
    assert mixed[2] == own  # local files are known as they were


def test_local_corpora_keep_their_fingerprints(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("more")
    config = DataConfig(source="text", path=str(tmp_path))
    assert (
        fingerprint(config)
        == '["text", [null, "d732c6be860e019351f99173fa6ae612", "ee230973adaa6873ff8cfa179f5ddd90"]]'
    )
    monkeypatch.setattr(data.documents, "HASHED", 0)
    for name in ("a.txt", "b.txt"):
        os.utime(tmp_path / name, ns=(5, 5))
    known = [[4, 5, "ce9fdf54ddf5fc43bc4690da94aaf091"], [4, 5, "6ee0539c64a8b6a4c10af0adf167aa85"]]
    assert json.loads(fingerprint(config)) == ["text", [None, *known]]


def test_a_file_that_changed_while_it_was_read_is_noticed(few, site, monkeypatch):
    config, tokenizer, files = few
    site.files = {f"/c/{name}": content for name, content in files.items()}
    site.etags = dict.fromkeys(site.files, '"1"')
    read, changed = data.documents.read_chunks, sorted(site.files)[3]

    def change_then_read(path):
        site.etags[changed] = '"2"'
        return read(path)

    monkeypatch.setattr(data.documents, "read_chunks", change_then_read)
    with pytest.raises(UserError, match="was changed while it was read"):
        prepare(replace(config, path=f"{site.url}/c/"), tokenizer)


def test_what_is_missing_empty_or_refused_is_a_sentence_with_the_url(site, memory, monkeypatch):
    memory("/corpus/a.txt", b"a")
    memory("/corpus/empty.jsonl", b"")
    assert refusal("text", "memory://corpus/b.txt") == "there is no file or folder memory://corpus/b.txt"
    assert refusal("text", "memory://nothing/") == "there is no file or folder memory://nothing/"
    assert refusal("text", "memory://corpus/*.csv") == "no file matches memory://corpus/*.csv"
    assert "memory://corpus holds no .parquet or .pq files" in refusal("parquet", "memory://corpus")
    assert refusal("jsonl", "memory://corpus/empty.jsonl") == "memory://corpus/empty.jsonl is empty"
    assert refusal("text", f"{site.url}/no.txt") == f"there is no file or folder {site.url}/no.txt"
    site.files["/a.txt"] = b"text"
    site.forbidden = True
    assert f"no permission to read {site.url}/a.txt" in refusal("text", f"{site.url}/a.txt")
    site.server_close()
    assert "cannot read http://127.0.0.1:9/a.txt: " in refusal("text", "http://127.0.0.1:9/a.txt")
    assert "cannot read nonsense://a/b: " in refusal("text", "nonsense://a/b")
    assert "data=hf takes the name of a data set" in refusal("hf", "hf://datasets/a/b")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "needs the package s3fs: pip install s3fs" in refusal("text", "s3://bucket/a.txt")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert "needs the package fsspec: pip install fsspec" in refusal("text", "s3://bucket/a.txt")


def test_a_file_that_became_shorter_than_it_was_listed_is_noticed(site, monkeypatch):
    monkeypatch.setattr(data.remote, "READ_AHEAD", 1 << 16)
    site.files["/a.txt"] = b"words\n" * 400_000
    (file,) = find_files(f"{site.url}/a.txt", None)
    site.files["/a.txt"] = b"words\n" * 200_000
    with pytest.raises(TryAgain, match="ended after 1,200,000 of 2,400,000 bytes"):
        list(read_chunks(file))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_breaks_can_be_tried_again(site, monkeypatch, ranges):
    monkeypatch.setattr(data.remote, "READ_AHEAD", 1 << 16)
    site.files = {"/a.txt": b"words\n" * 100_000, "/a.parquet": parquet_bytes({"text": ["a" * 100_000]})}
    site.broken, site.ranges = True, ranges
    assert f"{site.url}/a.txt" in refusal("text", f"{site.url}/a.txt", TryAgain)
    if ranges:
        assert f"{site.url}/a.parquet" in refusal("parquet", f"{site.url}/a.parquet", TryAgain)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@a.org/t",
        "https://hunter2@a.org/t",
        "https://me:hun/ter2@a.org/hunter2",
        "https://a.org/t?x=1&X-Amz-Signature=hunter2",
        "https://a.org/t?sig=hunter2",
        "https://a.org/t?access_token=hunter2",
        "s3://key:hunter2@bucket/t",
    ],
)
def test_a_url_that_writes_out_a_secret_is_refused_without_repeating_it(url):
    sentence = refusal("text", [url])
    assert "write $NAME in its place" in sentence
    assert "hunter2" not in sentence


def test_a_secret_comes_from_the_environment_and_goes_nowhere(site, few, monkeypatch):
    config, tokenizer, files = few
    site.files = {f"/c/{name}": content for name, content in files.items()}
    urls = [f"{site.url}{path}?token=$MY_TOKEN" for path in sorted(site.files)]
    assert "names the environment variable MY_TOKEN, which is not set" in refusal("text", urls)
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    folder = prepare(replace(config, path=urls), tokenizer)
    assert site.seen[-1].endswith("?token=hunter2hunter2")
    assert not [path for path in folder.iterdir() if b"hunter2" in path.read_bytes()]
    assert "hunter2" not in stamps(replace(config, path=urls))
    found = next(iter(documents(replace(config, path=urls))))
    assert found.name == urls[0]
    site.forbidden = True
    assert refusal("text", urls).startswith(f"no permission to read {urls[0]}")
    missing = "http://me:$MY_TOKEN@127.0.0.1:9/a?token=$MY_TOKEN"
    assert "hunter2" not in refusal("text", missing)
