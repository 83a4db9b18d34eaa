"""Compute metrics of an arm's runs, by seed. Claims are decided by these, besides the losses.

    final_eval_loss     held-out, nats per token; nan for a diverged run
    tokens_per_second   median over the run
    dead                units that were active for no token of the held-out text, in the last evaluation of all of it
    recovered           of the units that were dead in the later half of a run, the fraction that became active again, where a
                        unit counts as dead after `WINDOW` sampled tokens without activity
    max_over_rms        the largest |h| over the root mean square of h, in the layer where it is largest, in the last sample
    deviation           |loss - median of the arm's losses|: means of it are compared by the test of Brown and Forsythe 1974
    gap                 held-out loss less the mean training loss of the last tenth of a run
    any other           from telemetry (kernels/activations/telemetry.py, training/telemetry.py): the last sample that has it,
                        averaged over layers; for `max`, the maximum over layers
    multiplier          of two arms: compute that the other needs for this one's loss, over this one's; of a plan with horizons
    edge                of two arms and two sizes: the difference of their losses at a size
    spread              of all arms of a size: the standard deviation of their losses

In the earlier half a unit may look dead only because few tokens have been sampled, so `recovered` skips that half.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ablation.multipliers import LogMultiplier, log_multiplier, series
from ablation.results import Results, Run

BySeed = dict[int, float]
# Sampled tokens without activity after which a unit may be called dead: the default of telemetry_window.
WINDOW = 1_000_000
NEED_WINDOW = ("recovered",)


def by_seed(metric: str, runs: Iterable[Run], log: bool = False) -> BySeed:
    """Return a metric of an arm's runs, or its logarithm. A run without it is left out; a diverged run has the loss nan."""
    if metric == "final_eval_loss":
        return {run.planned.seed: run.outcome.loss for run in runs}
    runs = list(runs)
    if metric == "deviation":
        losses = [run.outcome.loss for run in runs]
        values = {run.planned.seed: abs(run.outcome.loss - float(np.median(losses))) for run in runs}
        return _finite(values)
    values = {run.planned.seed: _metric(metric, run) for run in runs}
    if log:
        values = {seed: math.log(value) if value > 0 else math.nan for seed, value in values.items()}
    return _finite(values)


def multiplier_over_horizons(results: Results, size: str, arm: str, other: str) -> LogMultiplier:
    """Return the log of the compute that the other arm needs for this arm's loss, over this arm's, by seed.

    Of runs at the plan's horizons (ablation/multipliers.py, E = 0); refused where there is one horizon.
    """
    of_size = next((of for of in series(results) if of.places[-1] == size), None)
    if of_size is None or len(results.manifest.plan.horizons) < 2:
        return LogMultiplier({}, refused="the plan has one horizon (ablation.horizons)")
    return log_multiplier(of_size, arm, other)


def edge(results: Results, size: str, arm: str, other: str) -> BySeed:
    """Return the difference of two arms' losses at a size, for the seeds that both have and that did not diverge."""
    losses = results.losses(size)
    return _finite(
        {seed: losses[arm][seed] - losses[other][seed] for seed in losses[arm].keys() & losses[other].keys()}
    )


def log_spread(results: Results, size: str) -> BySeed:
    """Return the log standard deviation of all arms' losses, for the seeds that all arms have."""
    losses = list(results.losses(size).values())
    ceiling = results.ceiling(size)
    seeds = sorted(set.intersection(*map(set, losses)))
    return {
        seed: math.log(np.std([of_arm[seed] if math.isfinite(of_arm[seed]) else ceiling for of_arm in losses], ddof=1))
        for seed in seeds
    }


def _metric(name: str, run: Run) -> float:
    if name == "tokens_per_second":
        return run.tokens_per_second
    if name == "dead":
        whole = [e for e in run.lines_of("eval") if e.get("dead") is not None and e.get("held_out_tokens")]
        most = max((line["held_out_tokens"] for line in whole), default=0)
        return next((_over_layers(e["dead"], name) for e in reversed(whole) if e["held_out_tokens"] == most), math.nan)
    if name == "gap":
        losses = [line["loss"] for line in run.lines_of("train") if line.get("loss") is not None]
        last = losses[len(losses) - max(1, len(losses) // 10) :]
        return run.outcome.loss - float(np.mean(last)) if last else math.nan
    samples = run.lines_of("telemetry")
    if name == "recovered":
        return _recovered(samples)
    if name == "max_over_rms":
        return next((r for sample in reversed(samples) if math.isfinite(r := _max_over_rms(sample))), math.nan)
    values = (_over_layers(sample.get(name), name) for sample in reversed(samples))
    return next((value for value in values if math.isfinite(value)), math.nan)


def _recovered(samples: Sequence[Mapping[str, Any]]) -> float:
    samples = [sample for sample in samples if sample.get("tokens") is not None]
    if not samples or (samples[-1].get("window_tokens") or 0) < WINDOW:
        return math.nan
    later = [sample for sample in samples if sample["tokens"] > samples[-1]["tokens"] / 2]
    revived = [_over_layers(sample.get("revived"), "revived") for sample in later]
    revived = [fraction for fraction in revived if math.isfinite(fraction)]  # the first sample of a process has none
    if not revived:
        return math.nan
    ever_dead = math.fsum(revived) + _over_layers(samples[-1].get("dead"), "dead")
    return math.fsum(revived) / ever_dead if ever_dead > 0 else math.nan


def _max_over_rms(sample: Mapping[str, Any]) -> float:
    largest, rms = (sample.get(name) for name in ("max", "rms"))
    sides = [side if isinstance(side, list) else [side] for side in (largest, rms)]
    ratios = [m / r for m, r in zip(*sides, strict=False) if m is not None and r]
    return max(ratios, default=math.nan)


def _over_layers(value: Any, name: str) -> float:
    """Return one number for a metric that may have a value per layer; nan where it is undefined."""
    values = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
    return float(max(values) if name == "max" else np.mean(values)) if values else math.nan


def _finite(values: BySeed) -> BySeed:
    return {seed: value for seed, value in values.items() if math.isfinite(value)}
