"""Refuse a typed key that has no effect under the chosen options, such as `data.path` without `data=text`.

The conditions stand beside the keys in the schema (`only=`). Values that come from presets and from the config.yaml of a
run are not checked, nor is a value that switches off (null, false, 0, none or empty), nor what is typed as `++key=value`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from conf.keys import choices, keys
from conf.overrides import FREE_FORM, Override, as_typed, within
from conf.schema import GROUPS, Config, DataConfig
from kernels.common.errors import UserError

_LABELLED = ("ffn", "model", "data", "tokenizer", "logger")  # groups whose key `name` selects nothing
_LONGEST = 60  # characters of a value in a sentence
_CONDITION = re.compile(r"(?P<key>[\w.]+?)(?P<relation>!=|=|>)(?P<right>.*)")


def refuse_ignored(
    overrides: Iterable[Override], values: Mapping[str, Any], schema: type = Config, prefix: str = ""
) -> None:
    """Raise for the first override of a key that has no effect under `values`.

    Args:
        values: {dotted key: value} of the composed configuration.
        schema: of these keys; each has `prefix` before its name.

    Raises:
        UserError: it names the key, and the option under which it has an effect.
    """
    overrides = list(overrides)
    forced = {override.key for override in overrides if override.forced}
    conditions = _conditions(schema, prefix)
    for override in overrides:
        condition = conditions.get(_declared(override.key), "")
        if forced & {override.key, *_deciding(condition)}:
            continue
        value = values.get(override.key, override.value)  # a dictionary is flat in `values`
        if condition and not _is_off(value) and not _holds(condition, values):
            raise _without_effect(override.key, override.typed, condition, values)


def deciding_keys(key: str) -> set[str]:
    """Return the keys and groups that decide whether a key of a run has an effect; empty if it always has one."""
    return _deciding(_conditions(Config).get(_declared(key), ""))


def refuse_ignored_of_parts(parts: Any) -> None:
    """Raise for a key of a part of a blend that has no effect on the part's source.

    Raises:
        UserError: it names the key, and the sources for which it has an effect.
    """
    conditions = {name: field.metadata["only"] for name, _, field in keys(DataConfig)}
    for part, values in parts.items() if isinstance(parts, dict) else ():
        source = {"data.source": values.get("source", part)} if isinstance(values, dict) else {}
        if not source or source["data.source"] not in choices("data"):
            continue  # refused where the parts are read
        for key, value in values.items():
            condition = conditions.get(key, "").replace("|blend", "")
            of_source = condition.startswith("data.source")  # what others depend on may be the blend's
            if of_source and not _is_off(value) and not _holds(condition, source):
                sentence = str(_without_effect(f"data.parts.{part}.{key}", str(value), condition, source))
                raise UserError(sentence.replace(" data=", f" data.parts.{part}.source="))


def refuse_mislabelled(overrides: Iterable[Override], chosen: Mapping[str, str]) -> None:
    """Raise where `GROUP.name=CHOICE` is typed for `GROUP=CHOICE`: it would only change the label.

    Args:
        chosen: {group: its choice} of the run.

    Raises:
        UserError: it says which override selects the choice.
    """
    for override in overrides:
        group, _, key = override.key.partition(".")
        name = override.value.strip("'\"")
        if group in _LABELLED and key == "name" and name in choices(group) and name != chosen[group]:
            raise UserError(
                f"{override.key}={name} would only change the label of {group}={chosen[group]}: write {group}={name}"
            )


def _conditions(schema: type, prefix: str = "") -> dict[str, str]:
    return {name: field.metadata["only"] for name, _, field in keys(schema, prefix) if field.metadata["only"]}


def _declared(key: str) -> str:
    """Return the key of the schema to which an override's key belongs."""
    return next((name for name in FREE_FORM if within(key, (name,))), key)


def _deciding(condition: str) -> set[str]:
    deciding = {_parts(part)[0] for part in condition.split(" or ")} if condition else set()
    return deciding | {key.partition(".")[0] for key in deciding}


def _holds(condition: str, values: Mapping[str, Any]) -> bool:
    return any(_part_holds(part, values) for part in condition.split(" or "))


def _part_holds(condition: str, values: Mapping[str, Any]) -> bool:
    key, relation, right = _parts(condition)
    value = values.get(key)
    if relation == ">":
        size = len(value) if isinstance(value, (list, dict)) else value
        return isinstance(size, (int, float)) and size > float(right)
    group = _group_of(key)
    if key == f"{group}.name" and as_typed(value) not in choices(group):
        return True  # a label of the user's own: nothing is known about what it stands for
    return (as_typed(value) in right.split("|")) == (relation == "=")


def _without_effect(key: str, value: str, condition: str, values: Mapping[str, Any]) -> UserError:
    parts = [_needed(part, values) for part in condition.split(" or ")]
    typed = f"{key}={value}" if len(value) <= _LONGEST else f"{key}={value[:_LONGEST]}..."
    now = " and ".join(present for present, _ in parts)
    return UserError(f"{typed} has no effect with {now}: it belongs to {' or '.join(needed for _, needed in parts)}")


def _needed(condition: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a condition depends on as it is, and as it would have to be."""
    left, relation, right = _parts(condition)
    name = _group_of(left) or left
    *others, last = right.split("|")
    if relation == "=":
        needed = f"{name}={', '.join(others)}{' or ' if others else ''}{last}"
    elif relation == "!=":
        needed = f"any {name} but {right}"
    else:
        needed = f"more than {right} {name}" if isinstance(values.get(left), list) else f"{name} above {right}"
    return f"{name}={as_typed(values.get(left))}", needed


def _parts(condition: str) -> tuple[str, str, str]:
    """Return the key, the relation and the right side of a condition."""
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise ValueError(f"the schema has a condition that does not parse: {condition!r}")
    return match["key"], match["relation"], match["right"]


def _group_of(key: str) -> str:
    """Return the group that selects this key's value by GROUP=CHOICE, or an empty string."""
    group, _, name = key.partition(".")
    return group if group in GROUPS and name in ("name", "source", "stage") else ""


def _is_off(value: Any) -> bool:
    return value in (None, False, 0, "", "none", "null", "{}") or value == [] or value == {}
