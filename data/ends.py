"""Which tokens end and begin a document: typed ones, those that configurations beside a tokenizer name, or by convention.

    special_tokens.json          written here beside a tokenizer whose tokens are not those of convention; it decides
    tokenizer_config.json, config.json, generation_config.json     of Hugging Face: the first that names an end decides

`tokenizer.py` looks the names up in its vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kernels.common.errors import UserError
from kernels.common.json_files import parse, read_bytes

SAVED = "special_tokens.json"
_LIMIT = 1 << 26  # bytes of a configuration
# Of several in one vocabulary the first is taken.
EOS_NAMES = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<end_of_text>",
    "<｜end▁of▁sentence｜>",
)


class Ends(NamedTuple):
    """The tokens that end and begin a document, by name; "" where nothing names one."""

    eos: str = ""
    bos: str = ""


def saved_ends(folder: Path) -> Ends:
    """Return what `save_ends` wrote into a folder, or two empty names."""
    content = _read(folder / SAVED)
    return Ends(str(content.get("eos") or ""), str(content.get("bos") or ""))


def save_ends(folder: Path, ends: Ends) -> None:
    """Write the tokens beside a tokenizer."""
    content = {name: token for name, token in ends._asdict().items() if token}
    (folder / SAVED).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def named_in_configs(folder: Path, kind: str) -> Iterator[str | int]:
    """Yield the tokens, by name or id, that configurations of Hugging Face in `folder` give, most decisive first.

    Args:
        kind: eos or bos.

    Raises:
        UserError: a configuration is not valid JSON.
    """
    for file, key in (
        ("tokenizer_config.json", f"{kind}_token"),
        ("config.json", f"{kind}_token_id"),
        ("generation_config.json", f"{kind}_token_id"),
    ):
        given: Any = _read(folder / file).get(key)
        if isinstance(given, dict):  # an AddedToken
            given = given.get("content")
        yield from (
            each
            for each in (given if isinstance(given, list) else [given])
            if isinstance(each, (str, int)) and not isinstance(each, bool)
        )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse(read_bytes(path, _LIMIT))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}, which names the end-of-text token: {error}") from error
    return content if isinstance(content, dict) else {}
