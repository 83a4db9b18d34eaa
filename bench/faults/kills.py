"""Ranks under SIGKILL: a run is killed and goes on, again and again, and ends as the undisturbed one.

A kill hits one rank, the launcher alone, or all of them at once, as when a machine goes down; after a step, while a checkpoint
is being written, or before the first step. Runs of two ranks under each launcher, in fp32, with ZeRO 1, 2 and 3 and with tensor
parallelism.

Required of each kill: all other processes end within a minute; the run goes on from the last save that was begun, or from the
one before. Required of each run at its end: every step once, with the loss and the gradient norm of the
undisturbed run to the last bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.faults.runs import LAUNCHERS, TINY, end_all, kill, launch, members, ranks_of, wait_until, write_corpus
from kernels.common.errors import UserError
from model.weights import checkpoints, step_of

SCRIPT, RANKS, SAVE_EVERY = "train.py", 2, 10
LAYOUTS = ("zero=1", "zero=2", "zero=3", "parallel.tensor=2")
MOMENTS = ("step", "save", "save", "start")  # after a step, while a checkpoint is being written, before the first step
TARGETS = ("rank", "rank", "all", "launcher")
_STEPS_PER_KILL = 25  # of a run: what a kill undoes comes on top
_PATIENCE = 180.0  # seconds for a run to reach the moment of its kill
_END_SECONDS = 60.0  # from a kill to the end of all processes


@dataclasses.dataclass(frozen=True)
class Killed:
    """What a kill did."""

    moment: str  # one of MOMENTS
    target: str  # one of TARGETS
    steps: int  # done before it
    newest: int  # step of the newest complete checkpoint after it; 0: none
    left: int  # processes that had not ended _END_SECONDS later


def verdict(killed: Killed, resumed: int | None) -> str:
    """Return what is wrong with a kill and the start after it; "": nothing.

    Args:
        resumed: the step after which the run went on; 0: it began anew, None: it did not begin.
    """
    if killed.left:
        return f"{killed.left} processes had not ended {_END_SECONDS:.0f} s after it"
    if resumed is None:
        return "it did not start again"
    if resumed != killed.newest:
        return f"it went on after step {resumed}, its newest checkpoint is of {killed.newest}"
    begun = killed.steps // SAVE_EVERY * SAVE_EVERY  # the last save that was
    return "" if resumed >= begun - SAVE_EVERY else f"after step {killed.steps} it went on after step {resumed}"


def run_campaign(folder: Path, kills: int, seed: int, overrides: list[str]) -> int:
    """Kill runs again and again, print what came of it; return 1 if something was wrong, else 0."""
    write_corpus(folder / "corpus")
    generator, wrong, done = random.Random(seed), 0, 0
    combined = list(itertools.product(LAYOUTS, LAUNCHERS))
    for number, (layout, launcher) in enumerate(combined):
        share = kills * (number + 1) // len(combined) - kills * number // len(combined)
        if not share:
            continue
        run = KilledRun(folder, layout, launcher, share * _STEPS_PER_KILL, overrides)
        problems = run.disturb(share, generator)
        done, wrong = done + run.kills, wrong + len(problems)
        lost = f"{run.kills} kills, at most {run.worst} steps lost"
        print(f"{layout}, {launcher}: {lost}: {'; '.join(problems) or 'as undisturbed'}", flush=True)
    print(f"{done} kills, {wrong} wrong")
    return 1 if wrong else 0


class KilledRun:
    """A run, and its undisturbed twin.

    Args:
        folder: of the campaign.
        layout: one of LAYOUTS.
        launcher: one of runs.LAUNCHERS.
        steps: of the run.
    """

    def __init__(self, folder: Path, layout: str, launcher: str, steps: int, overrides: list[str]) -> None:
        self.folder, self.launcher, self.steps = folder, launcher, steps
        self.path = folder / "runs" / f"{layout.replace('=', '_')} {launcher}"
        self.twin = self.path.with_name(f"{self.path.name} undisturbed")
        places = [f"data.path={folder / 'corpus'}", f"data.prepared={folder / 'prepared'}", f"runs={folder / 'runs'}"]
        lengths = [f"steps={steps}", f"save_every={SAVE_EVERY}", "keep_last=2", f"eval_every={2 * SAVE_EVERY}"]
        self._overrides = [*TINY, *places, *lengths, layout, *overrides]
        self.kills = self.worst = 0

    def disturb(self, kills: int, generator: random.Random) -> list[str]:
        """Run it undisturbed, and once more under kills; return all that is wrong."""
        if self._launch(self.twin).wait() != 0:
            raise UserError(f"the run fails without any kill: see {self._log(self.twin)}")
        problems: list[str] = []
        previous: Killed | None = None
        for number in range(kills):
            log_size = self._log_size()
            killed = self._kill(generator, (self.steps - 1) * (number + 1) // kills)
            if killed is None:
                problems.append(f"it ended before kill {number + 1}")
                break
            problems += self._judge(previous, log_size, early=killed.moment == "start")
            self.kills, previous = self.kills + 1, killed
        log_size = self._log_size()
        process = self._launch(self.path)
        if process.wait() != 0:
            problems.append(f"it ended with {process.returncode}")
        strays = end_all(process.pid)
        problems += [f"{strays} processes stayed behind"] * (strays > 0)
        problems += self._judge(previous, log_size)
        return problems + ["its metrics are not those of the undisturbed run"] * (lines(self.path) != lines(self.twin))

    def _judge(self, killed: Killed | None, log_size: int, early: bool = False) -> list[str]:
        """Return what is wrong with a kill, after the run was started again.

        Args:
            killed: what the kill did; None: there was none.
            log_size: of the log before that start.
            early: whether that start may have been killed before it went on.
        """
        if killed is None:
            return []
        with open(self._log(self.path), "rb") as file:
            file.seek(log_size)
            printed = file.read().decode("utf-8", errors="replace")
        found = re.search(r"^resuming .* after step (\d+) of", printed, re.MULTILINE)
        resumed = int(found[1]) if found else 0 if re.search(r"^step +1/", printed, re.MULTILINE) else None
        if "there is nothing to do" in printed:  # its ranks finished it although their launcher was gone
            resumed = self.steps
        if resumed is None and early:
            return []
        if resumed is not None:
            self.worst = max(self.worst, killed.steps - resumed)
        problem = verdict(killed, resumed)
        return [f"kill {self.kills} ({killed.target}, {killed.moment}): {problem}"] if problem else []

    def _kill(self, generator: random.Random, until: int) -> Killed | None:
        """Start or go on, kill at a random moment up to a step; None: it ended before."""
        done, moment = last_step(self.path), generator.choice(MOMENTS)
        target, rank = generator.choice(TARGETS), generator.randrange(RANKS)
        after, delay = generator.randint(min(done + 1, until), until), generator.uniform(0.0, 8.0)
        process = self._launch(self.path)
        if moment == "start":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)
            reached = process.poll() is None
        else:
            reached = wait_until(lambda: last_step(self.path) >= after, process, _PATIENCE, poll=0.02)
            if moment == "save":
                temporary = self.path / "checkpoints"
                reached &= wait_until(lambda: any(temporary.glob(".step_*.tmp")), process, _PATIENCE, poll=0.001)
        ranks = ranks_of(process.pid, SCRIPT)
        if target == "launcher":
            process.kill()
        elif target == "rank" and rank in ranks:
            kill([ranks[rank]])
        else:
            while alive := members(process.pid):  # one may have been starting another
                kill(alive)
        deadline = time.monotonic() + _END_SECONDS
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.5)
        left = end_all(process.pid)
        process.wait()
        if not reached:
            return None
        newest = max(map(step_of, checkpoints(self.path / "checkpoints")), default=0)
        return Killed(moment, target, last_step(self.path), newest, left)

    def _launch(self, run: Path) -> subprocess.Popen[bytes]:
        return launch(self.launcher, RANKS, SCRIPT, [*self._overrides, f"run={run.name}"], self._log(run))

    def _log(self, run: Path) -> Path:
        return self.folder / f"{run.name}.log"

    def _log_size(self) -> int:
        path = self._log(self.path)
        return path.stat().st_size if path.exists() else 0


def lines(run: Path) -> list[tuple[Any, ...]]:
    """Return (kind, step, loss, gradient norm) of the training and evaluation lines of a run."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the end of a line that was being written
                line = json.loads(text)
                if line["kind"] in ("train", "eval"):
                    found.append((line["kind"], line["step"], line["loss"], line.get("grad_norm")))
    return found


def last_step(run: Path) -> int:
    """Return the last training step in a run's metrics; 0: there is none."""
    with contextlib.suppress(FileNotFoundError):
        found = re.findall(rb'"kind": "train", "step": (\d+),', (run / "metrics.jsonl").read_bytes()[-20_000:])
        return int(found[-1]) if found else 0
    return 0
