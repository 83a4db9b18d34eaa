"""Formulas that reduce over d_ff: every kind of reduction, inside each other and beside learned parameters."""

from __future__ import annotations

from typing import Any

# Name: (formula, parameters).
REDUCING: dict[str, tuple[str, dict[str, Any]]] = {
    "norm": ("x*norm(x**2)", {}),
    "topk": ("relu(gate - mean(gate) - 1.645*std(gate))*up", {}),
    "softmax": ("exp(x - max(x))/sum(exp(x - max(x)))", {}),
    "polynorm": (
        "w3*norm(x**3) + w2*norm(x**2) + w1*norm(x) + b",
        {**{name: {"init": 1 / 3} for name in ("w1", "w2", "w3")}, "b": {"init": 0.0}},
    ),
    "subnorm": ("norm(relu(gate)**2*up)", {}),
    "sum": ("sum(x)*x", {}),
    "nested": ("mean(norm(x)*x)*x", {}),
    "twice": ("norm(norm(x)**2, 0.1)*x", {}),
    "rms": ("x*rms(x)", {}),
    "min": ("min(x)*tanh(x) + mean(x)", {}),
    "channel": ("x*rms(c*x, 0.5)", {"c": {"init": 0.5, "share": "channel"}}),
    "layernorm": ("(x - mean(x))/std(x, 1e-6)", {}),
    "products": ("max(gate*up)*up + a*mean(gate)", {"a": {"init": 0.5}}),
    "spread": ("std(x*rms(x))*x*mean(x)", {}),
}
