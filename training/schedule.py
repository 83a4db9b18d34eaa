"""Learning-rate schedules: linear warm-up, then cosine, linear or WSD (warm-up, stable, decay)."""

from __future__ import annotations

import math

from conf.schema import ScheduleConfig


def warmup_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Return the number of warm-up steps of a run of `steps` steps."""
    return round(schedule.warmup * steps)


def lr_scale(schedule: ScheduleConfig, step: int, steps: int, warmup: int | None = None) -> float:
    """Return the factor on the peak learning rate at step number `step` (0 to steps - 1).

    The factor rises linearly over the warm-up. Cosine and linear then decay to `final` at the last step. WSD (Hu 2024,
    arXiv 2404.06395) holds 1, then decays linearly to `final` over the last `decay` fraction; `decay` 0 holds 1 to the end.

    Args:
        warmup: warm-up steps; None: `schedule.warmup` of `steps`. A run whose length was changed keeps those it began with.
    """
    warmup = warmup_steps(schedule, steps) if warmup is None else warmup
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "wsd":
        decay_steps = round(schedule.decay * steps)
        progress = max(0.0, (step + 1 - (steps - decay_steps)) / max(1, decay_steps))
    else:
        progress = (step + 1 - warmup) / max(1, steps - warmup)
    decayed = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return schedule.final + (1 - schedule.final) * decayed
