"""Statistics of activations, computed inside the forward kernel.

A second variant of the forward kernel computes the same h, bit for bit, and also accumulates the sums that this module
defines. `BatchStats` holds the sums of one call, `ActivationStats` accumulates those of a layer over calls. The sums of
several ranks may be added; `figures` converts them to fractions, means and moments. The caller decides when to sample.

Slopes are derivatives of the formula, so every figure is defined for every formula: the *gate* of a gated formula is what
multiplies `up`, dh/dup, which is silu(gate) for silu(gate) * up; its slope is the derivative of that by `gate`. Reductions
over d_ff count as constants in them: a slope says what a channel does to its own h.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import sympy
import torch
from torch import Tensor

from ..formula.compiled import Compiled
from ..formula.derivative import Derivative, TooMuchWork, Work
from ..formula.grammar import FormulaError
from ..formula.program import Argument, Line, Lowering, Program
from ..formula.symbolic import abs, max, plain_algebra, where_ge, where_gt

SATURATED = 0.01  # |slope| below which a pre-activation counts as saturated
STORED = "0h"  # h as an input; "h" could be the name of a parameter, which cannot begin with a digit
PEAK, ACTIVE = "peak", "active"


@functools.lru_cache(maxsize=256)
def stats_program(compiled: Compiled) -> Program:
    """Return the program that computes the contribution of one element to the statistics.

    Inputs: the pre-activations, the parameters, the reductions, and `STORED`, the rounded h. Outputs: all but the last
    two are summed over all elements; `PEAK` is |h|, reduced by maximum; `ACTIVE` is 0 where h and all its slopes are exactly 0,
    else 1, and is summed over the tokens of each unit. The names of its lines differ from those of `compiled.forward`.

    Raises:
        FormulaError: the second derivative is too long.
    """
    try:
        with plain_algebra():
            return _renumbered(_lowered(compiled), len(compiled.forward.lines))
    except TooMuchWork:
        reason = "the telemetry of this formula is too long to compile: telemetry_every=0 trains without it"
        raise FormulaError(reason, compiled.formula.text, 0) from None


def _lowered(compiled: Compiled) -> Program:
    formula, h = compiled.formula, _symbol(STORED)
    slopes = [compiled.slopes[name] for name in formula.pre_activations]
    outputs = {
        "zero": where_ge(0, abs(h), 1, 0),
        "saturated": sum((_flat(slope) for slope in slopes), sympy.Integer(0)),
        "slope": sum((abs(slope) for slope in slopes), sympy.Integer(0)),
        **{f"h{power}": h**power for power in range(1, 5)},
    }
    if formula.gated:
        gate, up = (_symbol(name) for name in formula.pre_activations)
        opening = compiled.slopes["up"]
        outputs |= {"open": opening, "open2": opening**2, "flat": _flat(Derivative(gate, Work()).of(opening))}
        outputs |= {"gate": gate, "gate2": gate**2, "up": up, "up2": up**2, "gate_up": gate * up}
    largest = functools.reduce(max, (abs(slope) for slope in slopes), abs(h))
    outputs |= {PEAK: abs(h), ACTIVE: where_ge(0, largest, 0, 1)}
    inputs = (*formula.pre_activations, *formula.tensors, *compiled.reductions.names, STORED)
    return Lowering(inputs, outputs).program()


def sums_of(compiled: Compiled) -> tuple[str, ...]:
    """Return the names of the outputs that are summed over all elements, in order."""
    return tuple(name for name in stats_program(compiled).outputs if name not in (PEAK, ACTIVE))


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, real=True)


def _flat(slope: sympy.Expr) -> sympy.Expr:
    return where_gt(sympy.Rational(1, round(1 / SATURATED)), abs(slope), 1, 0)


def _renumbered(program: Program, first: int) -> Program:
    """Return the program with its lines named from t`first` on."""
    names = {line.name: f"t{first + i}" for i, line in enumerate(program.lines)}

    def renamed(argument: Argument) -> Argument:
        return names.get(argument, argument) if isinstance(argument, str) else argument

    lines = [Line(names[n.name], n.operation, tuple(map(renamed, n.arguments))) for n in program.lines]
    return Program(program.inputs, tuple(lines), {name: renamed(value) for name, value in program.outputs.items()})


@dataclasses.dataclass
class BatchStats:
    """The statistics of one call of a kernel.

    Attributes:
        sums: (number of sums,) fp32 or wider, in the order of `sums_of`.
        peak: () the largest |h|.
        active: (d_ff,) tokens for which each unit was active.
        elements: of h.
    """

    sums: Tensor
    peak: Tensor
    active: Tensor
    elements: int


class ActivationStats:
    """The statistics of one layer, accumulated over calls in fp64 on the device.

    Attributes:
        sums: (number of sums + 1,), in the order of `names`; the last is the number of elements.
        peak: (1,) the largest |h|.
        active: (d_ff,) tokens for which each unit was active.
    """

    def __init__(self, compiled: Compiled, width: int, device: torch.device) -> None:
        self.names = sums_of(compiled)
        self.pre_activations = len(compiled.formula.pre_activations)
        self.sums = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=device)
        self.peak = torch.zeros(1, dtype=torch.float64, device=device)
        self.active = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, batch: BatchStats) -> None:
        """Accumulate the statistics of one call."""
        self.sums[:-1] += batch.sums
        self.sums[-1] += batch.elements
        torch.maximum(self.peak, batch.peak.double(), out=self.peak)
        self.active += batch.active


def figures(names: Sequence[str], pre_activations: int, sums: Sequence[float], peak: float) -> dict[str, float]:
    """Return the figures of a layer by name.

    Args:
        names, pre_activations: those of its `ActivationStats`.
        sums, peak: as in `ActivationStats`, reduced over all ranks.

    Returns:
        zeros: fraction of h that is exactly 0.
        saturated: fraction of pre-activations (gate and up alike) at which |slope| < `SATURATED`.
        slope: mean |slope|.
        mean, rms: of h.
        max: largest |h|.
        mean_over_std: of h; far from 0, the gradients of a unit's weights tend to have one sign (zigzag).
        kurtosis: of h about its mean; 3 for a normal distribution.
        gate_mean, gate_std: of the gate.
        gate_saturated: fraction of gate values at which the gate's |slope| < `SATURATED`.
        gate_up_correlation: of the two pre-activations.

        A figure is NaN where it is undefined: no elements, or a constant.
    """
    count = sums[-1]
    mean = {name: total / count if count else math.nan for name, total in zip(names, sums, strict=False)}
    first, second, third, fourth = (mean[f"h{power}"] for power in range(1, 5))
    variance = _not_negative(second - first**2)
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    result = {
        "zeros": mean["zero"],
        "saturated": mean["saturated"] / pre_activations,
        "slope": mean["slope"] / pre_activations,
        "mean": first,
        "rms": math.sqrt(_not_negative(second)),
        "max": peak if first == first else math.nan,  # a device's maximum may ignore a NaN, a sum does not
        "mean_over_std": _ratio(first, math.sqrt(variance)),
        "kurtosis": _ratio(central, variance**2),
    }
    if "gate" in mean:
        spread = math.sqrt(_not_negative(mean["gate2"] - mean["gate"] ** 2))
        spread *= math.sqrt(_not_negative(mean["up2"] - mean["up"] ** 2))
        result |= {
            "gate_mean": mean["open"],
            "gate_std": math.sqrt(_not_negative(mean["open2"] - mean["open"] ** 2)),
            "gate_saturated": mean["flat"],
            "gate_up_correlation": _ratio(mean["gate_up"] - mean["gate"] * mean["up"], spread),
        }
    return result


def _not_negative(value: float) -> float:
    """Return a variance, which rounding may have made negative; NaN and infinity stay."""
    return 0.0 if value < 0 else value


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
