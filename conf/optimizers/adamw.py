"""AdamW for every parameter."""

from __future__ import annotations

from conf.optimizers.optimizer import ADAMW_RULE, Optimizer

ADAMW = Optimizer("adamw", ADAMW_RULE)
