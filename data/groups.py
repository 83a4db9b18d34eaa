"""Group consecutive documents: a group becomes at most one shard per split, and is the unit of parallel work and of resuming.

`groups` reads the whole corpus, because where a group begins depends on the documents before it. `read_groups` reads some of
them again, by the spans that the first reading left in its facts, and opens only the files that hold them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from conf.schema import DataConfig
from data.documents import Document, documents
from data.held_out import Selection
from data.pool import Group
from data.shards import PLAN, SPLITS
from kernels.common.errors import UserError

MEGABYTE = 1 << 20
GROUPS = 32  # in which a corpus is tokenized at least, unless they would be of less than a megabyte
XZ_LIMIT = 32 << 20  # bytes of held-out text that xz is tried on: xz -9 takes about a second for 2 MB


@dataclass(frozen=True)
class Span:
    """Where the documents of a group are."""

    number: int  # of the group
    file: int  # `Document.file` of the first one
    before: int  # documents of that file before it
    documents: int  # near duplicates included, which are in no shard
    text_hash: str  # of the group
    fraction: float  # of the corpus read up to its end


@dataclass
class Facts:
    """Facts collected while a corpus is read, complete after its last group."""

    corpus: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))  # of the text and of what is held out
    held_out_text: bytearray | None = field(default_factory=bytearray)  # None: more than XZ_LIMIT
    skipped: int = 0  # records whose text is null or empty
    near_duplicates: int = 0  # documents that nearly repeat held-out text
    # Held-out documents of each folder, one folder after the other.
    held_out_groups: list[int] = field(default_factory=list)
    last_group: str | None = None  # of the held-out documents
    spans: list[Span] = field(default_factory=list)  # of the groups so far

    def skip(self) -> None:
        self.skipped += 1

    def hold_out(self, group: str, raw: bytes) -> None:
        """Count a held-out document, given the folder that it belongs to and what counts of its text."""
        if group != self.last_group:
            self.held_out_groups.append(0)
        self.held_out_groups[-1] += 1
        self.last_group = group
        if self.held_out_text is not None:
            self.held_out_text += raw
            if len(self.held_out_text) > XZ_LIMIT:
                self.held_out_text = None


class _Collector:
    """The group that is being filled."""

    def __init__(self, file: int, before: int) -> None:
        self.file, self.before, self.documents = file, before, 0
        self.texts: dict[str, list[str]] = {split: [] for split in SPLITS}
        self.text_bytes = dict.fromkeys(SPLITS, 0)
        self.fraction = 0.0
        self._hash = hashlib.blake2b(digest_size=16)

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(self.text_bytes.values())

    def add(self, document: Document, selection: Selection, facts: Facts) -> None:
        """Take the next document."""
        self.documents += 1
        self.fraction = document.fraction
        raw = document.text.encode()
        part = selection.part(document.text, raw, document.group)
        if not part.split:
            facts.near_duplicates += 1
            return
        held_out = part.split == "held_out"
        if held_out:
            raw = part.text.encode()
            facts.hold_out(document.group, raw)
        self.texts[part.split].append(part.text)
        self.text_bytes[part.split] += len(raw)
        mark = hashlib.blake2b(raw, digest_size=16).digest() + bytes([held_out])
        self._hash.update(mark)
        facts.corpus.update(mark)

    def group(self, number: int) -> Group:
        """Return the group of the documents taken."""
        return Group(number, self.texts, self.text_bytes, self._hash.hexdigest(), self.fraction)

    def span(self, number: int) -> Span:
        """Return where these documents are."""
        return Span(number, self.file, self.before, self.documents, self._hash.hexdigest(), self.fraction)


def groups(data: DataConfig, selection: Selection, facts: Facts) -> Iterator[Group]:
    """Split the corpus between documents into groups of about `data.shard_megabytes` of text.

    A corpus of less than GROUPS times that has smaller ones, of at least a megabyte: there should be work for every core.
    Groups do not depend on the number of workers, so neither do the shards.
    """
    number, begun = 0, 0.0
    filled: _Collector | None = None
    for document, before in _placed(documents(data, facts.skip)):
        filled = filled or _Collector(document.file, before)
        counted = facts.near_duplicates
        filled.add(document, selection, facts)
        if facts.near_duplicates > counted:
            continue
        size, fraction = filled.size, filled.fraction
        if size >= data.shard_megabytes * MEGABYTE or (size >= MEGABYTE and fraction - begun >= 1 / GROUPS):
            facts.spans.append(filled.span(number))
            yield filled.group(number)
            number, begun, filled = number + 1, fraction, None
    if filled and any(filled.texts.values()):
        facts.spans.append(filled.span(number))
        yield filled.group(number)


def read_groups(data: DataConfig, selection: Selection, spans: Sequence[Span]) -> Generator[Group]:
    """Read groups again, in the order of their numbers.

    Raises:
        UserError: the documents there are others than when the spans were made.
    """
    reader: Iterator[tuple[Document, int]] | None = None
    file, number = 0, -1  # of the last document and group
    for span in spans:
        if reader is None or (span.file > file and span.number != number + 1):  # files between them are not opened
            reader = _placed(documents(data, first_file=span.file))
        filled, unused = _Collector(span.file, span.before), Facts()
        for document, before in reader:
            file = document.file
            if (file, before) < (span.file, span.before):
                continue
            filled.add(document, selection, unused)
            if filled.documents == span.documents:
                break
        if filled.span(span.number) != span:
            raise UserError(
                f"the corpus data={data.name} was changed since its parts were planned; delete {PLAN} in its prepared folder "
                "and run the same command again"
            )
        number = span.number
        yield filled.group(number)


def _placed(found: Iterator[Document]) -> Iterator[tuple[Document, int]]:
    """Yield every document with the number of documents of the same file before it."""
    file, before = -1, 0
    for document in found:
        before = before + 1 if document.file == file else 0
        file = document.file
        yield document, before
