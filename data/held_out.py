"""Choose the held-out documents of a corpus, what of each counts, and what must not be trained on beside them.

A document is held out by a hash of its text, so equal texts are on one side, and neither the order of a corpus nor the size of
its files matters. Where comparisons should hold for other text too (`data.held_out_files`), many documents matter more than
much text: then a piece of each counts, so that none outweighs the others, and training documents that repeat half of a piece
are left out. `prepare.py` reads the corpus.

Files of one project resemble each other. With `data.held_out_by=folder` all documents of a folder or package are on one side.
Each part of a blend chooses for itself, and no part trains on what another holds out.
"""

from __future__ import annotations

import collections
import copy
import hashlib
import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from conf.schema import DataConfig
from data.documents import documents
from kernels.common.errors import UserError

WINDOW = 64  # bytes of text that two documents have in common, white space aside, to match at a place
SAMPLED = 4  # of so many windows, chosen by their hash, one is kept
NEAR = 0.5  # a training document is a near duplicate if it has this fraction of the windows of a held-out piece
_FACTORS = [0x9E3779B97F4A7C15 + 2 * n for n in range(6)]  # odd, one for each doubling of a window: 2^6 is WINDOW


def _hashes_of(raw: bytes) -> tuple[int, int]:
    """Return two independent 64-bit hashes of a text: the first decides whether it is held out, the second samples it."""
    value = hashlib.blake2b(raw, digest_size=16).digest()
    return int.from_bytes(value[:8], "little"), int.from_bytes(value[8:], "little")


@dataclass(frozen=True)
class SplitText:
    """What becomes of a document."""

    split: str  # train | held_out | "": it repeats held-out text, or nearly, and is left out
    text: str  # all of it, or a piece
    number: int  # its second hash, by which documents are sampled


class Selection:
    """The choice of held-out documents in one corpus."""

    def __init__(self, data: DataConfig, known: dict[str, Any] | None = None) -> None:
        """Read the corpus as often as that takes.

        Args:
            known: the `record` of an earlier choice in the same corpus, which is then not read.

        Raises:
            UserError: all documents have the same text, or are of one folder where folders are held out.
        """
        self.groups: frozenset[str] | None = None  # those that are held out; None: documents are chosen one by one
        self.threshold = 0
        self.piece_bytes = data.held_out_kib << 10 if data.held_out_files else 0  # 0: all of a document counts
        self._pieces: list[str] = []  # held-out text that training documents must not repeat
        self._copies = np.empty(0, np.uint64)  # second hashes of what other parts of a blend hold out, ascending
        self._near: _NearDuplicates | None = None
        self._numbers: np.ndarray | None = None  # second hashes of the held-out documents; None: not read yet
        if known is None:
            self._choose(data)
        else:
            self.groups = None if known["groups"] is None else frozenset(known["groups"])
            self.threshold, self._pieces = known["threshold"], known["pieces"]
            self._copies = np.array(known.get("copies", []), np.uint64)
        self._compare_with_pieces()

    def _compare_with_pieces(self) -> None:
        self._near = _NearDuplicates(piece.encode() for piece in self._pieces) if self._pieces else None

    def _choose(self, data: DataConfig) -> None:
        if data.held_out and data.held_out_by == "folder":
            self.groups = _groups(data)
        elif data.held_out:
            self.threshold = _threshold_of_files(data) if data.held_out_files else _threshold(data)
        if data.held_out and data.held_out_files:
            found = list(self._held_out(data))
            self._pieces = [document.text for document in found]
            self._numbers = np.array([document.number for document in found], np.uint64)

    def _held_out(self, data: DataConfig) -> Iterator[SplitText]:
        found = (self.part(d.text, d.text.encode(), d.group) for d in documents(data))
        return (document for document in found if document.split == "held_out")

    def record(self) -> dict[str, Any]:
        """Return the choice as JSON takes it."""
        groups = None if self.groups is None else sorted(self.groups)
        copies = {"copies": self._copies.tolist()} if len(self._copies) else {}
        return {"groups": groups, "threshold": self.threshold, "pieces": self._pieces} | copies

    def apart_from(self, others: Iterable[tuple[DataConfig, Selection]]) -> Selection:
        """Return this choice, leaving out of the training documents also what other corpora hold out.

        It reads those of the others again of which that takes more than their pieces and thresholds.
        """
        result, numbers = copy.copy(self), [self._copies]
        for data, other in others:
            result._pieces = result._pieces + other._pieces
            by_hash = self.groups is None and other.groups is None
            if data.held_out and not (by_hash and other.threshold <= self.threshold):  # else held out here as well
                numbers.append(other._numbers_of(data))
        result._copies = np.unique(np.concatenate(numbers))
        result._compare_with_pieces()
        return result

    def _numbers_of(self, data: DataConfig) -> np.ndarray:
        if self._numbers is None:
            self._numbers = np.fromiter((document.number for document in self._held_out(data)), np.uint64)
        return self._numbers

    def part(self, text: str, raw: bytes, group: str = "") -> SplitText:
        """Return what becomes of a document, given as text and as UTF-8, and the folder or package that it belongs to."""
        first, second = _hashes_of(raw)
        if first < self.threshold if self.groups is None else group in self.groups:
            return SplitText("held_out", _piece(raw, self.piece_bytes, second) if self.piece_bytes else text, second)
        near = self._near is not None and self._near.found_in(raw)
        return SplitText("" if near or self._is_copy(second) else "train", text, second)

    def _is_copy(self, number: int) -> bool:
        place = int(np.searchsorted(self._copies, np.uint64(number)))
        return bool(place < len(self._copies) and self._copies[place] == number)


