"""`metrics.jsonl`, the record of a run line by line: what is written stays, and a line that the disk refuses is kept for later.

`recorder.py` makes the lines; `kernels/common/json_files.py` reads them wherever they were copied to.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from kernels.common.files import atomic_write, naming
from kernels.common.json_files import read_metrics_file

_NAME = "metrics.jsonl"


class MetricsFile:
    """The file of a run's folder. Only rank 0 calls the methods that write."""

    def __init__(self, run: Path) -> None:
        self.path = run / _NAME
        self._file: IO[bytes] | None = None
        self._unwritten: list[str] = []  # lines that could not be written, in order

    def append(self, record: dict[str, Any]) -> None:
        """Append one line. A killed process does not lose it: nothing is buffered here.

        Raises:
            OSError: it cannot be written now. The line is kept, and written before the next one.
        """
        self._unwritten.append(json.dumps(record, allow_nan=True) + "\n")
        self._write()

    def _write(self) -> None:
        """Write the lines that could not be written before.

        Raises:
            OSError: a line cannot be written now. It and those after it are kept.
        """
        if self._file is None:
            self._file = open(self.path, "ab", buffering=0)
        while self._unwritten:
            line = self._unwritten[0].encode()
            size_before = self._file.seek(0, os.SEEK_END)
            try:
                with naming(self.path):
                    written = self._file.write(line)
                    if written < len(line):  # only a part fitted: a second write raises the reason
                        written += self._file.write(line[written:])
                    if written < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._file.truncate(size_before)  # leave no partial line
                raise
            self._unwritten.pop(0)

    def sync(self) -> None:
        """Write the lines that could not be written before, and sync the file.

        Raises:
            OSError: a line cannot be written, or not be synced.
        """
        self._write()
        if self._file is not None:
            with naming(self.path):
                os.fsync(self._file.fileno())

    @property
    def unwritten(self) -> str:
        """Return how many lines wait to be written, as the end of a sentence; "": none."""
        steps = [json.loads(line)["step"] for line in self._unwritten]
        return f"; {len(steps)} line(s) of steps {min(steps)} to {max(steps)} are lost" if steps else ""

    def drop_unwritten(self, step: int) -> None:
        """Forget the lines after `step` that could not be written."""
        self._unwritten = [line for line in self._unwritten if json.loads(line)["step"] <= step]

    def lines_until(self, step: int, repeats_evaluation: bool = False) -> tuple[list[bytes], int]:
        """Return the lines of the file up to `step`, and how many could not be read.

        Args:
            repeats_evaluation: leave out the evaluations of `step`.

        Raises:
            OSError: the file cannot be read.
        """
        texts, lines, unreadable, _ = read_metrics_file(self.path) if self.path.exists() else ([], [], 0, False)
        kept = []
        for text, line in zip(texts, lines, strict=True):
            repeated = repeats_evaluation and (line["kind"], line["step"]) == ("eval", step)
            if line["step"] <= step and not repeated:
                kept.append(text)
        return kept, unreadable

    def replace(self, lines: Iterable[bytes]) -> None:
        """Replace the lines of the file, if there is one. It must be closed.

        Raises:
            OSError: it cannot be written.
        """
        if self.path.exists():
            with atomic_write(self.path, "wb") as file:
                for line in lines:
                    file.write(line + b"\n")

    def recorded_loss(self, step: int, tokens: int) -> float | None:
        """Return the held-out loss of a step on `tokens` tokens, None if the file has none."""
        recorded = (loss for of, on, loss in _evaluations(self.path) if (of, on) == (step, tokens))
        return next(recorded, None)

    def close(self, sync: bool = False) -> None:
        """Close the file until a line is appended; `sync`: sync it before, if possible."""
        if self._file is not None:
            if sync:
                with contextlib.suppress(OSError):
                    os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def periodic_losses(run: Path) -> dict[int, tuple[int, float]]:
    """Return {step: (held-out tokens, loss)} of the periodic evaluations in a run's metrics.jsonl.

    The last step is evaluated twice where `eval_tokens` is less than the held-out set; its first line is the periodic one.
    """
    losses: dict[int, tuple[int, float]] = {}
    for step, tokens, loss in _evaluations(run / _NAME):
        losses.setdefault(step, (tokens, loss))
    return losses


def _evaluations(path: Path) -> Iterator[tuple[int, int, float]]:
    """Yield (step, held-out tokens, loss) of each evaluation in a metrics.jsonl, in order."""
    try:
        lines = read_metrics_file(path, b'"eval"').lines
    except OSError:
        return
    for line in lines:
        if line["kind"] == "eval":
            tokens, loss = line.get("held_out_tokens"), line.get("loss")
            if type(tokens) is int and isinstance(loss, float):
                yield line["step"], tokens, loss
