"""The exception for mistakes of the user, and the message for an unknown name.

A `UserError` is one sentence: what is wrong, where, and what would be right. Commands print it and exit with status 2; other
exceptions are bugs and print a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Invalid input, described in one sentence; commands print it and exit with status 2."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return `"did you mean 'x'? "` for a near miss among `choices`, in any case, else an empty string."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f"did you mean {by_lower[near[0]]!r}? " if near else ""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """Return the error for a name that is not among `choices`, with a suggestion for a near miss."""
    choices = sorted(choices)
    return UserError(f"unknown {kind} {name!r}: {suggest(name, choices)}choose from {', '.join(choices)}")
