"""Read JSON that anything may have happened to: damaged, of another program, or a pipe by the name of a file.

Only regular files are opened, so no read waits for a writer. Size and depth are bounded, and whatever does not parse is a
ValueError, deep nesting included.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from typing import Any, NamedTuple

_BLOCK = 1 << 24  # bytes of a read
_LONGEST_LINE = 1 << 24  # bytes of a line of JSON


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a regular file for reading, unbuffered; a link to one is one.

    Raises:
        OSError: it is missing, cannot be read, or is a folder, a pipe or a device (EINVAL).
    """
    # Opening a pipe waits for its writer, unless it is opened like this.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return open(descriptor, "rb", buffering=0)


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the contents of a regular file.

    Raises:
        OSError: it is missing, cannot be read, or is not a regular file.
        ValueError: it has more than `limit` bytes.
    """
    parts, left = [], limit + 1
    with open_regular(path) as file:
        while left > 0 and (part := file.read(min(left, _BLOCK))):  # a read allocates what it asks for
            parts.append(part)
            left -= len(part)
    if left <= 0:
        raise ValueError(f"{os.fspath(path)} has more than {limit} bytes")
    return b"".join(parts)


def parse(text: bytes) -> Any:
    """Return the value that UTF-8 JSON holds.

    Raises:
        ValueError: it is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def read_object(path: str | os.PathLike[str], limit: int = 1 << 24) -> dict[str, Any]:
    """Return the JSON object of a regular file of at most `limit` bytes.

    Raises:
        OSError: it is missing, cannot be read, or is not a regular file.
        ValueError: it is too long, or does not hold a JSON object.
    """
    content = parse(read_bytes(path, limit))
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)} does not hold a JSON object")
    return content


def metrics_line(line: bytes) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, None if it is none: an object with a `kind` and the number of a `step`."""
    if len(line) > _LONGEST_LINE:
        return None
    try:
        record = parse(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    step = record.get("step")
    return record if type(step) is int and 0 <= step < 1 << 62 else None


class MetricsFile(NamedTuple):
    """The contents of a metrics.jsonl."""

    texts: list[bytes]  # the lines that can be read, as they are
    lines: list[dict[str, Any]]  # and parsed
    unreadable: int  # how many others there are
    partial: bool  # whether a last one was not completed, as a process that was killed leaves it; it is not among these


def read_metrics_file(path: str | os.PathLike[str], with_text: bytes = b"") -> MetricsFile:
    """Read a metrics.jsonl.

    Args:
        with_text: leave out, unparsed, the lines that do not contain this.

    Raises:
        OSError: it is missing, cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        *complete, last = file.read().split(b"\n")
    texts, lines, unreadable = [], [], 0
    for text in (*complete, last):
        if text.strip() and with_text in text:
            line = metrics_line(text)
            if line is not None:
                texts.append(text)
                lines.append(line)
            else:
                unreadable += 1
    partial = bool(last.strip()) and with_text in last and metrics_line(last) is None
    return MetricsFile(texts, lines, unreadable - partial, partial)
