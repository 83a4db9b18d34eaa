"""The keys of `data=` and `tokenizer=`, for the `--help` of the commands that take only these."""

from __future__ import annotations

from conf.help import key_lines
from conf.keys import choices
from conf.schema import DataConfig, TokenizerConfig


def with_keys(text: str) -> str:
    """Return a command's help: its text, then the choices of both groups and every key with its default and meaning."""
    lines = [text.strip()]
    for group, schema in (("data", DataConfig), ("tokenizer", TokenizerConfig)):
        lines += ["", f"{group}={' | '.join(choices(group))}", *key_lines(schema, f"{group}.")]
    return "\n".join(lines)
