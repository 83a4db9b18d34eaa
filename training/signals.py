"""From signals to one decision that all ranks share: stop after this step.

A handler only notes the signal. The loop asks once a step, and the ranks agree over a small group of their own on the CPU, so
that every one of them stops after the same step even when the signal reached only some.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Notes SIGINT (Ctrl-C), SIGTERM and SIGUSR1 while it is entered; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.name = ""  # of the signal that this rank received
        self._when = 0.0
        self._before: dict[int, object] = {}
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        # A launcher passes Ctrl-C on, so the same key press may arrive twice: only a later one is a person's second.
        if self.name == "SIGINT" and number == signal.SIGINT and time.monotonic() - self._when > 1.0:
            raise KeyboardInterrupt
        if not self.name:
            self.name, self._when = signal.Signals(number).name, time.monotonic()

    def agreed(self) -> str:
        """Return the name of the signal that some rank received, or "" (the same on every rank)."""
        if self._group is None:
            return self.name
        number = torch.tensor([signal.Signals[self.name].value if self.name else 0])
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(int(number)).name if number else ""
