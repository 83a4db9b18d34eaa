"""Encode by SentencePiece's BPE models in C, with exactly its ids and several times its speed (`bpe.c` says how).

It serves the models that are trained here, and others of their kind: BPE that changes no character and falls back to bytes.
`tokenizer.py` uses SentencePiece for the rest, and where there is no C compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kernels.c.toolchain import build

SOURCE = Path(__file__).with_name("bpe.c")
LONGEST = 256  # bytes of a piece, as in bpe.c
MOST_BYTES, MOST_PIECES = 1 << 23, 1 << 20  # that bpe_new takes
_NORMAL, _UNKNOWN, _CONTROL, _BYTE, _BPE = 1, 2, 3, 6, 2  # in sentencepiece_model.proto


class BpeEncoder:
    """An encoder of one model. Threads may share it. `of_model` makes them."""

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        self._library, self._address = library, address
        weakref.finalize(self, library.bpe_free, address)

    def encode(self, text: str, stretch: int) -> np.ndarray | None:
        """Return the ids of a text, int32 (tokens,); None where memory is short.

        Args:
            stretch: characters encoded at once; a longer text is split after a line end where there is one.
        """
        raw = text.encode()
        ids = np.empty(len(raw), np.int32)
        count = self._library.bpe_encode(self._address, raw, len(raw), stretch, ids.ctypes.data)
        return ids[:count] if count >= 0 else None


def of_model(raw: bytes) -> BpeEncoder | None:
    """Return the encoder of a SentencePiece model; None if the model is of another kind or there is no C compiler.

    Args:
        raw: the model file, which SentencePiece has read.
    """
    vocabulary = None
    with contextlib.suppress(IndexError, TypeError, ValueError):  # a damaged file, of which SentencePiece read enough
        vocabulary = _vocabulary(raw)
    library = _library() if vocabulary is not None else None
    if vocabulary is None or library is None:
        return None
    pieces, scores, byte_ids = vocabulary
    start = np.cumsum([0, *map(len, pieces)], dtype=np.int32)
    rank = np.unique(-scores, return_inverse=True)[1].astype(np.int32)
    ids = np.array(byte_ids, np.int32)
    addresses = [array.ctypes.data for array in (start, rank, ids)]
    address = library.bpe_new(b"".join(pieces), *addresses, len(pieces))
    return BpeEncoder(library, address) if address else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = build(SOURCE.read_text(encoding="utf-8"))
    except OSError:
        return None
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.bpe_new.argtypes = [ctypes.c_char_p, pointer, pointer, pointer, ctypes.c_int32]
    library.bpe_new.restype = pointer
    library.bpe_encode.argtypes = [pointer, ctypes.c_char_p, size, size, pointer]
    library.bpe_encode.restype = size
    library.bpe_free.argtypes, library.bpe_free.restype = [pointer], None
    return library


def _vocabulary(raw: bytes) -> tuple[list[bytes], np.ndarray, list[int]] | None:
    """Return the text of every id, the scores, and the ids of bytes; None if `bpe.c` would not encode as SentencePiece does."""
    texts, scores, kinds = [], [], []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            texts.append(piece.get(1, b""))
            scores.append(piece.get(2, bytes(4)))
            kinds.append(piece.get(3, _NORMAL))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    # A normalizer's fields: a map of characters, a space before the text, fewer spaces, U+2581 for each. What a later
    # version may add is not known here.
    unchanged = normalizer.get(2, b"") == b"" and [normalizer.get(i, 1) for i in (3, 4, 5)] == [0, 0, 1]
    if trainer.get(3) != _BPE or not unchanged or not normalizer.keys() <= {1, 2, 3, 4, 5, 6}:
        return None
    if not set(kinds) <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}:
        return None  # user-defined pieces come before merges, and unused ones are split again
    normal = [text if kind == _NORMAL else b"" for text, kind in zip(texts, kinds, strict=True)]
    reserved = {text for text, kind in zip(texts, kinds, strict=True) if kind != _NORMAL}
    if not _plain(normal, reserved):
        return None
    byte_ids = {int(texts[i][3:5], 16): i for i, kind in enumerate(kinds) if kind == _BYTE}
    values = np.frombuffer(b"".join(scores), "<f4")
    if len(byte_ids) != 256 or not np.isfinite(values).all():
        return None
    return [text.replace("\u2581".encode(), b" ") for text in normal], values, [byte_ids[i] for i in range(256)]


def _plain(normal: list[bytes], reserved: set[bytes]) -> bool:
    """Return whether every text has one id, and merges only join characters that are pieces."""
    if sum(map(len, normal)) >= MOST_BYTES or len(normal) >= MOST_PIECES or not any(normal):
        return False
    pieces = set(normal)
    characters = {character for text in pieces for character in text.decode()}
    known = {text.decode() for text in pieces}
    return (
        max(map(len, pieces)) <= LONGEST
        and not pieces & reserved
        and all(len(text.decode()) > 1 for text in reserved)
        and characters <= known
        and " " not in characters  # SentencePiece writes it as U+2581
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of every field of a protocol buffer; fixed-width ones as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind)
        size = varint() if size is None else size
        yield key >> 3, message[at : at + size]
        at += size
