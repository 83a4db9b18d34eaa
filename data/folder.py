"""Name the folder of a prepared corpus, by a hash of everything that determines its content."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.load import flatten
from conf.schema import DataConfig, TokenizerConfig
from conf.validate import check_ranges
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
        settings: Any = load_tokenizer(tokenizer.path, tokenizer.eos, tokenizer.bos, tokenizer.kind).hash
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
    check_ranges(flatten({"data": asdict(data), "tokenizer": asdict(tokenizer)}))
    for name, (_, part) in parts(data).items() if data.source == "blend" else ():
        check_ranges(flatten({"data": asdict(part)}), f"data.parts.{name}")
    foreign = tokenizer.kind == "huggingface"
    if foreign and not tokenizer.path:
        raise UserError(
            "tokenizer=huggingface needs tokenizer.path, a tokenizer.json; only SentencePiece is trained here"
        )
    if (
        tokenizer.path
        and Path(tokenizer.path).expanduser().is_file()
        and foreign != str(tokenizer.path).endswith(".json")
    ):
        right = "sentencepiece" if foreign else "huggingface"
        raise UserError(f"{tokenizer.path} does not fit tokenizer.kind={tokenizer.kind}; set tokenizer={right}")


def is_complete(folder: Path) -> bool:
    """Whether the folder, and each part of a blend, has its index."""
    if not (folder / INDEX).is_file():
        return False
    return all((folder / part["folder"] / INDEX).is_file() for part in read_index(folder).get("parts", []))
