"""Spikes: a loss or a gradient norm far above those before it.

The measure is a robust z-score: the distance from the median of the last values in units of 1.4826 x MAD, their median absolute
deviation, which is the standard deviation where they are normal (Iglewicz and Hoaglin, 1993). A spike that entered the window
moves neither much. The norm is taken by its logarithm, because it varies by factors.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import math
from typing import Any

_SIGMA = 1.4826  # of a normal distribution, in units of its MAD
# The least standard deviation that is assumed: a run of nearly equal values makes no spike of a small step.
_LEAST = {"loss": 0.02, "grad_norm": 0.15}  # nats; natural logarithm


@dataclasses.dataclass(frozen=True)
class Spike:
    """A value far above those before it."""

    name: str  # loss | grad_norm
    value: float
    median: float
    sigmas: float

    def __str__(self) -> str:
        name = {"grad_norm": "gradient norm"}.get(self.name, self.name)
        return f"{name} {self.value:.4g}, {self.sigmas:.1f} sigmas above the median of {self.median:.4g}"


class SpikeDetector:
    """Compares each loss and gradient norm with those before it.

    Args:
        window: how many values a new one is compared with; nothing is a spike before a quarter of them is there.
        sigmas: robust z-score beyond which a value is a spike.
    """

    def __init__(self, window: int, sigmas: float) -> None:
        self._needed, self._sigmas = max(2, window // 4), sigmas
        self._window = window
        self._values = {name: collections.deque[float]() for name in _LEAST}
        self._sorted: dict[str, list[float]] = {name: [] for name in _LEAST}  # the same values

    def check(self, loss: float, grad_norm: float) -> Spike | None:
        """Return the spike that this step is, if it is one, and remember its values.

        What is not finite is no spike, and is not remembered: the step is skipped in any case.
        """
        spikes = [self._check(name, value) for name, value in (("loss", loss), ("grad_norm", grad_norm))]
        return max(filter(None, spikes), key=lambda spike: spike.sigmas, default=None)

    def _check(self, name: str, value: float) -> Spike | None:
        if not math.isfinite(value):
            return None
        values, scaled = self._values[name], math.log(max(value, 1e-30)) if name == "grad_norm" else value
        spike = None
        if len(values) >= self._needed:
            ascending = self._sorted[name]
            median = _median(ascending)
            deviation = _median(sorted([abs(each - median) for each in ascending]))  # two runs: a merge, not a sort
            sigmas = (scaled - median) / max(_SIGMA * deviation, _LEAST[name])
            if sigmas > self._sigmas:
                spike = Spike(name, value, math.exp(median) if name == "grad_norm" else median, sigmas)
        self._remember(name, scaled)
        return spike

    def _remember(self, name: str, value: float) -> None:
        values, ascending = self._values[name], self._sorted[name]
        values.append(value)
        bisect.insort(ascending, value)
        if len(values) > self._window:
            del ascending[bisect.bisect_left(ascending, values.popleft())]

    def state(self) -> dict[str, list[float]]:
        """Return the values that are remembered, for a checkpoint."""
        return {name: list(values) for name, values in self._values.items()}

    def load(self, state: Any) -> None:
        """Take over what `state` returned. Of None, and of what has another form, nothing is remembered."""
        for name, values in self._values.items():
            values.clear()
            self._sorted[name].clear()
            stored = state.get(name) if isinstance(state, dict) else None
            for each in stored if isinstance(stored, list) else ():
                if isinstance(each, (int, float)) and abs(each) < 1e300:
                    self._remember(name, float(each))


def _median(ascending: list[float]) -> float:
    middle = len(ascending) // 2
    return ascending[middle] if len(ascending) % 2 else (ascending[middle - 1] + ascending[middle]) / 2
