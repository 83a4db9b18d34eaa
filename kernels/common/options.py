"""The options of a small command, NAME=VALUE each, beside the configuration of a run that `conf/load.py` composes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import UserError, unknown


def read_options(
    argv: list[str],
    defaults: Mapping[str, str | int | float | bool],
    least: Mapping[str, int] | None = None,
    needs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the options that `argv` sets, and the defaults of the others.

    Args:
        defaults: the options there are; what is typed becomes of the default's type.
        least: the least that a number may be; 0 where nothing is said. A default may be less, as a sign of "not said".
        needs: of options that must be said: the words after "say" that ask for it.

    Raises:
        UserError: an option that there is not, that needs a value, or that must be said.
    """
    options = dict(defaults)
    for word in argv:
        name, equals, value = word.partition("=")
        if name not in defaults or not equals:
            raise unknown("option", name, defaults)
        options[name] = _read(word, value, type(defaults[name]), (least or {}).get(name, 0))
    for name, ask in (needs or {}).items():
        if not options[name]:
            raise UserError(f"say {ask}")
    return options


def _read(word: str, value: str, kind: type, least: int) -> str | int | float | bool:
    if kind is str:
        return value
    if kind is bool:
        if value not in ("true", "false"):
            raise UserError(f"{word}: expected true or false")
        return value == "true"
    try:
        number = kind(value)
        if not least <= number < math.inf:
            raise ValueError
    except ValueError:
        raise UserError(f"{word}: expected a {'whole ' if kind is int else ''}number of at least {least}") from None
    return number
