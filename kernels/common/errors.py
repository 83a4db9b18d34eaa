"""How commands end: the exit statuses, the exceptions that one sentence explains, and the message for an unknown name.

A `UserError` says what is wrong, where, and what would be right. Exceptions that are no `Failure` are bugs: commands
print a traceback and exit with status 1.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable


class ExitStatus(enum.IntEnum):
    """What a command's exit status means; the table in docs/training.md says what to do about each."""

    DONE = 0  # or stopped by a signal, and saved
    FAILED = 1  # a bug or the machine; there is a traceback, or a sentence
    REFUSED = 2  # bad input: the same command is refused again
    DIVERGED = 3  # the numbers are no longer finite: the same command fails again
    HUNG = 4  # no progress, and the watchdog ended it: the same command goes on
    TRY_AGAIN = 75  # a lost node, a disk, a port: the same command may succeed later (EX_TEMPFAIL of sysexits.h)


class Failure(Exception):
    """An end of a command that one sentence explains; commands print it and exit with `status`."""

    status = ExitStatus.FAILED


class UserError(Failure):
    """Invalid input, described in one sentence; commands print it and exit with status 2."""

    status = ExitStatus.REFUSED


class TryAgain(UserError):
    """What cannot be done now, and may be later; commands print why and exit with status 75."""

    status = ExitStatus.TRY_AGAIN


class PeerLost(Failure):
    """Another rank is gone, and nobody knows why; commands print so and exit with status 75."""

    status = ExitStatus.TRY_AGAIN


class Crash(Failure):
    """An exception whose traceback was printed, perhaps by another rank; commands print a sentence and exit with status 1."""


class Diverged(Failure):
    """Training whose numbers are no longer finite; commands print why and exit with status 3."""

    status = ExitStatus.DIVERGED


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return `"did you mean 'x'? "` for a near miss among `choices`, in any case, else an empty string."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f"did you mean {by_lower[near[0]]!r}? " if near else ""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """Return the error for a name that is not among `choices`, with a suggestion for a near miss."""
    choices = sorted(choices)
    return UserError(f"unknown {kind} {name!r}: {suggest(name, choices)}choose from {', '.join(choices)}")
