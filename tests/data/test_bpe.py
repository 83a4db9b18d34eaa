"""The encoder in C gives SentencePiece's ids for every text, and leaves to it the models that it does not fit."""

from __future__ import annotations

import io
import pickle
import random
import struct
import sysconfig
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data import bpe
from data import tokenizer as module
from data.pool import Group, encode_group
from data.tokenizer import load_tokenizer
from data.train_tokenizer import TRAINER, train_sentencepiece
from kernels.c.toolchain import find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C compiler")


def library_files(most_bytes: int) -> list[str]:
    """Return modules of the standard library: the first ones by name, of at most so many bytes in all."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts and "bad" not in path.name:
            texts.append(path.read_text(encoding="utf-8", errors="ignore"))
            most_bytes -= len(texts[-1])
            if most_bytes < 0:
                break
    return texts


def letters() -> list[str]:
    """Return texts of few characters, some of several bytes, whose pieces overlap in all ways."""
    draw = random.Random(2)
    return ["".join(draw.choices("ab \n\u00e9\u6f22\U0001f642", [9, 9, 3, 1, 3, 3, 3], k=300)) for _ in range(150)]


@pytest.fixture(scope="module")
def models():
    code = [text[:10_000] for text in library_files(600_000)]
    return {
        "of 300": train_sentencepiece([text[:2000] for text in code if text.isascii()][:40], 370),
        "of 4096": train_sentencepiece(code, 4096),
        "letters": train_sentencepiece(letters(), 700),
    }


def random_text(draw: random.Random, pieces: list[str]) -> str:
    """Return characters of all planes or of few kinds, repetitions, or parts of pieces beside each other."""
    kinds = [
        [chr(c) for c in (draw.randrange(0x110000) for _ in range(50)) if not 0xD800 <= c < 0xE000],
        [chr(c) for c in range(0x300)],
        ["a", "e", *map(chr, range(0x300, 0x370))],
        [chr(c) for c in range(0x1F300, 0x1F700)],
        list("\u2581\u2585 \n\t\r\0a"),
        list("ab \n\u00e9\u6f22\U0001f642"),
        sorted(set("".join(draw.sample(pieces, 3)))) or [" "],
        pieces,
        [piece[draw.randrange(len(piece) + 1) :] for piece in draw.sample(pieces, 20)],
        [draw.choice(pieces)],
    ]
    return "".join(draw.choices(draw.choice(kinds), k=draw.choice([0, 1, 2, 3, 5, 8, 13, 30, 100])))


def assert_same(tokenizer, texts: list[str]) -> None:
    assert tokenizer._bpe is not None
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.encode_document(text).tolist() == ids, repr(text)


@pytest.mark.parametrize("name", ["of 300", "of 4096", "letters"])
def test_random_texts_have_the_ids_of_sentencepiece(models, name):
    draw, tokenizer = random.Random(3), models[name]
    pieces = [raw.decode("utf-8", "replace") for raw in tokenizer._bytes]
    longest = sorted(pieces, key=len)[-200:]
    assert_same(tokenizer, [random_text(draw, draw.choice([pieces, longest])) for _ in range(1500)])


@pytest.mark.parametrize("name", ["of 300", "of 4096", "letters"])
def test_text_has_the_ids_of_sentencepiece(models, name):
    assert_same(models[name], ["", *library_files(250_000), *letters()])


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [300, 4096, 32_000])
def test_the_standard_library_has_the_ids_of_sentencepiece(vocab_size):
    texts = library_files(1 << 40)
    short = [text[:100] for text in texts if text.isascii()] if vocab_size == 300 else texts[::4]
    tokenizer = train_sentencepiece(short, max(vocab_size, 370))
    assert_same(tokenizer, texts)
    draw, pieces = random.Random(4), [raw.decode("utf-8", "replace") for raw in tokenizer._bytes]
    assert_same(tokenizer, [random_text(draw, pieces) for _ in range(20_000)])


@pytest.mark.parametrize("stretch", [1, 7, 100])
def test_stretches_are_those_of_sentencepiece(models, monkeypatch, stretch):
    monkeypatch.setattr(module, "STRETCH", stretch)
    texts = [*letters()[:20], *(text[:1500] for text in library_files(50_000))]
    texts += ["\u2581" * 5, "a\u2581\n\u2581b" * 50, "\n" * 300, "\U0001f642" * 300, "\u00e9\n" * 150, "x" * stretch]
    assert_same(models["letters"], texts)
    assert_same(models["of 4096"], texts)


def test_long_lines_have_the_ids_of_sentencepiece(models):
    draw = random.Random(5)
    texts = [character * 70_000 for character in ("a", " ", "\u6f22", "\u2581")]
    texts += ["".join(draw.choices("ab \u00e9", k=70_000)), "\n".join(library_files(100_000)).replace("\n", " ")]
    assert_same(models["letters"], texts)
    assert_same(models["of 4096"], texts)


def test_shards_do_not_depend_on_who_encodes(models, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(models["of 4096"].save(tmp_path))
    texts = {"train": library_files(80_000), "held_out": ["", "a\u2581b\0"]}
    sizes = {split: sum(len(text.encode()) for text in some) for split, some in texts.items()}
    (tmp_path / "fast").mkdir()
    (tmp_path / "slow").mkdir()
    fast = encode_group(tmp_path / "fast", tokenizer, Group(0, texts, sizes, "", 1.0))
    assert tokenizer._bpe is not None
    tokenizer = load_tokenizer(tmp_path)
    monkeypatch.setattr(bpe, "_library", lambda: None)  # no compiler
    slow = encode_group(tmp_path / "slow", tokenizer, Group(0, texts, sizes, "", 1.0))
    assert tokenizer._bpe is None
    assert [asdict(shard) for shard in fast] == [asdict(shard) for shard in slow]


def test_a_machine_without_a_compiler_has_no_encoder(models, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(bpe, "_library", bpe._library.__wrapped__)
    assert bpe.of_model(models["letters"].raw) is None


def test_a_tokenizer_with_an_encoder_goes_to_another_process(models):
    tokenizer = models["letters"]
    assert tokenizer._bpe is not None
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.encode_document("ab ba").tolist() == tokenizer.encode("ab ba")


class _Wrong:
    def encode(self, text: str, stretch: int) -> np.ndarray:
        return np.zeros(len(text) + stretch, np.int32)


def test_an_encoder_with_other_ids_is_not_used(models, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(models["letters"].save(tmp_path))
    monkeypatch.setattr(bpe, "of_model", lambda _: _Wrong())
    assert tokenizer.encode_document("ab ba").tolist() == tokenizer.encode("ab ba")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"user_defined_symbols": ["self"]},
    ],
    ids=str,
)
def test_other_kinds_of_models_are_left_to_sentencepiece(options):
    model, size = io.BytesIO(), {"vocab_size": 400, "hard_vocab_limit": False}
    texts = [text[:2000] for text in library_files(100_000) if text.isascii()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **TRAINER | size | options
    )
    assert bpe.of_model(model.getvalue()) is None


def field(number: int, content: bytes) -> bytes:
    """Return a field of a protocol buffer of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(content)]) + content


