"""The arguments of a command: its own options, NAME=VALUE each, and what else was given.

A run's configuration is not read here: `conf/load.py` composes it from overrides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any

from .errors import UserError, unknown

Value = str | int | float | bool
_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"([+-]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE]\+?[0-9]{1,2})?)([KMBT]?)", re.IGNORECASE)


def whole_number(text: str) -> int | None:
    """Return the integer that is typed as 4096, 1e9, 100k, 1.5M, 2B or 15T (thousands to trillions), or None."""
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        return None
    number = Decimal(match[1]) * _MULTIPLES[match[2].upper()]
    return int(number) if number == number.to_integral_value() else None


def read_options(
    argv: list[str],
    defaults: Mapping[str, Value],
    minimum: Mapping[str, int] | None = None,
    required: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the options of a command that takes nothing else: those that `argv` sets, and the defaults of the others.

    Args:
        defaults: every option; values are cast to the type of its default.
        minimum: the smallest value of a number, 0 where none is given. A default may be smaller, to mean "not set".
        required: {option: what is missing without it, as "run=NAME, the run to sample from"}.

    Raises:
        UserError: an unknown option, an invalid value, or a required option that is missing.
    """
    options, others = split_options(argv, defaults, minimum)
    if others:
        raise _unexpected(others[0], defaults)
    _require(options, required or {})
    return options


def read_positional(
    argv: list[str],
    defaults: Mapping[str, Value],
    minimum: Mapping[str, int] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a command that also takes positional arguments, and these in order.

    Args and errors are those of `read_options`: an unknown NAME=VALUE or --NAME is no positional argument.
    """
    options, others = split_options(argv, defaults, minimum)
    for argument in others:
        if "=" in argument or argument.startswith("-"):
            raise _unexpected(argument, defaults)
    return options, others


def split_options(
    argv: list[str],
    defaults: Mapping[str, Value],
    minimum: Mapping[str, int] | None = None,
    required: Mapping[str, str] | None = None,
    flags: Mapping[str, Value] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a command that also takes overrides, and all other arguments, in order and unchecked.

    Args and errors are those of `read_options`.

    Args:
        flags: {option: its value when it is given as a bare --NAME}.
    """
    options: dict[str, Any] = dict(defaults)
    others = []
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        if name not in defaults:
            others.append(argument)
        elif equals:
            options[name] = _cast(argument, value, type(defaults[name]), (minimum or {}).get(name, 0))
        elif flags and name in flags and argument.startswith("--"):
            options[name] = flags[name]
        else:
            raise UserError(f"{argument} needs a value: {name}=VALUE")
    _require(options, required or {})
    return options, others


def _require(options: Mapping[str, Any], required: Mapping[str, str]) -> None:
    for name, description in required.items():
        if not options[name]:
            raise UserError(f"missing {description}")


def _unexpected(argument: str, options: Collection[str]) -> UserError:
    if not options:
        return UserError(f"unexpected {argument!r}: this command has no options")
    if "=" not in argument and not argument.startswith("-"):
        return UserError(f"unexpected {argument!r}: write NAME=VALUE, with one of {', '.join(sorted(options))}")
    return unknown("option", argument.partition("=")[0], options)


def _cast(argument: str, text: str, kind: type, minimum: int) -> Value:
    if kind is str:
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise UserError(f"{argument}: expected true or false")
        return text == "true"
    try:
        number = whole_number(text) if kind is int else kind(text)
    except ValueError:
        number = None
    if number is None or not minimum <= number < math.inf:
        raise UserError(f"{argument}: expected a {'whole ' if kind is int else ''}number of at least {minimum}")
    return number
