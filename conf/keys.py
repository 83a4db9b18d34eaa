"""The keys of the schema and the choices of its groups, as `--help`, overrides and errors list them."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.schema import Config

FOLDER = Path(__file__).resolve().parent


def choices(group: str) -> list[str]:
    """Return the names that `group=` takes."""
    return sorted(
        path.relative_to(FOLDER / group).with_suffix("").as_posix() for path in (FOLDER / group).rglob("*.yaml")
    )


@functools.cache
def keys(cls: type = Config, prefix: str = "") -> tuple[tuple[str, Any, dataclasses.Field], ...]:
    """Return (dotted key, type, field) of every leaf of the schema."""
    return tuple(_leaves(cls, prefix))


def _leaves(cls: type, prefix: str) -> Iterator[tuple[str, Any, dataclasses.Field]]:
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(types[field.name]):
            yield from _leaves(types[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, types[field.name], field