def model_of(pieces: dict[str, float], kinds: dict[str, int] | None = None) -> bytes:
    """Return a BPE model of these pieces and scores, with the reserved ones before them."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{b:02X}>": 6 for b in range(256)} | (kinds or {})
    out = b""
    for text, score in (dict.fromkeys(kinds, 0.0) | pieces).items():
        out += field(
            1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kinds.get(text, 1)])
        )
    return out + field(2, b"\x18\x02\x98\x02\x01") + field(3, b"\x18\x00\x20\x00")  # BPE with bytes; nothing changed


def test_equal_scores_are_merged_from_the_left(tmp_path):
    scores = {"aa": -1.0, "ab": -1.0, "ba": -1.0, "aab": -2.0, "aaa": -2.0, "baab": -3.0, "abba": -3.0}
    (tmp_path / "tokenizer.model").write_bytes(model_of(scores | dict.fromkeys("\u2581ab", -9.0)))
    draw = random.Random(6)
    assert_same(load_tokenizer(tmp_path), ["".join(draw.choices("ab ", k=draw.randrange(30))) for _ in range(3000)])


@pytest.mark.parametrize(
    ("pieces", "kinds"),
    [
        ({"ab": -1.0, "\u2581": -9.0, "a": -9.0}, {}),  # b is no piece, so a merge would need what is none
        (
            {"ab": -3.0, "bc": -4.0, "abc": -1.0, **dict.fromkeys("\u2581abc", -9.0)},
            {},
        ),  # made before what it is made of
        ({"ab": -1.0, "a b": -2.0, **dict.fromkeys(" \u2581ab", -9.0)}, {}),  # a space, which a text never has
        (dict.fromkeys("\u2581ab", -9.0) | {"ab": float("nan")}, {}),
        (dict.fromkeys("\u2581ab", -9.0), {"c": 3}),  # a character that would become a control piece
        (dict.fromkeys("\u2581ab", -9.0) | {"ab": -1.0}, {"ba": 5}),  # an unused piece
        (dict.fromkeys("ab", -9.0) | {"ab": -1.0}, {}),  # no space
    ],
)
def test_models_that_the_encoder_does_not_fit(pieces, kinds):
    sound = dict.fromkeys("\u2581ab", -9.0) | {"ab": -1.0}
    assert bpe.of_model(model_of(sound)) is not None
    assert bpe.of_model(model_of(pieces, kinds)) is None


@pytest.mark.parametrize("raw", [b"", b"\x0a", b"\x0a\xff", b"garbage!", b"\xff" * 40])
def test_what_is_no_model_has_no_encoder(raw):
    assert bpe.of_model(raw) is None


def test_a_damaged_model_has_an_encoder_or_none(models):
    draw, raw = random.Random(7), bytearray(models["letters"].raw)
    for _ in range(60):
        damaged = bytearray(raw)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        encoder = bpe.of_model(bytes(damaged[: draw.choice([None, draw.randrange(len(raw))])]))
        assert encoder is None or encoder.encode("ab \u6f22\nba", 100) is not None
