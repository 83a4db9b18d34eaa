"""Turn a corpus into a prepared folder of tokens, in parallel; resume where it stopped.

This module selects the tokenizer's training text and brings the steps together, for a whole corpus or for a part of it. Reading
documents is in `documents.py`, which of them are held out in `held_out.py`, grouping them in `groups.py`, writing a shard in
`shards.py`, the worker processes in `pool.py`. The command takes `part=I/N` for one part, or `cluster=NAME jobs=N`: then
`launch/prepare.py` submits all parts to SLURM.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import lzma
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.load import load
from conf.overrides import check_overrides
from conf.schema import DataConfig, TokenizerConfig
from data.batches import open_dataset
from data.blend import Blend, choose
from data.documents import documents, fingerprint, stamps
from data.folder import folder_of, is_complete
from data.groups import MEGABYTE, Facts, Span, groups, read_groups
from data.held_out import Selection
from data.lock import locked
from data.plan import CorpusPlan, Share, read_plan, read_share, write_plan
from data.pool import Group, encode_groups, run_in_subprocess
from data.progress import ProgressReporter
from data.shards import FORMAT, Shard, finished_group, read_index, remove_leftovers, token_dtype, write_index
from data.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer
from data.train_tokenizer import train_sentencepiece
from data.usage import with_keys
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import explain_os_errors
from kernels.common.options import split_options


def prepare(data: DataConfig, tokenizer: TokenizerConfig, show: bool = False, blend: Blend | None = None) -> Path:
    """Prepare a corpus unless it is prepared already, and return its folder.

    Any number of processes may call this at once: one prepares, the others wait for it. An interrupted call leaves
    finished shards; the next call continues after them, with the same result as an uninterrupted one.

    Args:
        show: report progress on standard error, as a bar where that is a terminal.
        blend: the one that this corpus is a part of.

    Raises:
        UserError: bad input, a full disk, a folder that cannot be written.
    """
    folder = folder_of(data, tokenizer, blend.beside[data.name] if blend else "")
    if is_complete(folder):
        return folder
    progress = ProgressReporter(show)
    with locked(folder, progress):
        if not is_complete(folder):
            with explain_os_errors("prepare", folder), progress:
                remove_leftovers(folder)
                if data.source == "blend":
                    _prepare_blend(data, tokenizer, folder, progress)
                else:
                    _prepare_corpus(data, tokenizer, folder, progress, blend)
    return folder


def prepare_part(
    data: DataConfig, tokenizer: TokenizerConfig, part: Share, show: bool = False, blend: Blend | None = None
) -> Path:
    """Tokenize a part of a corpus into its folder, which is returned; `prepare` then finishes it with what parts have left.

    Parts may run at once, on machines that share the folder. The first one makes the plan that all follow, while the others
    wait: it chooses the held-out documents, trains the tokenizer, and finds where groups begin. What an interrupted part has
    finished is not done again. Of a blend, each part is that part of all of its corpora.

    Raises:
        UserError: as `prepare`, or the corpus was changed since its plan was made.
    """
    folder = folder_of(data, tokenizer, blend.beside[data.name] if blend else "")
    if is_complete(folder):
        return folder
    progress = ProgressReporter(show)
    with explain_os_errors("prepare", folder), progress:
        if data.source == "blend":
            whole, found = Blend(data), _existing_tokenizer(folder)
            if found is None:
                with locked(folder, progress):
                    found = _tokenizer_of_blend(tokenizer, whole, folder, progress)
            _, path = found
            progress.close()  # every corpus reports its own
            for _, corpus, shared in whole.corpora(tokenizer, path):
                progress.print(f"part {corpus.name} of the blend")
                prepare_part(corpus, shared, part, show, whole)
        else:
            _prepare_part_of_corpus(data, tokenizer, part, folder, progress, blend)
    return folder


def _prepare_part_of_corpus(
    data: DataConfig,
    config: TokenizerConfig,
    part: Share,
    folder: Path,
    progress: ProgressReporter,
    blend: Blend | None,
) -> None:
    known = fingerprint(data)
    if _planned(data, folder, known) is None:
        with locked(folder, progress):  # excludes other parts too, none of which has a temporary file then
            if not is_complete(folder) and _planned(data, folder, known) is None:
                remove_leftovers(folder)
                _make_plan(data, config, folder, known, progress, blend)
    if part.number < 0:
        return
    with locked(folder, progress, shared=True):
        if is_complete(folder):
            return
        found = _planned(data, folder, known)
        if found is None:  # a part with another data.shard_megabytes has made its own
            raise UserError(f"the plan in {folder} was replaced; run all parts with the same overrides")
        plan, tokenizer = found
        spans = part.of(plan.spans)
        progress.start(f"tokenizing {len(spans)} of {len(plan.spans)} groups of {data.name}")
        _follow(plan, spans, data, tokenizer, folder, progress)


def _planned(data: DataConfig, folder: Path, known: str) -> tuple[CorpusPlan, tuple[Tokenizer, Path]] | None:
    """Return the plan in a folder, and the tokenizer, given the fingerprint of the corpus; None if it is not planned."""
    tokenizer = _existing_tokenizer(folder)
    plan = read_plan(folder, data, known, tokenizer[0].hash) if tokenizer else None
    return (plan, tokenizer) if tokenizer and plan else None


def _prepare_blend(data: DataConfig, config: TokenizerConfig, folder: Path, progress: ProgressReporter) -> None:
    """Prepare every part with one tokenizer, and write the index that names them."""
    blend = Blend(data)
    tokenizer, path = _tokenizer_of_blend(config, blend, folder, progress)
    progress.close()  # every part reports its own
    records, known = [], hashlib.blake2b(digest_size=16)
    for weight, part, shared in blend.corpora(config, path):
        progress.print(f"part {part.name}, {weight:.1%} of the samples")
        prepared = prepare(part, shared, progress.show, blend)
        records.append({"name": part.name, "weight": weight, "folder": os.path.relpath(prepared, folder)})
        known.update(f"{part.name}\0{weight!r}\0{read_index(prepared)['corpus_hash']}\0".encode())
    index = {"format": FORMAT, "name": data.name, "source": "blend", "corpus_hash": known.hexdigest(), "parts": records}
    write_index(folder, index | _about(tokenizer))


def _tokenizer_of_blend(
    config: TokenizerConfig, blend: Blend, folder: Path, progress: ProgressReporter
) -> tuple[Tokenizer, Path]:
    def sample(budget: int) -> list[str]:
        """Sample the training documents of every part in proportion to its weight."""
        texts = []
        for weight, part in blend.parts.values():
            _, selection = _choose(part, blend, progress)
            texts += _sample(part, selection, int(budget * weight), progress)
        return texts

    return _tokenizer(config, folder, sample, progress)


def _prepare_corpus(
    data: DataConfig, config: TokenizerConfig, folder: Path, progress: ProgressReporter, blend: Blend | None
) -> None:
    """Write all shards of a corpus and its index: those of a plan that parts of it have followed, or all in one reading."""
    known = fingerprint(data)
    if planned := _planned(data, folder, known):
        plan, tokenizer = planned
        progress.start(f"tokenizing {data.name}")
        done, index = _follow(plan, plan.spans, data, tokenizer, folder, progress), plan.index
    else:
        done, index = _prepare_at_once(data, config, folder, known, progress, blend)
    if index["skipped"]:
        progress.print(f"{index['skipped']:,} records of {data.name} have no text (null or empty) and were left out")
    if index["near_duplicates"]:
        progress.print(
            f"{index['near_duplicates']:,} documents of {data.name} repeat held-out ones, or nearly, and were left out"
        )
    shards = [shard for number in sorted(done) for shard in done[number]]
    keep = {shard.name for shard in shards} | {f"group-{number:05d}" for number in done}
    remove_leftovers(folder, keep)
    write_index(folder, index | {"shards": [asdict(shard) for shard in shards]})


def _choose(data: DataConfig, blend: Blend | None, progress: ProgressReporter) -> tuple[str, Selection]:
    progress.start(f"choosing the held-out documents of {data.name}")
    return choose(data, blend)


def _prepare_at_once(
    data: DataConfig,
    config: TokenizerConfig,
    folder: Path,
    known: str,
    progress: ProgressReporter,
    blend: Blend | None,
) -> tuple[dict[int, list[Shard]], dict[str, Any]]:
    """Tokenize the groups of a corpus as they are read; return their shards, and the index without shards."""
    before, selection = _choose(data, blend, progress)
    tokenizer, path = _tokenizer(config, folder, lambda budget: _sample(data, selection, budget, progress), progress)
    facts, done = Facts(), {}

    def unfinished() -> Iterator[Group]:
        for group in groups(data, selection, facts):
            shards = _finished(folder, group, tokenizer)
            if shards is None:
                yield group
            else:
                done[group.number] = shards

    progress.start(f"tokenizing {data.name}")
    with contextlib.closing(encode_groups(unfinished(), folder, path, _workers(data))) as encoded:
        for group, shards in encoded:
            done[group.number] = shards
            progress.update(group.fraction)
    _refuse_changed(data, before)
    return done, _index(data, facts, tokenizer, known, progress)


def _make_plan(
    data: DataConfig,
    config: TokenizerConfig,
    folder: Path,
    known: str,
    progress: ProgressReporter,
    blend: Blend | None,
) -> None:
    """Read a corpus without tokenizing it, train its tokenizer, and write its plan."""
    before, selection = _choose(data, blend, progress)
    tokenizer, _ = _tokenizer(config, folder, lambda budget: _sample(data, selection, budget, progress), progress)
    progress.start(f"planning the parts of {data.name}")
    facts = Facts()
    for group in groups(data, selection, facts):
        progress.update(group.fraction)
    _refuse_changed(data, before)
    plan = CorpusPlan(selection.record(), _index(data, facts, tokenizer, known, progress), facts.spans)
    write_plan(folder, plan, data, known)


def _follow(
    plan: CorpusPlan,
    spans: list[Span],
    data: DataConfig,
    tokenizer: tuple[Tokenizer, Path],
    folder: Path,
    progress: ProgressReporter,
) -> dict[int, list[Shard]]:
    """Tokenize those of some groups of a plan that are not finished, and return the shards of all of them."""
    done, left = {}, []
    for span in spans:
        shards = _finished(folder, span, tokenizer[0])
        if shards is None:
            left.append(span)
        else:
            done[span.number] = shards
    found = read_groups(data, Selection(data, plan.held_out), left)
    with contextlib.closing(encode_groups(found, folder, tokenizer[1], _workers(data))) as encoded:
        for group, shards in encoded:
            done[group.number] = shards
            progress.update(len(done) / len(spans))
    return done


def _finished(folder: Path, group: Group | Span, tokenizer: Tokenizer) -> list[Shard] | None:
    return finished_group(folder, group.number, group.text_hash, tokenizer.hash, token_dtype(tokenizer.vocab_size))


def _workers(data: DataConfig) -> int:
    return data.workers or len(os.sched_getaffinity(0))


def _refuse_changed(data: DataConfig, before: str) -> None:
    if stamps(data) != before:
        raise UserError(f"the corpus data={data.name} was changed while it was read; run the same command again")


def _index(
    data: DataConfig, facts: Facts, tokenizer: Tokenizer, known: str, progress: ProgressReporter
) -> dict[str, Any]:
    """Return the index of a corpus that was read, without its shards."""
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
        "shards": [],
    }
    if data.held_out_by == "folder":
        index["held_out_groups"] = facts.held_out_groups
    return index | _about(tokenizer)


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


def _existing_tokenizer(folder: Path) -> tuple[Tokenizer, Path] | None:
    for path in (folder / name for name in FILE_NAMES.values()):
        if path.is_file():
            return load_tokenizer(path), path
    return None


def _tokenizer(
    config: TokenizerConfig, folder: Path, sample: Any, progress: ProgressReporter
) -> tuple[Tokenizer, Path]:
    """Return the tokenizer and its file in `folder`: the existing one, the one that `config` names, or a new one.

    `sample(bytes)` gives the documents to train on; it is called only if one is trained.
    """
    if existing := _existing_tokenizer(folder):
        return existing
    if config.path:
        tokenizer = load_tokenizer(config.path, config.eos, config.bos, config.kind)
    else:
        texts = sample(config.train_megabytes * MEGABYTE)
        megabytes = sum(map(len, texts)) / 1e6
        progress.start(f"training a tokenizer of {config.vocab_size} pieces on {megabytes:.2f} MB")
        tokenizer = run_in_subprocess(
            train_sentencepiece, texts, config.vocab_size, folder / FILE_NAMES["sentencepiece"]
        )
    return tokenizer, tokenizer.save(folder)


USAGE = """
usage: python -m data.prepare [KEY=VALUE ...] [cluster=NAME jobs=N | part=I/N]

