"""Turn a corpus into a prepared folder of tokens, in parallel; resume where it stopped.

This module selects the tokenizer's training text and groups documents into shards. Reading documents is in `documents.py`,
which of them are held out in `held_out.py`, writing a shard in `shards.py`, the worker processes in `pool.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import lzma
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conf.load import load
from conf.schema import DataConfig, TokenizerConfig
from data.batches import open_dataset
from data.documents import PYTHON, documents, fingerprint, parts, stamps
from data.held_out import Selection
from data.pool import Group, encode_groups, run_in_subprocess
from data.progress import ProgressReporter
from data.shards import FORMAT, INDEX, SPLITS, finished_group, read_index, remove_leftovers, token_dtype, write_index
from data.tokenizer import FILE_NAMES, TRAINER, Tokenizer, load_tokenizer, train_sentencepiece
from data.usage import with_keys
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import explain_os_errors

MEGABYTE = 1 << 20
GROUPS = 32  # in which a corpus is tokenized at least, unless they would be of less than a megabyte
XZ_LIMIT = 32 << 20  # bytes of held-out text that xz is tried on: xz -9 takes about a second for 2 MB


def prepare(data: DataConfig, tokenizer: TokenizerConfig, show: bool = False) -> Path:
    """Prepare a corpus unless it is prepared already, and return its folder.

    Any number of processes may call this at once: one prepares, the others wait for it. An interrupted call leaves
    finished shards; the next call continues after them, with the same result as an uninterrupted one.

    Args:
        show: report progress on standard error, as a bar where that is a terminal.

    Raises:
        UserError: bad input, a full disk, a folder that cannot be written.
    """
    folder = folder_of(data, tokenizer)
    if is_complete(folder):
        return folder
    progress = ProgressReporter(show)
    with explain_os_errors("create the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, progress):
        if not is_complete(folder):
            with explain_os_errors("prepare", folder), progress:
                remove_leftovers(folder)
                prepare_source = _prepare_blend if data.source == "blend" else _prepare_corpus
                prepare_source(data, tokenizer, folder, progress)
    return folder


def folder_of(data: DataConfig, tokenizer: TokenizerConfig) -> Path:
    """Return the folder of a prepared corpus; its name holds a hash of everything that determines its content."""
    _check(data, tokenizer)
    folder = _folder(data, tokenizer, fingerprint(data))
    if not is_complete(folder) and data.source not in (*PYTHON, "hf"):
        earlier = _folder(data, tokenizer, stamps(data))  # version 0.1 named it by the place of the files
        if is_complete(earlier):
            return earlier
    return folder


def _folder(data: DataConfig, tokenizer: TokenizerConfig, corpus: str) -> Path:
    if tokenizer.path:
        settings: Any = load_tokenizer(tokenizer.path, tokenizer.eos, tokenizer.bos).hash
    else:
        settings = [TRAINER, tokenizer.vocab_size, tokenizer.train_megabytes]
    held_out: Any = _held_out_settings(data)
    if data.source == "blend":
        held_out = {name: _held_out_settings(part) for name, (_, part) in parts(data).items()}
    known = json.dumps([FORMAT, corpus, settings, held_out], sort_keys=True)
    name = re.sub(r"[^\w.-]+", "-", data.name) or "corpus"
    return Path(data.prepared).expanduser() / f"{name}-{hashlib.blake2b(known.encode(), digest_size=4).hexdigest()}"


def _held_out_settings(data: DataConfig) -> Any:
    """Return the settings that decide what is held out; those of 0.2 as they were then, so that folders keep their names."""
    if data.held_out and data.held_out_files:
        own: list[Any] = [data.held_out_files, data.held_out_kib]
        return own if data.held_out_by == "document" else [*own, data.held_out_by]
    return [data.held_out, data.held_out_by] if data.held_out and data.held_out_by != "document" else data.held_out


def _check(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    if not 0 <= data.held_out < 1:
        raise UserError(f"data.held_out is a fraction of the documents, from 0 to below 1, not {data.held_out}")
    if data.held_out_files < 0 or data.held_out_kib < 1:
        raise UserError("data.held_out_files is a number of documents from 0 on, and data.held_out_kib at least 1")
    if data.shard_megabytes < 1 or tokenizer.train_megabytes < 1:
        raise UserError("data.shard_megabytes and tokenizer.train_megabytes must be at least 1")
    if data.workers < 0:
        raise UserError(f"data.workers is a number of processes, or 0 for one per core, not {data.workers}")
    if tokenizer.kind not in ("sentencepiece", "huggingface"):
        raise UserError(f"tokenizer.kind is sentencepiece or huggingface, not {tokenizer.kind!r}")
    foreign = tokenizer.kind == "huggingface"
    if foreign and not tokenizer.path:
        raise UserError(
            "tokenizer=huggingface needs tokenizer.path, a tokenizer.json; only SentencePiece is trained here"
        )
    if tokenizer.path and Path(tokenizer.path).is_file() and foreign != str(tokenizer.path).endswith(".json"):
        right = "sentencepiece" if foreign else "huggingface"
        raise UserError(f"{tokenizer.path} does not fit tokenizer.kind={tokenizer.kind}; set tokenizer={right}")


def is_complete(folder: Path) -> bool:
    """Whether the folder, and each part of a blend, has its index."""
    if not (folder / INDEX).is_file():
        return False
    return all((folder / part["folder"] / INDEX).is_file() for part in read_index(folder).get("parts", []))


@contextlib.contextmanager
def _locked(folder: Path, progress: ProgressReporter) -> Iterator[None]:
    path = folder.with_name(f".{folder.name}.lock")
    # Without the fallback to a lock file that outlives a killed process: the kernel releases this one with its process.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        with explain_os_errors("lock", path):
            try:
                lock.acquire(blocking=False)
            except Timeout:
                progress.print(f"waiting for the process that prepares {folder}")
                lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot lock {path} ({error.strerror}); set data.prepared to a folder on another file system"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _prepare_blend(data: DataConfig, config: TokenizerConfig, folder: Path, progress: ProgressReporter) -> None:
    """Prepare every part with one tokenizer, and write the index that names them."""
    blend_parts = parts(data)

    def sample(budget: int) -> list[str]:
        """Sample every part in proportion to its weight, without its held-out documents."""
        texts = []
        for weight, part in blend_parts.values():
            texts += _sample(part, Selection(part), int(budget * weight), progress)
        return texts

    tokenizer, path = _tokenizer(config, folder, sample, progress)
    shared = replace(config, kind="sentencepiece" if path.suffix == ".model" else "huggingface", path=str(path))
    progress.close()  # every part reports its own
    records, known = [], hashlib.blake2b(digest_size=16)
    for name, (weight, part) in blend_parts.items():
        progress.print(f"part {name}, {weight:.1%} of the samples")
        prepared = prepare(replace(part, prepared=data.prepared, workers=data.workers), shared, progress.show)
        records.append({"name": name, "weight": weight, "folder": os.path.relpath(prepared, folder)})
        known.update(f"{name}\0{weight!r}\0{read_index(prepared)['corpus_hash']}\0".encode())
    index = {"format": FORMAT, "name": data.name, "source": "blend", "corpus_hash": known.hexdigest(), "parts": records}
    write_index(folder, index | _about(tokenizer))


@dataclass
class _Facts:
    """Facts collected while a corpus is read, complete after its last group."""

    corpus: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))  # of the text and of what is held out
    held_out_text: bytearray | None = field(default_factory=bytearray)  # None: more than XZ_LIMIT
    skipped: int = 0  # records whose text is null or empty
    near_duplicates: int = 0  # documents that nearly repeat held-out text
    # Held-out documents of each folder, one folder after the other.
    held_out_groups: list[int] = field(default_factory=list)
    last_group: str | None = None  # of the held-out documents

    def skip(self) -> None:
        self.skipped += 1

    def hold_out(self, group: str) -> None:
        """Count a held-out document."""
        if group != self.last_group:
            self.held_out_groups.append(0)
        self.held_out_groups[-1] += 1
        self.last_group = group


def _prepare_corpus(data: DataConfig, config: TokenizerConfig, folder: Path, progress: ProgressReporter) -> None:
    known, before = fingerprint(data), stamps(data)
    progress.start(f"choosing the held-out documents of {data.name}")
    selection = Selection(data)
    tokenizer, path = _tokenizer(config, folder, lambda budget: _sample(data, selection, budget, progress), progress)
    dtype = token_dtype(tokenizer.vocab_size)
    facts, done = _Facts(), {}
    workers = data.workers or len(os.sched_getaffinity(0))

    def unfinished() -> Iterator[Group]:
        for group in _groups(data, selection, facts):
            shards = finished_group(folder, group.number, group.text_hash, tokenizer.hash, dtype)
            if shards is None:
                yield group
            else:
                done[group.number] = shards

    progress.start(f"tokenizing {data.name}")
    with contextlib.closing(encode_groups(unfinished(), folder, path, workers)) as encoded:
        for group, shards in encoded:
            done[group.number] = shards
            progress.update(group.fraction)
    if stamps(data) != before:
        raise UserError(f"the corpus data={data.name} was changed while it was read; run the same command again")
    if facts.skipped:
        progress.print(f"{facts.skipped:,} records of {data.name} have no text (null or empty) and were left out")
    if facts.near_duplicates:
        progress.print(
            f"{facts.near_duplicates:,} documents of {data.name} nearly repeat held-out ones and were left out"
        )
    shards = [shard for number in sorted(done) for shard in done[number]]
    facts.corpus.update(tokenizer.hash.encode())
    progress.start("compressing the held-out text with xz, for comparison")
    held_out = facts.held_out_text
    xz = _xz(held_out, progress) * 8 / len(held_out) if held_out else None
    index = {
        "format": FORMAT,
        "name": data.name,
        "source": data.source,
        "fingerprint": hashlib.blake2b(known.encode(), digest_size=16).hexdigest(),
        "corpus_hash": facts.corpus.hexdigest(),
        "held_out": data.held_out,
        "skipped": facts.skipped,
        "near_duplicates": facts.near_duplicates,
        "xz_bits_per_byte": xz,
        "shards": [asdict(shard) for shard in shards],
    }
    if data.held_out_by == "folder":
        index["held_out_groups"] = facts.held_out_groups
    keep = {shard.name for shard in shards} | {f"group-{number:05d}" for number in done}
    remove_leftovers(folder, keep)
    write_index(folder, index | _about(tokenizer))


def _xz(text: bytearray, progress: ProgressReporter) -> int:
    """Return the size in bytes of a text compressed with `xz -9`; in steps, so that Ctrl-C ends it."""
    compressor, size = lzma.LZMACompressor(preset=9), 0
    for start in range(0, len(text), MEGABYTE):
        size += len(compressor.compress(text[start : start + MEGABYTE]))
        progress.update(start / len(text))
    return size + len(compressor.flush())


def _about(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "tokenizer_hash": tokenizer.hash}


def _sample(data: DataConfig, selection: Selection, budget: int, progress: ProgressReporter) -> list[str]:
    """Return a uniform sample of the training documents, about `budget` bytes, in the order of the corpus.

    It keeps those with the smallest second hash, so neither the order nor the size of files matters.
    """
    progress.start(f"reading {data.name} for the tokenizer")
    kept: list[tuple[int, int, int, str]] = []  # a heap: (-second number, place, bytes, text)
    size = 0
    for place, document in enumerate(documents(data)):
        raw = document.text.encode()
        part = selection.part(document.text, raw, document.group)
        if part.split == "train":
            heapq.heappush(kept, (-part.number, place, len(raw), document.text))
            size += len(raw)
            while size > budget and len(kept) > 1:
                size -= heapq.heappop(kept)[2]
        progress.update(document.fraction)
    return [text[:budget] for _, _, _, text in sorted(kept, key=lambda entry: entry[1])]


def _tokenizer(
    config: TokenizerConfig, folder: Path, sample: Any, progress: ProgressReporter
) -> tuple[Tokenizer, Path]:
    """Return the tokenizer and its file in `folder`: the existing one, the one that `config` names, or a new one.

    `sample(bytes)` gives the documents to train on; it is called only if one is trained.
    """
    for path in (folder / name for name in FILE_NAMES):
        if path.is_file():
            return load_tokenizer(path), path
    if config.path:
        tokenizer = load_tokenizer(config.path, config.eos, config.bos)
    else:
        texts = sample(config.train_megabytes * MEGABYTE)
        megabytes = sum(map(len, texts)) / 1e6
        progress.start(f"training a tokenizer of {config.vocab_size} pieces on {megabytes:.2f} MB")
        tokenizer = run_in_subprocess(train_sentencepiece, texts, config.vocab_size, folder / FILE_NAMES[0])
    return tokenizer, tokenizer.save(folder)


def _groups(data: DataConfig, selection: Selection, facts: _Facts) -> Iterator[Group]:
    """Split the corpus between documents into groups of about `data.shard_megabytes` of text.

    A corpus of less than GROUPS times that has smaller ones, of at least a megabyte: there should be work for every core.
    Groups do not depend on the number of workers, so neither do the shards.
    """

    def empty() -> tuple[dict[str, list[str]], dict[str, int], Any]:
        return {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0), hashlib.blake2b(digest_size=16)

    number, begun, fraction = 0, 0.0, 0.0
    texts, sizes, text_hash = empty()
    for document in documents(data, facts.skip):
        raw = document.text.encode()
        part = selection.part(document.text, raw, document.group)
        fraction = document.fraction
        if not part.split:
            facts.near_duplicates += 1
            continue
        held_out = part.split == "held_out"
        if held_out:
            facts.hold_out(document.group)
        raw = part.text.encode() if held_out else raw
        texts[part.split].append(part.text)
        sizes[part.split] += len(raw)
        mark = hashlib.blake2b(raw, digest_size=16).digest() + bytes([held_out])
        text_hash.update(mark)
        facts.corpus.update(mark)
        if held_out and facts.held_out_text is not None:
            facts.held_out_text += raw
            if len(facts.held_out_text) > XZ_LIMIT:
                facts.held_out_text = None
        size = sum(sizes.values())
        if size >= data.shard_megabytes * MEGABYTE or (size >= MEGABYTE and fraction - begun >= 1 / GROUPS):
            yield Group(number, texts, sizes, text_hash.hexdigest(), fraction)
            number, begun = number + 1, fraction
            texts, sizes, text_hash = empty()
    if any(texts.values()):
        yield Group(number, texts, sizes, text_hash.hexdigest(), fraction)


USAGE = """
usage: python -m data.prepare data=NAME data.KEY=VALUE ... tokenizer=NAME tokenizer.KEY=VALUE ...

