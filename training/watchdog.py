"""The watchdog: ends a run that hangs, with the stacks of every rank and the name of the one that the others wait for.

Threads of each rank do it; the training thread only notes its progress (`beat`), which takes well under a microsecond.

- One writes a heartbeat every few seconds and looks for a verdict: files, as a rank that hangs takes part in no collective.
- Another decides, from memory alone, so that a disk that hangs cannot hold it up. Without progress of its rank for longer than
  allowed it reads the heartbeats of all ranks twice, and the verdict follows from them (`launch/heartbeats.py`).
- Every rank that finds a verdict writes its stacks and ends with status 4; a rank of its node sees to it that a stopped process
  ends too. Before the first step a rank also ends where its launcher has.

Time counts only while this process runs: one that was suspended and goes on does not take its own pause for a hang.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from conf.schema import WatchdogConfig
from kernels.common.errors import ExitStatus
from launch import heartbeats
from launch.heartbeats import Diagnosis, Heartbeat
from launch.ranks import Ranks
from training.hang import Investigation, peer_of, print_lines
from training.stacks import activity_of, flights, stacks

Mark = tuple[str, int, float]  # phase, steps that are done, time.time()

LEAST_SECONDS, STEPS = 300.0, 20.0  # without a bound of the user's: at least these, and as long as so many median steps
_STARTING, _STARTING_SECONDS = ("start", "load"), 1.0  # phases in which the launcher is looked for, and how often
INVESTIGATION_SECONDS = 45.0  # from the end of the allowance to that of the process


class _Progress:
    """What the threads of this process did last."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.main: Mark = ("start", 0, time.time())
        self.main_thread = threading.main_thread().ident
        self.saver: Mark | None = None
        self.saver_thread: int | None = None


_progress = _Progress()


def beat(phase: str, step: int) -> None:
    """Note that the training thread has begun a phase, or goes on in it, after `step` steps."""
    _progress.main = (phase, step, time.time())


def alive() -> None:
    """Note that the training thread goes on in its phase."""
    phase, step, _ = _progress.main
    _progress.main = (phase, step, time.time())


def saving(step: int | None) -> None:
    """Note that this thread, which saves the checkpoint of a step, has begun a part of that; None: it has ended."""
    _progress.saver_thread = threading.get_ident()
    _progress.saver = None if step is None else ("save", step, time.time())


class Patience:
    """Measures how long a mark has been the same, in seconds during which this process could run."""

    def __init__(self) -> None:
        self._mark: Mark | None = None
        self._seconds = 0.0

    def tick(self, seconds: float, mark: Mark | None) -> float:
        """Return for how long this has been the mark, `seconds` after the last call; 0 where there is none."""
        changed, self._mark = mark is not self._mark, mark
        self._seconds = 0.0 if changed or mark is None else self._seconds + seconds
        return self._seconds


class Bounds:
    """How long each phase may go on without progress, in seconds."""

    def __init__(self, config: WatchdogConfig) -> None:
        self._own = None if config.minutes is None else 60 * config.minutes
        self._phase = 60 * config.phase_minutes
        self._durations: deque[float] = deque(maxlen=64)  # of recent steps, seconds
        self._last: Mark | None = None

    def observe(self, mark: Mark) -> None:
        """Note a mark of the training thread; those that come in between may be missing."""
        last, self._last = self._last, mark
        if last and (last[0], mark[0]) == ("step", "step") and mark[1] > last[1]:
            self._durations.append((mark[2] - last[2]) / (mark[1] - last[1]))

    def allowed(self, mark: Mark) -> float:
        """Return the bound of a mark's phase."""
        if mark[0] != "step":
            return self._phase
        if self._own is not None:
            return self._own
        if not self._durations:
            return self._phase
        return max(LEAST_SECONDS, STEPS * statistics.median(self._durations))


