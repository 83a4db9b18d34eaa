"""Read JSON that anything may have happened to: damaged, of another program, or a pipe by the name of a file.

Only regular files are opened, so no read waits for a writer. Size and depth are bounded, and whatever does not parse is a
ValueError, deep nesting included. `digest` is the hash by which folders tell that their JSON was changed.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

DOCUMENTS = "documents.json"  # in a run folder: the loss of each held-out document
_BLOCK = 1 << 24  # bytes of a read
_LONGEST_LINE = 1 << 24  # bytes of a line of JSON
_LARGEST = 1 << 62  # whole numbers below this fit into every array
# The types of what runs write to metrics.jsonl and summary.json.
_COUNTS = ("step", "tokens", "held_out_tokens", "window_tokens", "steps", "parameters", "ffn_parameters", "vocab_size",
           "flops_per_token")  # fmt: skip
_NUMBERS = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_gib", "perplexity", "bits_per_byte",
            "xz_bits_per_byte", "final_eval_loss", "wall_seconds")  # fmt: skip
_TEXTS = ("event", "run_id", "status", "data_order_hash", "config_hash")


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


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number that arithmetic can take; nan and infinity are."""
    return type(value) is float or (type(value) is int and abs(value) < _LARGEST)


def is_count(value: Any, below: int = _LARGEST) -> bool:
    """Return whether a JSON value is a whole number from 0 on, below a bound."""
    return type(value) is int and 0 <= value < below


def digest(content: Any, size: int = 8) -> str:
    """Return the hash of JSON-serialisable content: `size` bytes in hexadecimal."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=size).hexdigest()


def metrics_line(line: bytes) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, None if it is none.

    It is an object with a `kind` and the number of a `step`. What else it has may be missing, but is of the right type.
    """
    if len(line) > _LONGEST_LINE:
        return None
    try:
        record = parse(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or not is_count(record.get("step")):
        return None
    return record if _misfit(record, record["kind"] == "telemetry") is None else None


def _misfit(record: dict[str, Any], is_telemetry: bool) -> str | None:
    """Return the first key whose value is of another type than runs write, in a line of metrics.jsonl or a summary.json.

    A report reads every line of every run: no function is called for a value that has the usual type.
    """
    for key, value in record.items():
        if (fits := _FITS.get(key)) is not None:
            if not fits(value):
                return key
        elif is_telemetry and key != "kind":
            for each in value if type(value) is list else (value,):
                if type(each) is not float and each is not None and not is_number(each):
                    return key
    return None


def is_provenance(value: Any) -> bool:
    """Return whether a JSON value is a provenance: an object of texts, with the versions of packages."""
    if not isinstance(value, dict) or not isinstance(value.get("versions", {}), dict):
        return False
    texts = [*value.get("versions", {}).values(), *(value[key] for key in value.keys() - {"versions", "dirty"})]
    return all(text is None or isinstance(text, str) for text in texts)


_FITS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_COUNTS, lambda value: value is None or is_count(value)),
    **dict.fromkeys(_NUMBERS, lambda value: value is None or type(value) is float or is_number(value)),
    **dict.fromkeys(_TEXTS, lambda value: value is None or isinstance(value, str)),
    "provenance": is_provenance,
}


def read_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a run's summary.json.

    Raises:
        OSError: it is missing, cannot be read, or is not a regular file.
        ValueError: it is no JSON object, or one of its values is of another type than `train.py` writes.
    """
    summary = read_object(path)
    if (key := _misfit(summary, is_telemetry=False)) is not None:
        raise ValueError(f"{key} is no value of a summary")
    return summary


class DocumentLosses(NamedTuple):
    """The contents of a documents.json."""

    step: int
    held_out: str  # hash of the held-out text
    nats: list[float]  # of each document or folder, or of neighbouring ones together
    tokens: list[int]  # of the same
    unit: str = "documents"  # or folders


def read_document_losses(run: str | os.PathLike[str]) -> DocumentLosses | None:
    """Return the losses in a run folder by held-out document; None if it has none that can be read."""
    try:
        content = read_object(os.path.join(run, DOCUMENTS))
    except (OSError, ValueError):
        return None
    step, text, nats, tokens = (content.get(key) for key in ("step", "held_out", "nats", "tokens"))
    unit = "folders" if content.get("unit") == "folders" else "documents"
    if not is_count(step) or not isinstance(text, str) or not isinstance(nats, list) or not isinstance(tokens, list):
        return None
    right = len(nats) == len(tokens) and all(map(is_number, nats)) and all(is_count(n) and n for n in tokens)
    return DocumentLosses(typing.cast(int, step), text, nats, tokens, unit) if right and tokens else None


class MetricsLines(NamedTuple):
    """The contents of a metrics.jsonl."""

    texts: list[bytes]  # the lines that can be read, as they are
    lines: list[dict[str, Any]]  # and parsed
    unreadable: int  # how many others there are
    partial: bool  # whether a last one was not completed, as a process that was killed leaves it; it is not among these


def read_metrics_file(path: str | os.PathLike[str], with_text: bytes = b"") -> MetricsLines:
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
    return MetricsLines(texts, lines, unreadable - partial, partial)
