"""Text from elsewhere: as a terminal may print it, and without what nobody else may read.

A name, a prompt or a sample can hold control sequences, which move a terminal's cursor, rename its window or hide what was
printed before; a command line can hold a password.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping

# C0 and C1 but tab and newline, line separators, marks that reverse the direction of what follows, and halves of characters,
# which UTF-8 cannot encode.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
HIDDEN = "***"
_SECRET = re.compile(
    r"(\w*(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)|(API|ACCESS|PRIVATE)?(KEY|SECRET|PASSWORD|CREDENTIAL)S|PAT|JWT)"
)
_LONG_ENOUGH = 12  # characters of a value that is looked for in other texts: shorter ones are words
# NAME=VALUE or NAME: VALUE, also inside of an argument, as in {A_KEY: b} and --export=ALL,A_KEY=b; a value may be quoted.
_NAME = re.compile(r"""([A-Za-z_][\w.-]*)["']?\s*[=:]\s*""")
_VALUE = re.compile(r"""\"[^"]*"|'[^']*'|[^\n,;}\]"']+""")


def listed(names: Iterable[object]) -> str:
    """Return names as text: "a", "a and b", "a, b and c"."""
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last


def printable(text: str) -> str:
    r"""Return a text in which control characters are written as their escapes, such as \x1b; tabs and newlines stay."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def is_secret(name: str) -> bool:
    """Return whether a name is that of a secret, such as WANDB_API_KEY, HF_TOKEN or dbPassword; `tokens` is none."""
    words = re.split(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])", name)
    return any(_SECRET.fullmatch(word.upper()) for word in words)


def secrets_of(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that hold a secret, by the name that says so; a path is none."""
    return {
        name: value
        for name, value in environment.items()
        if len(value) >= _LONG_ENOUGH and is_secret(name) and value[0] not in "/~."
    }


def redact(argument: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a text without secrets: the value of NAME=VALUE with a secret's name, and the values of secret variables."""
    name, equals, value = argument.partition("=")
    if equals and re.fullmatch(r"[\w.+-]+", name) and _is_assigned(name, value):
        return f"{name}={HIDDEN}"
    text, end = "", 0
    for _, start, after in _assigned(argument):
        text, end = text + argument[end:start] + HIDDEN, after
    text += argument[end:]
    for value in sorted(secrets_of(environment).values(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text


def assigned_secret(text: str) -> str | None:
    """Return the name of the first secret whose value a text writes out, as in HF_TOKEN=hf_abc; not HF_TOKEN=$(cat file)."""
    return next((name for name, _, _ in _assigned(text)), None)


def _assigned(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each secret that a text writes out, and where its value begins and ends."""
    place = 0
    while name := _NAME.search(text, place):
        value, place = _VALUE.match(text, name.end()), name.end()
        if value and _is_assigned(name[1], value[0]):
            yield name[1], value.start(), value.end()
            place = value.end()


def _is_assigned(name: str, value: str) -> bool:
    return is_secret(name) and value.strip("\"'")[:1] not in ("", "$", "`")


def command_text(arguments: Iterable[str]) -> str:
    """Return arguments as one line that a shell reads back, without secrets and control characters."""
    return shlex.join(printable(redact(argument)) for argument in arguments)
