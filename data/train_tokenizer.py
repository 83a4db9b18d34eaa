"""Train a SentencePiece tokenizer on documents: every option of its trainer, and why it may refuse.

`prepare.py` selects the text; `tokenizer.py` encodes by what was trained.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from data.ends import Ends
from data.packages import need
from data.tokenizer import SentencePiece, Tokenizer
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, explain_os_errors

# Every option of the trainer. A document is one "sentence", so that pieces may hold line ends and indentation.
TRAINER: dict[str, Any] = {
    "model_type": "bpe",  # trains in seconds where unigram takes minutes, and gives no more tokens on code
    "split_by_whitespace": False,  # a piece may hold spaces inside: indentation, "in range", ":\n"
    "max_sentencepiece_length": 16,  # characters
    "byte_fallback": True,  # 256 byte pieces: any character has tokens
    "character_coverage": 0.9999,  # the rarest characters go to the byte pieces rather than take a piece each
    "normalization_rule_name": "identity",  # no character is changed
    "add_dummy_prefix": False,  # no space is put before a text
    "remove_extra_whitespaces": False,  # runs of spaces stay
    "allow_whitespace_only_pieces": True,  # an indentation can be one piece
    "max_sentence_length": 1 << 30,  # bytes; longer documents would be left out silently
    "shuffle_input_sentence": False,  # the same text gives the same tokenizer
    "num_threads": 2,  # a constant: unigram's sums depend on it
    "minloglevel": 2,  # errors only; they come back as exceptions
}
UNKNOWN = "\u2585"  # what its trainer writes for an unknown character; it leaves out documents that hold it


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Train a tokenizer and return it; the same texts in the same order give the same file.

    Args:
        texts: documents.
        vocab_size: number of pieces, the 256 byte pieces and 3 special ones included.
        path: where to write the model.

    Raises:
        UserError: `vocab_size` is too small for the characters, or too large for the text; a size that works is named.
    """
    sentencepiece = need("sentencepiece", "training a tokenizer")
    # Line ends are part of a document, so they must reach the trainer: it is given an iterator, not a file.
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts), model_writer=model, vocab_size=vocab_size, **TRAINER
        )
    except (RuntimeError, OSError) as error:
        raise _why_not_trained(str(error), vocab_size) from error
    tokenizer = SentencePiece(model.getvalue(), "the trained tokenizer")
    tokenizer.use_ends(Ends())
    if not tokenizer.exact:
        raise UserError(
            "the trained tokenizer does not give texts back exactly; an option of TRAINER in data/train_tokenizer.py is lossy"
        )
    if path is not None:
        with explain_os_errors("write", path), atomic_write(path, "wb") as file:
            file.write(tokenizer.raw)
    return tokenizer


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts for the trainer, and spaces where they have so few that the vocabulary would have none.

    A space without a piece of its own comes back as another character: SentencePiece writes it as U+2581.
    """
    characters = spaces = 0
    for text in texts:
        characters, spaces = characters + len(text), spaces + text.count(" ")
        yield text.replace(UNKNOWN, "")
    rare = 1 - TRAINER["character_coverage"]
    if spaces < rare * characters:
        yield " " * (1 + int(2 * rare * characters))


def _why_not_trained(message: str, vocab_size: int) -> UserError:
    if match := re.search(r"value <= (\d+)", message):
        return UserError(
            f"the corpus is too small for tokenizer.vocab_size={vocab_size}: it supports at most {match[1]} pieces; "
            f"set tokenizer.vocab_size={match[1]} or give it more text"
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"tokenizer.vocab_size={vocab_size} is too small: the bytes and the characters of this corpus alone take "
            f"{match[1]} pieces; set tokenizer.vocab_size={int(match[1]) * 2} or more"
        )
    if "sentences_.empty()" in message:
        return UserError("there is no text to train a tokenizer on")
    return UserError(f"SentencePiece could not train a tokenizer of {vocab_size} pieces: {message.strip()}")
