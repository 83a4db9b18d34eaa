"""Measure opening a corpus of 10 billion tokens, in time and memory: `python -m bench.index`.

    tokens=10B               tokens of the corpus; 4% of the documents are held out
    document=1000            tokens of a document
    rounds=5                 how often a fresh process opens it
    out=FILE                 where the table goes

The folder is made up, in the format and with the shards that `data.prepare` writes for so much text at 4.4 bytes per token. Its
tokens are holes in files, but for the first held-out documents. A fresh process opens it as `train.py` does, in these stages:

    prepared      twice the check that the folder is complete, as `prepare` makes it
    open          open_dataset: the index with its digest, the tokenizer, the size of every file
    batch         the stream of samples and its first 32 samples of 2,048 tokens
    prompts       the beginnings of held-out documents, which a run samples from
    documents     where the held-out documents end, for an evaluation's losses by document

Seconds do not count imports. Memory is the peak of the resident set since the imports, so it can only be too high. Files are in
the page cache, as on a node whose other ranks have opened them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.records import claim_record
from bench.train import machine
from conf.schema import Config
from data.batches import BatchStream, open_dataset
from data.folder import is_complete
from data.shards import FORMAT, SPLITS, VERIFY_AT_OPEN, Shard, shard_checksum, token_dtype, write_index
from data.tokenizer import load_tokenizer
from data.train_tokenizer import train_sentencepiece
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import atomic_write
from kernels.common.options import read_options
from training.prompts import prompts_of

STAGES = ("prepared", "open", "batch", "prompts", "documents")
SEQUENCE = 2048  # tokens of a sample
BYTES_PER_TOKEN = 4.4  # of English with a vocabulary of 32,000 to 50,000
HELD_OUT = 0.04
RESULT = "bench/results/index.md"
# What the corpus of 10 billion tokens is to take at most, all stages together.
LARGEST_SECONDS, LARGEST_MIB = 1.0, 100.0


def make_folder(folder: Path, tokens: int, document: int) -> None:
    """Write a prepared folder of about `tokens` tokens in documents of `document` tokens, nearly all of them holes in files."""
    train_sentencepiece([f"word {i} of some text\n" for i in range(2000)], 300, folder / "tokenizer.model")
    tokenizer = load_tokenizer(folder)
    per_group = int(Config().data.shard_megabytes * 2**20 / BYTES_PER_TOKEN / document)  # documents
    shards, left, number = [], tokens // document, 0
    while left > 0:
        here = min(left, per_group)
        held_out = round(here * HELD_OUT) or 1
        for split, documents in (("train", here - held_out), ("held_out", held_out)):
            if documents:
                shards.append(_shard(folder, split, number, documents, document, tokenizer.vocab_size))
        left, number = left - here, number + 1
    for split in SPLITS:  # of a small set the checksums are verified
        own = [shard for shard in shards if shard.split == split]
        if sum(shard.tokens for shard in own) * token_dtype(tokenizer.vocab_size).itemsize <= VERIFY_AT_OPEN:
            for shard in own:
                shards[shards.index(shard)] = replace(shard, checksum=shard_checksum(folder, shard))
    about = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "tokenizer_hash": tokenizer.hash}
    index: dict[str, Any] = {
        "format": FORMAT,
        "name": "made",
        "source": "text",
        "corpus_hash": "made",
        "held_out": HELD_OUT,
    }
    write_index(folder, index | {"xz_bits_per_byte": None, "shards": [asdict(shard) for shard in shards]} | about)


def _shard(folder: Path, split: str, number: int, documents: int, document: int, vocab_size: int) -> Shard:
    name, tokens = f"{split}-{number:05d}", documents * document
    with open(folder / f"{name}.bin", "wb") as file:
        if (split, number) == ("held_out", 0):  # the prompts are looked for where there is text
            file.write(np.full(3 * document, vocab_size - 1, token_dtype(vocab_size)).data)
        file.truncate(tokens * token_dtype(vocab_size).itemsize)
    with open(folder / f"{name}.idx", "wb") as file:
        if split == "held_out":
            file.write((np.arange(1, documents + 1, dtype="<i8") * document).data)
        file.truncate(documents * 8)
    return Shard(name, split, tokens, documents, int(tokens * BYTES_PER_TOKEN), "0" * 32)


def stages_of(folder: str) -> dict[str, list[float]]:
    """Open a folder in this process; return {stage: [seconds of it, peak MiB up to its end]}."""
    found: dict[str, list[float]] = {}
    config = Config()
    config.data.source = "text"  # of the standard library the prompts are fixed
    load_tokenizer(folder)  # imports the tokenizer's library
    before = _mib("VmRSS")
    start = time.perf_counter()

    def ended(stage: str) -> None:
        nonlocal start
        now = time.perf_counter()
        found[stage] = [now - start, max(0.0, _mib("VmHWM") - before)]
        start = now

    for _ in range(2):
        assert is_complete(Path(folder))
    ended("prepared")
    dataset = open_dataset(folder)
    ended("open")
    BatchStream(dataset, SEQUENCE, 0).samples(0, 32)
    ended("batch")
    assert prompts_of(config, dataset)
    ended("prompts")
    dataset.held_out.document_ends()
    ended("documents")
    return found


def _mib(name: str) -> float:
    """Return a size of this process, in MiB: VmRSS is what it has in memory, VmHWM the most that it had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Open a folder in `rounds` fresh processes; return {stage: [median seconds, largest peak in MiB]}."""
    runs = []
    for _ in range(rounds):
        command = [sys.executable, "-m", "bench.index", "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"opening {folder} failed:\n{done.stderr[-2000:]}")
        runs.append(json.loads(done.stdout))
    return {
        stage: [statistics.median(run[stage][0] for run in runs), max(run[stage][1] for run in runs)]
        for stage in STAGES
    }


def page(options: dict[str, Any], stages: dict[str, list[float]], shards: int) -> str:
    """Return the page of results."""
    seconds, mib = sum(s for s, _ in stages.values()), max(m for _, m in stages.values())
    given = "".join(f" {name}={options[name]}" for name in ("tokens", "document", "rounds"))
    lines = [
        f"# Opening a corpus of {options['tokens']:,} tokens ({machine()}; `python -m bench.index{given}`)",
        "",
        f"{options['tokens'] // options['document']:,} documents in {shards:,} shards. Median seconds over {options['rounds']} "
        "fresh processes, imports not counted; the largest peak of memory beyond that after the imports.",
        "",
        "| stage | seconds | peak MiB up to its end |",
        "|---|---|---|",
        *(f"| {stage} | {s:.3f} | {m:.1f} |" for stage, (s, m) in stages.items()),
        f"| all | {seconds:.3f} | {mib:.1f} |",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    if argv[:1] == ["--folder"]:  # a child process
        print(json.dumps(stages_of(argv[1])))
        return 0
    defaults = {"tokens": 10**10, "document": 1000, "rounds": 5, "out": RESULT}
    options = read_options(argv, defaults, {"tokens": 100_000, "document": 2, "rounds": 1})
    claim_record(options["out"], argv)
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), options["tokens"], options["document"])
        shards = len(list(Path(folder).glob("*.bin")))
        stages = measure(Path(folder), options["rounds"])
    text = page(options, stages, shards)
    print(text, end="")
    with atomic_write(options["out"]) as file:
        file.write(text)
    within = sum(s for s, _ in stages.values()) < LARGEST_SECONDS and stages[STAGES[-1]][1] < LARGEST_MIB
    return 0 if within else 1


if __name__ == "__main__":
    run_command(main, __doc__)