Turns a corpus into a folder of tokens, in parallel, and prints its path and statistics: ahead of a training that takes the
same overrides, which otherwise does this first. The same command again goes on where an interrupted one stopped.

  python -m data.prepare data=text data.path=notes/
  python -m data.prepare data=jsonl data.path='web/*.jsonl.gz' data.field=content tokenizer.vocab_size=32000
"""


def main(argv: list[str]) -> int:
    """Prepare the corpus that the overrides select, and print its statistics."""
    config = load(argv, program="python -m data.prepare")
    dataset = open_dataset(prepare(config.data, config.tokenizer, show=True))
    train = [part.train for part in dataset.parts]
    held_out = dataset.held_out
    tokens, count = sum(t.tokens for t in train) + held_out.tokens, sum(t.documents for t in train) + held_out.documents
    size = sum(t.text_bytes for t in train) + held_out.text_bytes
    print(dataset.folder)
    for part in dataset.parts if len(dataset.parts) > 1 else []:
        print(
            f"  part       {part.name}: {part.weight:.1%} of the samples, {part.train.tokens:,} tokens in {part.folder}"
        )
    print(f"  tokenizer  {dataset.vocab_size:,} pieces, {size / tokens:.3f} bytes per token")
    print(f"  documents  {count:,}, of which held out {held_out.documents:,}")
    print(f"  tokens     {tokens:,}, of which held out {held_out.tokens:,}")
    print(f"  text       {size / 1e6:,.2f} MB, of which held out {held_out.text_bytes / 1e6:,.2f} MB")
    if dataset.why_no_bits:
        print(f"  lossy      {dataset.why_no_bits}: training reports no bits per byte")
    if skipped := sum(read_index(part.folder).get("skipped", 0) for part in dataset.parts):
        print(f"  left out   {skipped:,} records without text (null or empty)")
    if repeated := sum(read_index(part.folder).get("near_duplicates", 0) for part in dataset.parts):
        print(f"  left out   {repeated:,} documents that nearly repeat held-out ones")
    if dataset.xz_bits_per_byte is not None:
        print(f"  xz -9      {dataset.xz_bits_per_byte:.3f} bits per byte of the held-out text")
    return 0


if __name__ == "__main__":
    run_command(main, with_keys(USAGE))
