"""The tokens that end and begin a document: which ones they are, that no text becomes one, and that they are kept."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from conf.identity import config_hash, what_is_learned
from conf.load import load
from data.batches import open_dataset
from data.prepare import prepare
from data.shards import read_index
from data.tokenizer import FILE_NAMES, load_tokenizer
from kernels.common.errors import UserError

TEXTS = [f"self value return {i} index </s> in\n" for i in range(200)]
ENDS = ["<unk>", "</s>", "<|endoftext|>", "<|start|>"]
DEEPSEEK = "<｜end▁of▁sentence｜>"


def byte_level(special: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["self value return index in"] * 20, trainer)
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def words(unknown: str, **entries: int) -> Tokenizer:
    vocabulary = {"a": 0, "</s>": 1, "<unk>": 2, **entries}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def of_merges() -> Tokenizer:
    letters = ["<", "/", "s", ">", "</", "s>", "</s>", "a", "b"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[("<", "/"), ("s", ">"), ("</", "s>")]))


def wide() -> Tokenizer:
    """No text that is written in ASCII becomes its end: only the normaliser makes it one."""
    made = words("<unk>")
    made.normalizer = normalizers.Sequence([normalizers.Replace("</s>", "a"), normalizers.NFKC()])
    return made


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (unigram(), "turns the characters '</s>' of a text into the token '</s>', so documents would end inside"),
        (words("<unk>"), "turns the characters '</s>' of a text into the token '</s>'"),
        (words("</s>"), "of a text into the token '</s>'"),
        (of_merges(), "turns the characters '</s>' of a text into the token '</s>'"),
        (wide(), "turns the characters '＜／ｓ＞' of a text into the token '</s>'"),
    ],
    ids=["unigram", "words", "unknown", "merges", "normaliser"],
)
def test_a_vocabulary_in_which_a_text_can_be_an_end_is_refused(made, sentence, tmp_path):
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.eos=TOKEN") as caught:
        load_tokenizer(tmp_path)
    assert sentence in str(caught.value)


def test_a_user_defined_piece_of_sentencepiece_is_no_end(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=40, user_defined_symbols=["<end>"], minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    assert load_tokenizer(tmp_path).token(load_tokenizer(tmp_path).eos_id) == "</s>"
    with pytest.raises(UserError, match="turns the characters '<end>' of a text into the token '<end>'"):
        load_tokenizer(tmp_path, eos="<end>")


def test_an_end_that_is_listed_as_a_plain_token_is_made_a_special_one(tmp_path):
    made = byte_level([])
    made.add_tokens([AddedToken("</s>", special=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_id not in loaded.encode("a </s> b</s>")
    assert loaded.decode(loaded.encode("a </s> b</s>")) == "a </s> b</s>"


def test_a_text_that_becomes_an_end_in_a_way_nobody_foresaw_stops_the_encoding(tmp_path):
    made = words("<unk>")
    made.normalizer = normalizers.Sequence([normalizers.Replace("</s>", "a"), normalizers.Replace("END", "</s>")])
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("a b") == [0, 2]
    with pytest.raises(
        UserError, match="turns a part of a text that begins 'a END a' into its end-of-text token '</s>'"
    ):
        loaded.encode_batch(["a", "a END a"])


def beside(folder, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "</s>"),
        ({"tokenizer_config": {"eos_token": "<|endoftext|>"}}, "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": {"content": "<|endoftext|>", "special": True}}}, "<|endoftext|>"),
        ({"config": {"eos_token_id": 2}}, "<|endoftext|>"),
        ({"config": {"eos_token_id": 1}}, "</s>"),
        ({"generation_config": {"eos_token_id": [2, 1]}}, "<|endoftext|>"),
        (
            {"tokenizer_config": {"eos_token": None}, "config": {}, "generation_config": {"eos_token_id": 2}},
            "<|endoftext|>",
        ),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}, "config": {"eos_token_id": 9999}}, "</s>"),
        ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 2}}, "</s>"),
    ],
    ids=str,
)
def test_the_files_beside_a_tokenizer_say_which_token_is_the_end(files, expected, tmp_path):
    byte_level(ENDS).save(str(tmp_path / "tokenizer.json"))
    beside(tmp_path, **files)
    loaded = load_tokenizer(tmp_path)
    assert loaded.token(loaded.eos_id) == expected
    (tmp_path / "run").mkdir()
    loaded.save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert (again.eos_id, again.hash) == (loaded.eos_id, loaded.hash)
    assert (again.hash == load_tokenizer(tmp_path, eos="</s>").hash) == (expected == "</s>")


def test_a_typed_name_decides_and_a_wrong_one_is_refused(tmp_path):
    byte_level(ENDS).save(str(tmp_path / "tokenizer.json"))
    beside(tmp_path, tokenizer_config={"eos_token": "</s>"})
    assert load_tokenizer(tmp_path, eos="<|endoftext|>").eos_id == 2
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path, eos="<endoftext>")
    sentence = (
        "has no such token; did you mean '<|endoftext|>'? its special tokens are <unk> </s> <|endoftext|> <|start|>"
    )
    assert str(caught.value).startswith("tokenizer.eos=<endoftext>: ")
    assert sentence in str(caught.value)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config\.json, which names the end-of-text token"):
        load_tokenizer(tmp_path)


def test_the_end_of_deepseek_is_known_and_any_other_can_be_typed(tmp_path):
    byte_level([DEEPSEEK]).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_id == 0
    byte_level(["<odd>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.eos=TOKEN; its special tokens are <odd>"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, eos="<odd>").eos_id == 0


def test_an_empty_vocabulary_is_refused(tmp_path):
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json has an empty vocabulary"):
        load_tokenizer(tmp_path)


@pytest.mark.usefixtures("small_shards")
def test_of_a_folder_with_both_files_the_kind_decides(corpus, tmp_path):
    """As Llama's repositories have them."""
    data, own = corpus
    shutil.copy(prepare(data, own) / "tokenizer.model", tmp_path)
    byte_level(ENDS).save(str(tmp_path / "tokenizer.json"))
    for kind, other in (("huggingface", "tokenizer.model"), ("sentencepiece", "tokenizer.json")):
        config = load([f"tokenizer={kind}", f"tokenizer.path={tmp_path}"]).tokenizer
        folder = prepare(data, config)
        assert (folder / FILE_NAMES[kind]).is_file()
        assert not (folder / other).exists()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("workers", [1, 2])
