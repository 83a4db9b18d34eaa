"""One reader of overrides, for plain runs and for sweeps: `GROUP=CHOICE` and `key=value`, in Hydra's grammar.

Three conveniences are added to it: a text, such as a formula or a path, needs no second layer of quotes, a count may be typed
as 1e9, 100k or 2B, and `--multirun` splits the values of a key at its outermost commas. `conf/load.py` composes what is read
here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from conf.arms import unknown_arm
from conf.keys import choices, keys
from conf.schema import GROUPS
from conf.urls import refuse_secrets
from kernels.common.errors import UserError, unknown
from kernels.common.options import whole_number

TEXT_LISTS = ("prompts", "logger.tags")
FREE_FORM = ("data.parts", "ffn.parameters", "ffn.per_layer")  # dictionaries with keys chosen by the user
LARGEST_FORMULA = 10_000  # characters; the formula parser has a far lower limit, this one bounds Hydra's work
LONGEST_NUMBER = 4000  # digits; Python reads 4,300
_PLACES = ("data.path", "tokenizer.path", "runs", "data.prepared")  # of files and folders
_INSTEAD = {  # of a choice that is a path or a name on the hub
    "data": "text in files is data=text data.path={0}",
    "tokenizer": "a tokenizer in a file is tokenizer=huggingface tokenizer.path=tokenizer.json",
    "model": "a Hugging Face model is imported by python -m model.import_hf from=FOLDER",
}
_SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
_OPENING, _CLOSING = "([{", ")]}"
_INSIDE = {
    "data.parts": "data",
    "ffn.per_layer": "ffn",
}  # dictionaries of parts of a group, whose keys are those of the group


@dataclasses.dataclass(frozen=True)
class Override:
    """An override whose key is in the schema."""

    key: str  # a group, or a dotted key
    value: str  # in Hydra's grammar
    typed: str = ""  # the value as it was typed
    forced: bool = False  # typed as `++key=value`: not checked for an effect (conf/effects.py)

    def __str__(self) -> str:
        """Write it for Hydra."""
        return f"{'++' if within(self.key, FREE_FORM) else ''}{self.key}={self.value}"


def within(key: str, names: tuple[str, ...]) -> bool:
    """Return whether a dotted key is one of `names`, or lies inside of one."""
    return any(key == name or key.startswith(name + ".") for name in names)


def is_text(key: str) -> bool:
    """Return whether the value of a dotted key is a text, which is taken verbatim and not parsed by Hydra."""
    for name, group in _INSIDE.items():
        if within(key, (name,)) and key.count(".") > name.count(".") + 1:
            key = f"{group}.{key.split('.', name.count('.') + 2)[-1]}"
    return key == "data.path" or key in _texts()


@functools.cache
def _texts() -> frozenset[str]:
    return frozenset(key for key, kind, _ in keys() if kind in (str, typing.Optional[str]))


_LISTED = "python train.py --help lists them"  # whichever command was typed


def read_override(argument: str, options: Iterable[str] = ()) -> Override:
    """Check the key of one override against the schema, and bring its value into Hydra's grammar.

    Args:
        options: of the command itself, among which a mistyped key is looked for too.

    Raises:
        UserError: it is no override, or names an unknown group, choice or key.
    """
    if re.search("[\ud800-\udfff]", argument):
        raise UserError(f"{argument!r} is not UTF-8: write names and texts in it")
    if argument.startswith("-"):
        raise _unknown_option(argument)
    key, equals, typed = argument.partition("=")
    forced, key = key.startswith("++"), key.lstrip("+")
    if key.startswith(("hydra/", "hydra.")):
        raise UserError(
            f"unknown key {key!r}: Hydra composes the configuration, but its run folders, sweepers and launchers are not used; "
            "--multirun sweeps in sequence, ablation.run compares arms, and launch.slurm submits jobs"
        )
    if not equals:
        raise UserError(f"{argument!r} is not an override: write GROUP=CHOICE or KEY=VALUE ({_LISTED})")
    verbatim = is_text(key) and typed[:1] not in ("'", '"', "[")
    if not verbatim and (digits := re.search(rf"[0-9_]{{{LONGEST_NUMBER},}}", typed)):
        raise UserError(f"{key} has a number of {len(digits[0]):,} digits; fewer than {LONGEST_NUMBER:,} are read")
    if key in GROUPS:
        refuse_secrets(key, typed)
        return Override(key, f"'{_choice(key, typed)}'", typed, forced)  # quoted: a bare `zero=1` would be a number
    if key in _PLACES or (key.startswith("data.parts.") and key.endswith(".path")):
        _refuse_address(key, typed)
    known = {name: kind for name, kind, _ in keys()}
    if key not in known and not within(key, FREE_FORM):
        raise _unknown_key(key, list(known), options)
    value = typed
    if verbatim and typed not in ("null", ""):
        if len(typed) > LARGEST_FORMULA:
            raise UserError(f"{key} has {len(typed):,} characters; at most {LARGEST_FORMULA:,} are read")
        value = quoted(typed)
    elif (count := count_of(known.get(key), typed)) is not None:
        value = str(count)
    return Override(key, value, typed, forced)


def count_of(kind: Any, value: Any) -> int | None:
    """Return the integer that a text stands for where a key of type `kind` takes one, None elsewhere."""
    return whole_number(value) if isinstance(value, str) and kind in (int, typing.Optional[int]) else None


def _choice(group: str, value: str) -> str:
    """Return the choice of a group without the quotes of a shell's second layer."""
    name = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
    if name in choices(group):
        return name
    if group == "ffn":
        raise unknown_arm(name, f"ffn=custom ffn.formula='{name}'", group)
    if group in _INSTEAD and re.search(r"[/.]", name):
        raise UserError(
            f"{group}={name} names no choice of {', '.join(choices(group))}: {_INSTEAD[group].format(name)}"
        )
    raise unknown(group, name, choices(group))


