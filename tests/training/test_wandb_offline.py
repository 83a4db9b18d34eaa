"""A killed and resumed run, as W&B recorded it offline: the numbers of metrics.jsonl, under one id."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.started import Started
from tests.training.tiny import PATIENCE, ROOT, command, newest_intact, overrides

# test_loggers.py has runs that the real wandb writes offline, without a training around them.
pytestmark = pytest.mark.slow
STEPS = 100
ROWS = 10  # of the killed process, which its file must hold
LABELS = {"group": "a plan", "job_type": "an arm", "tags": ["size:nano", "stage:final"]}


def figures(line: dict[str, Any]) -> dict[str, float]:
    """Return what W&B must hold of a line of metrics.jsonl: its numbers, and each number of its lists."""
    numbers = {}
    for name, value in line.items():
        for place, number in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(number, (int, float)):
                numbers[f"{line['kind']}/{name}" if place is None else f"{line['kind']}/{name}/layer_{place}"] = number
    return numbers | {"step": line["step"], "tokens": line["tokens"]}


class Session:
    """The .wandb file of one process, as wandb's own command reads it."""

    def __init__(self, folder: Path) -> None:
        read = command(sys.executable, "-m", "wandb", "leet", "inspect", "--json", folder)
        assert read.status == 0, read.err
        records = [json.loads(line) for line in read.out.splitlines()]
        of = {kind: [record[kind] for record in records if record["type"] == kind] for kind in ("run", "metric")}
        self.id = folder.name.rsplit("-", 1)[-1]
        self.run = of["run"][0] if of["run"] else None  # a killed process loses its last 32 KiB
        self.x_axes = {metric["glob_name"]: metric["step_metric"] for metric in of["metric"] if "step_metric" in metric}
        self.rows = [
            {name: value for name, value in record["history"]["item"].items() if not name.startswith("_")}
            for record in records
            if record["type"] == "history"
        ]
        self.summary: dict[str, Any] = {}
        for record in records:
            self.summary |= record["summary"]["update"] if record["type"] == "summary" else {}


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A run that was killed some steps after its checkpoint, and finished by a second command."""
    runs = tmp_path_factory.mktemp("runs")
    settings = {"steps": STEPS, "save_every": 20, "eval_every": 20, "run": "killed", "logger": "wandb"}
    labels = {"group": "'a plan'", "job_type": "'an arm'", "tags": "['size:nano','stage:final']"}
    settings |= {f"logger__{name}": value for name, value in labels.items()}
    arguments = [str(ROOT / "train.py"), *overrides(corpus, runs, **settings)]
    started = Started(sys.executable, *arguments, WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL="0.2")
    started.until(f"step  30/{STEPS}")
    until = time.monotonic() + PATIENCE
    # Its output pipe is no longer read, so the run cannot finish.
    # A row names the loss twice: in itself, and in the summary that follows it.
    while not any(file.read_bytes().count(b"train/loss") > 2 * ROWS for file in runs.glob("wandb/*/*.wandb")):
        assert time.monotonic() < until
        time.sleep(0.05)
    started.process.send_signal(signal.SIGKILL)
    assert started.end().status == -signal.SIGKILL
    checkpoint, _ = newest_intact(runs / "killed" / "checkpoints")
    assert checkpoint is not None
    ended = command(sys.executable, *arguments)
    assert ended.status == 0, ended.err
    assert f"resuming {runs / 'killed'} after step {int(checkpoint.name.removeprefix('step_'))} of" in ended.out
    return runs / "killed"


@pytest.fixture(scope="module")
def sessions(run) -> list[Session]:
    """The files of the killed process and of the second one."""
    folders = sorted((run.parent / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    return [Session(folder) for folder in folders]


def test_the_newest_file_holds_every_line_of_metrics_jsonl_once(run, sessions):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sessions[-1].rows == [figures(line) for line in lines]
    assert {line["kind"] for line in lines} == {"train", "eval", "telemetry", "event"}
    assert [row["step"] for row in sessions[-1].rows if "train/loss" in row] == list(range(1, STEPS + 1))
    files = run.parent / "wandb"
    assert (files / "latest-run").resolve().name == sorted(files.glob("offline-run-*"))[-1].name


def test_the_file_of_the_killed_process_has_the_same_numbers(sessions):
    """It may lack rows that were lost with the process; those that it has are of the same run."""
    first, second = ({row["tokens"]: row["train/loss"] for row in s.rows if "train/loss" in row} for s in sessions)
    assert len(first) >= ROWS
    assert first.items() <= second.items()


def test_it_has_one_id_and_its_labels(run, sessions):
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert sessions[-1].run is not None
    assert len({session.id for session in sessions}) == 1
    for session in sessions:
        if session.run is None:
            continue
        assert session.run["run_id"] == (run / "wandb_id").read_text(encoding="utf-8")
        assert session.run["resume"] is True
        assert {"group": session.run["run_group"], **{n: session.run[n] for n in ("job_type", "tags")}} == LABELS
        assert session.run["config"]["update"]["config_hash"] == summary["config_hash"]
    assert sessions[-1].x_axes == dict.fromkeys(("train/*", "eval/*", "telemetry/*", "event/*"), "tokens")
    assert sessions[-1].summary["final_eval_loss"] == summary["final_eval_loss"]
