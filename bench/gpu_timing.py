"""How `bench/gpu.py` and `bench/fused.py` time calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

CALLS = 4  # back-to-back calls in one timing


def seconds_of(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the seconds per call, averaged over `calls` back-to-back calls."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def interleaved(methods: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time every method once per round; return [median, minimum, maximum] of its seconds."""
    for call in methods.values():
        seconds_of(call, CALLS, device)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, call in methods.items():
            seconds[name].append(seconds_of(call, CALLS, device))
    return {name: [statistics.median(times), min(times), max(times)] for name, times in seconds.items()}
