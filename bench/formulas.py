"""The formulas that kernels are measured on: every arm of conf/ffn, and others that use what the arms do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_ARMS = Path(__file__).parents[1] / "conf" / "ffn"

# Name: (formula, parameters). Each has something that no arm has: a cubic in the exponent, learned parameters of both kinds,
# several functions of one pre-activation, functions of both.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu_tanh": ("gelu_tanh(x)", {}),
    "xielu": (  # Huang 2024 (arXiv 2411.13010)
        "where(x>0, softplus(ap)*x**2, softplus(an)*(expm1(x)-x)) + 0.5*x",
        {"ap": {"init": 0.8}, "an": {"init": 0.8}},
    ),
    "situ": ("4*tanh(gate/4)*sigmoid(gate)*25*tanh(up/25)", {}),
    "mish": ("x*tanh(softplus(x))", {}),  # Misra 2019 (arXiv 1908.08681)
    "prelu": ("where(x>0,x,slope*x)", {"slope": {"init": 0.25}}),  # He 2015 (arXiv 1502.01852)
    "prelu_channel": ("where(x>0,x,slope*x)", {"slope": {"init": 0.25, "share": "channel"}}),
}


def formulas() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return {name: (formula, parameters)}, arms first."""
    found = {}
    for path in sorted(_ARMS.glob("*.yaml")):
        arm = yaml.safe_load(path.read_text(encoding="utf-8"))
        if arm["formula"]:  # custom has none
            found[arm["name"]] = (arm["formula"], arm.get("parameters") or {})
    return found | OTHERS
