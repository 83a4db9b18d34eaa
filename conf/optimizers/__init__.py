"""The optimizers by name, as `optim=` selects them. A new one: its description here, its update in `training/optimizers/`."""

from __future__ import annotations

from conf.optimizers.adamw import ADAMW
from conf.optimizers.muon import MUON
from conf.optimizers.normuon import NORMUON
from conf.optimizers.optimizer import Optimizer, Rule

OPTIMIZERS: dict[str, Optimizer] = {each.name: each for each in (ADAMW, MUON, NORMUON)}


def all_states() -> tuple[str, ...]:
    """Return the names of all tensors that optimizers keep of parameters."""
    rules = [rule for each in OPTIMIZERS.values() for rule in each.rules]
    return tuple(dict.fromkeys(state for rule in rules for state in (*rule.states, *rule.row_states)))


__all__ = ["OPTIMIZERS", "Optimizer", "Rule", "all_states"]
