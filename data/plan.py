"""The plan of a preparation in parts: what one reading of the corpus decides, so that no part has to read all of it.

It lies in the prepared folder until the index is written. Any number of parts may follow one plan.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from conf.schema import DataConfig
from data import groups
from data.groups import Span
from data.shards import PLAN, write_json
from kernels.common.errors import UserError
from kernels.common.json_files import read_object

_FORMAT = 1
_LARGEST = 1 << 32  # bytes of a plan that is read: of tens of millions of groups
_PART = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True)
class Share:
    """Part `number` of `count`: consecutive groups, about as many as in every other part."""

    number: int  # from 0; -1: no groups, only what all parts need first
    count: int

    def of(self, spans: list[Span]) -> list[Span]:
        """Return the spans of this part."""
        if self.number < 0:
            return []
        return spans[self.number * len(spans) // self.count : (self.number + 1) * len(spans) // self.count]


def read_share(text: str) -> Share:
    """Return the part that is typed as "3/64" or "plan".

    Raises:
        UserError: it is neither.
    """
    if text == "plan":
        return Share(-1, 1)
    match = _PART.fullmatch(text)
    if match is None or not int(match[2]):
        raise UserError(
            f"part={text} is no part: part=3/64 is number 3 of 64, counted from 0, and part=plan comes first"
        )
    part = Share(int(match[1]), int(match[2]))
    if part.number >= part.count:
        raise UserError(
            f"part={text} is none of {part.count}: parts are part=0/{part.count} to part={part.count - 1}/{part.count}"
        )
    return part


@dataclass(frozen=True)
class CorpusPlan:
    """What one reading of a corpus decides."""

    held_out: dict[str, Any]  # `Selection.record`
    index: dict[str, Any]  # of the prepared folder, without its shards
    spans: list[Span]  # of all groups


def write_plan(folder: Path, plan: CorpusPlan, data: DataConfig, corpus: str) -> None:
    """Write a plan for `read_plan`; UserError on a full disk or an unwritable folder."""
    spans = [list(astuple(span)) for span in plan.spans]
    write_json(
        folder / PLAN, {**_made_from(data, corpus), "held_out": plan.held_out, "index": plan.index, "spans": spans}
    )


def read_plan(folder: Path, data: DataConfig, corpus: str, tokenizer_hash: str) -> CorpusPlan | None:
    """Return the plan in a folder, or None where there is none of this corpus, tokenizer and size of shards.

    Args:
        corpus: its `fingerprint`.
    """
    try:
        content = read_object(folder / PLAN, _LARGEST)
        same = {key: content[key] for key in _made_from(data, corpus)} == _made_from(data, corpus)
        plan = CorpusPlan(content["held_out"], content["index"], [Span(*span) for span in content["spans"]])
        return plan if same and plan.index["tokenizer_hash"] == tokenizer_hash else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # not written yet, damaged, or by a version with another form: made again


def _made_from(data: DataConfig, corpus: str) -> dict[str, Any]:
    return {"format": _FORMAT, "corpus": corpus, "shard_bytes": data.shard_megabytes * groups.MEGABYTE}
