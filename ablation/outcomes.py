"""How the runs of a plan stand, told from their folders alone: a report can be made wherever the folders were copied to."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
from pathlib import Path
from typing import Any

WAITING, QUEUED, RUNNING, STOPPED, FAILED, DIVERGED, FINISHED = (
    "waiting",
    "queued",  # by SLURM, which only `ablation.slurm` knows
    "running",
    "stopped",
    "failed",
    "diverged",
    "finished",
)
ENDED = (DIVERGED, FINISHED)  # what is not run again


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run stands."""

    state: str
    step: int = 0  # of the last line of its metrics
    loss: float = math.nan  # final held-out loss, nats a token; nan unless finished
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of the runs that have begun in the folder of a plan."""
    return sorted(path.parent for path in (folder / "runs").glob("*/config.yaml"))


def outcome(run: Path, lines: list[dict[str, Any]] | None = None) -> Outcome:
    """Return how the run in a folder stands, whose metrics may be at hand; a folder that is missing is of a run that waits."""
    summary = _json(run / "summary.json")
    lines = read_metrics(run)[0] if lines is None else lines
    step = lines[-1]["step"] if lines else 0
    if any(line.get("event") == "diverged" for line in lines):
        return Outcome(DIVERGED, step, summary=summary)
    status = summary.get("status")
    if status == "finished":
        loss = summary.get("final_eval_loss")
        ends = is_finite(loss)
        return Outcome(FINISHED if ends else DIVERGED, step, float(loss) if ends else math.nan, summary)
    if is_running(run):  # whatever an earlier process wrote
        return Outcome(RUNNING, step, summary=summary)
    if status == "failed":
        return Outcome(FAILED, step, summary=summary)
    begun = (run / "config.yaml").exists()  # one that was killed, or found its input bad, leaves no summary
    return Outcome(STOPPED if begun else WAITING, step, summary=summary)


def is_running(run: Path) -> bool:
    """Return whether a process of this machine trains in a folder: it holds the folder's lock."""
    try:
        with open(run / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of metrics.jsonl, and how many could not be read: the last one, of a run that was killed."""
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
    """Return whether a value that JSON gave is a number that is neither nan nor infinite."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
