"""The learning rate as a function of the step: warm-up, then cosine, linear or WSD (warm-up, stable, decay)."""

from __future__ import annotations

import math

from conf.schema import ScheduleConfig


def rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Return the share of the peak learning rate that step number `step` (0 to steps - 1) trains with.

    The rate rises in a straight line over the first `warmup` share of the steps. Then cosine and linear fall to `final` at
    the last step; WSD (Hu 2024, arXiv 2404.06395) stays at the peak and falls in a straight line over the last `decay`.
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "wsd":
        falling = max(1, round(schedule.decay * steps))
        progress = max(0.0, (step + 1 - (steps - falling)) / falling)
    else:
        progress = (step + 1 - warmup) / max(1, steps - warmup)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return schedule.final + (1 - schedule.final) * left
