"""Groups outside of a run's configuration, a choice and its keys typed by a schema of their own: `cluster=`, `ablation=`."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

from conf.effects import refuse_ignored
from conf.keys import FOLDER, choices
from conf.load import first_line, flatten
from conf.overrides import Override, count_of
from conf.yaml_files import parse_yaml, read_yaml
from kernels.common.errors import UserError, unknown

Group = typing.TypeVar("Group")
# Types of keys whose values are taken as they are written.
_TEXT, _TEXTS, _LIST = (str, typing.Optional[str]), dict[str, str], list[str]


def read_group(group: str, schema: type[Group], arguments: list[str], kind: str) -> tuple[Group, list[str]]:
    """Read a group outside of a run's configuration from `GROUP=NAME GROUP.KEY=VALUE` arguments.

    A dictionary given as a whole replaces that of the choice; `GROUP.KEY.NAME=VALUE` adds an entry to it.

    Args:
        schema: of the group; `name` becomes the name of the choice.
        kind: what a choice of this group is called, such as "plan".

    Returns:
        The group, and all other arguments.

    Raises:
        UserError: no choice is named, or an unknown one; an unknown key, or a value of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    names = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{group}=")]
    if not names:
        raise UserError(f"{group}=NAME is missing: choose a {kind} from {', '.join(choices(group))}")
    if names[-1] not in choices(group):
        raise unknown(kind, names[-1], choices(group))
    overrides = [argument.removeprefix(f"{group}.") for argument in arguments if argument.startswith(f"{group}.")]
    others = [argument for argument in arguments if not argument.startswith((f"{group}=", f"{group}."))]
    types = typing.get_type_hints(schema)
    known = list(types)
    for override in overrides:
        name = re.split(r"[.=]", override, maxsplit=1)[0]
        if name not in known:
            raise unknown(f"key of {group}", name, known)
    try:
        settings = _read_choice(FOLDER / group / f"{names[-1]}.yaml", types)
        for override in overrides:
            _set(settings, types, *override.split("=", 1))
        _refuse_other_than_lists(settings, types)
        merged = OmegaConf.merge(OmegaConf.structured(schema), {"name": names[-1].rpartition("/")[2], **settings})
        config: Any = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{kind} {names[-1]}: {first_line(error)}") from error
    split = (override.partition("=") for override in overrides)
    typed = [Override(f"{group}.{key}", value, value) for key, _, value in split]
    refuse_ignored(typed, flatten({group: dataclasses.asdict(config)}), schema, f"{group}.")
    return config, others


def _read_choice(path: Path, types: dict[str, Any]) -> dict[str, Any]:
    """Return the keys and values of a choice; texts are those that are written, not the numbers that YAML sees in them."""
    settings, texts = read_yaml(path), read_yaml(path, as_text=True)
    for name, value in settings.items():
        if types.get(name) in _TEXT and value is not None and not isinstance(value, (list, dict)):
            settings[name] = texts[name]
        elif types.get(name) == _TEXTS and isinstance(value, dict):
            settings[name] = {key: "" if value[key] is None else texts[name][str(key)] for key in value}
        elif types.get(name) == _LIST and isinstance(value, list):
            settings[name] = texts[name]
    return settings


def _set(settings: dict[str, Any], types: dict[str, Any], path: str, text: str = "") -> None:
    """Set the key at a dotted path to the value that was typed."""
    name, _, entry = path.partition(".")
    count = count_of(types.get(path), text)
    if types.get(path) in _TEXT and text != "null":  # YAML takes 1:00:00 for a number
        settings[path] = text
    elif entry and types[name] == _TEXTS:
        settings[name] = {**settings.get(name, {}), entry: text}
    elif count is not None:
        settings[path] = count
    else:
        value = parse_yaml(text, as_text=types.get(path) in (_TEXTS, _LIST))
        for part in reversed(path.split(".")[1:]):
            value = {part: value}
        adds = entry and isinstance(settings.get(name), dict)
        settings[name] = {**settings[name], **value} if adds else value


def _refuse_other_than_lists(settings: dict[str, Any], types: dict[str, Any]) -> None:
    """Refuse a text where a list of texts belongs, and in the list what is none, such as `setup: [echo a: b]`.

    Raises:
        ValueError: it names the key.
    """
    for name, value in settings.items():
        if types.get(name) != _LIST:
            continue
        if not isinstance(value, list):
            raise ValueError(f"{name} takes a list, [one, two]")
        for item in value:
            if not isinstance(item, str):
                raise ValueError(f"{name} takes a list of texts, and one of them is {item}: write it in quotes")
