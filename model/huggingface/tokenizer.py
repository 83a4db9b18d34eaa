"""Write a run's tokenizer for Hugging Face Transformers: tokenizer.json, tokenizer_config.json, and a copy of the run's file.

A SentencePiece model trained by this project becomes a BPE model of the library `tokenizers` with the same token ids. Merges
are ordered by the pieces' scores, characters without a piece become bytes, and nothing is normalised. Spaces stay spaces in the
vocabulary, so a U+2581 in a text is no piece and becomes bytes, as in `data/tokenizer.py`. Two differences remain: our
tokenizer splits texts of more than 65,536 characters, and decodes broken UTF-8 with fewer U+FFFD.

With special tokens, the default in Transformers, a text starts with the token that a document starts with in training and in
`model.generate`: the end-of-text token, or the begin token if the run has one. Special tokens are not recognised inside a text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.packages import need
from data.tokenizer import PROBE, SPACE, Tokenizer
from kernels.common.errors import UserError

ORIGINAL = {  # the run's tokenizer file -> its copy in an exported folder
    "tokenizer.model": "tokenizer.model",
    "tokenizer.json": "tokenizer.original.json",
}
_PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
_PROBES = (
    PROBE,
    "a\u2581 b",
    "",
    " ",
    "\n\n\t\t  ",
    "aaaaaaa" * 9,
    " " * 77,
    "def f(x):\n        return x\n",
    "<0x41><s>",
)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> int:
    """Write the tokenizer's files into `folder`, and return the id of the padding token.

    Args:
        max_length: the sequence length in training.

    Raises:
        UserError: the converted tokenizer would give other ids, as with some SentencePiece models that were trained elsewhere.
    """
    tokenizers = need("tokenizers", "writing tokenizer.json")
    if tokenizer.file_name == "tokenizer.json":
        converted = tokenizers.Tokenizer.from_str(tokenizer.raw.decode("utf-8"))
        converted.no_truncation()
        converted.no_padding()
    else:
        converted = _from_sentencepiece(tokenizer.raw)
    eos, start = tokenizer.token(tokenizer.eos_id), tokenizer.token(tokenizer.start_id)
    # Special tokens of a vocabulary may be listed as plain ones, which would be matched in a text.
    special = [tokenizers.AddedToken(each, special=True, normalized=False) for each in dict.fromkeys((eos, start))]
    converted.add_special_tokens(special)
    converted.post_processor = tokenizers.processors.TemplateProcessing(
        [start, "$A"], [start, "$A", start, "$B:1"], special_tokens=[(start, tokenizer.start_id)]
    )
    converted.encode_special_tokens = True
    for probe in _PROBES:
        if converted.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe):
            raise UserError(
                f"the tokenizer cannot be written as tokenizer.json: {probe!r} would get other tokens. SentencePiece models "
                "that this project trains can (BPE, byte fallback, no normalisation); provide others as a tokenizer.json"
            )
    vocabulary = converted.get_vocab(with_added_tokens=True)
    # A SentencePiece model never produces <unk>, because bytes stand for characters without a piece: it can pad.
    names = ("<unk>",) if tokenizer.file_name == "tokenizer.model" else _PAD_NAMES
    pad = next((name for name in names if name in vocabulary), eos)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": eos,
        "pad_token": pad,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        # For converters to GGUF, whose default is true, and for Transformers, which would change ByteLevel to false.
        "add_prefix_space": _adds_space(converted),
        "model_max_length": max_length,
    }
    converted.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / ORIGINAL[tokenizer.file_name]).write_bytes(tokenizer.raw)
    return vocabulary[pad]


def _adds_space(converted: Any) -> bool:
    """Return whether a tokenizer puts a space before a text."""
    parts = [json.loads(converted.to_str())[key] or {} for key in ("normalizer", "pre_tokenizer")]
    steps = [step for part in parts for step in part.get("pretokenizers", part.get("normalizers", [part]))]
    return any(
        step.get("add_prefix_space")
        or step.get("prepend_scheme") in ("always", "first")
        or step.get("type") == "Prepend"
        for step in steps
    )


def _from_sentencepiece(raw: bytes) -> Any:
    """Convert a serialised SentencePiece BPE model to a `tokenizers.Tokenizer`."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models

    model = SentencePieceProcessor(model_proto=raw)
    special = {i for i in range(len(model)) if model.is_control(i) or model.is_unknown(i)}
    plain = [i for i in range(len(model)) if i not in special and not model.is_byte(i)]
    pieces = {i: model.id_to_piece(i).replace(SPACE, " ") for i in plain}
    vocabulary = {pieces.get(i, model.id_to_piece(i)): i for i in range(len(model))}
    scores = {pieces[i]: model.get_score(i) for i in plain}
    merges = [
        pair
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for pair in _splits(piece)
        if pair[0] in scores and pair[1] in scores
    ]
    unknown = model.id_to_piece(model.unk_id())
    bpe = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, byte_fallback=True, fuse_unk=False)
    converted = Tokenizer(bpe)
    converted.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    converted.add_special_tokens([AddedToken(model.id_to_piece(i), special=True) for i in sorted(special)])
    return converted


def _splits(piece: str) -> list[tuple[str, str]]:
    """Return the pairs that merge to a piece, in order of precedence.

    SentencePiece merges the piece of the highest score first, and among equal pieces the leftmost. BPE by pairs must rank the
    pairs of one piece. Two of them can overlap in a text if the right half of one is the left half of the other: the one that
    is then on the left comes first.
    """
    pairs = [(piece[:i], piece[i:]) for i in range(len(piece) - 1, 0, -1)]  # of "aaa" the longer left half first
    for i, first in enumerate(pairs):
        for j in range(i):
            if first[1] == pairs[j][0] and pairs[j][1] != first[0]:
                pairs.insert(j, pairs.pop(i))
                break
    return pairs
