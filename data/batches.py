"""Batches: which tokens make up sample i of a run, and the windows on which the held-out loss is computed.

Notable here:
- a sample is a function of (corpus, seed, sequence length, its number) alone: no state, so any rank can compute any
  sample, a resumed run needs only the count of tokens consumed, and 1, 2 or 4 ranks see the same batches;
- the order of an epoch is a pseudo-random permutation, computed index by index without storing it;
- each epoch splits the text into different windows;
- samples that are left out (`BatchStream.skipped`) shift those that follow, and change nothing else;
- integer arithmetic and BLAKE2 only: the same on every platform and with every version of NumPy.

The on-disk format of tokens is in `shards.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.ranges import NO_SAMPLES, SampleRanges
from data.shards import ShardSet, open_shards, read_index, read_part
from data.tokenizer import Tokenizer, load_tokenizer
from kernels.common.errors import UserError

IGNORED = -100  # target excluded from the loss; the default ignore_index of torch's cross_entropy
BLOCK = 1000  # samples; within each block the parts of a blend have exactly their weights
ROUNDS = 8  # of the Feistel network; 4 already give a pseudo-random permutation (Luby and Rackoff, 1988)


@dataclass(frozen=True)
class Part:
    """One corpus of a data set; a data set that is no blend has one."""

    name: str
    folder: Path
    weight: float  # fraction of the samples; weights sum to 1
    train: ShardSet
    corpus_hash: str


@dataclass(frozen=True)
class Dataset:
    """A prepared folder, opened."""

    folder: Path
    tokenizer: Tokenizer
    parts: list[Part]
    held_out: ShardSet  # of all parts, concatenated
    # Documents of each held-out folder, in order; None: they were not held out so.
    held_out_groups: tuple[int, ...] | None
    xz_bits_per_byte: float | None  # of xz -9 on the held-out text; None: it is too large, or there is none
    corpus_hash: str  # of the text, the tokenizer and the weights

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of the held-out text; where there is none, of the training text."""
        sets = [self.held_out] if self.held_out.tokens else [part.train for part in self.parts]
        return sum(s.text_bytes for s in sets) / max(1, sum(s.tokens for s in sets))

    @property
    def why_no_bits(self) -> str:
        """Why a loss per token says nothing about bits per byte; "" if it does."""
        lost, all_documents = self.held_out.lossy_documents, self.held_out.documents
        if all_documents and not self.held_out.text_bytes:
            return f"all {all_documents:,} held-out documents are empty"
        if not lost:
            return ""
        return f"the tokenizer does not give back the text of {lost:,} of {all_documents:,} held-out documents"

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.eos_id


