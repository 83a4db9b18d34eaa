"""Encode and decode text: SentencePiece tokenizers, trained here or elsewhere, and those of Hugging Face.

Notable here:
- a tokenizer trained here is lossless: decode(encode(text)) == text for every text that UTF-8 can encode;
- a special token spelled out in a text ("</s>") is text, never the end of a document; a vocabulary in which it cannot be
  text is refused;
- long texts are encoded in pieces, so that time and memory grow linearly;
- documents are encoded in C by models as they are trained here (`bpe.py`), with SentencePiece's ids.

`train_tokenizer.py` trains one.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import bpe
from data.ends import EOS_NAMES, SAVED, Ends, named_in_configs, save_ends, saved_ends
from data.packages import need
from data.shards import token_dtype
from kernels.common.errors import UserError, suggest
from kernels.common.files import atomic_write, explain_os_errors
from kernels.common.json_files import open_regular

SPACE = "\u2581"  # what SentencePiece writes for a space; in a text it can only be kept as bytes
# Characters encoded at once; on much longer texts SentencePiece is slower per character and needs gigabytes.
STRETCH = 1 << 16
FILE_NAMES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}  # by `tokenizer.kind`
ODD = "\u0378\ue000\U0001f9ff \u6f22\u304b \x01"  # characters for which many vocabularies have no token
PROBE = "  a  b\t\r\n\x00</s> \u00e9e\u0301\ufb01\u3000\U0001f600 \n   def"  # changed by whatever normalises


class Tokenizer(abc.ABC):
    """The interface of both kinds. `load_tokenizer` and `train_sentencepiece` (train_tokenizer.py) return one.

    Attributes:
        vocab_size: number of ids; every id is below it.
        eos_id: id of the end-of-text token.
        bos_id: id of the token that begins every document; None: documents have none.
        hash: 32 hex digits, of the model file and of the two tokens where they are not those of convention.
        exact: decode gives back what was encoded, for any text.
    """

    file_name: str
    unit = "token"
    vocab_size: int
    eos_id: int
    bos_id: int | None = None
    exact: bool

    def __init__(self, raw: bytes, name: str) -> None:
        self.raw, self.name = raw, name
        self._conventional = True
        self.hash = hashlib.blake2b(raw, digest_size=16).hexdigest()

    @property
    def start_id(self) -> int:
        """The token before the first one of a text: the begin token, or the end of the document before."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any begin or end token."""
        return self.encode_batch([text])[0]

    def encode_document(self, text: str) -> np.ndarray:
        """Return the ids of a document as it is stored: after the begin token, if there is one, and before its end.

        Their dtype is that of the disk.

        Raises:
            UserError: the vocabulary turns a part of the text into the end-of-text token.
        """
        ids = self._encode_long(text)
        self._refuse_end_in(text, ids)
        begin = [] if self.bos_id is None else [self.bos_id]
        stored = np.empty(len(begin) + len(ids), token_dtype(self.vocab_size))
        stored[: len(begin)] = begin
        stored[len(begin) :] = ids
        return stored

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts.

        Raises:
            UserError: the vocabulary turns a part of a text into the end-of-text token.
        """
        encoded = self._encode_batch(texts)
        for text, ids in zip(texts, encoded, strict=True):
            self._refuse_end_in(text, ids)
        return encoded

    def _refuse_end_in(self, text: str, ids: list[int] | np.ndarray) -> None:
        if self.eos_id in ids:
            raise UserError(
                f"{self.name} turns a part of a text that begins {text[:40]!r} into its end-of-text token "
                f"{self.token(self.eos_id)!r}: name a token that no text becomes (tokenizer.eos=TOKEN)"
            )

    @abc.abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def _encode_long(self, text: str) -> list[int] | np.ndarray:
        """Return the ids of `_encode_batch`, for texts that are worth what it takes to be fast."""
        return self._encode_batch([text])[0]

    @abc.abstractmethod
    def token(self, number: int) -> str:
        """Return the name of a token."""

    @abc.abstractmethod
    def token_id(self, token: str) -> int | None:
        """Return the id of a token, None if the vocabulary does not hold it."""

    @abc.abstractmethod
    def special_tokens(self) -> list[str]:
        """Return the names of tokens that stand for no text."""

    def use_ends(self, ends: Ends) -> None:
        """Take the named tokens as the end and the begin of documents; an empty name leaves the conventional one.

        Raises:
            UserError: the vocabulary does not hold one of them, or has no end at all.
        """
        conventional = self.eos_id
        ids = {key: self.token_id(token) for key, token in ends._asdict().items() if token}
        for key, number in ids.items():
            if number is None:
                token = getattr(ends, key)
                known = self.special_tokens()
                raise UserError(
                    f"tokenizer.{key}={token}: {self.name} has no such token; {suggest(token, known)}{self._special()}"
                )
        if "eos" not in ids and conventional < 0:
            raise UserError(
                f"{self.name} has no end-of-text {self.unit}, and documents need an end: "
                f"name it by tokenizer.eos=TOKEN; {self._special()}"
            )
        eos, bos = ids.get("eos"), ids.get("bos")
        self.eos_id = conventional if eos is None else eos
        self.bos_id = None if bos == self.eos_id else bos
        self._conventional = self.eos_id == conventional and self.bos_id is None
        if not self._conventional:
            known = f"\0eos={self.eos_id} bos={self.bos_id}".encode()
            self.hash = hashlib.blake2b(self.raw + known, digest_size=16).hexdigest()
        self._prepare_ends()
        self._refuse_matching_ends()

    def _special(self) -> str:
        known = self.special_tokens()
        shown = " ".join(known[:8]) + (" ..." if len(known) > 8 else "")
        return f"its special tokens are {shown}" if known else "it has no special tokens"

    @abc.abstractmethod
    def _prepare_ends(self) -> None:
        """Make the end and the begin tokens that are not matched in a text, as far as the library can."""

    def _refuse_matching_ends(self) -> None:
        """Raise a UserError if a text can become the end of a document or its begin."""
        for key, number in (("eos", self.eos_id), ("bos", self.bos_id)):
            if number is None:
                continue
            token = self.token(number)
            wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in token)  # NFKC makes it plain
            for probe in (token, f"a{token}b", f" {token} ", f"\n{token}\n", token.upper(), token.lower(), wide):
                if number in self._encode_batch([probe])[0]:
                    raise UserError(
                        f"{self.name} turns the characters {probe.strip()!r} of a text into the token {token!r}, so documents "
                        f"would end inside of their text: name a token that no text becomes (tokenizer.{key}=TOKEN), "
                        "or take another tokenizer"
                    )
            if number in self._encode_batch([ODD])[0]:
                raise UserError(
                    f"{self.name} gives characters that it does not know the token {token!r}, so documents would end "
                    f"inside of their text: name another token (tokenizer.{key}=TOKEN)"
                )

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Bytes that are not UTF-8 (part of a character) become U+FFFD."""

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the model file into `folder` as tokenizer.model or tokenizer.json and return its path.

        Beside it stand the names of the end and begin tokens where they are not those of convention.
        """
        path = Path(folder, self.file_name)
        with explain_os_errors("write", path):
            (path.parent / SAVED).unlink(missing_ok=True)
            if not self._conventional:
                save_ends(
                    path.parent, Ends(self.token(self.eos_id), "" if self.bos_id is None else self.token(self.bos_id))
                )
            with atomic_write(path, "wb") as file:
                file.write(self.raw)
        return path


class SentencePiece(Tokenizer):
    """A SentencePiece model, from the bytes of its file."""

    file_name, unit = FILE_NAMES["sentencepiece"], "piece"

    def __init__(self, raw: bytes, name: str) -> None:
        super().__init__(raw, name)
        sentencepiece = need("sentencepiece", "this tokenizer")
        sentencepiece.set_min_log_level(2)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=raw)
            self._read_pieces()
        except (RuntimeError, ValueError, IndexError) as error:  # ValueError: a piece that is not UTF-8, or no byte
            raise UserError(f"{name} is no SentencePiece model") from error
        if self.vocab_size == 0:
            raise UserError(f"{name} is no SentencePiece model")

    def _read_pieces(self) -> None:
        model = self._model
        self.vocab_size, self.eos_id = model.get_piece_size(), model.eos_id()
        # The bytes of every piece. Decoding by this table is exact where the library's own decoding is not (U+2581).
        self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]
        bytes_there = {self._bytes[i]: i for i in range(self.vocab_size) if model.is_byte(i)}
        self.exact = len(bytes_there) == 256 and self._join(model.encode(PROBE)).decode("utf-8", "replace") == PROBE
        self._space = [bytes_there[bytes([b])] for b in SPACE.encode()] if self.exact else []

    def _piece_bytes(self, i: int) -> bytes:
        piece = self._model.id_to_piece(i)
        if self._model.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # <0x41>
        if self._model.is_control(i) or self._model.is_unknown(i):
            return b""
        return piece.replace(SPACE, " ").encode()

    def _join(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes[i] for i in ids])

    def token(self, number: int) -> str:
        return self._model.id_to_piece(number)

    def token_id(self, token: str) -> int | None:
        number = self._model.piece_to_id(token) if _is_unicode(token) else -1
        return number if 0 <= number < self.vocab_size and self.token(number) == token else None

    def special_tokens(self) -> list[str]:
        return [self.token(i) for i in range(self.vocab_size) if self._model.is_control(i)]

    def _prepare_ends(self) -> None:
        """Do nothing: control pieces are never matched, and nothing keeps other ones from it."""

    @functools.cached_property
    def _bpe(self) -> bpe.BpeEncoder | None:
        """The encoder in C; None where SentencePiece must serve. Most who load a tokenizer encode little, and need none."""
        encoder = bpe.of_model(self.raw) if self.exact else None
        if encoder is None:
            return None
        # A version of SentencePiece may encode otherwise than the one that bpe.c follows, and folders must not differ.
        longest = b"".join(sorted(self._bytes, key=len)[-100:]).decode("utf-8", "replace")
        probe = (PROBE + ODD + longest).replace(SPACE, "")
        ids = encoder.encode(probe, len(probe))
        return encoder if ids is not None and ids.tolist() == self._model.encode(probe) else None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_bpe"}  # it is of this process

    def _encode_long(self, text: str) -> list[int] | np.ndarray:
        ids = None if self._bpe is None else self._bpe.encode(text, STRETCH)
        return super()._encode_long(text) if ids is None else ids

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.exact:
            return self._model.encode(list(texts), num_threads=1)
        # One flat call for all stretches; None stands for a U+2581 between two of them.
        stretches = [list(_stretches(text)) for text in texts]
        flat = self._model.encode([s for some in stretches for s in some if s is not None], num_threads=1)
        found, results = iter(flat), []
        for some in stretches:
            ids: list[int] = []
            for stretch in some:
                ids += self._space if stretch is None else next(found)
            results.append(ids)
        return results

    def decode(self, ids: Sequence[int]) -> str:
        ids = [int(i) for i in ids]
        return self._join(ids).decode("utf-8", "replace") if self.exact else self._model.decode(ids)


def _is_unicode(token: str) -> bool:
    """Return whether a token is text, without halves of characters, which JSON can hold and no vocabulary does."""
    return not any("\ud800" <= character <= "\udfff" for character in token)


def _stretches(text: str) -> Iterator[str | None]:
    """Split a text after line ends into stretches of at most STRETCH characters, with None for every U+2581."""
    for i, piece in enumerate(text.split(SPACE)):
        if i:
            yield None
        start = 0
        while len(piece) - start > STRETCH:
            end = piece.rfind("\n", start, start + STRETCH) + 1 or start + STRETCH
            yield piece[start:end]
            start = end
        if start < len(piece):
            yield piece[start:] if start else piece


@contextlib.contextmanager
def _refused(reason: str) -> Iterator[None]:
    """Convert what the library `tokenizers` raises: bare Exceptions, and a PanicException of Rust, which is none."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{reason}: {error}") from error
        raise


