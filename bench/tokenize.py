"""Measure how much text one core tokenizes per second, against SentencePiece and Hugging Face: `python -m bench.tokenize`.

    vocab_sizes=4096,32000    of the tokenizers, trained on the text that is timed
    megabytes=3               of each text, at most
    rounds=5                  of the timings, in which each contender takes a turn
    out=FILE                  where the page goes

The texts are code (the standard library) and English (the documentation and licences of installed packages). What is timed
is `data.pool.encode_group`: from strings to shards on disk, in processor time of one thread. Every contender writes its shards
by the same code. The shards of our encoder are compared with those that SentencePiece's ids give.
"""

from __future__ import annotations

import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers

from bench.records import claim_record
from bench.train import machine
from data.pool import Group, encode_group
from data.shards import Shard
from data.tokenizer import Tokenizer, load_tokenizer
from data.train_tokenizer import train_sentencepiece
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import print_and_write
from kernels.common.options import read_options

OURS, LIBRARY, FOREIGN = "ours", "ours without a compiler: SentencePiece", "Hugging Face, byte-level BPE"


def main(argv: list[str]) -> None:
    defaults = {"vocab_sizes": "4096,32000", "megabytes": 3, "rounds": 5, "out": "bench/results/cpu-tokenize.md"}
    options = read_options(argv, defaults, minimum={"megabytes": 1, "rounds": 1})
    claim_record(options["out"], argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print_and_write(_page(options), options["out"])


def _page(options: dict[str, Any]) -> Iterator[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("sentencepiece", "tokenizers"))
    yield f"# Tokenizing on one core ({machine()}; {packages}; `python -m bench.tokenize`)"
    yield ""
    yield "Megabytes of UTF-8 per second of processor time, from strings to shards on disk. Median (range) of"
    yield f"{options['rounds']} rounds, in which each contender takes a turn. Tokenizers are trained on the text that is timed."
    yield "Ratio: over SentencePiece, in the same round. The shards of the first two are equal, byte for byte."
    yield ""
    yield "| text | MB | pieces | contender | MB/s | ratio | bytes per token |"
    yield "|---|---|---|---|---|---|---|"
    texts = {"code": _read("stdlib", ("*.py",)), "English": _read("purelib", ("*.md", "*.rst", "*.txt", "METADATA"))}
    for name, documents in texts.items():
        chosen = _first(documents, options["megabytes"] * 1_000_000)
        size = sum(len(text.encode()) for text in chosen)
        for vocab_size in map(int, options["vocab_sizes"].split(",")):
            speeds, tokens = _measure(chosen, size, vocab_size, options["rounds"])
            for contender, values in speeds.items():
                ratios = [a / b for a, b in zip(values, speeds[LIBRARY], strict=True)]
                yield (
                    f"| {name} | {size / 1e6:.1f} | {vocab_size} | {contender} | {_figures(values, 1)} | "
                    f"{_figures(ratios, 2)} | {size / tokens[contender]:.2f} |"
                )
    yield ""
    yield "Code: modules of the standard library. English: the .md, .rst and .txt files and METADATA of the installed packages,"
    yield "which are documentation and licences with some code and tables, not a corpus of prose."


def _read(place: str, patterns: tuple[str, ...]) -> list[str]:
    """Return the different texts of the files below one of sysconfig's places, by reversed names, which mixes the folders."""
    texts: dict[str, None] = {}
    root = Path(sysconfig.get_path(place))
    for path in sorted((path for pattern in patterns for path in root.rglob(pattern)), key=lambda p: p.name[::-1]):
        if place == "stdlib" and "site-packages" in path.parts:
            continue
        try:
            texts[path.read_text(encoding="utf-8")] = None
        except (OSError, UnicodeDecodeError):
            continue
    return [text for text in texts if text]


def _first(texts: list[str], most_bytes: int) -> list[str]:
    chosen = []
    for text in texts:
        most_bytes -= len(text.encode())
        if most_bytes < 0:
            break
        chosen.append(text)
    return chosen


def _measure(
    texts: list[str], size: int, vocab_size: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return each contender's MB/s in every round, and its tokens.

    Raises:
        UserError: our encoder and SentencePiece wrote different shards.
    """
    speeds: dict[str, list[float]] = {}
    shards: dict[str, Shard] = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders = _contenders(texts, vocab_size, Path(folder))
        for number in range(rounds + 1):
            for name, tokenizer in contenders.items():
                group = Group(0, {"train": texts}, {"train": size}, "", 1.0)
                start = time.process_time()
                [shards[name]] = encode_group(Path(folder), tokenizer, group)
                seconds = time.process_time() - start
                if number:  # the first builds tables and touches memory
                    speeds.setdefault(name, []).append(size / 1e6 / seconds)
    print(f"  {vocab_size} pieces, {rounds} rounds", file=sys.stderr, flush=True)
    if shards[OURS] != shards[LIBRARY]:
        raise UserError("our encoder and SentencePiece wrote different shards, which must not be")
    return speeds, {name: shard.tokens for name, shard in shards.items()}


def _contenders(texts: list[str], vocab_size: int, folder: Path) -> dict[str, Tokenizer]:
    train_sentencepiece(texts, vocab_size, folder / "tokenizer.model")
    foreign = tokenizers.Tokenizer(tokenizers.models.BPE())
    foreign.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    foreign.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    foreign.train_from_iterator(texts, trainer)
    foreign.save(str(folder / "tokenizer.json"))
    contenders = {name: load_tokenizer(folder / "tokenizer.model") for name in (OURS, LIBRARY)}
    if getattr(contenders[OURS], "_bpe", None) is None:
        raise UserError("there is no C compiler, so there is no encoder to measure")
    vars(contenders[LIBRARY])["_bpe"] = None  # as where there is no compiler
    return contenders | {FOREIGN: load_tokenizer(folder / "tokenizer.json")}


def _figures(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    run_command(main, __doc__)
