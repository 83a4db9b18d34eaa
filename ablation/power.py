"""Say before a plan runs which differences it can find, and how many seeds its smallest effect takes."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from ablation.manifest import NAME
from ablation.metrics import LOSS, metric_of
from ablation.plan import Plan, planned_looks
from ablation.results import read_results
from ablation.ttest import ALPHA, FEWEST_SEEDS, MOST_SEEDS, POWER, detectable_difference, seeds_needed
from conf.shape import shape_of
from launch.estimate.counts import parameters

# Median over arms of the standard deviation of per-seed differences to relu, nats per token, by parameters, after 1M tokens:
# bench/results/glu_variants/comparisons.csv.
MEASURED = {3_344_576: 0.0362, 5_114_624: 0.0233}


def power_lines(plan: Plan, folder: Path) -> list[str]:
    """Return, for every size, which difference its seeds find and how many seeds the plan's smallest effect takes.

    The scatter comes from the runs of the plan's folder where three seeds of an arm and the baseline have ended, or else, of
    losses, from the measured size that is nearest. What missed learning rates add is not known before the sweep. The number of
    seeds is that of a plan whose only look is after so many.
    """
    metric = metric_of(plan.config.metric)
    pairs = sum(len(plan.arms[size]) - 1 for size in plan.sizes)
    seeds, effect = len(plan.config.seeds), plan.config.smallest_effect
    looks = planned_looks(plan.config)
    look = looks.reached(seeds)
    alpha = looks.level(ALPHA / pairs, look) if look else ALPHA / pairs
    of_runs = _of_runs(folder) if (folder / NAME).exists() else {}
    lines = []
    for size, arms in ((size, plan.arms[size]) for size in plan.sizes):
        deviation, source = of_runs.get(size, math.nan), "of the runs that have ended"
        if math.isnan(deviation) and metric != LOSS:
            lines.append(
                f"{size}: what its seeds find is known once {FEWEST_SEEDS} of an arm and the baseline have ended"
            )
            continue
        if math.isnan(deviation):
            count = sum(parameters(shape_of(arms[plan.config.baseline].config)).values())
            nearest = min(MEASURED, key=lambda n: abs(math.log(n / count)))
            deviation, source = MEASURED[nearest], f"measured at {nearest / 1e6:.1f}M parameters and 1M tokens"
        found = deviation * detectable_difference(look or seeds, alpha)
        needed = seeds_needed(deviation, 0.0, effect, lambda _: ALPHA / pairs * (1 - plan.config.reserve))
        takes = f"about {needed:.0f} seeds" if math.isfinite(needed) else f"more than {MOST_SEEDS:,} seeds"
        lines.append(
            f"{size}: {look or seeds} seeds find a difference of {found:.2g} {metric.short} in {POWER:.0%} of such plans, and "
            f"{effect:g} takes {takes} (SD of differences {deviation:.2g}, {source})"
        )
    return lines


def _of_runs(folder: Path) -> dict[str, float]:
    """Return the median deviation of differences by size, from the runs of a plan's folder."""
    results = read_results(folder)
    by_size = {
        size: [c.deviation for c in results.comparisons(size) if c.seeds >= FEWEST_SEEDS] for size in results.sizes
    }
    return {size: statistics.median(deviations) for size, deviations in by_size.items() if deviations}
