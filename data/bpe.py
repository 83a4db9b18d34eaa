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
PIECES = 1 << 20  # of a model, at most
SPACE = "\u2581".encode()  # what the model writes for a space
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
    with contextlib.suppress(LookupError, TypeError, ValueError):  # a damaged file, of which SentencePiece read enough
        vocabulary = _vocabulary(raw)
    library = _library() if vocabulary is not None else None
    if vocabulary is None or library is None:
        return None
    pieces, scores, byte_ids = vocabulary
    start = np.cumsum([0, *map(len, pieces)], dtype=np.int32)
    rank = np.unique(-scores, return_inverse=True)[1].astype(np.int32)
    order = np.array(sorted(range(len(pieces)), key=pieces.__getitem__), np.int32)
    ids = np.array(byte_ids, np.int32)
    addresses = [array.ctypes.data for array in (start, rank, order, ids)]
    address = library.bpe_new(b"".join(pieces), *addresses, len(pieces))
    return BpeEncoder(library, address) if address else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = build(SOURCE.read_text(encoding="utf-8"))
    except OSError:
        return None
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.bpe_new.argtypes = [ctypes.c_char_p, *[pointer] * 4, ctypes.c_int32]
    library.bpe_new.restype = pointer
    library.bpe_encode.argtypes = [pointer, ctypes.c_char_p, size, size, pointer]
    library.bpe_encode.restype = size
    library.bpe_free.argtypes, library.bpe_free.restype = [pointer], None
    return library


def _vocabulary(raw: bytes) -> tuple[list[bytes], np.ndarray, list[int]] | None:
    """Return the text of every id, the scores, and the ids of bytes; None if `bpe.c` would not encode as SentencePiece does."""
    messages = [(number, value) for number, value in _fields(raw) if isinstance(value, bytes)]
    pieces = [dict(_fields(value)) for number, value in messages if number == 1]
    trainer, normalizer = (dict(_fields(b"".join(v for n, v in messages if n == number))) for number in (2, 3))
    # A normalizer's fields: a map of characters, a space before the text, fewer spaces, U+2581 for each. What a later
    # version adds is not known here.
    unchanged = normalizer.get(2, b"") == b"" and [normalizer.get(i, 1) for i in (3, 4, 5)] == [0, 0, 1]
    if trainer.get(3) != _BPE or not unchanged or not normalizer.keys() <= {1, 2, 3, 4, 5, 6}:
        return None
    texts = [_bytes(piece[1]) for piece in pieces]
    kinds = [piece.get(3, _NORMAL) for piece in pieces]
    if not set(kinds) <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}:
        return None  # user-defined pieces come before merges, and unused ones are split again
    normal = [text if kind == _NORMAL else b"" for text, kind in zip(texts, kinds, strict=True)]
    byte_ids = {int(texts[i][3:5], 16): i for i, kind in enumerate(kinds) if kind == _BYTE}
    scores = np.frombuffer(b"".join(_bytes(piece.get(2, bytes(4))) for piece in pieces), "<f4")
    if len(byte_ids) != 256 or len(scores) != len(pieces) or not np.isfinite(scores).all():
        return None
    if len(pieces) >= PIECES or not _plain(set(normal), set(texts).difference(normal)):
        return None
    return [text.replace(SPACE, b" ") for text in normal], scores, [byte_ids[i] for i in range(256)]


def _plain(normal: set[bytes], reserved: set[bytes]) -> bool:
    """Return whether merges join only characters that are pieces, and none makes the name of a piece of another kind."""
    characters = {character.encode() for text in normal for character in text.decode()}
    return (
        max(map(len, normal)) <= LONGEST
        and characters <= normal
        and SPACE in characters
        and b" " not in characters  # a text's spaces are SPACE to SentencePiece
        and all(len(text.decode()) > 1 for text in reserved)
    )


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    raise TypeError("a field of the model is a number")


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