def _groups(data: DataConfig) -> frozenset[str]:
    """Return the groups to hold out, in the order of their names' hashes, until they have as many documents as asked.

    A group of more than a tenth of these is passed over while others suffice: many groups say more of other text than few do.
    So is one that would make it more than twice as many documents. If no group is small enough, the smallest is held out.
    """
    counts = collections.Counter(document.group for document in documents(data))
    if len(counts) < 2:
        raise UserError(
            f"data.held_out_by=folder needs several folders, and all documents of data={data.name} are of one: "
            "data.held_out_by=document"
        )
    total = counts.total()
    wanted = min(data.held_out_files or math.ceil(data.held_out * total), total // 2)
    order = sorted(counts, key=lambda name: _hashes_of(name.encode())[0])
    chosen: set[str] = set()
    have = 0
    for largest in (wanted // 10, total):
        for name in order:
            count = counts[name]
            if name not in chosen and count <= largest and have < wanted and have + count <= min(2 * wanted, total - 1):
                chosen.add(name)
                have += count
    return frozenset(chosen or {min(counts, key=lambda name: (counts[name], name))})


def _threshold(data: DataConfig) -> int:
    """Return the threshold: documents whose first hash lies below it are held out.

    Where chance would leave a side empty, the threshold is moved so that each has at least one document.
    """
    limit = int(data.held_out * 2**64)
    smallest, largest = 2**64, -1
    for document in documents(data):
        number = _hashes_of(document.text.encode())[0]
        smallest, largest = min(smallest, number), max(largest, number)
        if smallest < limit <= largest:
            return limit  # both sides have a document: the rest need not be read
    if smallest == largest:
        raise _all_the_same(data)
    return min(max(limit, smallest + 1), largest)


def _threshold_of_files(data: DataConfig) -> int:
    """Return the threshold that holds `data.held_out_files` documents out, or half of those that differ if these are less."""
    wanted = 2 * data.held_out_files
    smallest: list[int] = []  # a heap of the smallest distinct hashes, negated
    kept: set[int] = set()
    for document in documents(data):
        number = _hashes_of(document.text.encode())[0]
        if number not in kept and (len(smallest) < wanted or number < -smallest[0]):
            kept.add(number)
            heapq.heappush(smallest, -number)
            if len(smallest) > wanted:
                kept.remove(-heapq.heappop(smallest))
    if len(smallest) < 2:
        raise _all_the_same(data)
    return sorted(kept)[len(kept) // 2 - 1] + 1


def _all_the_same(data: DataConfig) -> UserError:
    return UserError(
        f"all documents of data={data.name} have the same text, so none can be held out for evaluation; "
        f"give it other documents, or train without evaluation: data.held_out=0"
    )


def _piece(raw: bytes, size: int, number: int) -> str:
    """Return about `size` bytes of a text, whole lines where these are short, from a place that `number` selects."""
    if len(raw) <= size:
        return raw.decode()
    start = number % (len(raw) - size + 1)
    line = raw.rfind(b"\n", max(0, start - size // 2), start) + 1
    start = line or start
    end = start + size
    end = raw.rfind(b"\n", start + size // 2, end) + 1 or end
    return raw[start:end].decode(errors="ignore")  # of a character that is cut in two, nothing is left


class _NearDuplicates:
    """The windows of the held-out pieces, by their hashes."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        hashes = [np.unique(window_hashes(piece)) for piece in pieces]
        self.counts = np.array([max(1, len(own)) for own in hashes])  # windows of each piece
        owners = np.repeat(np.arange(len(hashes)), [len(own) for own in hashes])
        every = np.concatenate(hashes)
        order = np.argsort(every, kind="stable")
        self.hashes, self.owners = every[order], owners[order]

    def found_in(self, raw: bytes) -> bool:
        """Return whether a document has `NEAR` of the windows of some piece."""
        own = np.unique(window_hashes(raw))
        first, last = (np.searchsorted(self.hashes, own, side=side) for side in ("left", "right"))
        matched = np.flatnonzero(last > first)
        if not len(matched):
            return False
        places = np.concatenate([np.arange(first[i], last[i]) for i in matched.tolist()])
        found = np.bincount(self.owners[places], minlength=len(self.counts))
        return bool((found >= NEAR * self.counts).any())


def window_hashes(raw: bytes) -> np.ndarray:
    """Return hashes of the sampled windows of a text: uint64; a text that is shorter than a window has none.

    Runs of white space count as one space. Which windows are sampled depends on what they hold alone.
    """
    values = np.frombuffer(b" ".join(raw.split()), np.uint8).astype(np.uint64) + np.uint64(1)
    length = 1
    for factor in _FACTORS:  # the hash of 2n bytes from those of both halves
        if len(values) <= length:
            return np.empty(0, np.uint64)
        values = values[:-length] * np.uint64(factor) + values[length:]
        values ^= values >> np.uint64(29)
        length *= 2
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(32)
    return values[values % np.uint64(SAMPLED) == 0]