def test_typed_tokens_stand_on_disk(corpus, tmp_path, workers):
    data, _ = corpus
    byte_level(ENDS).save(str(tmp_path / "tokenizer.json"))
    keys = ["tokenizer=huggingface", f"tokenizer.path={tmp_path / 'tokenizer.json'}"]
    config = load([*keys, "tokenizer.eos=<|endoftext|>", "tokenizer.bos=<|start|>"]).tokenizer
    folder = prepare(replace(data, workers=workers), config)
    dataset = open_dataset(folder)
    assert (dataset.eos_id, read_index(folder)["eos_id"]) == (2, 2)
    tokens = dataset.parts[0].train.read(0, dataset.parts[0].train.tokens)
    assert (tokens == 2).sum() == (tokens == 3).sum() == dataset.parts[0].train.documents
    assert tokens[0] == 3
    assert (tokens[1:][tokens[:-1] == 2] == 3).all()  # a begin token after every end
    assert folder != prepare(data, load(keys).tokenizer)


def test_a_token_of_a_tokenizer_that_is_trained_here_cannot_be_typed():
    with pytest.raises(UserError, match=r"tokenizer\.eos"):
        load(["tokenizer.eos=<end>"])


def test_plans_made_without_these_keys_keep_their_hash():
    config = load([])
    foreign = ["tokenizer=huggingface", "tokenizer.path=t.json"]
    assert config_hash(load(foreign)) != config_hash(load([*foreign, "tokenizer.eos=<|endoftext|>"]))
    assert "tokenizer.eos" not in what_is_learned(config)
    assert load([*foreign, f"tokenizer.eos={DEEPSEEK}"]).tokenizer.eos == DEEPSEEK
