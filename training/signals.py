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

from launch.launchers import Launchers

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_REASONS = ("", "the launcher has ended", *(number.name for number in _SIGNALS))


class StopRequest:
    """Notes SIGINT (Ctrl-C), SIGTERM and SIGUSR1 while it is entered; a second Ctrl-C interrupts at once.

    Args:
        launchers: those that started this rank; their end is a request too, and so is a SIGUSR1 that came before.
    """

    def __init__(self, launchers: Launchers) -> None:
        self.reason = ""  # why this rank wants to stop: one of _REASONS
        self._launchers = launchers
        self._when = 0.0
        self._before: dict[int, object] = {}
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        if self._launchers.warned:
            self.reason = signal.SIGUSR1.name
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        # A launcher passes Ctrl-C on, so the same key press may arrive twice: only a later one is a person's second.
        if self.reason == "SIGINT" and number == signal.SIGINT and time.monotonic() - self._when > 1.0:
            raise KeyboardInterrupt
        if not self.reason:
            self.reason, self._when = signal.Signals(number).name, time.monotonic()

    def agreed(self) -> str:
        """Return why to stop: the name of the signal that some rank received, or else that some rank's launcher has
        ended, or "" (the same on every rank)."""
        if not self.reason and self._launchers.gone():
            self.reason = _REASONS[1]
        if self._group is None:
            return self.reason
        index = torch.tensor([_REASONS.index(self.reason)])
        dist.all_reduce(index, op=dist.ReduceOp.MAX, group=self._group)
        return _REASONS[int(index)]
