"""The one exception that means "the person who typed this must act".

Everything that a user can get wrong is raised as `UserError` with one sentence that says what was wrong, where, and what
would be right. Commands print the sentence and exit with status 2; a traceback is kept for bugs of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input, told in one sentence; commands print it and exit with status 2."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return `"did you mean 'x'? "` for a near miss among `choices`, else an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}? " if near else ""


def unknown(kind: str, word: str, choices: Iterable[str]) -> UserError:
    """Build the error for a name that is none of `choices`: a near miss first, then all that would do."""
    choices = sorted(choices)
    return UserError(f"unknown {kind} {word!r}: {suggest(word, choices)}choose from {', '.join(choices)}")
