"""Predict the held-out text without a neural network: the losses that a model has to beat.

    unigram   how often each token is, with absolute discounting for those that were not seen
    bigram    Kneser-Ney (1995), interpolated: how often a token follows the one before it, backed off to how many different
              tokens it follows
    xz        `xz -9` on the text itself, which learns from nothing but what it has compressed so far

The first two learn from the very tokens that a run trains on, up to MOST_TOKENS. They predict each token of the held-out text,
the end-of-text tokens included, as models do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from conf.load import load
from conf.overrides import check_overrides
from conf.validate import total_steps, validate
from data.batches import BatchStream, Dataset, open_dataset
from data.prepare import prepare
from data.shards import write_json
from data.usage import with_keys
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import explain_os_errors, make_folder_of
from kernels.common.options import split_options

MOST_TOKENS = 1 << 26  # of the training text; pairs of so many take about 2 GB at most
_BLOCK = 1 << 20  # tokens read at a time

USAGE = """
usage: python -m data.baselines [to=FILE] KEY=VALUE ...

Prints the loss on the held-out text of models that are no neural networks (token frequencies, a Kneser-Ney bigram model, xz)
after as many training tokens as a run with these overrides of train.py has, and writes it to a JSON file.

  python -m data.baselines model=nano tokens=1M
"""


@dataclass(frozen=True)
class Baselines:
    """Losses on the held-out text, nats per token."""

    held_out: str  # hash of the text
    bytes_per_token: float
    tokens: int  # of the training text
    unigram: float
    bigram: float
    xz: float | None  # None: the text is too long for it


@dataclass(frozen=True)
class _Counts:
    """How often pairs (v, w) of neighbouring tokens stand in a text; a pair is the number v * vocabulary + w."""

    pairs: np.ndarray  # (different pairs,), ascending
    counts: np.ndarray  # (different pairs,)
    vocabulary: int

    def followers(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how often each token stands first, and how many different ones follow it: (vocabulary,) each."""
        first = self.pairs // self.vocabulary
        return (np.bincount(first, self.counts, self.vocabulary), np.bincount(first, minlength=self.vocabulary))

    def seconds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how often each token stands second, and how many different ones it follows: (vocabulary,) each."""
        second = self.pairs % self.vocabulary
        return (np.bincount(second, self.counts, self.vocabulary), np.bincount(second, minlength=self.vocabulary))


def count_pairs(samples: Iterator[np.ndarray], vocabulary: int) -> _Counts:
    """Count the pairs of neighbours in rows of tokens (rows, tokens)."""
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for rows in samples:
        new, own = np.unique(rows[:, :-1] * vocabulary + rows[:, 1:], return_counts=True)
        both, inverse = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        pairs, counts = both, np.bincount(inverse, np.concatenate([counts, own])).astype(np.int64)
    return _Counts(pairs, counts, vocabulary)


def unigram(counts: _Counts) -> np.ndarray:
    """Return the probability of each token: (vocabulary,)."""
    return _discounted(counts.seconds()[0])


def _discounted(counts: np.ndarray) -> np.ndarray:
    """Return counts as probabilities, less a discount that goes to all entries alike."""
    discount, total = _discount(counts), counts.sum()
    seen = np.maximum(counts - discount, 0.0) * (counts > 0)
    return (seen + discount * np.count_nonzero(counts) / len(counts)) / total


def _discount(counts: np.ndarray) -> float:
    """Return the discount of Ney, Essen and Kneser (1994), from how many things were counted once and twice."""
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return min(0.95, max(0.05, once / max(1, once + 2 * twice)))  # within (0, 1) for texts of any shape


class Bigram:
    """An interpolated Kneser-Ney bigram model."""

    def __init__(self, counts: _Counts) -> None:
        self.counts = counts
        self.discount = _discount(counts.counts)
        self.totals, self.different = counts.followers()
        self.backoff = _discounted(counts.seconds()[1])

    def probabilities(self, before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the probability of each of `tokens` after the one before it; int64, one shape."""
        pairs = before * self.counts.vocabulary + tokens
        place = np.searchsorted(self.counts.pairs, pairs).clip(max=len(self.counts.pairs) - 1)
        count = np.where(self.counts.pairs[place] == pairs, self.counts.counts[place], 0)
        total, backoff = self.totals[before], self.backoff[tokens]
        seen = np.maximum(count - self.discount, 0.0) + self.discount * self.different[before] * backoff
        return np.where(total > 0, seen / np.maximum(total, 1), backoff)


def baselines(dataset: Dataset, sequence_length: int, data_seed: int, tokens: int) -> Baselines:
    """Return the losses after the first `tokens` tokens of a run.

    Raises:
        UserError: no text is held out.
    """
    held_out = dataset.held_out
    if not held_out.tokens:
        raise UserError("no text of this corpus is held out (data.held_out=0), so there is nothing to predict")
    stream, rows = BatchStream(dataset, sequence_length, data_seed), max(1, _BLOCK // sequence_length)
    samples = -(-min(tokens, MOST_TOKENS) // sequence_length)
    blocks = (stream.samples(first, min(rows, samples - first)) for first in range(0, samples, rows))
    counts = count_pairs(blocks, dataset.vocab_size)
    alone, model = np.log(unigram(counts)), Bigram(counts)
    nats = np.zeros(2)
    for start in range(0, held_out.tokens, _BLOCK):
        text = held_out.read(start - 1, min(_BLOCK, held_out.tokens - start) + 1)
        nats -= [alone[text[1:]].sum(), np.log(model.probabilities(text[:-1], text[1:])).sum()]
    xz = None
    if dataset.xz_bits_per_byte is not None:
        xz = dataset.xz_bits_per_byte * dataset.bytes_per_token * math.log(2)
    of_unigram, of_bigram = (nats / held_out.tokens).tolist()
    return Baselines(held_out.hash, dataset.bytes_per_token, samples * sequence_length, of_unigram, of_bigram, xz)


def main(argv: list[str]) -> int:
    """Print the baselines of a run, and write them."""
    options, overrides = split_options(argv, {"to": ""})
    check_overrides(overrides, options)
    to = Path(options["to"]) if options["to"] else None
    if to is not None:
        make_folder_of(to)
    config = load(overrides, program="python -m data.baselines")
    steps = total_steps(config)
    if steps is None:
        raise UserError("how long the run is decides how many tokens there are to learn from: set tokens=N or steps=N")
    batch = validate(config, config.parallel.tensor * config.parallel.context)
    dataset = open_dataset(prepare(config.data, config.tokenizer, show=True))
    found = baselines(dataset, config.sequence_length, config.data_seed, steps * batch.tokens_per_step)
    print(f"after {found.tokens:,} training tokens, on {dataset.held_out.tokens:,} held-out ones:")
    for name in ("unigram", "bigram", "xz"):
        loss = getattr(found, name)
        if loss is not None:
            per_byte = loss / math.log(2) / found.bytes_per_token
            bits = "" if dataset.why_no_bits else f"  {per_byte:.4f} bits per byte"
            print(f"  {name:8} {loss:.4f} nats per token{bits}")
    if to is not None:
        with explain_os_errors("write", to):
            write_json(to, asdict(found))
    return 0


if __name__ == "__main__":
    run_command(main, with_keys(USAGE))