def _refuse_address(key: str, text: str) -> None:
    """Refuse a URL where only a place on this machine will do, and one that holds a secret everywhere."""
    refuse_secrets(key, text)
    if not re.search(r"\b[a-z][a-z0-9+.-]*://", text) or key == "data.path" or key.startswith("data.parts."):
        return
    if key == "tokenizer.path":
        raise UserError(f"{key}={text} is not on this machine, and only a local tokenizer is read: download it first")
    raise UserError(f"{key}={text} is not on this machine, and files are only written to its own or mounted folders")


def check_overrides(overrides: Iterable[str], options: Iterable[str]) -> None:
    """Refuse overrides that no run takes, before anything else is done with them.

    Args:
        options: of the command itself, one of which may have been mistyped.

    Raises:
        UserError: as `read_override`.
    """
    for override in overrides:
        read_override(override, options)


def _unknown_option(argument: str) -> UserError:
    """Name the override that an option in the style of argparse stands for: steps=10 for --steps=10."""
    name, _, value = argument.lstrip("-").partition("=")
    known = [*GROUPS, *(key for key, _, _ in keys())]
    meant = next((key for key in (name, name.replace("-", "_")) if key in known), None)
    advice = f"write {meant}={value or 'VALUE'}" if meant else "write GROUP=CHOICE or KEY=VALUE"
    return UserError(f"unknown option {argument!r}: {advice} ({_LISTED})")


def _unknown_key(key: str, known: list[str], options: Iterable[str]) -> UserError:
    inside = [name for name in known if name.endswith("." + key)]
    if inside:
        return UserError(f"unknown key {key!r}: did you mean {' or '.join(map(repr, inside))}?")
    siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    return unknown("key", key, siblings if siblings and "." in key else [*siblings, *GROUPS, *options])


def quoted(text: str) -> str:
    """Quote a text so that Hydra reads it back unchanged, whatever it contains: `'1e5'` stays a text."""
    # In Hydra's quotes a backslash is itself, unless it stands before a quote.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


def as_typed(value: Any) -> str:
    """Write a value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def parse(override: str) -> Any:
    """Parse an override with Hydra's grammar.

    Raises:
        UserError: it does not parse.
    """
    from hydra.errors import HydraException

    try:
        return _parser().parse_override(override)
    except HydraException as error:
        raise UserError(f"cannot parse {override!r}: a bracket, quote or comma is misplaced") from error


@functools.cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


# ------------------------------------------------------------------------------------------------------------- sweeps


def sweep(argument: str) -> list[str]:
    """Return the overrides that one override of `--multirun` stands for, in order: a single one where it sweeps nothing.

    Values are separated by the outermost commas, or given as Hydra's `choice(...)`, `range(...)` or `glob(...)`.

    Raises:
        UserError: a sweep that does not parse, or that has no list of values.
    """
    key, equals, value = argument.partition("=")
    if not equals:
        return [argument]
    if _SWEEP.fullmatch(value.strip()):
        return [f"{key}={each}" for each in _expanded(key.lstrip("+"), value.strip())]
    return [f"{key}={each.strip()}" for each in _split(value)]


def _split(text: str) -> Iterator[str]:
    """Split a text at commas outside of brackets and quotes. A quote opens only where a value begins."""
    start, depth, quote, before = 0, 0, "", ","
    for place, character in enumerate(text):
        if quote:
            if character == quote and not _is_escaped(text, place):
                quote = ""
        elif character in "'\"" and before in (",", ":", *_OPENING):
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == "," and depth == 0:
            yield text[start:place]
            start = place + 1
        before = before if character.isspace() else character
    yield text[start:]


def _is_escaped(text: str, place: int) -> bool:
    before = text[:place]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _expanded(key: str, value: str) -> list[str]:
    """Return the values of one of Hydra's sweep functions; the function itself where it sweeps nothing, as sort([b,a])."""
    from hydra.core.override_parser.types import Glob

    if value.startswith("choice("):
        return [each.strip() for each in _split(value[len("choice(") : -1])]
    parsed = parse(f"{key}={value}")
    if not parsed.is_sweep_override():
        return [value]
    if parsed.is_interval_sweep():
        raise UserError(
            f"{key}={value} is a continuous range, which only an optimizer can search: list values, or use range(1,4)"
        )
    glob = parsed.value()
    if not isinstance(glob, Glob):
        return list(parsed.sweep_string_iterator())
    if key not in GROUPS:
        raise UserError(f"{key}={value}: glob(...) selects choices of a group, and {key} is no group")
    found = glob.filter(choices(key))
    if not found:
        raise UserError(f"{key}={value} matches no choice: there are {', '.join(choices(key))}")
    return found
