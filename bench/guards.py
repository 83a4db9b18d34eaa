"""Measure what the default guards add to a step: `python -m bench.guards`.

    steps=20   steps that are timed, for the time of one
    KEY=VALUE  overrides for train.py

The guards are the watchdog (a mark per step and its two threads), the checks of loss and gradient norm at each log line, and
the scan of the host copies at each save, which a thread makes beside training. Each is timed by itself, because a difference of
less than a percent drowns in the noise of steps: their sum is an upper bound of what they take from training.
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.ranks import as_rank, engine_of, on_ranks, random_tokens
from conf.load import load
from conf.overrides import check_overrides
from kernels.common.commands import run_command
from kernels.common.options import split_options
from launch.ranks import Ranks
from model.finite import find
from model.weights import MOMENTS
from training import watchdog
from training.spikes import SpikeDetector
from training.watchdog import Watchdog

_CALLS, _WATCHED_SECONDS = 2000, 20.0


def main(argv: list[str]) -> None:
    if argv[:1] == ["--rank"]:
        as_rank(lambda ranks: _figures(ranks, int(argv[1]), argv[2:]))
    options, overrides = split_options(argv, {"steps": 20}, {"steps": 3})
    check_overrides(overrides, options)
    figures = on_ranks(1, "bench.guards", [str(options["steps"]), "logger=none", *overrides])[0]
    config, step = load(overrides), figures["step"]
    often = f"a line is logged every {config.log_every} step(s), a save comes every {config.save_every}"
    print(f"a step takes {step * 1e3:.1f} ms; {often}")
    per_step = {
        "watchdog: a mark per step": figures["mark"],
        "watchdog: its threads, of a core": figures["threads"] * step,
        "spikes: per log line": figures["spike"] / config.log_every,
        "saves: the scan of the copies, in a thread": figures["scan"] / config.save_every if config.save_every else 0.0,
    }
    for name, seconds in per_step.items():
        print(f"{name:45} {seconds * 1e6:10.2f} us per step {seconds / step:9.4%}")
    print(f"{'all':45} {sum(per_step.values()) * 1e6:10.2f} us per step {sum(per_step.values()) / step:9.4%}")


def _figures(ranks: Ranks, steps: int, overrides: list[str]) -> dict[str, float]:
    """Return seconds: of a step, and of each guard's part; `threads` is a fraction of a core."""
    engine, batch, shape = engine_of(overrides, ranks)
    tokens = random_tokens(batch, shape, engine.config.sequence_length, ranks.rank)
    seconds = []
    for _ in range(steps + 3):
        began = time.perf_counter()
        engine.train_step(tokens, 1.0)
        seconds.append(time.perf_counter() - began)
    guard, chance = engine.config.guard, random.Random(0)
    spikes = SpikeDetector(guard.spike_window, guard.spike_sigmas)
    weights = {name: p.detach().float() for name, p in engine.module.named_parameters()}
    copies = {f"{name} {key}": weight.clone() for name, weight in weights.items() for key in ("master", *MOMENTS)}
    with tempfile.TemporaryDirectory() as folder:
        watch = Watchdog(engine.config.watchdog, ranks, Path(folder))
        watch.start()
        tasks = [Path(f"/proc/self/task/{thread.native_id}/schedstat") for thread in watch.threads]
        used, began = _on_cpu(tasks), time.monotonic()
        time.sleep(_WATCHED_SECONDS)
        threads = (_on_cpu(tasks) - used) / (time.monotonic() - began)
        watch.stop()
    return {
        "step": statistics.median(seconds[3:]),
        "mark": _timed(lambda: watchdog.beat("step", 7), _CALLS),
        "spike": _timed(lambda: spikes.check(chance.gauss(3.0, 0.1), math.exp(chance.gauss(0.0, 0.3))), _CALLS),
        "scan": _timed(lambda: find(copies.items()), 5),
        "threads": threads,
    }


def _on_cpu(tasks: list[Path]) -> float:
    """Return the seconds for which threads have run on a core, from Linux's scheduler."""
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def _timed(call: Callable[[], object], times: int) -> float:
    """Return the seconds of a call, the median of ten rounds."""
    rounds = []
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(times):
            call()
        rounds.append((time.perf_counter() - began) / times)
    return statistics.median(rounds)


if __name__ == "__main__":
    run_command(main, __doc__)
