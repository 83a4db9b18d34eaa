"""What a check of this machine found: the lines of `launch.doctor`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.text import Text

from conf.terminal import SafeConsole

GREEN, YELLOW, RED = "green", "yellow", "red"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check, and advice if it is not green. `node`: the machine is at fault, and another one could do."""

    level: str
    name: str
    text: str
    advice: str = ""
    node: bool = False


class Report:
    """The printed findings of a process: keeps the worst level, and whether this node is at fault.

    Args:
        rank: of this process; green findings are printed by rank 0 only.
        prefix: of every finding.
    """

    def __init__(self, rank: int, prefix: str) -> None:
        self.worst = GREEN
        self._rank, self._prefix, self._at_fault = rank, prefix, False
        self._console = SafeConsole(file=sys.stdout, highlight=False, markup=False)

    def show(self, found: Iterable[Finding]) -> None:
        """Print findings as they complete."""
        for finding in found:
            self.worst = max(self.worst, finding.level, key=(GREEN, YELLOW, RED).index)
            self._at_fault |= finding.node
            if finding.level == GREEN and self._rank:
                continue
            advice = f" -> {finding.advice}" if finding.advice and finding.level != GREEN else ""
            line = Text(f"{finding.level:<7}", style=f"bold {finding.level}")
            self._console.print(line + f"{self._prefix}{finding.name}: {finding.text}{advice}", soft_wrap=True)

    def name_fault(self, path: Path, node: str) -> None:
        """Append the name of this node to a file, if a finding since the last call is the node's fault."""
        if self._at_fault:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{node}\n")
        self._at_fault = False
