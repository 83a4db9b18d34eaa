"""How `bench/gpu.py` and `bench/fused.py` time calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

CALLS = 4  # back-to-back calls in one timing
# Of the GPU's clock, per second that the host took to launch the calls: twice that at 3 GHz, longer at the clocks of servers.
_CYCLES = 2 * 3e9
_LONGEST_LAUNCH = 0.1  # seconds: a first call that compiles takes longer, and needs no such sleep


def seconds_of(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the seconds per call, averaged over `calls` back-to-back calls.

    On a GPU that is its own time, between events around the calls. Before them it sleeps until the host has launched all: a
    kernel of some microseconds takes less than the host needs to launch the next, and the GPU would wait within the timing. A
    first pass of the calls, which is not timed, tells how long the host takes. On a CPU it is wall-clock time.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    launching = min(time.perf_counter() - began, _LONGEST_LAUNCH)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(_CYCLES * launching))
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
