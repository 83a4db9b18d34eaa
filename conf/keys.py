"""The keys of the schema and the choices of its groups, as `--help`, overrides and errors list them."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.schema import Config
from conf.yaml_files import read_yaml

FOLDER = Path(__file__).resolve().parent
_DECIDING = {"data": "source", "tokenizer": "kind"}  # the key that tells a group's choice, where `name` is a label


def choices(group: str) -> list[str]:
    """Return the names that `group=` takes."""
    return sorted(
        path.relative_to(FOLDER / group).with_suffix("").as_posix() for path in (FOLDER / group).rglob("*.yaml")
    )


def choice_of(group: str, values: dict[str, Any]) -> str:
    """Return the choice of a group, as far as its values tell: of several that fit, the one that sets most of them."""
    if "name" in values:
        return str(values[_DECIDING.get(group, "name")])
    sets = {choice: read_yaml(FOLDER / group / f"{choice}.yaml") or {} for choice in choices(group)}
    fitting = [choice for choice, own in sets.items() if own.items() <= values.items()]
    return max(fitting, key=lambda choice: len(sets[choice]), default="default")


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
