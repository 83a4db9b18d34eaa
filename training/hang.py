"""The end of a run that hangs: find the rank that the others wait for, write all stacks, say it once, end what is stopped.

It runs in a thread of its own on every rank, because each part of it may wait for a disk.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from kernels.common.errors import ExitStatus
from kernels.common.text import printable
from launch import heartbeats
from launch.endings import SessionEnding, read_ending, write_ending
from launch.heartbeats import Diagnosis, Heartbeat
from launch.ranks import Ranks

_PRINTED = 8  # stacks of ranks
_STAGGERED = 4  # ranks that do not all read the heartbeats of all ranks at once
_ANSWER_SECONDS = 12.0  # for the stacks of all ranks
_MARGIN_SECONDS = 1.0  # for a process that was stopped, beside the intervals in which it reads


class Investigation:
    """What a rank does that has made no progress, or that finds the verdict of another.

    Args:
        run: the run folder.
        interval: seconds between heartbeats.
        lane: the threads that make no progress: main or saver.
        told: returns the verdict if there is one.
        recovered: returns whether this rank has made progress since.
        answer: writes the stacks of this rank for the verdict of that name.
    """

    def __init__(
        self,
        ranks: Ranks,
        run: Path,
        interval: float,
        lane: str,
        told: Callable[[], Diagnosis | None],
        recovered: Callable[[], bool],
        answer: Callable[[str], None],
    ) -> None:
        self._ranks, self._run, self._folder = ranks, run, heartbeats.folder_of(run)
        self._interval, self._lane = interval, lane
        self._told, self._recovered, self._answer = told, recovered, answer
        self.verdict: Diagnosis | None = None  # None: there is none yet
        self.goes_on = False  # whether this rank has made progress before there was one

    def run(self) -> None:
        """Find the verdict; if there is one, do what it asks of this rank."""
        self.verdict = verdict = self._told() or self._investigate()
        if verdict is None:
            self.goes_on = True
            return
        self._answer(verdict.name)
        speaker = next(rank for rank in range(self._ranks.world_size) if rank not in verdict.silent)
        if self._ranks.rank == speaker:
            self._wait(_ANSWER_SECONDS, lambda: self._answered(verdict))
            self._speak(verdict)
        else:  # the launcher kills the others as soon as one of them ends
            self._wait(_ANSWER_SECONDS + 4 * self._interval, lambda: self._was_said(verdict))
        self._end([peer for rank in verdict.silent if (peer := peer_of(heartbeats.read(self._folder, rank)))])

    def _investigate(self) -> Diagnosis | None:
        """Return the verdict, this rank's own unless another was faster; None if this rank goes on after all."""
        self._wait(min(self._ranks.rank, _STAGGERED) * self._interval / 2, lambda: self._told() is not None)
        first = heartbeats.read_all(self._folder, self._ranks.world_size)
        self._wait(3 * self._interval, lambda: self._told() is not None)
        second = heartbeats.read_all(self._folder, self._ranks.world_size)
        if verdict := self._told():
            return verdict
        if self._recovered():
            return None
        found = heartbeats.diagnose(first, second, self._ranks.world_size, self._lane)
        try:
            return heartbeats.publish_verdict(self._folder, found)
        except OSError:  # the others find it out by themselves
            return found

    def _was_said(self, verdict: Diagnosis) -> bool:
        ending = read_ending(self._run)
        return ending is not None and (ending.status, ending.reason) == ("hung", verdict.sentence)

    def _answered(self, verdict: Diagnosis) -> bool:
        beats = heartbeats.read_all(self._folder, self._ranks.world_size)
        asked = (rank for rank in range(self._ranks.world_size) if rank not in verdict.silent)
        return all(rank in beats and beats[rank].answered == verdict.name for rank in asked)

    def _speak(self, verdict: Diagnosis) -> None:
        """Print stacks and verdict, and write how the run ended."""
        world = self._ranks.world_size
        shown = range(world) if world <= _PRINTED else dict.fromkeys((self._ranks.rank, verdict.rank))
        for rank in shown:
            if rank not in verdict.silent:
                with contextlib.suppress(OSError):
                    text = heartbeats.stacks_of(self._run, rank).read_text(encoding="utf-8", errors="replace")
                    print_lines(text)
        print_lines(f"error: the run hangs: {verdict.sentence}; the stacks of all ranks are in {self._run / 'stacks'}")
        write_ending(self._run, SessionEnding("hung", ExitStatus.HUNG, verdict.sentence, verdict.rank, verdict.step))

    def _end(self, peers: list[psutil.Process]) -> None:
        """Let stopped processes go on, so that they find the verdict and end with its status; kill those that do not.

        A launcher ends with the status of the first rank that it sees ending.
        """
        for number in (signal.SIGCONT, signal.SIGKILL):
            for peer in peers:
                with contextlib.suppress(psutil.Error):
                    peer.send_signal(number)
            if number == signal.SIGCONT:
                self._wait(2 * self._interval + _MARGIN_SECONDS, lambda: not any(map(_is_alive, peers)))

    def _wait(self, seconds: float, done: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not done():
            time.sleep(min(0.2, self._interval))


def peer_of(beat: Heartbeat | None) -> psutil.Process | None:
    """Return the process of another rank's heartbeat, if a signal may be sent to it.

    Only a process of this node and user that this rank's launcher started, and at the time that the heartbeat tells.
    """
    if beat is None or beat.host != socket.gethostname() or beat.pid == os.getpid():
        return None
    with contextlib.suppress(psutil.Error):  # it has ended
        process, own = psutil.Process(beat.pid), psutil.Process()
        same = heartbeats.start_of(beat.pid) == beat.started
        if same and process.ppid() == own.ppid() and process.uids().real == own.uids().real:
            return process
    return None


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def print_lines(text: str) -> None:
    """Print lines on standard error, as far as that is possible."""
    with contextlib.suppress(OSError, ValueError):
        for line in text.splitlines():
            print(printable(line), file=sys.stderr)
        sys.stderr.flush()
