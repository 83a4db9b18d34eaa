"""URLs of text: which texts are URLs, what a URL must not hold, and the environment variables that it names instead.

A run writes `data.path` into its config.yaml, into job scripts and into messages, so no password or signature may stand in it.
`$NAME` stands there instead, and `data/remote.py` puts in the value of the environment variable when it opens the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote

from kernels.common.errors import UserError
from kernels.common.text import is_secret, redact

PLACE_OF_TEXT = re.compile(r"data\.(.+\.)?path")  # the keys whose values say where text lies
_URL = re.compile(r"[a-z][a-z0-9+.-]+(://|::)", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"]*", re.IGNORECASE)  # inside of a text
_VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")
# Parameters of signed addresses that `is_secret` does not know, by the words in their names.
_SIGNATURE = re.compile(r"(sig|signature|auth|authorization|sas|code|pass|pwd)", re.IGNORECASE)


def is_url(entry: object) -> bool:
    """Return whether an entry of data.path is a URL such as s3://bucket/text, and no path on this machine."""
    return bool(_URL.match(str(entry)))


def entries_of(paths: Any) -> list[str]:
    """Return the entries of a `data.path`, which is one or a list of them."""
    return [str(entry) for entry in (paths if isinstance(paths, (list, tuple)) else [paths])]


def refuse_secrets(key: str, text: str) -> None:
    """Refuse a text with URLs, the value of `key`, that writes out a secret.

    Raises:
        UserError: it does. The sentence does not repeat the secret.
    """
    for found in _ADDRESS.findall(text):
        # A list may have been typed without spaces: what follows a comma may be another address, or the rest of this one.
        for address in {found, *re.split(r",(?=[A-Za-z][A-Za-z0-9+.-]*://)", found)}:
            if what := _secret_in(address):
                raise UserError(
                    f"{key} has a URL with {what}, which would be written into the files of a run: put the secret into an "
                    f"environment variable and write $NAME in its place, in single quotes"
                )


def _secret_in(address: str) -> str:
    """Return what a URL gives away, as a noun; "" if nothing."""
    scheme, _, rest = address.partition("://")
    host, _, tail = re.match(r"([^/?#]*)([/?#]?)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    user, at, place = host.rpartition("@")
    name, colon, password = user.partition(":")
    # A token may stand where a user does.
    secret = password if colon else (name if at and scheme.lower() in ("http", "https") else "")
    if secret and not _VARIABLE.fullmatch(secret):
        return "a password or token before the host"
    port = re.sub(r"^\[[^\]]*\]", "", place).partition(":")[2]
    if port and not port.isdigit() and "@" in tail:  # a password with a slash
        return "a password before the host"
    for name, value in parse_qsl(
        re.sub(r"^[^?#]*[?#]", "", tail).replace("#", "&") if re.search(r"[?#]", tail) else ""
    ):
        known = is_secret(name) or any(_SIGNATURE.fullmatch(word) for word in re.split(r"[^A-Za-z0-9]+", name))
        if known and not _VARIABLE.fullmatch(value):
            return f"the secret parameter {name}"
    return ""


def expand(url: str, environment: Mapping[str, str] = os.environ) -> tuple[str, dict[str, str]]:
    """Return a URL with the values of the environment variables that it names, and these: {value: "$NAME"}.

    Raises:
        UserError: a variable is not set.
    """
    values: dict[str, str] = {}
    for name in _VARIABLE.findall(url):
        if not environment.get(name):
            raise UserError(f"{url} names the environment variable {name}, which is not set")
        values[environment[name]] = f"${name}"
    return _VARIABLE.sub(lambda match: environment[match[1]], url), values


def hide(text: str, values: Mapping[str, str]) -> str:
    """Return a text with `$NAME` in place of the values that `expand` put in, in whatever form a library writes them."""
    for value, name in sorted(values.items(), key=lambda pair: len(pair[0]), reverse=True):
        for form in (value, quote(value, safe=""), quote(value)):
            text = text.replace(form, name)
    return text


def without_secrets(message: str, values: Mapping[str, str]) -> str:
    """Return a library's message without secrets: also addresses that a server redirected to lose what signs them."""
    text = hide(message, values)
    text = re.sub(r"(\w+://)(?:[^\s/@'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?", r"\1\2", text)
    return redact(text)


def refuse_secrets_in(values: Iterable[tuple[str, Any]]) -> None:
    """Refuse secrets in the values of keys: (key, an entry or a list of them) each.

    Raises:
        UserError: see `refuse_secrets`.
    """
    for key, value in values:
        for entry in entries_of(value):
            refuse_secrets(key, entry)
