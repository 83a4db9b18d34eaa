"""The run folder: the truth about a run. W&B and TensorBoard only mirror it.

runs/<name>/config.yaml      the configuration, every key resolved
            metrics.jsonl    one JSON object a line: kind, step, tokens, then figures
            summary.json     how the run ended
            checkpoints/     (checkpoint.py)
            samples.txt      what the model wrote, by step
            deepspeed.log    what DeepSpeed had to say
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from conf.errors import UserError
from conf.files import atomic_write, say_why
from conf.load import from_yaml, to_yaml
from conf.schema import Config
from conf.validate import differences

_ATTEMPTS, _PAUSE = 20, 0.05  # at a folder's lock; seconds


class RunFolder:
    """One run's folder. Every rank may hold one; only rank 0 calls what writes."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.runs) / str(config.run)
        self._lock: IO[str] | None = None
        self._metrics: IO[bytes] | None = None
        self._unwritten: list[str] = []  # lines of metrics.jsonl that a full disk refused

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def claim(self, config: Config) -> None:
        """Create the folder, or take one whose run this configuration continues, and lock it for this process.

        Raises:
            UserError: another process trains in it; it holds a run with other settings; it cannot be written.
        """
        with say_why("write to the run folder", self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")
        try:
            _lock(self._lock)
        except OSError as error:
            raise UserError(
                f"another process is training in {self.path}: wait for it, or give this run a name (run=NAME)"
            ) from error
        written = self.path / "config.yaml"
        # A command that was refused before its first step leaves no metrics: its corrected version may take the folder.
        if written.exists() and (self.path / "metrics.jsonl").exists():
            if not config.resume:
                raise UserError(f"{self.path} holds a run and resume=false: give this run another name (run=NAME)")
            changed = differences(from_yaml(written), config)
            if changed:
                raise UserError(
                    f"{self.path} holds a run with other settings ({'; '.join(changed)}): give this one a name (run=NAME)"
                )
        with say_why("write to the run folder", self.path), atomic_write(written) as file:
            file.write(to_yaml(config))

    def rewind(self, step: int) -> None:
        """Drop the summary, the metrics after `step`, and a half-written last line: a resumed run writes them again."""
        path = self.path / "metrics.jsonl"
        with say_why("write to the run folder", self.path):
            (self.path / "summary.json").unlink(missing_ok=True)
            if not path.exists():
                return
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
            with atomic_write(path) as file:
                file.writelines(line + "\n" for line in kept)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl; it is in the kernel's hands before this returns.

        Raises:
            OSError: it cannot be written now. The line is kept, and goes before the next one.
        """
        self._unwritten.append(json.dumps(record, allow_nan=True) + "\n")
        self.write_metrics()

    def write_metrics(self) -> None:
        """Write the lines of metrics.jsonl that could not be written before; OSError as above."""
        if self._metrics is None:
            self._metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)
        while self._unwritten:
            line = self._unwritten[0].encode()
            size = self._metrics.seek(0, os.SEEK_END)
            try:
                written = self._metrics.write(line)
                if written < len(line):  # the first part fitted: the second call says why the rest does not
                    written += self._metrics.write(line[written:])
                if written < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._metrics.name)
            except OSError:
                self._metrics.truncate(size)  # no half line stays
                raise
            self._unwritten.pop(0)

    def append_samples(self, text: str) -> None:
        """Add a sample to samples.txt."""
        with open(self.path / "samples.txt", "a", encoding="utf-8") as file:
            file.write(text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json anew."""
        with atomic_write(self.path / "summary.json") as file:
            json.dump(summary, file, indent=2)
            file.write("\n")

    def read_summary(self) -> dict[str, Any]:
        """Return summary.json, or {} before there is one."""
        try:
            return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def close(self) -> None:
        """Sync metrics.jsonl and release the lock."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Send what libraries print, Python or C++, to deepspeed.log instead of the console."""
        log = os.open(self.path / "deepspeed.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        try:
            os.dup2(log, 1)
            os.dup2(log, 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            os.close(log)


def _lock(file: IO[str]) -> None:
    """Lock a file for this process. Who only asks whether a run is alive (`ablation/outcomes.py`) holds the lock for a moment.

    Raises:
        OSError: another process holds it for a second.
    """
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_PAUSE)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
