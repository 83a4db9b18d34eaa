"""Stop requests: signals on any rank become one decision, shared by all ranks, to stop after the current step.

A handler only records the signal. The loop polls once per step, and the ranks agree through a small gloo group of their own.
So all of them stop after the same step, even if the signal reached only some.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from launch.launchers import STOP_SIGNALS, Launchers, stop_signals

_LAUNCHER_ENDED = "the launcher has ended"
DIVERGED = "the numbers are not finite"  # a rank knows, and must not end before the others
_REASONS = ("", _LAUNCHER_ENDED, *(number.name for number in STOP_SIGNALS), DIVERGED)  # in increasing priority


class StopRequest:
    """Record SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP (a lost terminal) while entered; a second Ctrl-C interrupts at once.

    Under `nohup`, which ignores SIGHUP, it stays ignored.

    Args:
        launchers: the launchers that started this rank. A launcher that ends is a stop request too, and so is a SIGUSR1 that
            arrived before this object was entered.
    """

    def __init__(self, launchers: Launchers) -> None:
        self.reason = ""  # why this rank wants to stop: one of _REASONS
        self._launchers = launchers
        self._received_at = 0.0  # time.monotonic() of the first signal
        self._previous_handlers: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def __enter__(self) -> StopRequest:
        self._previous_handlers = {number: signal.signal(number, self._record) for number in stop_signals()}
        if self._launchers.warned:
            self.reason = signal.SIGUSR1.name
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        # A launcher forwards Ctrl-C, so one key press may arrive twice. Only a later one is a second key press.
        if self.reason == "SIGINT" and number == signal.SIGINT and time.monotonic() - self._received_at > 1.0:
            raise KeyboardInterrupt
        if not self.reason:
            self.reason, self._received_at = signal.Signals(number).name, time.monotonic()

    def agree(self, diverged: bool = False) -> str:
        """Return why to stop, the same on every rank, or "" to continue. Collective.

        The reason is DIVERGED where some rank says so; else the name of a signal that some rank received; else that some
        rank's launcher has ended.
        """
        if not self.reason and self._launchers.gone():
            self.reason = _LAUNCHER_ENDED
        reason = DIVERGED if diverged else self.reason
        if self._group is None:
            return reason
        index = torch.tensor([_REASONS.index(reason)])
        dist.all_reduce(index, op=dist.ReduceOp.MAX, group=self._group)
        return _REASONS[int(index)]
