"""The run folder, the authoritative record of a run. W&B and TensorBoard hold copies.

runs/<name>/config.yaml      the configuration, every key resolved
            metrics.jsonl    one JSON object per line: kind, step, tokens, then figures (metrics_file.py)
            summary.json     how the run ended
            documents.json   the loss of each held-out document in the last evaluation of them all
            checkpoints/     (checkpoint.py)
            run_id           the name of the run in its checkpoints, written with the first of them
            provenance.json  date, commit, machine, versions and command of each session, newest last
            samples.txt      text that the model generated, by step
            deepspeed.log    the output of DeepSpeed and other libraries
            heartbeats/      what each rank is doing, while the run is alive (launch/heartbeats.py)
            stacks/          what each rank was doing when the run hung, or when launch.stacks asked
            ending.json      how the last session ended (launch/endings.py)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conf.identity import differences, how_to_go_on
from conf.load import from_yaml, has_trained, to_yaml
from conf.schema import Config
from conf.validate import total_steps
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, explain_os_errors, naming
from kernels.common.json_files import (
    DOCUMENTS,
    is_provenance,
    parse,
    read_bytes,
    read_document_losses,
    read_metrics_file,
    read_summary,
)
from launch import heartbeats
from model.manifest import run_of
from model.weights import checkpoints
from training.metrics_file import MetricsFile

_PROVENANCE = "provenance.json"
_RUN_ID = "run_id"
_FILES = ("config.yaml", "metrics.jsonl", "summary.json", DOCUMENTS, _RUN_ID, _PROVENANCE, "samples.txt", "deepspeed.log",
          ".lock")  # fmt: skip
LOCK_TIMEOUT_SECONDS = 1.0  # `ablation` holds the lock for a moment to check whether a run is alive


class RunFolder:
    """A run's folder. Every rank may construct one; only rank 0 calls the methods that write."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.runs) / str(config.run)
        self.metrics = MetricsFile(self.path)
        # Without filelock's fallback to a file that outlives a killed process: the kernel releases this lock with its process.
        self._lock = FileLock(self.path / ".lock", fallback_to_soft=False)
        self.previous_steps: int | None = None  # length of the run before this session; None: it is new
        self.run_id: str | None = None  # None: unknown, or this run has saved no checkpoint yet
        self.trained = False  # whether this session has taken a step
        self._created: list[Path] = []  # by this session: the folder, and those that it is in
        self._previous_config: bytes | None = None  # config.yaml as this session found it
        self._wrote_config = False

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def claim(self, config: Config) -> list[str]:
        """Create the folder, or take over that of a run that this configuration continues, and lock it for this process.

        Returns:
            Warnings about files that cannot be read.

        Raises:
            UserError: another process trains in it, it holds a run with other settings, or it cannot be written.
        """
        with explain_os_errors("write to the run folder", self.path):
            self._created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        _refuse_irregular(self.path)
        self._acquire_lock()
        self.run_id = self._own_id()
        config_path = self.path / "config.yaml"
        warnings = []
        if has_trained(self.path):
            if not config.resume:
                raise UserError(f"{self.path} holds a run and resume=false: give this run another name (run=NAME)")
            if config_path.exists():
                warnings = self._compare(config_path, config)
        if config_path.exists():
            with explain_os_errors("read", config_path):
                self._previous_config = config_path.read_bytes()
        with explain_os_errors("write to the run folder", self.path), atomic_write(config_path) as file:
            file.write(to_yaml(config))
        self._wrote_config = True
        return warnings

    def _own_id(self) -> str | None:
        """Return the name that this run has in its checkpoints; None if nothing tells.

        metrics.jsonl and summary.json repeat it, so run_id may be gone, or be another run's: a checkpoint must have it too.
        """
        try:
            lines = read_metrics_file(self.metrics.path, b'"run_id"').lines
        except OSError:
            lines = []
        told = [read_run_id(self.path), *(line.get("run_id") for line in lines[-1:]), self.read_summary().get("run_id")]
        told = [run_id for run_id in told if isinstance(run_id, str)]
        stored = {run_of(path) for path in checkpoints(self.checkpoints)}
        return next((run_id for run_id in told if run_id in stored), told[0] if told else None)

    def _acquire_lock(self) -> None:
        try:
            with explain_os_errors("write to the run folder", self.path):
                self._lock.acquire(timeout=LOCK_TIMEOUT_SECONDS)
        except Timeout as error:
            self._created = []
            raise UserError(
                f"another process is training in {self.path}: wait for it, or give this run another name (run=NAME)"
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot lock {self.path / '.lock'} ({error.strerror}): set runs to a folder on another file system"
            ) from error

    def _compare(self, config_path: Path, config: Config) -> list[str]:
        """Compare the settings of the run with those of this configuration; return warnings.

        Raises:
            UserError: it is another run, or neither config.yaml nor the checkpoints tell.
        """
        try:
            previous = from_yaml(config_path)
        except UserError as error:
            if self.run_id is None:  # checkpoints of a run that has one hold its settings
                raise UserError(f"{error}: bring it back, or give this run another name (run=NAME)") from error
            return [f"{error}; the settings are compared with those of the checkpoints"]
        changed = differences(previous, config)
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings ({'; '.join(changed)}): {how_to_go_on(changed)}"
            )
        self.previous_steps = total_steps(previous)
        return []

    def discard(self) -> None:
        """Undo `claim` if this session took no step: remove the folders that it created, or restore config.yaml."""
        if self.trained:
            return
        with contextlib.suppress(OSError):
            beats = heartbeats.folder_of(self.path)
            # First, so that other ranks write none while it is removed.
            beats.rename(beats.with_name(".heartbeats.old"))
        shutil.rmtree(self.path / ".heartbeats.old", ignore_errors=True)
        if self._created:
            self.metrics.close()
            shutil.rmtree(self.path, ignore_errors=True)
            for folder in self._created[1:]:
                with contextlib.suppress(OSError):  # other runs are in it
                    folder.rmdir()
        elif self._previous_config is not None:
            with contextlib.suppress(OSError), atomic_write(self.path / "config.yaml", "wb") as file:
                file.write(self._previous_config)
        elif self._wrote_config:
            with contextlib.suppress(OSError):
                (self.path / "config.yaml").unlink(missing_ok=True)

    def refuse_to_start_over(self) -> None:
        """Refuse to train from step 1 in a folder whose run has saved a checkpoint, now that it has none.

        A run that ended before its first checkpoint starts over.

        Raises:
            UserError: there is such a run.
        """
        try:
            with naming(self.metrics.path):
                _, lines, unreadable, _ = read_metrics_file(self.metrics.path)
        except FileNotFoundError:
            lines, unreadable = [], 0
        summary = self.read_summary()
        saved = any(line.get("event") in ("saved", "imported", "resumed") for line in lines) or (
            unreadable and not lines
        )
        ended = summary.get("status") in ("finished", "stopped") or (
            not summary and (self.path / "summary.json").exists()
        )
        if saved or ended or (self.path / _RUN_ID).exists():
            raise UserError(
                f"{self.path} holds a run of {max((line['step'] for line in lines), default=0)} steps and no checkpoint of it: "
                f"bring its checkpoints back, give this run another name (run=NAME), or delete {self.path} to train it again"
            )

    def write_run_id(self) -> None:
        """Write the file `run_id`, unless it is there.

        Raises:
            OSError: it cannot be written.
        """
        if self.run_id is not None and read_run_id(self.path) != self.run_id:
            with atomic_write(self.path / _RUN_ID) as file:
                file.write(f"{self.run_id}\n")

    def refuse_fewer_steps(self, steps: int, done: int) -> None:
        """Refuse a length that the run has reached already at the learning rate of a longer one.

        Args:
            done: steps of the checkpoint that the run would go on from.

        Raises:
            UserError: it is at or beyond `steps`, and was not meant to be the last.
        """
        if self.previous_steps is None or done < steps or done == steps == self.previous_steps:
            return
        state = "has finished its" if done == self.previous_steps else f"has trained {done} of"
        raise UserError(
            f"{self.path} {state} {self.previous_steps} steps, so it cannot end after {steps}: "
            f"set steps to more than {done}, or give this run another name (run=NAME)"
        )

    def rewind(self, step: int, repeats_evaluation: bool = False) -> int:
        """Delete what a resumed run writes again: summary, losses of documents, ending, metrics after `step`, unreadable lines.

        Args:
            repeats_evaluation: delete the evaluations of `step` as well.

        Returns:
            How many lines could not be read, not counting the last one where a killed process left it incomplete.
        """
        self.metrics.close()  # the file is replaced
        self.metrics.drop_unwritten(step)
        with explain_os_errors("read", self.metrics.path):
            kept, unreadable = self.metrics.lines_until(step, repeats_evaluation)
        with explain_os_errors("write to the run folder", self.path):
            losses = read_document_losses(self.path)
            outdated = losses is None or losses.step > step or (repeats_evaluation and losses.step == step)
            for name in ("summary.json", "ending.json", *([DOCUMENTS] if outdated else [])):
                (self.path / name).unlink(missing_ok=True)
            self.metrics.replace(kept)
        return unreadable

    def append_samples(self, text: str) -> None:
        """Append text to samples.txt.

        Raises:
            OSError: it cannot be written.
        """
        with naming(self.path / "samples.txt"), open(self.path / "samples.txt", "a", encoding="utf-8") as file:
            file.write(text)

    def append_provenance(self, content: dict[str, Any]) -> None:
        """Add this session to provenance.json.

        Raises:
            UserError: it cannot be written.
        """
        sessions = provenances(self.path)
        with explain_os_errors("write to the run folder", self.path), atomic_write(self.path / _PROVENANCE) as file:
            json.dump([*sessions, content], file, indent=1)
            file.write("\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace summary.json."""
        with atomic_write(self.path / "summary.json") as file:
            json.dump(summary, file, indent=2)
            file.write("\n")

    def write_document_losses(self, step: int, losses: dict[str, Any]) -> None:
        """Replace documents.json by the losses of a step."""
        with atomic_write(self.path / DOCUMENTS) as file:
            json.dump({"step": step, **losses}, file)
            file.write("\n")

    def read_summary(self) -> dict[str, Any]:
        """Return summary.json, or {} if there is none that can be read."""
        try:
            return read_summary(self.path / "summary.json")
        except (OSError, ValueError):
            return {}

    def finished_summary(self, step: int) -> dict[str, Any]:
        """Return the summary of a run that has finished after `step` steps; {} if summary.json is not that of this run."""
        summary = self.read_summary()
        if summary.get("status") != "finished" or summary.get("steps") != step:
            return {}
        figures = {key: summary.get(key) for key in ("final_eval_loss", "bits_per_byte")}
        whole = all(figure is None or isinstance(figure, float) for figure in figures.values())
        return summary | figures if whole and summary.get("run_id") in (None, self.run_id) else {}

    def close(self) -> None:
        """Sync metrics.jsonl if possible, and release the lock."""
        self.metrics.close(sync=True)
        self._lock.release()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Redirect the output of libraries, Python or C++, to deepspeed.log while entered."""
        with explain_os_errors("write to the run folder", self.path):
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


def read_run_id(run: Path) -> str | None:
    """Return the name that a run has in its checkpoints; None if the folder does not tell."""
    with contextlib.suppress(OSError, ValueError):
        text = read_bytes(run / _RUN_ID, 100).decode("ascii").strip()
        return text if re.fullmatch(r"[0-9a-f]{32}", text) else None
    return None


def _refuse_irregular(run: Path) -> None:
    """Refuse a pipe, a folder or a socket by the name of a file: to open it could wait for ever.

    Raises:
        UserError: there is one.
    """
    for name in _FILES:
        with contextlib.suppress(OSError):  # most often: there is no such file
            mode = (run / name).stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):
                raise UserError(f"{run / name} is not a file: move it away, or give this run another name (run=NAME)")


def provenances(run: Path) -> list[dict[str, Any]]:
    """Return the provenance of each session of a run; [] if the run has none."""
    try:
        sessions = parse(read_bytes(run / _PROVENANCE, 1 << 26))
    except (OSError, ValueError):
        return []
    return [session for session in sessions if is_provenance(session)] if isinstance(sessions, list) else []


def newest_provenance(run: Path) -> dict[str, Any]:
    """Return the provenance of a run's newest session; {} if the run has none."""
    return (provenances(run) or [{}])[-1]
