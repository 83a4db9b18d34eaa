"""Compute metrics of an arm's runs, by seed. Claims are decided by these, besides the losses.

    final_eval_loss     held-out, nats per token; nan for a diverged run
    tokens_per_second   median over the run
    recovered           of the units that were dead in the later half of a run, the fraction that became active again
    any other           from telemetry (kernels/activations/telemetry.py, training/telemetry.py): the last sample that has it,
                        averaged over layers; for `max`, the maximum over layers
    speed_up            of two arms: tokens at which the other's curve reaches this one's loss, over this one's tokens
    spread              of all arms of a size: the standard deviation of their losses

In the earlier half a unit may look dead only because few tokens have been sampled, so `recovered` skips that half.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ablation.curves import effective_speed_up
from ablation.results import Results, Run

MOST_SPEED_UP = 4.0  # the limit of `effective_speed_up` beyond a curve
BySeed = dict[int, float]


def by_seed(metric: str, runs: Iterable[Run], log: bool = False) -> BySeed:
    """Return a metric of an arm's runs, or its logarithm. A run without it is left out; a diverged run has the loss nan."""
    if metric == "final_eval_loss":
        return {run.planned.seed: run.outcome.loss for run in runs}
    values = {run.planned.seed: _metric(metric, run) for run in runs}
    if log:
        values = {seed: math.log(value) if value > 0 else math.nan for seed, value in values.items()}
    return _finite(values)


def log_speed_up(own: Iterable[Run], others: Iterable[Run]) -> BySeed:
    """Return the log ratio of the tokens the other arm needs to reach this arm's loss.

    The ratio lies between 1 / `MOST_SPEED_UP`, where the other reaches the loss before its second evaluation, and
    `MOST_SPEED_UP`. A diverged run counts as slower than any run that did not diverge, by `MOST_SPEED_UP`.
    """
    other_runs = {run.planned.seed: run for run in others}
    pairs = [(run, other_runs[run.planned.seed]) for run in own if run.planned.seed in other_runs]
    return _finite({run.planned.seed: _log_speed_up(run, other) for run, other in pairs})


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
    samples = run.lines_of("telemetry")
    if name == "recovered":
        return _recovered(samples)
    values = (_over_layers(sample.get(name), name) for sample in reversed(samples))
    return next((value for value in values if math.isfinite(value)), math.nan)


def _recovered(samples: Sequence[Mapping[str, Any]]) -> float:
    samples = [sample for sample in samples if sample.get("tokens") is not None]
    later = [sample for sample in samples if sample["tokens"] > samples[-1]["tokens"] / 2]
    revived = [_over_layers(sample.get("revived"), "revived") for sample in later]
    revived = [fraction for fraction in revived if math.isfinite(fraction)]  # the first sample of a process has none
    if not revived:
        return math.nan
    ever_dead = math.fsum(revived) + _over_layers(samples[-1].get("dead"), "dead")
    return math.fsum(revived) / ever_dead if ever_dead > 0 else math.nan


def _over_layers(value: Any, name: str) -> float:
    """Return one number for a metric that may have a value per layer; nan where it is undefined."""
    values = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
    return float(max(values) if name == "max" else np.mean(values)) if values else math.nan


def _log_speed_up(run: Run, other: Run) -> float:
    run_ended, other_ended = math.isfinite(run.outcome.loss), math.isfinite(other.outcome.loss)
    if not (run_ended and other_ended):
        limit = math.log(MOST_SPEED_UP)
        return limit if run_ended else -limit if other_ended else math.nan
    own, curve = run.curve(), other.curve()
    if not own or len(curve) < 2:
        return math.nan
    spent = max(own)  # the last evaluation on the text of all others
    speed_up = effective_speed_up(list(curve), list(curve.values()), own[spent], spent)
    if math.isnan(speed_up.factor):  # beyond the curve, on either side
        return math.log(MOST_SPEED_UP) * (1 if speed_up.extrapolated else -1)
    return math.log(speed_up.factor)


def _finite(values: BySeed) -> BySeed:
    return {seed: value for seed, value in values.items() if math.isfinite(value)}
