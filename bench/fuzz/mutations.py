"""Damage JSON and bytes at random: as a program, a disk, an editor or an enemy would."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_NUMBERS = (0, -1, 1, 2, 3, 7, 255, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 10**400, -(10**400), 0.5, -0.5, 1e308,
            5e-324, 1e16, float("nan"), float("inf"), float("-inf"))  # fmt: skip
_TEXTS = ("", "x", "1", "nan", "\x00", "\x1b[2J", "\ud800", "\u202e", "é", "../..", "/", ".", "a" * 5000, "{0}", "%s", "$x_$",
          "a\nb", "<b>", "[bold]", "finished", "train", "eval")  # fmt: skip
_OTHERS = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    {"a": 1},
    [None],
    [1, 2, 3],
    [0.5] * 40,
    {"": {}},
    [{}],
    ["x"],
    [[0, 0, 1, 0]],
)
VALUES = (*_NUMBERS, *_TEXTS, *_OTHERS)
_LITERALS = (b"1e999", b"-0", b"9" * 5000, b"NaN", b"Infinity", b"-Infinity", b"1.", b"01", b"true", b"null", b'"\\ud800"',
             b"{}", b"[]", b"'x'", b"0x10", b"[" * 2000, b'{"a":' * 2000, b"1e-999", b"1" * 4000)  # fmt: skip


class Damaged(NamedTuple):
    """Files of a folder as they are after some damage: their contents by relative name, None for a missing one."""

    how: str
    files: dict[str, bytes | None]


def damaged_json(draw: random.Random, value: Any, most: int = 4) -> Any:
    """Return a copy of a JSON value with one to `most` of its parts replaced, removed, moved or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, most)):
        value = _damage_once(draw, value)
    return value


def _damage_once(draw: random.Random, value: Any) -> Any:
    places = list(_places(value))
    if not places or draw.random() < 0.02:
        return copy.deepcopy(draw.choice(VALUES))
    holder, key = draw.choice(places)
    old, kind = holder[key], draw.random()
    if kind < 0.5:
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind < 0.6 and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[key] = draw.choice(
            (-old, old + 1, old - 1, str(old), old * 2**32, float(old) if abs(old) < 1e300 else 0)
        )
    elif kind < 0.7:
        del holder[key]
    elif kind < 0.78:
        other, place = draw.choice(places)
        holder[key] = json.loads(json.dumps(other[place]))
    elif kind < 0.84:
        holder[key] = draw.choice(([old], {"a": old}, [old, old], str(old)))
    elif kind < 0.9 and isinstance(holder, dict):
        holder[draw.choice((f"{key}x", key.upper(), key[:-1], ""))] = holder.pop(key)
    elif isinstance(holder, dict):
        holder[draw.choice(_TEXTS)] = old
    else:
        holder.insert(draw.randint(0, len(holder)), copy.deepcopy(draw.choice((old, draw.choice(VALUES)))))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (holder, key) of every value inside of a JSON value."""
    for key, inner in (
        list(value.items()) if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    ):
        yield value, key
        yield from _places(inner)


def json_bytes(draw: random.Random, value: Any, damage: float = 0.15) -> bytes:
    """Return a value as JSON, with a probability of `damage` as a text that is damaged too."""
    raw = json.dumps(value, indent=draw.choice((None, 1))).encode()
    return damaged_text(draw, raw) if draw.random() < damage else raw


def damaged_text(draw: random.Random, raw: bytes) -> bytes:
    """Return JSON or YAML that is doubled, nested, replaced or encoded in part, or damaged as bytes are."""
    kind = draw.random()
    if kind < 0.2 and (names := list(re.finditer(rb'"[^"\n]*": ', raw))):  # a key that is given twice
        name = draw.choice(names)
        return raw[: name.start()] + name[0] + draw.choice(_LITERALS) + b", " + raw[name.start() :]
    if kind < 0.5 and (numbers := list(re.finditer(rb"-?\d+(\.\d+)?(e[+-]?\d+)?|null|true|false", raw))):
        number = draw.choice(numbers)
        return raw[: number.start()] + draw.choice(_LITERALS) + raw[number.end() :]
    if kind < 0.65:
        text = raw.decode(errors="replace")
        return draw.choice(
            (
                b"\xef\xbb\xbf" + raw,
                text.encode("utf-16"),
                text.encode("utf-32-be"),
                raw + b"\x00",
                raw + raw,
                raw + b"\n{}",
                b"[" * 100_000 + raw,
                b'{"a":' * 100_000,
                b"",
                b" \n",
                b"null",
                b"[1, 2]",
                raw.replace(b"\n", b"\r\n"),
            )
        )
    return damaged_bytes(draw, raw)


def damaged_bytes(draw: random.Random, raw: bytes) -> bytes:
    """Return bytes of which some are flipped, cut off, removed, doubled, zeroed or random."""
    data = bytearray(raw or b" ")
    for _ in range(draw.choice((1, 1, 2, 5))):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice((1, 1, 2, 8, 100)))
        kind = draw.randrange(7)
        if kind < 3 and start < len(data):
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 3:
            del data[start : draw.choice((len(data), end))]
        elif kind == 4:
            data[start:start] = data[start:end] * draw.choice((1, 2, 50))
        elif kind == 5:
            data[start:end] = bytes(end - start)
        else:
            data[start:end] = draw.randbytes(end - start)
        data = data or bytearray(b" ")
    return bytes(data)


@contextmanager
def copied(sound: Path, files: dict[str, bytes | None]) -> Iterator[Path]:
    """Yield a copy of a folder in which some files have other contents, or are gone."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, sound.name)
        shutil.copytree(sound, copy, copy_function=shutil.copyfile)
        for name, content in files.items():
            (copy / name).unlink(missing_ok=True)
            if content is not None:
                (copy / name).write_bytes(content)
        yield copy


def read_all(readers: list[Callable[[], object]], refusals: tuple[type[Exception], ...]) -> None:
    """Call all readers, and raise the first refusal once all have been called."""
    refusal: Exception | None = None
    for reader in readers:
        try:
            reader()
        except refusals as error:
            if not str(error):
                raise AssertionError("an empty sentence") from error
            refusal = refusal or error
    if refusal is not None:
        raise refusal
