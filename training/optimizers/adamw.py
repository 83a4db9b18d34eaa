"""AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_update

from conf.schema import OptimConfig


def adamw(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of parameter groups."""
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def step_adamw(group: dict[str, Any], state: dict[Any, dict[str, Any]], optim: OptimConfig) -> None:
    """Update the parameters of a group that have a gradient, bit for bit as `adamw` would.

    For optimizers that update only some parameters by a rule of their own.

    Args:
        state: of the optimizer; that of a parameter is created by its first step.
    """
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    for parameter in parameters:
        if not state[parameter]:
            state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
    if not parameters:
        return

    def of_each(key: str) -> list[Tensor]:
        return [state[parameter][key] for parameter in parameters]

    adamw_update(
        parameters,
        [parameter.grad for parameter in parameters],
        of_each("exp_avg"),
        of_each("exp_avg_sq"),
        [],
        of_each("step"),
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
    )
