"""Batches: which tokens are sample number i of a run, and the windows that the held-out text is judged on.

Notable here:
- a sample is a function of (corpus, seed, sequence length, its number) alone: no state, so any rank can compute any
  sample, a resumed run needs only the count of tokens consumed, and 1, 2 or 4 ranks see the same batches;
- the order of an epoch is a pseudo-random permutation that is computed number by number, in no memory;
- each epoch cuts the text into other windows;
- integer arithmetic and BLAKE2 only: the same on every platform and with every version of NumPy.

How tokens lie on disk is in `shards.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.shards import ShardSet, open_shards, read_index
from data.tokenizer import Tokenizer, load_tokenizer
from kernels.common.errors import UserError

IGNORED = -100  # target that no loss is taken of; the default of torch's cross_entropy
BLOCK = 1000  # samples in which the parts of a blend have exactly their shares
ROUNDS = 8  # of the Feistel network; 4 already give a pseudo-random permutation (Luby and Rackoff, 1988)


@dataclass(frozen=True)
class Part:
    """One corpus of a data set; a data set that is no blend has one."""

    name: str
    folder: Path
    weight: float  # share of the samples; all add to 1
    train: ShardSet
    corpus_hash: str


@dataclass(frozen=True)
class Dataset:
    """A prepared folder, opened."""

    folder: Path
    tokenizer: Tokenizer
    parts: list[Part]
    held_out: ShardSet  # of all parts, one after the other
    xz_bits_per_byte: float | None  # what xz -9 makes of the held-out text; None: too large to try, or none
    corpus_hash: str  # of the text, the tokenizer and the weights

    @property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out text."""
        return self.held_out.text_bytes

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
    parts, held_out, xz_bits = [], [], 0.0
    for record in records:
        where = folder if record["folder"] == "." else Path(folder, record["folder"]).resolve()
        part = read_index(where)
        if part["tokenizer_hash"] != tokenizer.hash:
            raise UserError(f"the shards in {where} were made with another tokenizer than the one in {folder}")
        train = open_shards(where, part, "train")
        parts.append(Part(record["name"], where, record["weight"], train, part["corpus_hash"]))
        held_out.append(open_shards(where, part, "held_out"))
        if held_out[-1].tokens:
            xz_bits += held_out[-1].text_bytes * (part["xz_bits_per_byte"] or math.nan)
    together = ShardSet([shard for shards in held_out for shard in shards.shards], parts[0].train.dtype)
    xz = xz_bits / together.text_bytes if together.tokens else math.nan
    return Dataset(folder, tokenizer, parts, together, None if math.isnan(xz) else xz, index["corpus_hash"])


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
    """Apply a pseudo-random permutation of [0, size) that `keys` (uint64, one a round) chooses.

    A balanced Feistel network permutes the next power of 4; a result outside [0, size) is permuted again until it is
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
    of a part are a ring (`ShardSet`) of N tokens; epoch e cuts it, from a random place on, into N // sequence_length
    windows and takes them in a random order. Fewer than sequence_length tokens are no target in an epoch, others in
    each.
    """

    def __init__(self, dataset: Dataset, sequence_length: int, seed: int) -> None:
        """Raises UserError: the sequence length is beyond the tokens, or a part's weight is below 1 / BLOCK."""
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
        self._counts = _shares([part.weight for part in dataset.parts])  # of each part in a block
        for part, count in zip(dataset.parts, self._counts, strict=True):
            if count == 0:
                raise UserError(
                    f"the part {part.name} of the blend has a weight of less than 1 in {BLOCK}: raise or drop it"
                )
        self._slots = np.repeat(np.arange(len(dataset.parts)), self._counts)
        self._epochs: dict[tuple[int, int], tuple[np.ndarray, int]] = {}

    def parts_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, for sample numbers (n,), the part that each is of, and its number in that part: int64, (n,) each."""
        if len(self.dataset.parts) == 1:
            return np.zeros(len(numbers), np.int64), np.asarray(numbers, np.int64)
        part, nth = np.empty(len(numbers), np.int64), np.empty(len(numbers), np.int64)
        blocks = numbers // BLOCK
        for block in np.unique(blocks).tolist():
            order = np.argsort(_keys(BLOCK, "blend", self.seed, block), kind="stable")
            slots = self._slots[order]
            before = np.empty(BLOCK, np.int64)  # samples of the same part earlier in the block
            for p, count in enumerate(self._counts):
                before[slots == p] = np.arange(count)
            here = blocks == block
            place = numbers[here] - block * BLOCK
            part[here] = slots[place]
            nth[here] = block * np.array(self._counts)[slots[place]] + before[place]
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
        """Return samples first .. first + count - 1 of the stream: int64, (count, sequence_length + 1)."""
        length = self.sequence_length
        out = np.empty((count, length + 1), np.int64)
        parts, nth = self.parts_of(np.arange(first, first + count, dtype=np.int64))
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


def _shares(weights: Sequence[float]) -> list[int]:
    """Divide BLOCK samples by weights (which add to 1); largest remainders are rounded up, first of equals first."""
    exact = [weight * BLOCK for weight in weights]
    counts = [int(x + 1e-9) for x in exact]  # 0.3 * 1000 must be 300 in floating point too
    remainders = sorted(range(len(exact)), key=lambda p: (counts[p] - exact[p], p))
    for p in remainders[: BLOCK - sum(counts)]:
        counts[p] += 1
    return counts


def held_out_count(dataset: Dataset, sequence_length: int) -> int:
    """Return how many windows the held-out text has."""
    return -(-dataset.held_out.tokens // sequence_length)


def held_out_windows(
    dataset: Dataset, sequence_length: int, rows: int = 8, which: Sequence[int] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (inputs, targets) of the held-out text, int64, (up to `rows`, sequence_length) each.

    Window k has the tokens from k * sequence_length on as targets, and the tokens one before them as inputs (an
    end-of-text before the very first): every held-out token is a target exactly once. The last window is filled up with
    end-of-text inputs and IGNORED targets.

    Args:
        which: numbers of the windows, below `held_out_count`; None: all. range(rank, count, ranks) is a rank's share.
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
    """Return a hash of samples first, first + 1, ...: the sum of one hash each, mod 2^64, so that ranks can add theirs.

    Args:
        rows: int64, (count, any).
    """
    total = 0
    for number, row in enumerate(np.ascontiguousarray(rows, "<i8"), start=first):
        digest = hashlib.blake2b(number.to_bytes(8, "little") + row.tobytes(), digest_size=8).digest()
        total += int.from_bytes(digest, "little")
    return total % 2**64
