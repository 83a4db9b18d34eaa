"""Progress of a preparation, on standard error: standard output is for results."""

from __future__ import annotations

import sys
from typing import Any


class ProgressReporter:
    """Reports progress on standard error: a bar where that is a terminal, else a line per stage; or nothing."""

    def __init__(self, show: bool) -> None:
        self.show = show
        self._bar: Any = None
        self._displayed = 0.0

    def print(self, line: str) -> None:
        """Print a line."""
        if self.show:
            print(line, file=sys.stderr, flush=True)

    def start(self, stage: str) -> None:
        """Begin a stage."""
        if self.show and not sys.stderr.isatty():
            self.print(stage)
        elif self.show:
            if self._bar is None:
                self._bar = self._make_bar()
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(stage, total=None)
        self._displayed = 0.0

    def update(self, fraction: float) -> None:
        """Report the completed fraction of the stage, 0 to 1."""
        # An update per document is too much for a terminal.
        if self._bar is not None and fraction - self._displayed >= 0.005:
            self._bar.update(self._bar.task_ids[-1], completed=fraction, total=1.0)
            self._displayed = fraction

    def _make_bar(self) -> Any:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        from conf.terminal import SafeConsole

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        bar = Progress(*columns, TimeRemainingColumn(), console=SafeConsole(stderr=True), transient=True)
        bar.start()
        return bar

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