class _HuggingFace(Tokenizer):
    """A model of Hugging Face's `tokenizers`, from the bytes of its tokenizer.json."""

    file_name = FILE_NAMES["huggingface"]
    exact = False

    def __init__(self, raw: bytes, name: str) -> None:
        super().__init__(raw, name)
        tokenizers = need("tokenizers", f"reading {name}")
        with _refused(f"{name} is no tokenizer.json of Hugging Face tokenizers"):
            self._model = model = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        model.no_truncation()
        model.no_padding()
        vocabulary = model.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{name} has an empty vocabulary: it cannot encode any text")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = next((vocabulary[each] for each in EOS_NAMES if each in vocabulary), -1)
        model.encode_special_tokens = True  # what looks like a special token in a text is text

    def token(self, number: int) -> str:
        return self._model.id_to_token(number)

    def token_id(self, token: str) -> int | None:
        return self._model.token_to_id(token) if _is_unicode(token) else None

    def special_tokens(self) -> list[str]:
        added = self._model.get_added_tokens_decoder()
        return [added[number].content for number in sorted(added) if added[number].special]

    def _prepare_ends(self) -> None:
        added = self._model.get_added_tokens_decoder()
        for number in (self.eos_id, self.bos_id):
            if number in added and not added[number].special:  # it would be matched in a text
                token = added[number]
                token.special = True
                self._model.add_special_tokens([token])

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with _refused(f"{self.name} cannot encode a text"):
            return [e.ids for e in self._model.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(
    path: str | os.PathLike[str], eos: str | None = None, bos: str | None = None, kind: str = "sentencepiece"
) -> Tokenizer:
    """Load a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or the one in a folder.

    Args:
        eos: name of the end-of-text token; None: the one that files beside the tokenizer name (`data/ends.py`), or by
            convention.
        bos: name of the token that begins a document; None: none, or what `Tokenizer.save` wrote.
        kind: sentencepiece or huggingface, which of them is loaded from a folder that has both.

    Raises:
        UserError: it is missing or unreadable, no tokenizer, or has no end-of-text token that only ends documents.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = [path / name for name in FILE_NAMES.values() if (path / name).is_file()]
        if not inside:
            raise UserError(f"there is no {' and no '.join(FILE_NAMES.values())} in {path}")
        path = next((file for file in inside if file.name == FILE_NAMES[kind]), inside[0])
    try:
        with io.BufferedReader(open_regular(path)) as file:
            raw = file.read()
    except OSError as error:
        hint = ""
        if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)) and path.suffix not in (".json", ".model"):
            hint = (
                f"; if it is a name on the Hugging Face hub: hf download {path} tokenizer.json --local-dir FOLDER, and "
            )
            hint += "tokenizer=huggingface tokenizer.path=FOLDER/tokenizer.json"
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}{hint}") from error
    tokenizer = (_HuggingFace if path.suffix == ".json" else SentencePiece)(raw, str(path))
    saved = saved_ends(path.parent)
    eos = eos or saved.eos or named_by_config(tokenizer, path.parent, "eos")
    tokenizer.use_ends(Ends(eos, bos or saved.bos))
    return tokenizer


def named_by_config(tokenizer: Tokenizer, folder: Path, kind: str) -> str:
    """Return the token that a configuration of Hugging Face in `folder` names, "" if none names one of the vocabulary.

    Args:
        kind: eos or bos.
    """
    for given in named_in_configs(folder, kind):
        if isinstance(given, str) and tokenizer.token_id(given) is not None:
            return given
        if isinstance(given, int) and 0 <= given < tokenizer.vocab_size and tokenizer.token(given):
            return tokenizer.token(given)
    return ""
