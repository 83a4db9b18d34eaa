"""The campaign `tokenizers`: damaged folders given as `tokenizer.path`, loaded and used."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.fuzz.campaign import Campaign
from bench.fuzz.mutations import Damaged, copied, damaged_bytes, damaged_json, json_bytes
from bench.fuzz.sound import VOCABULARY, texts
from data.tokenizer import load_tokenizer
from data.train_tokenizer import train_sentencepiece
from kernels.common.errors import UserError

_CONFIGS = {
    "tokenizer_config.json": {
        "eos_token": {"content": "</s>", "special": True},
        "bos_token": "<s>",
        "model_max_length": 512,
    },
    "config.json": {"eos_token_id": [2, 1], "bos_token_id": 1},
    "generation_config.json": {"eos_token_id": 2, "bos_token_id": 1},
    "special_tokens.json": {"eos": "</s>", "bos": "<s>"},
}
_PIECES = (
    b"",
    b"\xff\xfe",
    b"\x00",
    b"<0x41>",
    b"<0xZZ>",
    b"<0x4",
    b"</s>",
    b"a" * 3000,
    b"\xe2\x96\x81",
    "é".encode(),
    b"<unk>",
)
_TYPES = (0, 1, 2, 3, 4, 5, 6, 7, 99)  # 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte
_SAMPLES = ("", "a b", "  x\n\té</s> \U0001f600\u2581", "abc " * 200)


def campaign(_: str, folder: Path) -> Campaign:
    """Return the campaign; its sound files are written to an empty folder."""
    models = {"bpe": train_sentencepiece(texts(), VOCABULARY).raw, "unigram": _unigram()}
    jsons = _hugging_face()
    sound = folder / "tokenizer"
    sound.mkdir()

    def make(draw: random.Random) -> Damaged:
        files: dict[str, bytes | None] = {}
        if draw.random() < 0.5:
            kind = draw.choice(sorted(models))
            raw = models[kind]
            files["tokenizer.model"] = _damaged_model(draw, raw) if draw.random() < 0.9 else raw
        else:
            kind = draw.choice(sorted(jsons))
            content = damaged_json(draw, jsons[kind]) if draw.random() < 0.9 else jsons[kind]
            files["tokenizer.json"] = json_bytes(draw, content, 0.1)
        for name, config in _CONFIGS.items():
            if draw.random() < 0.2:
                files[name] = json_bytes(draw, damaged_json(draw, config))
        return Damaged(kind, files)

    def read(damaged: Damaged) -> None:
        with copied(sound, damaged.files) as copy:
            tokenizer = load_tokenizer(copy)
            for ids in tokenizer.encode_batch(_SAMPLES):
                tokenizer.decode(ids)
            tokenizer.encode_document("a b")
            tokenizer.decode([0, tokenizer.eos_id, tokenizer.vocab_size - 1])
            tokenizer.token(tokenizer.start_id)
            again = copy / "again"
            again.mkdir()
            tokenizer.save(again)
            if load_tokenizer(again).hash != tokenizer.hash:
                raise AssertionError("its copy has another hash")

    return Campaign(make, read, (UserError,))


def _unigram() -> bytes:
    """Return a SentencePiece model with what ours have not: a table of normalised characters, scores, a dummy prefix."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_writer=model, vocab_size=60, model_type="unigram", minloglevel=2
    )
    return model.getvalue()


def _hugging_face() -> dict[str, Any]:
    """Return the contents of a tokenizer.json by the kind of its model."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    made = {}
    for kind, model, trainer in (
        (
            "BPE",
            models.BPE(unk_token="<unk>", byte_fallback=False),
            trainers.BpeTrainer(vocab_size=120, special_tokens=special),
        ),
        (
            "Unigram",
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>"),
        ),
        (
            "WordPiece",
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer(vocab_size=120, special_tokens=special),
        ),
        (
            "WordLevel",
            models.WordLevel(unk_token="<unk>"),
            trainers.WordLevelTrainer(vocab_size=80, special_tokens=special),
        ),
    ):
        tokenizer: Any = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel() if kind == "BPE" else pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.ByteLevel() if kind == "BPE" else decoders.Metaspace()
        tokenizer.train_from_iterator(texts(), trainer)
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        made[kind] = json.loads(tokenizer.to_str())
    return made


# ------------------------------------------------------------------------------------------------- protocol buffers


def _damaged_model(draw: random.Random, raw: bytes) -> bytes:
    """Damage a SentencePiece model: its bytes, or the fields of its message and of those inside of it."""
    if draw.random() < 0.3:
        return damaged_bytes(draw, raw)
    fields = list(_fields(raw))
    for _ in range(draw.choice((1, 1, 2, 5, 40))):
        at, kind = draw.randrange(len(fields)), draw.random()
        number, value = fields[at]
        if kind < 0.6 and number == 1:
            piece = _piece(
                draw.choice(_PIECES), draw.choice((0.0, float("nan"), float("inf"), -1e38, 7.5)), draw.choice(_TYPES)
            )
            fields[at] = (
                1,
                draw.choice((piece, damaged_bytes(draw, value), _piece(_text_of(value), 0.0, draw.choice(_TYPES)))),
            )
        elif kind < 0.7:
            fields[at] = number, damaged_bytes(draw, value)
        elif kind < 0.8 and len(fields) > 1:
            del fields[at]
        elif kind < 0.9:
            fields.insert(at, draw.choice(fields))
        else:  # the settings of the trainer and of the normaliser come last
            fields[-1 - draw.randrange(2)] = fields[-1][0], damaged_bytes(draw, fields[-1][1])
    return b"".join(_varint(number << 3 | 2) + _varint(len(value)) + value for number, value in fields)


def _fields(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (number, contents) of the fields of a message all of whose fields have a length."""
    place = 0
    while place < len(raw):
        key, place = _read_varint(raw, place)
        size, place = _read_varint(raw, place)
        yield key >> 3, raw[place : place + size]
        place += size


def _read_varint(raw: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        number |= (raw[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if not raw[place - 1] & 0x80:
            return number, place


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _piece(text: bytes, score: float, kind: int) -> bytes:
    return b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)


def _text_of(piece: bytes) -> bytes:
    """Return the text of a piece, its first field."""
    if piece[:1] != b"\x0a" or len(piece) < 2:
        return b"x"
    size, place = _read_varint(piece + b"\x00", 1)
    return piece[place : place + size]
