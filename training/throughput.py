"""How many steps per second a run takes, as its log lines report it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Throughput:
    """Measures steps per second since the last log line, without the time of evaluations, samples and saves."""

    def __init__(self, step: int) -> None:
        self._first_step, self._started, self._paused_seconds = step, time.perf_counter(), 0.0

    def restart(self, step: int) -> None:
        """Measure from here on; `step` steps are done."""
        self._first_step, self._started, self._paused_seconds = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time while entered."""
        started = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - started

    def measure(self, step: int) -> tuple[int, float]:
        """Return (steps, seconds) since the start, now that `step` steps are done."""
        seconds = time.perf_counter() - self._started - self._paused_seconds
        return step - self._first_step, max(seconds, 1e-9)
