"""Measure the cost of an activation telemetry sample in a run of `train.py`: `python -m bench.telemetry`.

    steps=200  steps per run
    rounds=3   runs
    out=FILE   where the figures go (JSON)
    KEY=VALUE  overrides for train.py

Every fourth step is sampled. The step after it waits for the reduction and writes the line. The other two are plain. The cost
of a sample is the time of the first two beyond that of two plain steps, in medians over the run.
"""

from __future__ import annotations

import json
import statistics
import sys

from bench.records import claim_record
from bench.train import machine, seconds_of_steps
from conf.load import load
from conf.overrides import check_overrides
from kernels.common.commands import run_command
from kernels.common.files import atomic_write
from kernels.common.options import split_options

EVERY = 4
_DEFAULTS = {"steps": 200, "rounds": 3, "out": "bench/results/cpu-telemetry.json"}


def sample_cost(seconds: list[float]) -> float:
    """Return the cost of a sample as a fraction of a plain step, from the seconds of steps 1, 2, 3 and so on."""
    by_phase = [seconds[(phase - 1) % EVERY + EVERY :: EVERY] for phase in range(EVERY)]  # the first four warm up
    plain = statistics.median([*by_phase[2], *by_phase[3]])
    return (statistics.median(by_phase[0]) + statistics.median(by_phase[1])) / plain - 2


def main(argv: list[str]) -> None:
    options, overrides = split_options(argv, _DEFAULTS, {"steps": 4 * EVERY, "rounds": 1})
    check_overrides(overrides, options)
    claim_record(options["out"], argv)
    every = load(overrides).telemetry_every or 50
    costs = []
    for number in range(options["rounds"]):
        seconds = seconds_of_steps([*overrides, f"telemetry_every={EVERY}"], options["steps"])
        costs.append(sample_cost(seconds))
        print(f"round {number + 1}: a sample costs {costs[-1]:.1%} of a step", file=sys.stderr, flush=True)
    fractions = [cost / every for cost in sorted(costs)]
    print(
        f"a sample costs {statistics.median(costs):.1%} of a step ({min(costs):.1%} to {max(costs):.1%}); sampling every "
        f"{every} steps costs {statistics.median(fractions):.2%} of the time ({fractions[0]:.2%} to {fractions[-1]:.2%})"
    )
    with atomic_write(options["out"]) as file:
        json.dump(
            {
                "machine": machine(),
                "overrides": overrides,
                "fraction_of_step": costs,
                f"fraction_of_time_every_{every}_steps": fractions,
            },
            file,
            indent=2,
        )
        file.write("\n")


if __name__ == "__main__":
    run_command(main, __doc__)
