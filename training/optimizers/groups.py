"""The parameter groups of an optimizer: which rule updates a parameter, at which rate and decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from conf.optimizers import OPTIMIZERS
from conf.schema import OptimConfig
from model.scaling import Scaling


def parameter_groups(model: nn.Module, optim: OptimConfig, scaling: Scaling) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: matrices have weight decay, vectors (norms) have none.

    Each group has a "rule", by the name of `conf/optimizers/`. Where rates follow width and depth, each factor has a group of
    its own, with a decay that moves weights as before.
    """
    optimizer = OPTIMIZERS[optim.name]
    rules = {rule.name: rule for rule in optimizer.rules}
    groups: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        dimensions = dimensions_of(parameter)
        rule = optimizer.rule(name, dimensions)
        rate = scaling.rate(name, optimizer.width_exponent(optim, rule))
        groups.setdefault((rule.name, dimensions > 1, rate), []).append(parameter)
    return [
        {
            "params": parameters,
            "rule": rule,
            "lr": optimizer.lr(optim, rules[rule]) * rate,
            "weight_decay": optimizer.weight_decay(optim, rules[rule]) / rate if is_matrix else 0.0,
        }
        for (rule, is_matrix, rate), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def dimensions_of(parameter: nn.Parameter) -> int:
    """Return the number of a parameter's dimensions. Under ZeRO-3 its own shape is that of a placeholder."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
