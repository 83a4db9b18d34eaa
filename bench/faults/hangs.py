"""The campaign of hangs: a rank is stopped or blocks for ever, before its first step or later, and the watchdog ends the run.

Required of each case: all processes end within the bound and 60 seconds, with a status other than 0; the stacks of every rank
that can still run are in the run folder; ending.json names the right rank; no process stays behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.faults.runs import LAUNCHERS, TINY, end_all, launch, ranks_of, wait_until, write_corpus
from launch.endings import read_ending

STEP_SECONDS, PHASE_SECONDS = 12.0, 60.0  # the bounds of the watchdog
END_SECONDS = 60.0  # from the bound to the end of all processes
_PATIENCE = 180.0  # seconds for a run to reach the place where it is to hang
PLACES = ("stop", "loader", "collective", "save")
SCRIPT = "bench/faults/blocked_train.py"


@dataclasses.dataclass(frozen=True)
class Hang:
    """One way in which a run hangs."""

    place: str  # one of PLACES
    step: int  # in which it hangs, from 1; a save is that of this step
    ranks: int
    rank: int  # the one that hangs
    launcher: str  # one of runs.LAUNCHERS

    @property
    def bound(self) -> float:
        """Return the watchdog's bound, in seconds."""
        return PHASE_SECONDS if self.step == 1 or self.place == "save" else STEP_SECONDS


@dataclasses.dataclass(frozen=True)
class HangOutcome:
    """What came of it."""

    status: int | None  # None: it did not end
    seconds: float  # from the hang to the end of the launcher
    stacks: int
    rank: int | None  # that ending.json names
    strays: int
    reason: str


def cases(seed: int) -> list[Hang]:
    """Return every case; the seed chooses which ranks hang."""
    places = [(place, step) for place in PLACES for step in (1, 4) if (place, step) != ("save", 1)]
    combined = itertools.product(places, (2, 4), LAUNCHERS)
    return [
        Hang(place, step, ranks, (number + seed) % ranks, launcher)
        for number, ((place, step), ranks, launcher) in enumerate(combined)
    ]


def verdict(case: Hang, outcome: HangOutcome) -> str:
    """Return what is wrong with an outcome; "": nothing."""
    if outcome.status is None:
        return f"it had not ended {case.bound + END_SECONDS:.0f} s after it hung"
    if outcome.status == 0:
        return "its status is 0"
    if outcome.seconds > case.bound + END_SECONDS:
        return f"it ended only after {outcome.seconds:.0f} s"
    if outcome.strays:
        return f"{outcome.strays} processes stayed behind"
    if outcome.rank != case.rank:
        return f"it names rank {outcome.rank}: {outcome.reason}"
    expected = case.ranks - (case.place == "stop")
    return "" if outcome.stacks >= expected else f"it left {outcome.stacks} stacks of {expected}"


def run_campaign(folder: Path, count: int, seed: int, overrides: list[str]) -> int:
    """Hang runs in `count` ways (0: all), print a table, and return 1 if something was wrong, else 0."""
    write_corpus(folder / "corpus")
    chosen = cases(seed)[: count or None]
    wrong = 0
    print(f"{'place':12}{'step':>5}{'ranks':>6}{'rank':>5}  {'launcher':10}{'status':>7}{'bound':>7}{'seconds':>8}")
    for number, case in enumerate(chosen):
        outcome = hang(case, folder, number, overrides)
        problem = verdict(case, outcome)
        wrong += bool(problem)
        print(
            f"{case.place:12}{case.step:5}{case.ranks:6}{case.rank:5}  {case.launcher:10}{outcome.status!s:>7}"
            f"{case.bound:7.0f}{outcome.seconds:8.1f}  {problem or outcome.reason}",
            flush=True,
        )
    print(f"{len(chosen)} hangs, {wrong} wrong")
    return 1 if wrong else 0


def words_of(folder: Path, name: str) -> list[str]:
    """Return the command line of a run, without those of the case."""
    bounds = [f"watchdog.minutes={STEP_SECONDS / 60}", f"watchdog.phase_minutes={PHASE_SECONDS / 60}"]
    places = [f"data.path={folder / 'corpus'}", f"data.prepared={folder / 'prepared'}", f"runs={folder / 'runs'}"]
    return [*TINY, *bounds, *places, f"run={name}", "steps=1000000", "save_every=4"]


def hang(case: Hang, folder: Path, number: int, overrides: list[str]) -> HangOutcome:
    """Start a run, let it hang, and return what came of it."""
    run, blocked = folder / "runs" / str(number), folder / f"blocked {number}"
    blocked.mkdir(parents=True)
    variables = {"BLOCKED": f"{case.place} {case.rank} {case.step} {blocked}"}
    words = [*words_of(folder, run.name), *overrides]
    process = launch(case.launcher, case.ranks, SCRIPT, words, folder / f"{number}.log", **variables)
    try:
        if case.place == "stop":
            _wait_for(
                process, lambda: _steps(run) >= case.step - 1 and len(ranks_of(process.pid, SCRIPT)) == case.ranks
            )
            ranks_of(process.pid, SCRIPT)[case.rank].send_signal(signal.SIGSTOP)
        else:
            _wait_for(process, (blocked / "blocked").exists)
        began, status = time.monotonic(), None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(case.bound + END_SECONDS)
        seconds = time.monotonic() - began
    finally:
        strays = end_all(process.pid)
    ending = read_ending(run)
    stacks = len(list((run / "stacks").glob("rank_*.txt")))
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    rank, reason = (ending.rank, ending.reason) if ending else (None, "ending.json is missing")
    return HangOutcome(status, seconds, stacks, rank, strays, reason)


def _wait_for(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    if not wait_until(happened, process, _PATIENCE):
        raise RuntimeError(f"the run ended ({process.poll()}), or did not come to where it should hang")


def _steps(run: Path) -> int:
    """Return the number of steps that are done; -1: it has not begun."""
    if not (run / "heartbeats").exists():
        return -1
    with contextlib.suppress(OSError):
        return (run / "metrics.jsonl").read_bytes().count(b'"kind": "train"')
    return 0
