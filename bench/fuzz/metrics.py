"""The campaign `metrics`: damaged records of runs, read as status, report, dashboard, comparison and a resumed run do."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

from ablation import figures, status
from ablation.dashboard import build, content_of
from ablation.outcomes import read_outcome
from ablation.report import comparison_rows, page, run_row
from ablation.results import Results, read_results
from ablation.status import Watcher, show
from bench.fuzz.campaign import Campaign
from bench.fuzz.mutations import Damaged, copied, damaged_json, damaged_text, json_bytes, read_all
from bench.fuzz.sound import STEPS, remember_configurations, run_config, write_plan, write_run
from conf.schema import Config
from conf.terminal import SafeConsole
from kernels.common.errors import UserError
from launch.endings import read_ending
from training.compare import print_comparison, read_run
from training.metrics_file import periodic_losses
from training.runfolder import RunFolder, newest_provenance
from training.verify import verify

_FILES = ("metrics.jsonl", "metrics.jsonl", "summary.json", "provenance.json")
_FIGURES = {
    make.__name__: make
    for make in (figures.verdicts, figures.curves, figures.differences, figures.costs, figures.rates)
}


def campaign(_: str, folder: Path) -> Campaign:
    """Return the campaign; its sound files are written to an empty folder."""
    config = run_config()
    run = write_run(config, folder / "runs")
    plan = write_plan(folder / "plans")[1]
    other = sorted((plan / "runs").iterdir())[0].name
    names = sorted(path.name for path in (plan / "runs").iterdir())

    def make(draw: random.Random) -> Damaged:
        if draw.random() < 0.75:
            name = draw.choice(_FILES)
            return Damaged("run", {name: _damaged_record(draw, run / name)})
        files: dict[str, bytes | None] = {}
        for _ in range(draw.choice((1, 1, 2, 8))):
            path = f"runs/{draw.choice(names)}/{draw.choice(_FILES[:3])}"
            files[path] = _damaged_record(draw, plan / path)
        return Damaged(draw.choice(("plan", *(f"plan, {name}" for name in _FIGURES))), files)

    def read(damaged: Damaged) -> None:
        if damaged.how == "run":
            with copied(run, damaged.files) as copy:
                read_all(_readings_of_run(copy, config, plan / "runs" / other), (UserError,))
        else:
            with copied(plan, damaged.files) as copy:
                read_all(readings_of_plan(copy, damaged.how.partition(", ")[2]), (UserError,))

    read(Damaged("plan", {}))  # loads what the dashboard needs
    return Campaign(make, read, (UserError,), begin)


def begin() -> None:
    """Prepare a child: sound configurations are parsed once, and SLURM is asked nothing."""
    remember_configurations()
    status.task_states = lambda _: {}


def _damaged_record(draw: random.Random, path: Path) -> bytes | None:
    """Return a damaged file of JSON, or of a JSON object per line."""
    if draw.random() < 0.02:
        return draw.choice((None, b""))
    if path.suffix == ".json":
        return json_bytes(draw, damaged_json(draw, json.loads(path.read_text(encoding="utf-8"))))
    lines: list[Any] = path.read_bytes().splitlines()
    for _ in range(draw.choice((1, 2, 6))):
        at, kind = draw.randrange(len(lines)), draw.random()
        if kind < 0.75:
            lines[at] = json.dumps(
                damaged_json(
                    draw, json.loads(path.read_bytes().splitlines()[0] if _broken(lines[at]) else lines[at]), 2
                )
            ).encode()
        elif kind < 0.9:
            lines[at] = damaged_text(draw, lines[at])
        elif kind < 0.95:
            lines.insert(at, draw.choice(lines))
        else:
            lines[at], lines[-1] = lines[-1], lines[at]
    return b"\n".join(lines) + draw.choice((b"\n", b"\n", b"", b'{"kind": "train", "st', b"\x00\n"))


def _broken(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _readings_of_run(run: Path, config: Config, other: Path) -> list[Any]:
    """Return what reads the records of a run."""

    def compare() -> None:
        runs = [read_run(run), read_run(other)]
        print_comparison(runs, 6, SafeConsole(file=io.StringIO(), highlight=False, width=100))

    def start_over() -> None:
        folder = RunFolder(dataclasses.replace(config, runs=str(run.parent)))
        folder.claim(config)
        folder.close()
        folder.refuse_to_start_over()

    def rewind() -> None:
        folder = RunFolder(dataclasses.replace(config, runs=str(run.parent)))
        folder.finished_summary(STEPS)
        folder.metrics.recorded_loss(STEPS, 64)
        periodic_losses(run)
        newest_provenance(run)
        folder.append_provenance({"date": "now"})
        folder.rewind(STEPS // 2)
        folder.metrics.append({"kind": "event", "step": STEPS})
        folder.close()

    outcome = [lambda: read_outcome(run), lambda: read_ending(run), lambda: list(verify(run))]
    return [*outcome, compare, start_over, rewind]


def readings_of_plan(folder: Path, figure: str = "") -> list[Any]:
    """Return what reads the folder of a plan, and draws one of the figures of its report."""

    def show_status() -> None:
        console = SafeConsole(file=io.StringIO(), highlight=False, markup=False, width=100)
        console.print(*show(Watcher(folder).snapshot(), 100))

    def report() -> None:
        results = read_results(folder)
        use(results, figure)

    return [show_status, report]


def use(results: Results, figure: str) -> None:
    """Make of the results of a plan what the report and the dashboard show."""
    if figure:
        _FIGURES[figure](results)
    for phenomenon in figures.PHENOMENA:
        for size, arm in results.size_arm_pairs():
            figures.telemetry(results, size, arm, phenomenon.metric)
    page(results, []).encode()
    for name in results.runs:
        run_row(results, name)
    for size in results.sizes:
        comparison_rows(results, size)
    json.dumps(
        [
            block._to_model().model_dump() if hasattr(block, "_to_model") else None
            for block in build(content_of(results))[0]
        ],
        allow_nan=False,
    ).encode()