Turns a corpus into a folder of tokens, in parallel, and prints its path and statistics: ahead of a training that takes the
same overrides, which otherwise does this first. The same command again goes on where an interrupted one stopped.

  python -m data.prepare data=text data.path=notes/
  python -m data.prepare data=jsonl data.path='web/*.jsonl.gz' \\
      data.field=content tokenizer.vocab_size=32000

Several machines that share the folder divide the work, with the same result:

  cluster=NAME jobs=N   submits SLURM jobs: one that plans the parts, an array of N that tokenize them, and one for the index;
                        cluster.KEY=VALUE overrides a key of conf/cluster/NAME.yaml
  part=I/N              tokenizes part I of N (0 to N-1) here; without part= the command does what is left, and writes the index
  part=plan             does what all parts need first, else the first part does it while the others wait

  python -m data.prepare data=jsonl data.path='web/*.jsonl.gz' \\
      cluster=slurm jobs=64
"""
_RUN_MODULE = Path(__file__).resolve().parents[1] / "launch" / "run_module.py"


def main(argv: list[str]) -> int:
    """Prepare the corpus that the overrides select, or a part of it, or submit jobs that do; print its statistics."""
    options, words = split_options(argv, {"part": "", "jobs": 0}, {"jobs": 1})
    overrides = [word for word in words if not word.startswith(("cluster=", "cluster."))]
    on_cluster = options["jobs"] or len(overrides) < len(words)
    if options["part"] and on_cluster:
        raise UserError(
            "part= tokenizes a part on this machine, and cluster=NAME jobs=N submits all of them: leave one out"
        )
    part = read_share(options["part"]) if options["part"] else None
    check_overrides(overrides, options)
    config = load(overrides, program="python -m data.prepare")
    if on_cluster and not is_complete(folder := folder_of(config.data, config.tokenizer)):
        # In a process of its own, because `data` and `launch` do not import each other.
        command = [sys.executable, str(_RUN_MODULE), "launch.prepare", f"folder={folder}.jobs", *argv]
        return subprocess.run(command).returncode
    if part is not None:
        folder = prepare_part(config.data, config.tokenizer, part, show=True)
        if not is_complete(folder):
            print(f"part={options['part']} is done: {folder}")
            return 0
    _print_statistics(prepare(config.data, config.tokenizer, show=True))
    return 0


def _print_statistics(folder: Path) -> None:
    dataset = open_dataset(folder)
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
        print(f"  left out   {repeated:,} documents that repeat held-out ones, or nearly")
    if dataset.xz_bits_per_byte is not None:
        print(f"  xz -9      {dataset.xz_bits_per_byte:.3f} bits per byte of the held-out text")


if __name__ == "__main__":
    run_command(main, with_keys(USAGE))
