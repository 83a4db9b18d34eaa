"""Name the folder of a prepared corpus, by a hash of everything that determines its content."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from conf.schema import DataConfig, TokenizerConfig
from data.documents import PYTHON, fingerprint, parts, stamps
from data.shards import FORMAT, INDEX, read_index
from data.tokenizer import load_tokenizer
from data.train_tokenizer import TRAINER
from kernels.common.errors import UserError


def folder_of(data: DataConfig, tokenizer: TokenizerConfig, beside: str = "") -> Path:
    """Return the folder of a prepared corpus; its name holds a hash of everything that determines its content.

    Args:
        beside: of a part of a blend, `Blend.beside`.
    """
    _check(data, tokenizer)
    folder = _folder(data, tokenizer, fingerprint(data), beside)
    if not is_complete(folder) and data.source not in (*PYTHON, "hf"):
        earlier = _folder(data, tokenizer, stamps(data), beside)  # version 0.1 named it by the place of the files
        if is_complete(earlier):
            return earlier
    return folder


def _folder(data: DataConfig, tokenizer: TokenizerConfig, corpus: str, beside: str = "") -> Path:
    if tokenizer.path:
        settings: Any = load_tokenizer(tokenizer.path, tokenizer.eos, tokenizer.bos).hash
    else:
        settings = [TRAINER, tokenizer.vocab_size, tokenizer.train_megabytes]
    held_out: Any = held_out_settings(data)
    if data.source == "blend":
        held_out = {name: held_out_settings(part) for name, (_, part) in parts(data).items()}
        # Up to 0.3 a part was trained on what another one held out: those folders have other names.
        beside = "apart" if len(held_out) > 1 and any(held_out.values()) else ""
    known = json.dumps([FORMAT, corpus, settings, held_out, *([beside] if beside else [])], sort_keys=True)
    name = re.sub(r"[^\w.-]+", "-", data.name) or "corpus"
    return Path(data.prepared).expanduser() / f"{name}-{hashlib.blake2b(known.encode(), digest_size=4).hexdigest()}"


def held_out_settings(data: DataConfig) -> Any:
    """Return the settings that decide what is held out; those of 0.2 as they were then, so that folders keep their names."""
    if data.held_out and data.held_out_files:
        own: list[Any] = [data.held_out_files, data.held_out_kib]
        return own if data.held_out_by == "document" else [*own, data.held_out_by]
    return [data.held_out, data.held_out_by] if data.held_out and data.held_out_by != "document" else data.held_out


def _check(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    if not 0 <= data.held_out < 1:
        raise UserError(f"data.held_out is a fraction of the documents, from 0 to below 1, not {data.held_out}")
    if data.held_out_files < 0 or data.held_out_kib < 1:
        raise UserError("data.held_out_files is a number of documents from 0 on, and data.held_out_kib at least 1")
    if data.shard_megabytes < 1 or tokenizer.train_megabytes < 1:
        raise UserError("data.shard_megabytes and tokenizer.train_megabytes must be at least 1")
    if data.workers < 0:
        raise UserError(f"data.workers is a number of processes, or 0 for one per core, not {data.workers}")
    if tokenizer.kind not in ("sentencepiece", "huggingface"):
        raise UserError(f"tokenizer.kind is sentencepiece or huggingface, not {tokenizer.kind!r}")
    foreign = tokenizer.kind == "huggingface"
    if foreign and not tokenizer.path:
        raise UserError(
            "tokenizer=huggingface needs tokenizer.path, a tokenizer.json; only SentencePiece is trained here"
        )
    if tokenizer.path and Path(tokenizer.path).is_file() and foreign != str(tokenizer.path).endswith(".json"):
        right = "sentencepiece" if foreign else "huggingface"
        raise UserError(f"{tokenizer.path} does not fit tokenizer.kind={tokenizer.kind}; set tokenizer={right}")


def is_complete(folder: Path) -> bool:
    """Whether the folder, and each part of a blend, has its index."""
    if not (folder / INDEX).is_file():
        return False
    return all((folder / part["folder"] / INDEX).is_file() for part in read_index(folder).get("parts", []))
