"""Measure whether an arm's best learning rate transfers to other sizes: `python -m ablation.transfer ablations/transfer`.

    FOLDER       of a plan whose sizes have sweeps of their own
    from=SIZE    the size whose learning rates would be taken for the others; default: the smallest

A row per arm and other size: how many factors of two the best learning rate, the vertex of the sweep's parabola, lies above
that of SIZE, with a 95% interval from the scatter of the sweeps' runs, and what taking SIZE's would cost there. Learning rates
are factors of each size's `optim.lr`, so under `optim.scaling=mup` no shift means that one value holds for all. A rate
transfers where the interval lies within half a factor of two, and does not where it lies outside; else more seeds are needed
(`ablation.rate_seeds`), which can be added to a plan that has run.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

from rich.table import Table
from scipy import stats

from ablation.multipliers import compute_of
from ablation.results import Results, read_results
from conf.terminal import SafeConsole
from kernels.common.commands import run_command
from kernels.common.errors import UserError, unknown
from kernels.common.options import read_positional

TOLERATED = 0.5  # factors of two by which a best learning rate may move


@dataclasses.dataclass(frozen=True)
class Shift:
    """How far an arm's best learning rate at one size lies from that at another."""

    arm: str
    size: str
    shift: float  # log2 of the ratio; nan where a sweep has no parabola
    interval: tuple[float, float]  # 95%
    cost: float  # nats that the other size's best learning rate costs here
    verdict: str  # "transfers", "does not transfer", "undecided", or why it is not known


def shifts(results: Results, base: str) -> list[Shift]:
    """Return the shifts of all arms and sizes but `base`.

    Raises:
        UserError: the plan swept at one size alone.
    """
    if results.manifest.plan.sweep_at is not None:
        raise UserError(f"the plan {results.manifest.plan.name} swept at {results.manifest.plan.sweep_at} alone")
    return [_shift(results, base, size, arm) for size in results.sizes if size != base for arm in results.arms(size)]


def _shift(results: Results, base: str, size: str, arm: str) -> Shift:
    sweeps = {place: results.sweep(place, arm) for place in (base, size)}
    unknown_shift = Shift(arm, size, math.nan, (math.nan, math.nan), math.nan, "")
    vertices, variances, freedoms = [], [], []
    for place, sweep in sweeps.items():
        noise = results.noises(place)[arm]
        if sweep is None or sweep.edge or math.isnan(sweep.rise) or not noise.freedom:
            why = f"no best learning rate at {place}" + (
                f": it is the {sweep.edge} tried" if sweep and sweep.edge else ""
            )
            return dataclasses.replace(unknown_shift, verdict=why)
        vertex = math.log2(sweep.best_lr / results.manifest.learned(place, arm)["optim.lr"]) - sweep.distance
        vertices.append(vertex)
        variances.append(sweep.vertex_variance(noise))
        freedoms.append(noise.freedom)
    shift = vertices[1] - vertices[0]
    variance = sum(variances)
    freedom = variance**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True)) if variance else math.inf
    reach = math.sqrt(variance) * float(stats.t.isf(0.025, freedom))  # Welch-Satterthwaite
    low, high = shift - reach, shift + reach
    verdict = "undecided"
    if low > -TOLERATED and high < TOLERATED:
        verdict = "transfers"
    elif low > TOLERATED or high < -TOLERATED:
        verdict = "does not transfer"
    here = sweeps[size]
    assert here is not None  # checked above
    return Shift(arm, size, shift, (low, high), here.rise * shift**2, verdict)


def main(argv: list[str]) -> int:
    options, folders = read_positional(argv, {"from": ""})
    if len(folders) != 1:
        raise UserError("expected the folder of one plan: python -m ablation.transfer ablations/transfer")
    results = read_results(Path(folders[0]))
    base = options["from"] or min(results.sizes, key=lambda size: compute_of(results, size, results.baseline))
    if base not in results.sizes:
        raise unknown("size", base, results.sizes)
    table = Table("arm", "size", "shift", "95%", "cost, nats", "learning rate", box=None)
    for found in shifts(results, base):
        low, high = found.interval
        numbers = [f"{found.shift:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{found.cost:.4f}"]
        table.add_row(found.arm, found.size, *(numbers if math.isfinite(low) else ["–"] * 3), found.verdict)
    console = SafeConsole(file=sys.stdout, highlight=False, markup=False)
    console.print(f"how far the best learning rate lies above that of {base}, in factors of two")
    console.print(table)
    return 0


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
