"""Standard streams that cannot end a program, whether its terminal is gone, its reader has left or its disk is full."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


class LossyStream:
    """A text stream whose output is dropped while it cannot be written; everything else is the stream's own.

    >>> full = LossyStream(open("/dev/full", "w", buffering=1))
    >>> full.write("a line\\n")
    7
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text if possible; return its length in any case."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_console() -> None:
    """Let this process go on where standard output and standard error cannot be written any more.

    Call it before files are opened: the first one would take the number of a closed stream, and what a library prints would
    be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        setattr(sys, name, LossyStream(stream))
