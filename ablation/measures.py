"""Figures of the runs of an arm, by seed: what claims are decided by, beside the losses.

    final_eval_loss     held-out, nats a token; nan of a run that diverged
    tokens_per_second   median
    recovered           of the units that were dead in the later half of a run, the share that was active again
    any other           of telemetry (kernels/activations/telemetry.py,
                        training/telemetry.py): of the last look that has it, mean over
                        layers; `max` is the largest of them
    speed_up            of two arms: tokens with which the other's curve reaches this one's loss, over this one's
    spread              of all arms of a size: the standard deviation of their losses

In the earlier half a unit may seem dead for want of tokens that were looked at, so `recovered` leaves that out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ablation.results import Results, Run
from ablation.statistics import effective_speed_up

MOST_SPEED_UP = 4.0  # as far as `effective_speed_up` goes on beyond a curve
BySeed = dict[int, float]


def by_seed(figure: str, runs: Iterable[Run], log: bool = False) -> BySeed:
    """Return a figure, or its logarithm, of an arm's runs. A seed whose run has none is left out, but for losses."""
    if figure == "final_eval_loss":
        return {run.planned.seed: run.outcome.loss for run in runs}
    values = {run.planned.seed: _figure(figure, run) for run in runs}
    if log:
        values = {seed: math.log(value) if value > 0 else math.nan for seed, value in values.items()}
    return _finite(values)


def log_speed_up(own: Iterable[Run], others: Iterable[Run]) -> BySeed:
    """Return the logarithm of how many times as many tokens the others take to the own runs' losses.

    It is at most `MOST_SPEED_UP`, and one over it for a loss that the others have before their second evaluation. A run that
    diverged never comes as far as one that did not.
    """
    of_seed = {run.planned.seed: run for run in others}
    return _finite(
        {run.planned.seed: _log_speed_up(run, of_seed[run.planned.seed]) for run in own if run.planned.seed in of_seed}
    )


def log_spread(results: Results, size: str) -> BySeed:
    """Return the logarithm of the deviation of all arms' losses, of seeds that all arms have."""
    losses = list(results.losses(size).values())
    seeds = sorted(set.intersection(*map(set, losses)))
    return {seed: math.log(np.std(_counted(losses, seed, results.ceiling(size)), ddof=1)) for seed in seeds}


def _counted(losses: list[BySeed], seed: int, ceiling: float) -> list[float]:
    return [of_arm[seed] if math.isfinite(of_arm[seed]) else ceiling for of_arm in losses]


def _figure(name: str, run: Run) -> float:
    if name == "tokens_per_second":
        return run.tokens_per_second
    looks = run.kind("telemetry")
    if name == "recovered":
        return _recovered(looks)
    values = (_of_layers(look.get(name), name) for look in reversed(looks))
    return next((value for value in values if math.isfinite(value)), math.nan)


def _recovered(looks: list[Mapping[str, Any]]) -> float:
    later = [look for look in looks if look["tokens"] > looks[-1]["tokens"] / 2]
    again = [_of_layers(look.get("revived"), "revived") for look in later]
    again = [share for share in again if math.isfinite(share)]  # the first look of a process has none
    if not again:
        return math.nan
    ever = math.fsum(again) + _of_layers(looks[-1].get("dead"), "dead")
    return math.fsum(again) / ever if ever > 0 else math.nan


def _of_layers(value: Any, name: str) -> float:
    """Return one number of a figure that may have one for each layer; nan where it is not defined."""
    values = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
    return float(max(values) if name == "max" else np.mean(values)) if values else math.nan


def _log_speed_up(run: Run, other: Run) -> float:
    ended = [math.isfinite(r.outcome.loss) for r in (run, other)]
    if not all(ended):
        return math.nan if not any(ended) else math.log(MOST_SPEED_UP) * (1 if ended[0] else -1)
    own, curve = run.curve(), other.curve()
    if not own or len(curve) < 2:
        return math.nan
    spent = max(own)  # the last evaluation on the text of all others
    found = effective_speed_up(list(curve), list(curve.values()), own[spent], spent)
    if math.isnan(found.factor):  # beyond the curve, on either side
        return math.log(MOST_SPEED_UP) * (1 if found.extrapolated else -1)
    return math.log(found.factor)


def _finite(values: BySeed) -> BySeed:
    return {seed: value for seed, value in values.items() if math.isfinite(value)}
