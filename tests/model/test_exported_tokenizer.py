"""The tokenizer of an exported folder gives the run's own ids, for any text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from data.tokenizer import load_tokenizer
from data.train_tokenizer import train_sentencepiece
from kernels.common.errors import UserError
from model.huggingface import tokenizer as exported
from model.huggingface.tokenizer import write_tokenizer

TEXTS = [
    "",
    " ",
    "  a  ",
    "\t\t x\n\n",
    "\r\n \x00 a\x00b",
    "</s><s><unk><pad><0x41><|endoftext|>",
    " </s> ",
    "\u2581",
    "a\u2581\u2581 b \u2581 \u2585",
    "e\u0301 \u00e9 \ufb01 \u3000 \u00a0 \u2028 \ufeff",
    "🙂👩‍👩‍👧‍👦🏴\U0010ffff 漢字かな",
    "    def index(self):\n        return self.value\n" * 20,
    " " * 99 + "\n" * 33 + "ininininin" * 9,
]


def noise(count: int = 150) -> list[str]:
    """Texts in which pieces overlap: of few characters, in runs."""
    chance = random.Random(5)
    alphabets = ["a ", "in ", " \n", "aab", "def return\n", "selfindexvalue ", "ab\u2581</s>é"]
    return ["".join(chance.choices(chance.choice(alphabets), k=chance.randint(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer.json as a model hub has it: byte-level BPE that begins every text with a token of its own."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    begin = [(special[0], made.token_to_id(special[0]))]
    made.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=begin)
    made.enable_truncation(5)
    return made.to_str()


@pytest.fixture(params=["sentencepiece", "runs of one character", "huggingface"])
def tokenizer(request, tmp_path, sentencepiece, byte_level):
    if request.param == "sentencepiece":
        return sentencepiece
    if request.param == "runs of one character":  # many pieces that can be cut in several ways
        return train_sentencepiece(["a" * n + " " * m + "aab" * n for n in range(1, 30) for m in range(1, 20)], 275)
    (tmp_path / "tokenizer.json").write_text(byte_level, encoding="utf-8")
    return load_tokenizer(tmp_path / "tokenizer.json")


def test_ids_are_the_same_for_any_text(transformers, tokenizer, tmp_path):
    pad = write_tokenizer(tokenizer, tmp_path, 512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, *noise()]:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs(text).input_ids == [tokenizer.eos_id, *ids], text  # as a document begins in model.generate
        assert theirs.decode(ids) == tokenizer.decode(ids), text
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.eos_id
    assert theirs.pad_token_id == pad
    assert theirs.model_max_length == 512


@pytest.mark.parametrize("spaced", [True, False])
def test_a_space_that_the_vocabulary_puts_before_a_text_stays(transformers, byte_level, spaced, tmp_path):
    made = tokenizers.Tokenizer.from_str(byte_level)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    (tmp_path / "hf").mkdir()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    write_tokenizer(tokenizer, tmp_path / "hf", 512)
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["add_prefix_space"] is spaced
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("in range", " in", "index value\n"):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)


def test_a_begin_token_starts_a_text(transformers, byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path, bos="<|begin_of_text|>")
    (tmp_path / "hf").mkdir()
    write_tokenizer(tokenizer, tmp_path / "hf", 512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    stored = tokenizer.encode_document("in").tolist()
    assert theirs("in").input_ids == [tokenizer.bos_id, *tokenizer.encode("in")] == stored
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def as_llama_cpp(folder: Path, text: str) -> list[int]:
    """Return the ids after a conversion to GGUF, as llama.cpp's converter and its SentencePiece tokenizer are published.

    The converter reads tokenizer.model, and `add_prefix_space` from tokenizer_config.json (default: true). The tokenizer merges
    the neighbours of the highest score until none is left, and spells what is no piece in bytes.
    """
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = {model.id_to_piece(i): (model.get_score(i), i) for i in range(len(model))}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    prefix = " " if settings.get("add_prefix_space", True) else ""
    symbols = list((prefix + text).replace(" ", "\u2581"))
    while True:
        pairs = [("".join(symbols[i : i + 2]), i) for i in range(len(symbols) - 1)]
        known = [(pieces[pair][0], -i) for pair, i in pairs if pair in pieces]
        if not known:
            break
        at = -max(known)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    spelled = [[symbol] if symbol in pieces else [f"<0x{b:02X}>" for b in symbol.encode()] for symbol in symbols]
    return [pieces[each][1] for some in spelled for each in some]


def test_a_conversion_to_gguf_gives_the_same_tokens(sentencepiece, tmp_path):
    write_tokenizer(sentencepiece, tmp_path, 512)
    for text in ("def", " def", "    return self\n", "in range index é 漢\n\tx", "</s> a", *noise(40)):
        if "\u2581" not in text:
            assert as_llama_cpp(tmp_path, text) == sentencepiece.encode(text), text


def test_the_file_of_the_run_lies_beside_it(tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out", 512)
    name = exported.ORIGINAL[tokenizer.file_name]
    assert load_tokenizer(tmp_path / "out" / name).hash == tokenizer.hash


def test_a_padding_token_is_taken_where_there_is_one(byte_level, tmp_path):
    made = tokenizers.Tokenizer.from_str(byte_level)
    made.add_special_tokens([AddedToken("<|pad|>", special=True)])
    made.save(str(tmp_path / "tokenizer.json"))
    assert write_tokenizer(load_tokenizer(tmp_path / "tokenizer.json"), tmp_path, 8) == made.token_to_id("<|pad|>")


def test_of_two_pairs_that_overlap_the_left_one_is_merged_first():
    order = exported._splits("abaabaab")
    for one in order:
        for other in order:
            if (
                one[1] == other[0] and other[1] != one[0]
            ):  # one's right half is the other's left: one stands on the left
                assert order.index(one) < order.index(other), (one, other)


def test_a_model_that_cannot_be_converted_is_refused(tmp_path):
    import sentencepiece as library

    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join("the quick brown fox jumps over lazy dogs " * 2 for _ in range(50)))
    library.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(tmp_path / "m"), vocab_size=30, model_type="unigram", minloglevel=2
    )
    with pytest.raises(UserError, match=r"cannot be written as tokenizer\.json: .* would get other tokens"):
        write_tokenizer(load_tokenizer(tmp_path / "m.model"), tmp_path, 8)
    assert not (tmp_path / "tokenizer.json").exists()
