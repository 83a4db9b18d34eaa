"""What a look into the layers costs, in one run of `train.py`: `python -m bench.telemetry [steps=200] [rounds=3]`.

Every fourth step is looked at; the step after it waits for the reduction and writes the line; the other two are plain. A look
costs what the first two take more than two plain steps, in medians over the run. Takes overrides of `train.py` too.
"""

from __future__ import annotations

import json
import statistics
import sys

from bench.train import machine, seconds_of_steps
from conf.load import load
from kernels.common.commands import run_command
from kernels.common.files import atomic_write
from kernels.common.options import split_options

EVERY = 4
RESULT = "bench/results/cpu-telemetry.json"


def cost_of_a_look(seconds: list[float]) -> float:
    """Return what a look costs, as a share of a plain step; `seconds` are those of steps 1, 2, 3 and so on."""
    by_phase = [seconds[(phase - 1) % EVERY + EVERY :: EVERY] for phase in range(EVERY)]  # the first four warm up
    plain = statistics.median([*by_phase[2], *by_phase[3]])
    return (statistics.median(by_phase[0]) + statistics.median(by_phase[1])) / plain - 2


def main(argv: list[str]) -> None:
    options, overrides = split_options(argv, {"steps": 200, "rounds": 3}, {"steps": 4 * EVERY, "rounds": 1})
    every = load(overrides).telemetry_every or 50
    costs = []
    for number in range(options["rounds"]):
        seconds = seconds_of_steps([*overrides, f"telemetry_every={EVERY}"], options["steps"])
        costs.append(cost_of_a_look(seconds))
        print(f"round {number + 1}: a look costs {costs[-1]:.1%} of a step", file=sys.stderr, flush=True)
    share = [cost / every for cost in sorted(costs)]
    print(
        f"a look costs {statistics.median(costs):.1%} of a step ({min(costs):.1%} to {max(costs):.1%}): "
        f"{statistics.median(share):.2%} of the time at every {every}th step ({share[0]:.2%} to {share[-1]:.2%})"
    )
    with atomic_write(RESULT) as file:
        json.dump(
            {"machine": machine(), "overrides": overrides, "of_a_step": costs, f"at_every_{every}": share},
            file,
            indent=2,
        )
        file.write("\n")


if __name__ == "__main__":
    run_command(main, __doc__)
