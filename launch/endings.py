"""How a session of a run ended: `ending.json` in its folder, whatever ended it, unless it was killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

from kernels.common.files import atomic_write
from kernels.common.json_files import read_object

_SKEW = 2.0  # seconds between the clocks of a node and of a file server


@dataclasses.dataclass(frozen=True)
class SessionEnding:
    """The end of a session."""

    status: str  # finished, stopped, failed, diverged, hung, ...
    exit_status: int
    reason: str = ""  # in one sentence; "": nothing went wrong
    rank: int | None = None  # the one that ended it, or that the others waited for
    step: int = 0  # steps that are done
    time: str = dataclasses.field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))


def write_ending(run: Path, ending: SessionEnding) -> None:
    """Write how a session ended, if that is possible."""
    with contextlib.suppress(OSError), atomic_write(run / "ending.json") as file:
        json.dump(dataclasses.asdict(ending), file, indent=1)
        file.write("\n")


def claim_ending(run: Path, ending: SessionEnding, since: float = 0.0) -> SessionEnding:
    """Write how a session ended, unless another rank has; return the ending that counts.

    Args:
        since: time.time() of the session's start: what is older is of an earlier one.
    """
    if read_ending(run, since) is None:
        with contextlib.suppress(OSError):
            (run / "ending.json").unlink(missing_ok=True)
    temporary = run / f".ending.{os.getpid()}.tmp"
    try:
        temporary.write_text(json.dumps(dataclasses.asdict(ending), indent=1) + "\n", encoding="utf-8")
        os.link(temporary, run / "ending.json")  # unlike a rename it replaces nothing
    except FileExistsError:
        return read_ending(run) or ending
    except OSError:
        return ending
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return ending


def read_ending(run: Path, since: float = 0.0) -> SessionEnding | None:
    """Return how the last session of a run ended, if after `since`; None if the folder does not tell."""
    try:
        if (run / "ending.json").stat().st_mtime < since - _SKEW:
            return None
        return SessionEnding(**read_object(run / "ending.json", 1 << 20))
    except (OSError, ValueError, TypeError):
        return None