class Watchdog:
    """Watches this rank and, when it makes no progress, all of them. Without effect where `watchdog.minutes` is 0.

    `began` is the time of its construction; `threads` are those that watch, while they do.

    Args:
        run: the run folder, shared by all ranks.
        orphaned: returns whether the launcher has ended. Before its first step a rank ends then, because it may wait for others
            that never come; later the training loop asks.
    """

    def __init__(
        self, config: WatchdogConfig, ranks: Ranks, run: Path, orphaned: Callable[[], bool] = lambda: False
    ) -> None:
        self._ranks, self._run, self._folder, self._orphaned = ranks, run, heartbeats.folder_of(run), orphaned
        self._enabled, self.began = config.minutes != 0, time.time()
        self._bounds = Bounds(config)
        shortest = min(60 * (config.minutes or config.phase_minutes), 60 * config.phase_minutes)
        self.interval = min(5.0, max(0.25, shortest / 8))
        self._stop, self._told = threading.Event(), threading.Event()
        self.threads: list[threading.Thread] = []
        self._count, self._answered, self._failed = 0, "", False
        self._verdict: Diagnosis | None = None
        self._ignored, self._requested = "", ""  # the verdict of an earlier session; the last request
        self._writing = threading.Lock()

    def start(self) -> None:
        """Begin to watch. Rank 0 removes what an earlier session left."""
        _progress.reset()
        if not self._enabled:
            return
        if self._ranks.rank == 0:
            with contextlib.suppress(OSError):
                self._folder.mkdir(exist_ok=True)
                for path in (*self._folder.glob("rank_*.json"), self._folder / "verdict.json"):
                    if not self._is_of_this_session(path):
                        path.unlink(missing_ok=True)
        elif earlier := heartbeats.read_verdict(self._folder):
            self._ignored = earlier.name
        pid = os.getpid()
        self._process = {"host": socket.gethostname(), "pid": pid, "started": heartbeats.start_of(pid)}
        for name, target in (("heartbeats", self._write_heartbeats), ("watchdog", self._watch)):
            self.threads.append(threading.Thread(target=target, name=name, daemon=True))
            self.threads[-1].start()

    def _is_of_this_session(self, path: Path) -> bool:
        """Whether a file is the first heartbeat of a rank that was faster than this one, on this node.

        Without it nothing would tell which process that is, if it were stopped before its next one.
        """
        rank = path.stem.removeprefix("rank_")
        return rank.isdecimal() and peer_of(heartbeats.read(self._folder, int(rank))) is not None

    @property
    def step(self) -> int:
        """Return how many steps are done."""
        return _progress.main[1]

    def fail(self) -> None:
        """End the watch, and let the other ranks find that this one has failed, should they wait for it."""
        self._failed = True
        beat("failed", _progress.main[1])
        self.stop()

    def stop(self) -> None:
        """End the watch, and remove this rank's heartbeat unless it has failed."""
        self._stop.set()
        for thread in self.threads:
            thread.join(self.interval)  # both wake at once, unless a disk hangs
        self.threads.clear()
        if self._enabled and not self._failed:
            # The last rank removes the folder.
            with contextlib.suppress(OSError):
                (self._folder / f"rank_{self._ranks.rank}.json").unlink(missing_ok=True)
                self._folder.rmdir()

    # The thread that writes.

    def _write_heartbeats(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self.write_heartbeat()
            verdict = heartbeats.read_verdict(self._folder)
            if verdict and verdict.name != self._ignored:
                self._verdict = verdict
                self._told.set()
            request = heartbeats.read_request(self._folder)
            if request and request != self._requested:
                self._requested = request
                self._write_stacks(request)
            if self._stop.wait(self.interval):
                break
        if self._failed:
            with contextlib.suppress(OSError):
                self.write_heartbeat()

    def write_heartbeat(self) -> None:
        """Write this rank's heartbeat.

        Raises:
            OSError: it cannot be written.
        """
        with self._writing:
            self._write_heartbeat()

    def _write_heartbeat(self) -> None:
        self._count += 1
        main, saver = _progress.main, _progress.saver
        heartbeat = Heartbeat(
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            **self._process,
            interval=self.interval,
            count=self._count,
            main=activity_of(*main, _progress.main_thread, others=True),
            saver=activity_of(*saver, _progress.saver_thread) if saver else None,
            answered=self._answered,
        )
        heartbeats.write(self._folder, heartbeat)

    def _write_stacks(self, name: str) -> None:
        """Write the stacks of this rank, in answer to the verdict or request of that name."""
        path = heartbeats.stacks_of(self._run, self._ranks.rank)
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            path.write_text(stacks(self._ranks.rank), encoding="utf-8")
            if trace := flights():
                Path(f"{heartbeats.flights_of(self._run)}{self._ranks.rank}").write_bytes(trace)
            self._answered = name
            self.write_heartbeat()

    # The thread that decides.

    def _watch(self) -> None:
        lanes, last = {"main": Patience(), "saver": Patience()}, time.monotonic()
        starting = True
        while not self._stop.wait(min(_STARTING_SECONDS, self.interval) if starting else self.interval):
            starting = _progress.main[0] in _STARTING
            if starting and self._orphaned():
                print_lines("error: the launcher has ended before the first step: run the same command again")
                os._exit(ExitStatus.TRY_AGAIN)
            now = time.monotonic()
            seconds, last = min(now - last, 3 * self.interval), now
            self._bounds.observe(_progress.main)
            lane = self.overdue(lanes, seconds)
            if self._told.is_set() or lane:
                self._end(lane or "main")
                last = time.monotonic()  # it went on after all

    def overdue(self, lanes: dict[str, Patience], seconds: float) -> str:
        """Return the lane that has made no progress for longer than allowed, `seconds` after the last call; "": none."""
        late = ""
        for lane, mark in (("main", _progress.main), ("saver", _progress.saver)):
            if lanes[lane].tick(seconds, mark) > (self._bounds.allowed(mark) if mark else 0.0) and mark:
                late = lane  # a saver that hangs holds up its training thread too
        return late

    def _end(self, lane: str) -> None:
        """End this process, unless it makes progress before there is a verdict. A disk that hangs does not hold this up."""
        marks = _progress.main, _progress.saver
        investigation = Investigation(
            self._ranks,
            self._run,
            self.interval,
            lane,
            told=lambda: self._verdict,
            recovered=lambda: (_progress.main, _progress.saver) != marks,
            answer=self._write_stacks,
        )
        thread = threading.Thread(target=investigation.run, name="watchdog", daemon=True)
        thread.start()
        thread.join(INVESTIGATION_SECONDS)
        if investigation.goes_on:
            return
        if investigation.verdict is None:
            print_lines(stacks(self._ranks.rank))
            print_lines(f"error: rank {self._ranks.rank} hangs, and {self._run} can neither be read nor written")
        os._exit(ExitStatus.HUNG)
