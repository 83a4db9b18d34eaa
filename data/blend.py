"""The parts of a blend: what each is prepared with, and what it must not be trained on, because another part holds it out.

Parts may have documents in common. Which ones a part holds out depends on its own documents and settings, so one that is held
out of a part may be training text of another; it is left out there. `prepare.py` prepares the parts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from conf.schema import DataConfig, TokenizerConfig
from data.documents import fingerprint, parts, stamps
from data.folder import held_out_settings
from data.held_out import Selection


class Blend:
    """The parts of a blend, which know of each other."""

    def __init__(self, data: DataConfig) -> None:
        """Raises UserError: as `parts`, or a file is missing."""
        self.data, self.parts = data, parts(data)

    def corpora(self, config: TokenizerConfig, path: Path) -> Iterator[tuple[float, DataConfig, TokenizerConfig]]:
        """Yield each part: fraction of the samples, and configurations, given the file of the tokenizer that they share."""
        shared = replace(config, kind="sentencepiece" if path.suffix == ".model" else "huggingface", path=str(path))
        for weight, part in self.parts.values():
            yield weight, replace(part, prepared=self.data.prepared, workers=self.data.workers), shared

    @functools.cached_property
    def beside(self) -> dict[str, str]:
        """What identifies the text that the others hold out, for each part; "" where they hold out none.

        It belongs to the name of the part's folder, whose content depends on it.
        """
        configs = {name: part for name, (_, part) in self.parts.items()}
        known = {n: json.dumps([fingerprint(c), held_out_settings(c)]) for n, c in configs.items() if c.held_out}
        others = {name: sorted(text for other, text in known.items() if other != name) for name in configs}
        return {name: json.dumps(texts) if texts else "" for name, texts in others.items()}

    @functools.cached_property
    def _choices(self) -> dict[str, tuple[str, Selection]]:
        return {name: (stamps(part), Selection(part)) for name, (_, part) in self.parts.items()}

    def choose(self, name: str) -> tuple[str, Selection]:
        """Return the `stamps` of a part before it was read, and its choice, which leaves out what other parts hold out."""
        before, own = self._choices[name]
        others = [(self.parts[other][1], chosen) for other, (_, chosen) in self._choices.items() if other != name]
        return before, own.apart_from(others)


def choose(data: DataConfig, blend: Blend | None) -> tuple[str, Selection]:
    """Choose the held-out documents of a corpus, which may be a part of a blend; return its `stamps` before it was read, too.

    Raises:
        UserError: as `Selection`, which reads the other parts as well.
    """
    return blend.choose(data.name) if blend else (stamps(data), Selection(data))
