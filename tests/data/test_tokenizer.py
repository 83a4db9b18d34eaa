"""Tokenizers: the exact round trip, foreign ones, and what is refused."""

from __future__ import annotations

import io
import json
import random

import pytest
import sentencepiece

from data import tokenizer as module
from data.tokenizer import load_tokenizer
from data.train_tokenizer import train_sentencepiece
from kernels.common.errors import UserError

WORDS = ["def", "return", "self", "value", "index", "for", "in", "range", "if", "else", "none", "not", "print", "class"]
WORDS += ["import", "from", "while", "true", "error", "with", "yield"]


def sample(count: int = 300) -> list[str]:
    chance = random.Random(1)
    lines = [
        ["    " * chance.randrange(3) + " ".join(chance.choices(WORDS, k=6)) for _ in range(9)] for _ in range(count)
    ]
    return ["\n".join(some) for some in lines]


@pytest.fixture(scope="module")
def trained():
    return train_sentencepiece(sample(), 330)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  a  ",
        "\t\t x\n\n",
        "\r",
        "a\rb\r\nc",
        "\x00",
        "a\x00b",
        "</s><s><unk><pad><0x41>",
        "\u2581",
        "a\u2581\u2581 b \u2581",
        "\u2585",
        "e\u0301 \u00e9 \ufb01 \u3000 \u00a0 \u2028 \ufeff",
        "🙂👩‍👩‍👧‍👦🏴\U0010ffff",
        "漢字かな",
        "\ufffd\ufffe\uffff",
        "def f(x):\n    return x\n",
    ],
)
def test_round_trip_of_hard_texts(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_round_trip_of_random_texts(trained):
    chance = random.Random(0)
    letters, emoji = [chr(i) for i in range(0x300)], [chr(i) for i in range(0x1F300, 0x1F700)]
    pools = ["\u2581 \n\t\r\x00", "abc de</s>", letters, emoji]
    texts = []
    for _ in range(3000):
        count = chance.randrange(24)
        anything = [chr(c) for c in (chance.randrange(0x110000) for _ in range(count)) if not 0xD800 <= c < 0xE000]
        texts.append("".join(chance.choice([*anything, *chance.choice(pools)]) for _ in range(count)))
    for text, ids in zip(texts, trained.encode_batch(texts), strict=True):
        assert trained.decode(ids) == text
        assert ids == trained.encode(text)
        assert trained.eos_id not in ids


def test_long_texts_are_encoded_in_stretches(trained, monkeypatch):
    text = "\n".join(sample(40)) + "x" * 500
    whole = trained.encode(text)
    monkeypatch.setattr(module, "STRETCH", 100)
    assert trained.decode(trained.encode(text)) == text
    assert max(len(s) for s in module._stretches(text)) <= 100
    assert len(trained.encode(text)) < 1.2 * len(whole)


def test_pieces_hold_indentation_and_training_is_deterministic_and_silent(trained, capfd):
    again = train_sentencepiece(sample(), 330)
    assert again.hash == trained.hash
    assert capfd.readouterr() == ("", "")
    assert len(trained.encode("        ")) <= 2
    assert len(trained.encode("\n        ")) <= 2
    assert (trained.vocab_size, trained.exact) == (330, True)


def test_documents_with_the_trainers_own_symbols_are_learned_from_too():
    odd = train_sentencepiece([f"\u2585{text}\0" for text in sample()], 330)
    assert len(odd.encode("    return self value")) <= 10
    assert odd.decode(odd.encode("\u2585 \0")) == "\u2585 \0"


@pytest.mark.parametrize("last", ["", "a b"])
def test_a_corpus_with_hardly_a_space_has_one_in_its_vocabulary(last):
    """Chinese, say: a space without a piece would come back as U+2581."""
    texts = ["".join(chr(0x4E00 + (7 * i + j * j) % 60) for j in range(500)) for i in range(50)]
    trained = train_sentencepiece([*texts, last], 400)
    assert trained.exact
    assert trained.token_id("\u2581") is not None


def test_save_and_load(trained, tmp_path):
    path = trained.save(tmp_path)
    for where in (path, tmp_path, str(path)):
        loaded = load_tokenizer(where)
        assert (loaded.hash, loaded.encode("self value")) == (trained.hash, trained.encode("self value"))


def test_a_vocabulary_that_does_not_fit_the_corpus_is_refused_with_one_that_does():
    with pytest.raises(UserError, match=r"set tokenizer\.vocab_size=(\d+)") as error:
        train_sentencepiece(["hello world, hello again"] * 5, 4096)
    size = int(str(error.value).partition("set tokenizer.vocab_size=")[2].split()[0])
    assert train_sentencepiece(["hello world, hello again"] * 5, size).vocab_size == size
    with pytest.raises(UserError, match=r"is too small.*set tokenizer\.vocab_size=(\d+) or more"):
        train_sentencepiece(sample(), 100)
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([""], 300)


def test_a_foreign_sentencepiece_model(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample()), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    (tmp_path / "foreign.model").write_bytes(model.getvalue())
    loaded = load_tokenizer(tmp_path / "foreign.model")
    assert not loaded.exact
    assert loaded.decode(loaded.encode("self value")) == "self value"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample()), model_writer=model, vocab_size=40, eos_id=-1, minloglevel=2
    )
    (tmp_path / "foreign.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="no end-of-text piece"):
        load_tokenizer(tmp_path / "foreign.model")


def byte_level(special: list[str]):
    tokenizers = pytest.importorskip("tokenizers")
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(sample(), trainer)
    return found


def test_a_hugging_face_tokenizer(tmp_path):
    foreign = byte_level(["<|endoftext|>"])
    foreign.enable_truncation(3)
    foreign.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    text = "self value <|endoftext|> é 🙂\n   index"
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text
    assert loaded.eos_id not in ids  # typed in a text, it is text
    assert len(ids) > 3
    assert max(ids) < loaded.vocab_size
    assert loaded.save(tmp_path).name == "tokenizer.json"
    byte_level(["<odd>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has no end-of-text token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.model", b"garbage!", "no SentencePiece model"),
        ("a.model", b"", "no SentencePiece model"),
        ("a.json", json.dumps({"model": 1}).encode(), "no tokenizer.json"),
        ("a.json", b"\xff", "no tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    ("piece", "other"), [(b"<0x41>", b"<0xZZ>"), (b"<unk>", b"<\xff\xfe>>"), (b"</s>", b"<\xc3s>")]
)
def test_a_model_with_a_piece_that_is_none_is_refused(trained, tmp_path, piece, other):
    (tmp_path / "a.model").write_bytes(trained.raw.replace(piece, other))
    with pytest.raises(UserError, match=r"a\.model is no SentencePiece model"):
        load_tokenizer(tmp_path / "a.model")


def test_a_vocabulary_without_its_unknown_token_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"</s>": 0}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json cannot encode a text: .*Missing \[UNK\]"):
        load_tokenizer(tmp_path)


def test_configurations_that_are_nested_too_deeply_or_name_half_a_character(trained, tmp_path):
    trained.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": "\\ud800"}')
    assert load_tokenizer(tmp_path).eos_id == trained.eos_id
    config.write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"cannot read .*tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*missing\.model"):
        load_tokenizer(tmp_path / "missing.model")
    with pytest.raises(UserError, match=r"no tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_a_refusal(tmp_path):
    """Its code in Rust panics over a merge that is shorter than the prefix; that is no `Exception` of Python."""
    vocabulary = {"a": 0, "": 1, "</s>": 2}
    model = {"type": "BPE", "continuing_subword_prefix": "##", "vocab": vocabulary, "merges": [["a", ""]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer\.json of Hugging Face tokenizers: range end"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_only_a_regular_file_is_read():
    # Reading a pipe would wait for its writer; a device does not, where the test fails.
    with pytest.raises(UserError, match=r"^cannot read the tokenizer /dev/null: not a regular file$"):
        load_tokenizer("/dev/null")