def open_dataset(folder: str | Path) -> Dataset:
    """Open a prepared folder.

    Raises:
        UserError: it is not complete, a shard is broken, or its tokenizer is not the one that made the shards.
    """
    folder = Path(folder)
    index = read_index(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.hash != index["tokenizer_hash"]:
        raise UserError(f"the tokenizer in {folder} is not the one that made the shards; restore it or prepare again")
    records = index.get("parts") or [{"name": index["name"], "weight": 1.0, "folder": "."}]
    parts, held_out, groups, xz_bits = [], [], [], 0.0
    for record in records:
        where = folder if record["folder"] == "." else Path(folder, record["folder"]).resolve()
        # The index of millions of documents is read once: it has a digest over all of it.
        part = index if record["folder"] == "." and "shards" in index else read_part(where)
        if part["tokenizer_hash"] != tokenizer.hash:
            raise UserError(f"the shards in {where} were made with another tokenizer than the one in {folder}")
        train = open_shards(where, part, "train")
        parts.append(Part(record["name"], where, record["weight"], train, part["corpus_hash"]))
        held_out.append(open_shards(where, part, "held_out"))
        groups.append(part.get("held_out_groups"))
        if held_out[-1].tokens:
            xz_bits += held_out[-1].text_bytes * (part.get("xz_bits_per_byte") or math.nan)
    all_held_out = ShardSet([shard for shards in held_out for shard in shards.shards], parts[0].train.dtype)
    xz = xz_bits / all_held_out.text_bytes if all_held_out.text_bytes else math.nan
    all_groups = None
    if any(groups):
        of_parts = zip(groups, held_out, strict=True)  # where a part has no folders, each of its documents is one
        all_groups = tuple(n for own, shards in of_parts for n in own or [1] * shards.documents)
    known_xz = None if math.isnan(xz) else xz
    return Dataset(folder, tokenizer, parts, all_held_out, all_groups, known_xz, index["corpus_hash"])


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 numbers (the finaliser of SplitMix64: Steele, Lea and Flood, 2014), wrapping mod 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(count: int, *names: object) -> np.ndarray:
    """Return `count` uint64 numbers that are a hash of `names`."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=32).digest()
    base = np.uint64(int.from_bytes(digest[:8], "little"))
    step = np.uint64(int.from_bytes(digest[8:16], "little") | 1)
    return _mix(np.arange(count, dtype=np.uint64) * step + base)


def permute(numbers: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Apply a pseudo-random permutation of [0, size) that `keys` (uint64, one per round) select.

    A balanced Feistel network permutes the next power of 4. A result outside [0, size) is permuted again until it is
    inside (cycle walking: Black and Rogaway, 2002), fewer than 4 times on average.

    Args:
        numbers: int64, any shape, in [0, size). Returns the same shape and dtype.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    result = np.array(numbers, dtype=np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        x = result[outside]
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        result[outside] = left << half | right
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


class BatchStream:
    """The endless stream of samples of a run.

    A sample is sequence_length + 1 neighbouring tokens: the inputs, and the same shifted by one as targets. The tokens
    of a part are a ring (`ShardSet`) of N tokens; epoch e splits it, from a random offset, into N // sequence_length
    windows and visits them in random order. Fewer than sequence_length tokens are left out of an epoch, different ones
    each time.
    """

    def __init__(self, dataset: Dataset, sequence_length: int, seed: int, skipped: SampleRanges = NO_SAMPLES) -> None:
        """Raises UserError: the sequence length is beyond the tokens, or a part's weight is below 1 / BLOCK."""
        self.skipped = skipped  # samples left out
        self.dataset, self.sequence_length, self.seed = dataset, sequence_length, seed
        if sequence_length < 1:
            raise UserError(f"sequence_length must be at least 1, not {sequence_length}")
        for part in dataset.parts:
            if part.train.tokens <= sequence_length:
                raise UserError(
                    f"sequence_length={sequence_length} is beyond the {part.train.tokens} tokens of {part.name} in "
                    f"{part.folder}; set it below {max(2, part.train.tokens)}"
                )
        self.windows = [part.train.tokens // sequence_length for part in dataset.parts]  # in an epoch of each part
        self._counts = _block_counts([part.weight for part in dataset.parts])  # of each part in a block
        for part, count in zip(dataset.parts, self._counts, strict=True):
            if count == 0:
                raise UserError(
                    f"the part {part.name} of the blend has a weight of less than 1 in {BLOCK}: raise or drop it"
                )
        self._slots = np.repeat(np.arange(len(dataset.parts)), self._counts)
        self._epochs: dict[tuple[int, int], tuple[np.ndarray, int]] = {}

    def parts_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the part of each sample number (n,), and its index within that part: int64, (n,) each."""
        if len(self.dataset.parts) == 1:
            return np.zeros(len(numbers), np.int64), np.asarray(numbers, np.int64)
        part, nth = np.empty(len(numbers), np.int64), np.empty(len(numbers), np.int64)
        blocks = numbers // BLOCK
        for block in np.unique(blocks).tolist():
            order = np.argsort(_keys(BLOCK, "blend", self.seed, block), kind="stable")
            slots = self._slots[order]
            earlier = np.empty(BLOCK, np.int64)  # samples of the same part earlier in the block
            for p, count in enumerate(self._counts):
                earlier[slots == p] = np.arange(count)
            here = blocks == block
            place = numbers[here] - block * BLOCK
            part[here] = slots[place]
            nth[here] = block * np.array(self._counts)[slots[place]] + earlier[place]
        return part, nth

    def _epoch(self, part: int, epoch: int) -> tuple[np.ndarray, int]:
        """Return the keys of an epoch's permutation and the token at which its first window starts."""
        if (part, epoch) not in self._epochs:
            corpus = self.dataset.parts[part]
            keys = _keys(ROUNDS + 1, "epoch", corpus.corpus_hash, part, self.seed, self.sequence_length, epoch)
            if len(self._epochs) > 64:
                self._epochs.clear()
            self._epochs[part, epoch] = keys[:ROUNDS], int(keys[ROUNDS]) % corpus.train.tokens
        return self._epochs[part, epoch]

    def samples(self, first: int, count: int) -> np.ndarray:
        """Return the samples at positions first .. first + count - 1 of the stream: int64, (count, sequence_length + 1)."""
        length = self.sequence_length
        out = np.empty((count, length + 1), np.int64)
        parts, nth = self.parts_of(self.skipped.numbers(np.arange(first, first + count)))
        windows = np.array(self.windows)[parts]
        epochs = nth // windows
        for part, epoch in sorted(set(zip(parts.tolist(), epochs.tolist(), strict=True))):
            rows = np.flatnonzero((parts == part) & (epochs == epoch))
            keys, start = self._epoch(part, epoch)
            window = permute(nth[rows] - epoch * self.windows[part], self.windows[part], keys)
            train = self.dataset.parts[part].train
            for row, w in zip(rows.tolist(), window.tolist(), strict=True):
                out[row] = train.read(start + w * length, length + 1)
        return out


def _block_counts(weights: Sequence[float]) -> list[int]:
    """Apportion BLOCK samples by weights that sum to 1, by largest remainder; ties go to the earlier part."""
    exact = [weight * BLOCK for weight in weights]
    counts = [int(x + 1e-9) for x in exact]  # 0.3 * 1000 must be 300 in floating point too
    remainders = sorted(range(len(exact)), key=lambda p: (counts[p] - exact[p], p))
    for p in remainders[: BLOCK - sum(counts)]:
        counts[p] += 1
    return counts


def epochs(dataset: Dataset, sequence_length: int, samples: int) -> dict[str, float]:
    """Return how often the first `samples` samples go through each part of a data set, by its name."""
    return {part.name: samples * part.weight / max(1, part.train.tokens // sequence_length) for part in dataset.parts}


def refuse_repetition(dataset: Dataset, sequence_length: int, samples: int, max_epochs: float) -> None:
    """Refuse a run of `samples` samples that goes through a corpus, or a part of a blend, more than `max_epochs` times.

    Raises:
        UserError: it would.
    """
    repeated = epochs(dataset, sequence_length, samples)
    worst = max(dataset.parts, key=lambda part: repeated[part.name])
    if repeated[worst.name] > max_epochs:
        raise UserError(
            f"this run would go {repeated[worst.name]:,.1f} times through {worst.name} ({worst.train.tokens:,} training "
            f"tokens), and data.max_epochs={max_epochs:g}: give it more text, or fewer tokens=N, or set "
            f"data.max_epochs={math.ceil(repeated[worst.name])}"
        )


def held_out_count(dataset: Dataset, sequence_length: int) -> int:
    """Return the number of windows of the held-out text."""
    return -(-dataset.held_out.tokens // sequence_length)


def measured_windows(dataset: Dataset, sequence_length: int, tokens: int | None) -> Sequence[int]:
    """Return the windows on which to measure the loss on `tokens` held-out tokens, at least one; None: on all of them.

    They are the first ones of a corpus, and of a blend as many spread evenly, because its parts follow each other.
    """
    total = held_out_count(dataset, sequence_length)
    count = total if tokens is None else min(total, max(1, tokens // sequence_length))
    if count == total or len(dataset.parts) == 1:
        return range(count)
    return [k * total // count for k in range(count)]  # never the last one, which may be short: `count` are full


def held_out_windows(
    dataset: Dataset, sequence_length: int, rows: int = 8, which: Sequence[int] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (inputs, targets) of the held-out text, int64, (up to `rows`, sequence_length) each.

    The targets of window k start at token k * sequence_length; its inputs start one token earlier (the very first input
    is an end-of-text). Every held-out token is a target exactly once. The last window is padded with end-of-text inputs
    and IGNORED targets.

    Args:
        which: numbers of the windows, below `held_out_count`; None: all. range(rank, count, ranks) are those of a rank.
    """
    tokens = dataset.held_out.tokens
    which = range(held_out_count(dataset, sequence_length)) if which is None else which
    for at in range(0, len(which), rows):
        some = which[at : at + rows]
        inputs = np.full((len(some), sequence_length), dataset.eos_id, np.int64)
        targets = np.full((len(some), sequence_length), IGNORED, np.int64)
        for row, k in enumerate(some):
            start = k * sequence_length
            count = min(sequence_length, tokens - start)
            stretch = dataset.held_out.read(start - 1, count + 1)
            inputs[row, :count], targets[row, :count] = stretch[:-1], stretch[1:]
        yield inputs, targets


def sample_hash(first: int, rows: np.ndarray) -> int:
    """Return a hash of samples first, first + 1, ...: the sum of their hashes mod 2^64, so that ranks can add theirs up.

    Args:
        rows: int64, (count, any).
    """
    total = 0
    for number, row in enumerate(np.ascontiguousarray(rows, "<i8"), start=first):
        digest = hashlib.blake2b(number.to_bytes(8, "little") + row.tobytes(), digest_size=8).digest()
        total += int.from_bytes(digest, "little")
    return total % 2**64
