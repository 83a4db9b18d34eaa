"""The formulas that kernels are measured on: every arm of conf/ffn, and three that use what no arm does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_ARMS = Path(__file__).parents[1] / "conf" / "ffn"

# Name: (formula, parameters).
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "prelu_channel": ("where(x>0,x,slope*x)", {"slope": {"init": 0.25, "share": "channel"}}),
    "tanh_log": ("tanh(gate)*log(1+up**2)", {}),
    "x_atan": ("x*atan(x)", {}),
}


def formulas() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return {name: (formula, parameters)}, arms first."""
    arms = {}
    for path in sorted(_ARMS.glob("*.yaml")):
        arm = yaml.safe_load(path.read_text(encoding="utf-8"))
        if arm["formula"]:  # custom has none
            arms[arm["name"]] = (arm["formula"], arm.get("parameters") or {})
    return arms | OTHERS
