"""Read the state of a run from its folder alone, so that a report works wherever the folders were copied to."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
from pathlib import Path
from typing import Any

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
    summary = _read_json(run / "summary.json")
    lines = read_metrics(run)[0] if lines is None else lines
    step = lines[-1]["step"] if lines else 0
    if any(line.get("event") == "diverged" for line in lines):
        return Outcome(DIVERGED, step, summary=summary)
    status = summary.get("status")
    if status == "finished":
        loss = summary.get("final_eval_loss")
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            return Outcome(FINISHED, step, float(loss), summary)
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
    lines: list[dict[str, Any]] = []
    broken = 0
    try:
        text = (run / "metrics.jsonl").read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return [], 0
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and {"kind", "step"} <= record.keys():
            lines.append(record)
        else:
            broken += 1
    return lines, broken


def is_finite(value: Any) -> bool:
    """Return whether a JSON value is a number other than nan and infinity."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
