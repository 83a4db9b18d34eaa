"""A small plot of an arm's h and its slope, for the tables of the report; computed from the formula, without torch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from kernels.formula import Formula, FormulaError, parse

REACH, LOW, HIGH = 4.0, -2.0, 4.0  # of x, and of h and its slope: the same for all arms, which can be compared
WIDTH, HEIGHT = 96.0, 72.0  # pixels
_POINTS = 129


@dataclasses.dataclass(frozen=True)
class Sketch:
    """The two curves as points of an SVG polyline, "x,y x,y ..."; what leaves the frame is clipped by it."""

    label: str
    h: str
    slope: str
    x_axis: float  # where 0 is, in pixels from the top
    y_axis: float = WIDTH / 2


def sketch(keys: Mapping[str, Any]) -> Sketch | None:
    """Return the plot of an arm: over x, or over gate with up at 1, with learned parameters at their start.

    Args:
        keys: the values of a run by dotted key, `ffn.formula` and `ffn.parameters` among them.

    Returns:
        None where the keys hold no formula that can be computed.
    """
    with contextlib.suppress(FormulaError):
        return _drawn(parse(str(keys.get("ffn.formula") or ""), parameters_of(keys)))
    return None


def parameters_of(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of an arm; a nested key, ffn.parameters.b.init say, is a key of its own in a manifest."""
    found: dict[str, Any] = dict(keys.get("ffn.parameters") or {})
    for key, value in keys.items():
        if key.startswith("ffn.parameters."):
            name, _, setting = key.removeprefix("ffn.parameters.").partition(".")
            if setting:
                found.setdefault(name, {})[setting] = value
            else:
                found[name] = value
    return found


def _drawn(formula: Formula) -> Sketch:
    from kernels.formula.compiled import compile_formula
    from kernels.formula.gaussian import gaussian_reductions
    from kernels.formula.program import run
    from kernels.formula.safety import NUMPY

    x = np.linspace(-REACH, REACH, _POINTS)
    argument = formula.pre_activations[0]
    values: dict[str, Any] = {name: np.float64(1) for name in (*formula.pre_activations, "dh")}
    values |= {name: np.float64(p.init) for name, p in formula.tensors.items()} | {argument: x}
    compiled = compile_formula(formula)
    # A channel of many standard normal ones, whose reductions it does not move.
    values |= dict.fromkeys(compiled.backward.inputs, np.float64(0)) | gaussian_reductions(compiled) | values
    with np.errstate(all="ignore"):
        results = run(compiled.backward_with_h, NUMPY, values)
    h, slope = (_points(x, np.broadcast_to(results[name], x.shape)) for name in ("h", f"d{argument}"))
    return Sketch(f"h and its slope over {argument} from -{REACH:g} to {REACH:g}", h, slope, _y(0.0))


def _points(x: np.ndarray, y: np.ndarray) -> str:
    inside = np.isfinite(y)
    y = np.clip(y, 2 * LOW, 2 * HIGH)  # far outside of the frame, but short
    across = (x + REACH) * WIDTH / (2 * REACH)
    return " ".join(f"{a:.1f},{_y(b):.1f}" for a, b in zip(across[inside], y[inside], strict=True))


def _y(value: float) -> float:
    return (HIGH - value) * HEIGHT / (HIGH - LOW)
