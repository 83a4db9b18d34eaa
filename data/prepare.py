"""`python -m data.prepare`: a corpus becomes a prepared folder of tokens, in parallel, and resumed where it stopped.

Which documents are held out, what the tokenizer is trained on and how documents are grouped into shards is decided
here. How documents are read is in `documents.py`, how a shard is written in `shards.py`, and the worker processes are
in `pool.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import heapq
import itertools
import json
import lzma
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.schema import DataConfig, TokenizerConfig
from data.documents import documents, fingerprint, parts
from data.pool import Group, encode_groups, run_apart
from data.progress import Report
from data.shards import FORMAT, INDEX, SPLITS, finished_group, read_index, remove_leftovers, token_dtype, write_json
from data.tokenizer import FILE_NAMES, TRAINER, Tokenizer, load_tokenizer, train_sentencepiece
from kernels.common.errors import UserError
from kernels.common.files import say_why

MEGABYTE = 1 << 20
FEW = 1000  # documents; in a corpus of fewer, chance alone may hold out none of them, or all
XZ_LIMIT = 32 << 20  # bytes of held-out text that xz is tried on: xz -9 takes about a second for 2 MB


def prepare(data: DataConfig, tokenizer: TokenizerConfig, show: bool = False) -> Path:
    """Make sure that a corpus is prepared, and return its folder; at once if it is.

    Any number of processes may call this together: one prepares, the others wait for it. An interrupted call leaves
    finished shards, and the next call goes on after them, with the same result as one call would have had.

    Args:
        show: report progress on standard error, as a bar where that is a terminal.

    Raises:
        UserError: bad input, a full disk, a folder that cannot be written (one sentence, see the rooms' readers).
    """
    folder = folder_of(data, tokenizer)
    if _complete(folder):
        return folder
    report = Report(show)
    with say_why("create the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, report):
        if not _complete(folder):
            with say_why("prepare", folder), report:
                remove_leftovers(folder)
                (_prepare_blend if data.source == "blend" else _prepare_corpus)(data, tokenizer, folder, report)
    return folder


def folder_of(data: DataConfig, tokenizer: TokenizerConfig) -> Path:
    """Return the folder that a corpus is prepared in; its name holds a hash of all that decides the content."""
    _check(data, tokenizer)
    if tokenizer.path:
        settings: Any = load_tokenizer(tokenizer.path).hash
    else:
        settings = [TRAINER, tokenizer.vocab_size, tokenizer.train_megabytes]
    held_out: Any = data.held_out
    if data.source == "blend":
        held_out = {name: part.held_out for name, (_, part) in parts(data).items()}
    known = json.dumps([FORMAT, fingerprint(data), settings, held_out], sort_keys=True)
    name = re.sub(r"[^\w.-]+", "-", data.name) or "corpus"
    return Path(data.prepared).expanduser() / f"{name}-{hashlib.blake2b(known.encode(), digest_size=4).hexdigest()}"


def _check(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    if not 0 <= data.held_out < 1:
        raise UserError(f"data.held_out is a share of the documents, from 0 to below 1, not {data.held_out}")
    if data.shard_megabytes < 1 or tokenizer.train_megabytes < 1:
        raise UserError("data.shard_megabytes and tokenizer.train_megabytes must be at least 1")
    if data.workers < 0:
        raise UserError(f"data.workers is a number of processes, or 0 for one a core, not {data.workers}")
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


def _complete(folder: Path) -> bool:
    """Whether the folder, and each part of a blend, has its index."""
    if not (folder / INDEX).is_file():
        return False
    return all((folder / part["folder"] / INDEX).is_file() for part in read_index(folder).get("parts", []))


@contextlib.contextmanager
def _locked(folder: Path, report: Report) -> Iterator[None]:
    path = folder.with_name(f".{folder.name}.lock")
    with say_why("lock", path):
        lock = open(path, "a")
    with lock:  # closing it lets go of the lock, and so does the end of this process, however it comes
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.say(f"waiting for the process that prepares {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"cannot lock {path} ({error.strerror}); set data.prepared to another file system"
            ) from error
        yield


def _prepare_blend(data: DataConfig, config: TokenizerConfig, folder: Path, report: Report) -> None:
    """Prepare every part with one tokenizer, and write the index that names them."""
    of_blend = parts(data)

    def sample(budget: int) -> list[str]:
        """Draw from every part by its weight, leaving out what the part holds out."""
        texts = []
        for share, part in of_blend.values():
            texts += _sample(part, _threshold(part), int(budget * share), report)
        return texts

    tokenizer, path = _tokenizer(config, folder, sample, report)
    shared = replace(config, kind="sentencepiece" if path.suffix == ".model" else "huggingface", path=str(path))
    report.close()  # every part reports for itself
    records, known = [], hashlib.blake2b(digest_size=16)
    for name, (share, part) in of_blend.items():
        report.say(f"part {name}, {share:.1%} of the samples")
        prepared = prepare(replace(part, prepared=data.prepared, workers=data.workers), shared, report.show)
        records.append({"name": name, "weight": share, "folder": os.path.relpath(prepared, folder)})
        known.update(f"{name}\0{share!r}\0{read_index(prepared)['corpus_hash']}\0".encode())
    index = {"format": FORMAT, "name": data.name, "source": "blend", "corpus_hash": known.hexdigest(), "parts": records}
    write_json(folder / INDEX, index | _about(tokenizer))


@dataclass
class _Facts:
    """What is gathered while a corpus is read; complete when the last group has been cut."""

    corpus: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))  # of the text and of what is held out
    held_out_text: bytearray | None = field(default_factory=bytearray)  # None: more than XZ_LIMIT


def _prepare_corpus(data: DataConfig, config: TokenizerConfig, folder: Path, report: Report) -> None:
    before = fingerprint(data)
    threshold = _threshold(data)
    tokenizer, path = _tokenizer(config, folder, lambda budget: _sample(data, threshold, budget, report), report)
    dtype = token_dtype(tokenizer.vocab_size)
    facts, done = _Facts(), {}
    workers = data.workers or len(os.sched_getaffinity(0))

    def unfinished() -> Iterator[Group]:
        for group in _groups(data, threshold, facts):
            shards = finished_group(folder, group.number, group.text_hash, tokenizer.hash, dtype)
            if shards is None:
                yield group
            else:
                done[group.number] = shards

    report.start(f"tokenizing {data.name}")
    with contextlib.closing(encode_groups(unfinished(), folder, path, workers)) as encoded:
        for group, shards in encoded:
            done[group.number] = shards
            report.share(group.share)
    if fingerprint(data) != before:
        raise UserError(f"the corpus data={data.name} was changed while it was read; run the same command again")
    shards = [shard for number in sorted(done) for shard in done[number]]
    facts.corpus.update(tokenizer.hash.encode())
    report.start("compressing the held-out text with xz, for comparison")
    held_out = facts.held_out_text
    xz = _xz(held_out, report) * 8 / len(held_out) if held_out else None
    index = {
        "format": FORMAT,
        "name": data.name,
        "source": data.source,
        "fingerprint": hashlib.blake2b(before.encode(), digest_size=16).hexdigest(),
        "corpus_hash": facts.corpus.hexdigest(),
        "held_out": data.held_out,
        "xz_bits_per_byte": xz,
        "shards": [asdict(shard) for shard in shards],
    }
    keep = {shard.name for shard in shards} | {f"group-{number:05d}" for number in done}
    remove_leftovers(folder, keep)
    write_json(folder / INDEX, index | _about(tokenizer))


def _xz(text: bytearray, report: Report) -> int:
    """Return the bytes that `xz -9` makes of a text; in steps, so that Ctrl-C ends it."""
    compressor, size = lzma.LZMACompressor(preset=9), 0
    for start in range(0, len(text), MEGABYTE):
        size += len(compressor.compress(text[start : start + MEGABYTE]))
        report.share(start / len(text))
    return size + len(compressor.flush())


def _about(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "tokenizer_hash": tokenizer.hash}


def _digest(raw: bytes) -> tuple[int, int]:
    """Return two independent 64-bit numbers of a text: by the first it is held out, by the second it is sampled."""
    digest = hashlib.blake2b(raw, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _threshold(data: DataConfig) -> int:
    """Return the number below which a document's first hash number means that it is held out.

    Equal texts fall on the same side. In a corpus of few documents it is moved so that each side has one at least.
    """
    limit = int(data.held_out * 2**64)
    if limit == 0:
        return 0
    few = [_digest(document.text.encode())[0] for document in itertools.islice(documents(data), FEW + 1)]
    if len(few) <= FEW:
        numbers = sorted(set(few))
        if len(numbers) == 1:
            raise UserError(
                f"data={data.name} is a single document, so none can be held out for evaluation; "
                f"give it more documents or set data.held_out=0"
            )
        limit = min(max(limit, numbers[0] + 1), numbers[-1])
    return limit


def _sample(data: DataConfig, threshold: int, budget: int, report: Report) -> list[str]:
    """Return an even sample of the documents that are not held out, of about `budget` bytes, in the corpus's order.

    Kept are those with the smallest second hash number: neither the order nor the size of files has a say.
    """
    report.start(f"reading {data.name} for the tokenizer")
    kept: list[tuple[int, int, int, str]] = []  # a heap: (-second number, place, bytes, text)
    size = 0
    for place, document in enumerate(documents(data)):
        raw = document.text.encode()
        first, second = _digest(raw)
        if first >= threshold:
            heapq.heappush(kept, (-second, place, len(raw), document.text))
            size += len(raw)
            while size > budget and len(kept) > 1:
                size -= heapq.heappop(kept)[2]
        report.share(document.share)
    return [text[:budget] for _, _, _, text in sorted(kept, key=lambda entry: entry[1])]


def _tokenizer(config: TokenizerConfig, folder: Path, sample: Any, report: Report) -> tuple[Tokenizer, Path]:
    """Return the tokenizer and its file in `folder`: the one that is there, the one that `config` names, or a new one.

    `sample(bytes)` gives the documents to train on; it is called only if one is trained.
    """
    for path in (folder / name for name in FILE_NAMES):
        if path.is_file():
            return load_tokenizer(path), path
    if config.path:
        tokenizer = load_tokenizer(config.path)
    else:
        texts = sample(config.train_megabytes * MEGABYTE)
        megabytes = sum(map(len, texts)) / 1e6
        report.start(f"training a tokenizer of {config.vocab_size} pieces on {megabytes:.2f} MB")
        tokenizer = run_apart(train_sentencepiece, texts, config.vocab_size, folder / FILE_NAMES[0])
    return tokenizer, tokenizer.save(folder)


def _groups(data: DataConfig, threshold: int, facts: _Facts) -> Iterator[Group]:
    """Cut the corpus into groups of about `data.shard_megabytes` of text; a document is never cut."""

    def empty() -> tuple[dict[str, list[str]], dict[str, int], Any]:
        return {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0), hashlib.blake2b(digest_size=16)

    number, share = 0, 0.0
    texts, sizes, text_hash = empty()
    for document in documents(data):
        raw = document.text.encode()
        held_out = _digest(raw)[0] < threshold
        split = "held_out" if held_out else "train"
        texts[split].append(document.text)
        sizes[split] += len(raw)
        share = document.share
        mark = hashlib.blake2b(raw, digest_size=16).digest() + bytes([held_out])
        text_hash.update(mark)
        facts.corpus.update(mark)
        if held_out and facts.held_out_text is not None:
            facts.held_out_text += raw
            if len(facts.held_out_text) > XZ_LIMIT:
                facts.held_out_text = None
        if sum(sizes.values()) >= data.shard_megabytes * MEGABYTE:
            yield Group(number, texts, sizes, text_hash.hexdigest(), share)
            number += 1
            texts, sizes, text_hash = empty()
    if any(texts.values()):
        yield Group(number, texts, sizes, text_hash.hexdigest(), share)


def main(argv: list[str]) -> int:
    """The command: prepare what the overrides say and print what came out."""
    from conf.load import load
    from data.batches import open_dataset

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
    print(f"  tokenizer  {dataset.vocab_size:,} pieces, {size / tokens:.3f} bytes a token")
    print(f"  documents  {count:,}, of which held out {held_out.documents:,}")
    print(f"  tokens     {tokens:,}, of which held out {held_out.tokens:,}")
    print(f"  text       {size / 1e6:,.2f} MB, of which held out {held_out.text_bytes / 1e6:,.2f} MB")
    if dataset.xz_bits_per_byte is not None:
        print(f"  xz -9      {dataset.xz_bits_per_byte:.3f} bits a byte of the held-out text")
    return 0


if __name__ == "__main__":
    from kernels.common.commands import run_command

    run_command(main)
