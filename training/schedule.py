"""Learning-rate schedules: linear warm-up, then cosine, linear or WSD (warm-up, stable, decay)."""

from __future__ import annotations

import math

from conf.schema import ScheduleConfig


def lr_scale(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Return the factor on the peak learning rate at step number `step` (0 to steps - 1).

    The factor rises linearly over the first `warmup` fraction of the steps. Cosine and linear then decay to `final` at the
    last step. WSD (Hu 2024, arXiv 2404.06395) holds 1, then decays linearly to `final` over the last `decay` fraction.
    """
    warmup_steps = round(schedule.warmup * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule.name == "wsd":
        decay_steps = max(1, round(schedule.decay * steps))
        progress = max(0.0, (step + 1 - (steps - decay_steps)) / decay_steps)
    else:
        progress = (step + 1 - warmup_steps) / max(1, steps - warmup_steps)
    decayed = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return schedule.final + (1 - schedule.final) * decayed
