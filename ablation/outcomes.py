"""Read the state of a run from its folder alone, so that a report works wherever the folders were copied to."""

from __future__ import annotations

import dataclasses
import fcntl
import math
import typing
from pathlib import Path
from typing import Any

from kernels.common.json_files import is_number, read_metrics_file, read_summary

WAITING = "waiting"
QUEUED = "queued"  # by SLURM, which only `ablation.slurm` knows
RUNNING = "running"
STOPPED = "stopped"
FAILED = "failed"
DIVERGED = "diverged"
FINISHED = "finished"
ENDED = (DIVERGED, FINISHED)  # these are never run again


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The state of a run, and its result where there is one."""

    state: str
    step: int = 0  # of the last line of metrics.jsonl
    loss: float = math.nan  # final held-out loss, nats per token; nan unless finished
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of the runs that have started in a plan's folder."""
    return sorted(path.parent for path in (folder / "runs").glob("*/config.yaml"))


def read_outcome(run: Path, lines: list[dict[str, Any]] | None = None) -> Outcome:
    """Return the outcome of the run in a folder. A run with neither folder nor log is waiting.

    Args:
        lines: the run's metrics, where the caller has read them already.
    """
    try:
        summary = read_summary(run / "summary.json")
    except (OSError, ValueError):
        summary = {}
    lines = read_metrics(run)[0] if lines is None else lines
    step = lines[-1]["step"] if lines else 0
    if any(line.get("event") == "diverged" for line in lines):
        return Outcome(DIVERGED, step, summary=summary)
    status = summary.get("status")
    if status == "finished":
        loss = summary.get("final_eval_loss")
        if is_finite(loss):
            return Outcome(FINISHED, step, float(typing.cast(float, loss)), summary)
        return Outcome(DIVERGED, step, summary=summary)
    if is_running(run):  # whatever an earlier process wrote
        return Outcome(RUNNING, step, summary=summary)
    if status == "failed":
        return Outcome(FAILED, step, summary=summary)
    # A run that was killed leaves no summary, and one that found its input invalid leaves its log alone.
    started = (run / "config.yaml").exists() or log_path(run).exists()
    return Outcome(STOPPED if started else WAITING, step, summary=summary)


def log_path(run: Path) -> Path:
    """Return where a plan's runner keeps the output of the run in a folder."""
    return run.parents[1] / "logs" / f"{run.name}.log"


def is_running(run: Path) -> bool:
    """Return whether a process on this machine is training in a folder, that is, holds the folder's lock."""
    try:
        with open(run / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of metrics.jsonl, and the number of unreadable ones: a run that was killed leaves half a line."""
    try:
        _, lines, unreadable, partial = read_metrics_file(run / "metrics.jsonl")
    except FileNotFoundError:
        return [], 0
    except OSError:  # a folder or a pipe of that name
        return [], 1
    return lines, unreadable + partial


def is_finite(value: Any) -> bool:
    """Return whether a JSON value is a number other than nan and infinity."""
    return is_number(value) and math.isfinite(value)
