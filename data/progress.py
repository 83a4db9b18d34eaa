"""What a person sees while a corpus is prepared. Standard error only: standard output is for results."""

from __future__ import annotations

import sys
from typing import Any


class Report:
    """Progress on standard error: a bar where that is a terminal, else a line a stage, or nothing."""

    def __init__(self, show: bool) -> None:
        self.show = show
        self._bar: Any = None
        self._shown = 0.0

    def say(self, line: str) -> None:
        """Print a line."""
        if self.show:
            print(line, file=sys.stderr, flush=True)

    def start(self, stage: str) -> None:
        """Begin a stage."""
        if self.show and not sys.stderr.isatty():
            self.say(stage)
        elif self.show:
            if self._bar is None:
                self._bar = self._make_bar()
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(stage, total=None)
        self._shown = 0.0

    def share(self, done: float) -> None:
        """Show how much of the stage is done, 0 to 1."""
        if self._bar is not None and done - self._shown >= 0.005:  # a call a document is too much for a terminal
            self._bar.update(self._bar.task_ids[-1], completed=done, total=1.0)
            self._shown = done

    def _make_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        bar.start()
        return bar

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
