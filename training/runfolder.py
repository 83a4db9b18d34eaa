"""The run folder, the authoritative record of a run. W&B and TensorBoard hold copies.

runs/<name>/config.yaml      the configuration, every key resolved
            metrics.jsonl    one JSON object per line: kind, step, tokens, then figures
            summary.json     how the run ended
            checkpoints/     (checkpoint.py)
            provenance.json  date, commit, machine, versions and command of each session, newest last
            samples.txt      text that the model generated, by step
            deepspeed.log    the output of DeepSpeed and other libraries
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from conf.load import from_yaml, to_yaml
from conf.schema import Config
from conf.validate import differences, total_steps
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, explain_os_errors
from model.weights import checkpoints, step_of

_PROVENANCE = "provenance.json"
LOCK_TIMEOUT_SECONDS = 1.0  # `ablation` holds the lock for a moment to check whether a run is alive


class RunFolder:
    """A run's folder. Every rank may construct one; only rank 0 calls the methods that write."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.runs) / str(config.run)
        # Without filelock's fallback to a file that outlives a killed process: the kernel releases this lock with its process.
        self._lock = FileLock(self.path / ".lock", fallback_to_soft=False)
        self.previous_steps: int | None = None  # length of the run before this session; None: it is new
        self.trained = False  # whether this session has taken a step
        self._created = False  # whether this session created the folder
        self._previous_config: bytes | None = None  # config.yaml as this session found it
        self._metrics: IO[bytes] | None = None
        self._unwritten: list[str] = []  # lines of metrics.jsonl that could not be written, in order

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def claim(self, config: Config) -> None:
        """Create the folder, or take over that of a run that this configuration continues, and lock it for this process.

        Raises:
            UserError: another process trains in it, it holds a run with other settings, or it cannot be written.
        """
        with explain_os_errors("write to the run folder", self.path):
            self._created = not self.path.exists()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            with explain_os_errors("write to the run folder", self.path):
                self._lock.acquire(timeout=LOCK_TIMEOUT_SECONDS)
        except Timeout as error:
            self._created = False
            raise UserError(
                f"another process is training in {self.path}: wait for it, or give this run another name (run=NAME)"
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot lock {self.path / '.lock'} ({error.strerror}): set runs to a folder on another file system"
            ) from error
        config_path = self.path / "config.yaml"
        # A command that failed before its first step leaves no metrics, so its corrected version may reuse the folder.
        if config_path.exists() and (self.path / "metrics.jsonl").exists():
            if not config.resume:
                raise UserError(f"{self.path} holds a run and resume=false: give this run another name (run=NAME)")
            previous = from_yaml(config_path)
            changed = differences(previous, config)
            if changed:
                raise UserError(
                    f"{self.path} holds a run with other settings ({'; '.join(changed)}): "
                    "give this run another name (run=NAME)"
                )
            self.previous_steps = total_steps(previous)
            self._refuse_fewer_steps(total_steps(config))
        if config_path.exists():
            self._previous_config = config_path.read_bytes()
        with explain_os_errors("write to the run folder", self.path), atomic_write(config_path) as file:
            file.write(to_yaml(config))

    def discard(self) -> None:
        """Undo `claim` if this session took no step: remove the folder that it created, or restore config.yaml."""
        if self.trained:
            return
        if self._created:
            if self._metrics is not None:
                self._metrics.close()
                self._metrics = None
            shutil.rmtree(self.path, ignore_errors=True)
        elif self._previous_config is not None:
            with contextlib.suppress(OSError), atomic_write(self.path / "config.yaml", "wb") as file:
                file.write(self._previous_config)

    def _refuse_fewer_steps(self, steps: int | None) -> None:
        """Refuse a length that the run has reached already at the learning rate of a longer one.

        Raises:
            UserError: the newest checkpoint is at or beyond `steps`, and was not meant to be the last.
        """
        done = next((step_of(path) for path in checkpoints(self.checkpoints)), 0)
        if steps is None or done < steps or done == steps == self.previous_steps:
            return
        state = "has finished its" if done == self.previous_steps else f"has trained {done} of"
        raise UserError(
            f"{self.path} {state} {self.previous_steps} steps, so it cannot end after {steps}: "
            f"set steps to more than {done}, or give this run another name (run=NAME)"
        )

    def recorded_loss(self, step: int, tokens: int) -> float | None:
        """Return the held-out loss of a step on `tokens` tokens as metrics.jsonl has it, None if it has none."""
        recorded = (loss for of, on, loss in _evaluations(self.path) if (of, on) == (step, tokens))
        return next(recorded, None)

    def rewind(self, step: int, repeats_evaluation: bool = False) -> None:
        """Delete the summary, the metrics after `step` and a partial last line: a resumed run writes them again.

        Args:
            repeats_evaluation: delete the evaluations of `step` as well.
        """
        path = self.path / "metrics.jsonl"
        with explain_os_errors("write to the run folder", self.path):
            (self.path / "summary.json").unlink(missing_ok=True)
            if not path.exists():
                return
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    record = json.loads(line)
                    repeated = repeats_evaluation and (record["kind"], record["step"]) == ("eval", step)
                    if record["step"] <= step and not repeated:
                        kept.append(line)
            with atomic_write(path) as file:
                file.writelines(line + "\n" for line in kept)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl. A killed process does not lose it: nothing is buffered here.

        Raises:
            OSError: it cannot be written now. The line is kept, and written before the next one.
        """
        self._unwritten.append(json.dumps(record, allow_nan=True) + "\n")
        self.write_metrics()

    def write_metrics(self) -> None:
        """Write the lines of metrics.jsonl that could not be written before.

        Raises:
            OSError: a line cannot be written now. It and those after it are kept.
        """
        if self._metrics is None:
            self._metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)
        while self._unwritten:
            line = self._unwritten[0].encode()
            size_before = self._metrics.seek(0, os.SEEK_END)
            try:
                written = self._metrics.write(line)
                if written < len(line):  # only a part fitted: a second write raises the reason
                    written += self._metrics.write(line[written:])
                if written < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._metrics.name)
            except OSError:
                self._metrics.truncate(size_before)  # leave no partial line
                raise
            self._unwritten.pop(0)

    def append_samples(self, text: str) -> None:
        """Append text to samples.txt."""
        with open(self.path / "samples.txt", "a", encoding="utf-8") as file:
            file.write(text)

    def append_provenance(self, content: dict[str, Any]) -> None:
        """Add this session to provenance.json.

        Raises:
            UserError: it cannot be written.
        """
        sessions = _sessions(self.path)
        with explain_os_errors("write to the run folder", self.path), atomic_write(self.path / _PROVENANCE) as file:
            json.dump([*sessions, content], file, indent=1)
            file.write("\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace summary.json."""
        with atomic_write(self.path / "summary.json") as file:
            json.dump(summary, file, indent=2)
            file.write("\n")

    def read_summary(self) -> dict[str, Any]:
        """Return summary.json, or {} if there is none."""
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
        self._lock.release()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Redirect the output of libraries, Python or C++, to deepspeed.log while entered."""
        log = os.open(self.path / "deepspeed.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        console = os.dup(1), os.dup(2)
        try:
            os.dup2(log, 1)
            os.dup2(log, 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, duplicate in zip((1, 2), console, strict=True):
                os.dup2(duplicate, descriptor)
                os.close(duplicate)
            os.close(log)


def _sessions(run: Path) -> list[dict[str, Any]]:
    """Return the provenance of each session of a run; [] if the run has none."""
    try:
        return list(json.loads((run / _PROVENANCE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return []


def newest_provenance(run: Path) -> dict[str, Any]:
    """Return the provenance of a run's newest session; {} if the run has none."""
    return (_sessions(run) or [{}])[-1]


def periodic_losses(run: Path) -> dict[int, tuple[int, float]]:
    """Return {step: (held-out tokens, loss)} of the periodic evaluations in a run's metrics.jsonl.

    The last step is evaluated twice where `eval_tokens` is less than the held-out set; its first line is the periodic one.
    """
    losses: dict[int, tuple[int, float]] = {}
    for step, tokens, loss in _evaluations(run):
        losses.setdefault(step, (tokens, loss))
    return losses


def _evaluations(run: Path) -> Iterator[tuple[int, int, float]]:
    """Yield (step, held-out tokens, loss) of each evaluation in a run's metrics.jsonl, in order."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        if b'"eval"' in line:
            with contextlib.suppress(ValueError, KeyError):  # a partial last line
                record = json.loads(line)
                if record["kind"] == "eval":
                    yield record["step"], record["held_out_tokens"], record["loss"]
