"""Static properties of an activation: cost, memory, the shape of its curve, and moments under normal pre-activations.

All values are computed in float64 on a grid of |pre-activation| <= 10 with a step of 1/1024 (1/16 for pairs of gate and up),
with learned parameters at their initial values, and reductions over d_ff at those of standard normal channels. `show.py` prints
them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Set

import torch
from torch import Tensor

from ..formula import Formula
from ..formula.compiled import Compiled
from ..formula.functions import REGISTRY
from ..formula.gaussian import gaussian_reductions
from ..formula.program import Program
from . import reference
from .eager import plain
from .telemetry import SATURATED

REACH = 10.0
_STEP = 1 / 1024
_COST = {
    "add": "add or multiply",
    "sub": "add or multiply",
    "mul": "add or multiply",
    "neg": "add or multiply",
    "gt": "compare or select",
    "ge": "compare or select",
    "select": "compare or select",
    "keep_nan": "compare or select",
    "div": "divide or root",
    **{name: function.cost for name, function in REGISTRY.items() if function.operation},
}


def cost(program: Program, per_row: Set[str] = frozenset()) -> Counter[str]:
    """Return the number of operations per element by class of cost, without those on inputs `per_row` alone."""
    return Counter(_COST[line.operation] for line in program.split(per_row)[1])


def costs(compiled: Compiled) -> dict[str, Counter[str]]:
    """Return the operations per element of "forward" and "backward" by class of cost, those of reductions among them.

    What depends only on parameters of the layer and on reductions is computed once per row, and not counted.
    """
    reductions, formula = compiled.reductions, compiled.formula
    per_row = {*reductions.names, *reductions.adjoints, *(n for n, p in formula.tensors.items() if p.share == "layer")}
    reduced: Counter[str] = Counter()
    for each in reductions.forward:
        reduced += cost(each.program, per_row)
        for (
            reduction
        ) in each.reductions:  # std is the mean, then a difference, a square and a sum; max keeps the channel
            reduced["compare or select" if reduction.kind == "max" else "add or multiply"] += _OF_REDUCTION[
                reduction.kind
            ]
    backward = reduced + cost(compiled.backward, per_row)
    for each in reductions.backward:
        backward += cost(each.program, per_row)
        backward["add or multiply"] += len(each.reductions)
    return {"forward": reduced + cost(compiled.forward, per_row), "backward": backward}


_OF_REDUCTION = {"mean": 1, "sum": 1, "rms": 2, "std": 4, "max": 3}


def bytes_moved(formula: Formula, itemsize: int = 2) -> dict[str, int]:
    """Return the bytes per element of h that a fused kernel reads and writes.

    Forward reads the pre-activations and writes h. Backward reads them and dh, and writes their gradients and optionally h.
    """
    streams = len(formula.pre_activations)
    forward, backward = (streams + 1) * itemsize, (2 * streams + 1) * itemsize
    return {"forward": forward, "backward": backward, "backward with h": backward + itemsize}


def saved_by_eager(formula: Formula, itemsize: int = 2) -> tuple[int, int]:
    """Return the bytes per element of h that plain torch saves for backward, without and with h.

    The down projection saves h, whatever computes the activation.
    """
    width, dtype = 4096, {2: torch.bfloat16, 4: torch.float32}[itemsize]
    pre = torch.ones((1, 2, width) if formula.gated else (1, width), dtype=dtype, device="cpu").requires_grad_()
    learned = {
        name: torch.full((1,), p.init, dtype=torch.float32, device="cpu", requires_grad=True)
        for name, p in formula.tensors.items()
    }
    nbytes: dict[int, int] = {}  # by address of the storage
    alive: list[Tensor] = []  # the address of a freed storage could be used again

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        if tensor.numel() >= width // 8:  # no scalars
            nbytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        h = plain(formula)(pre, **learned)
    storage = h.untyped_storage()
    without_h = sum(size for address, size in nbytes.items() if address != storage.data_ptr())
    return round(without_h / width), round((without_h + storage.nbytes()) / width)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Properties of h along one pre-activation, with the other one (if any) at 1.

    Attributes:
        jump, jump_at: the largest jump of h and its position; 0 and NaN without a jump.
        kink, kink_at: the same for the slope.
        monotone: "rising", "falling", "constant" or "neither".
        argmin: position of the smallest h.
        dead: intervals in which h and all slopes are exactly 0 for every value of the other pre-activation.
        saturated: fraction of standard normal pre-activations at which |slope| < `SATURATED`.
        steepest: the largest |slope|.
    """

    jump: float
    jump_at: float
    kink: float
    kink_at: float
    monotone: str
    argmin: float
    dead: list[tuple[float, float]]
    saturated: float
    steepest: float


@dataclasses.dataclass(frozen=True)
class Properties:
    """The properties of an activation.

    Attributes:
        at_zero: h where all pre-activations are 0.
        low, high: range of h on the grid.
        mean, std, rms: of h under standard normal pre-activations.
        true_glu: whether h is proportional to up; None for an ungated formula.
        curves: one for each pre-activation, by name.
        warnings: sentences about what is likely to hurt training.
    """

    at_zero: float
    low: float
    high: float
    mean: float
    std: float
    rms: float
    true_glu: bool | None
    curves: dict[str, Curve]
    warnings: list[str]


class Sampler:
    """Evaluate h and its slopes at given points, in float64.

    Reductions over d_ff have the values of standard normal channels, whatever the points: a point is one channel of many.
    """

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.reduced = torch.tensor([*gaussian_reductions(compiled).values()], dtype=torch.float64, device="cpu")[None]
        self.adjoints = torch.zeros((1, len(compiled.reductions.all)), dtype=torch.float64, device="cpu")
        self.names = compiled.formula.pre_activations
        self.learned = [
            torch.tensor([p.init], dtype=torch.float64, device="cpu") for p in compiled.formula.tensors.values()
        ]

    def __call__(self, **points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        parts = torch.broadcast_tensors(*(points[name] for name in self.names))
        shape, parts = parts[0].shape, [part.reshape(1, -1) for part in parts]
        pre = torch.stack(parts, 1) if len(parts) == 2 else parts[0]
        numbers = self.reduced, self.adjoints
        dpre, h, _ = reference.backward(self.compiled, pre, torch.ones_like(parts[0]), self.learned, True, *numbers)
        assert h is not None
        slopes = [dpre[:, i] for i in range(2)] if len(parts) == 2 else [dpre]
        return h.reshape(shape), {n: s.reshape(shape) for n, s in zip(self.names, slopes, strict=True)}

    def along(self, name: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return the function points -> (h, slope) of one pre-activation, with the other one at 1."""

        def curve(points: Tensor) -> tuple[Tensor, Tensor]:
            others = {other: torch.ones_like(points) for other in self.names if other != name}
            h, slopes = self(**{name: points}, **others)
            return h, slopes[name]

        return curve


def properties(compiled: Compiled) -> Properties:
    """Return the properties of a compiled formula."""
    sample = Sampler(compiled)
    names, gated = sample.names, compiled.formula.gated
    axis = torch.arange(-REACH, REACH + _STEP / 2, 1 / 16 if gated else _STEP, dtype=torch.float64, device="cpu")
    h, slopes = sample(**_grid(names, axis))
    normal = torch.arange(-8.0, 8.0 + 1e-9, 1 / 64 if gated else 1 / 1024, dtype=torch.float64, device="cpu")
    weight = torch.exp(-(normal**2) / 2)
    weight /= weight.sum()
    weights = weight[:, None] * weight if gated else weight
    normal_h, normal_slopes = sample(**_grid(names, normal))
    mean = round(float((weights * normal_h).sum()), 12) + 0.0  # a mean of rounding errors is 0, and not -0
    square = float((weights * normal_h**2).sum())
    saturated = {name: float((weights * (normal_slopes[name].abs() < SATURATED)).sum()) for name in names}
    zero = {name: torch.zeros(1, dtype=torch.float64, device="cpu") for name in names}
    result = Properties(
        at_zero=float(sample(**zero)[0]),
        low=float(h.min()),
        high=float(h.max()),
        mean=mean,
        std=math.sqrt(max(square - mean**2, 0.0)),
        rms=math.sqrt(square),
        true_glu=_is_true_glu(sample) if gated else None,
        curves={name: _curve(sample, name, saturated[name]) for name in names},
        warnings=[],
    )
    result.warnings.extend(_warnings(result, h, slopes))
    return result


def _grid(names: tuple[str, ...], axis: Tensor) -> dict[str, Tensor]:
    """Return the coordinates of all points of a grid with the same axis for each name."""
    axes = [axis] * len(names)
    return dict(zip(names, torch.meshgrid(*axes, indexing="ij"), strict=True))


def _curve(sample: Sampler, name: str, saturated: float) -> Curve:
    along = sample.along(name)
    points = torch.arange(-REACH, REACH + _STEP / 2, _STEP, dtype=torch.float64, device="cpu")
    h, slope = along(points)
    jump, jump_at = _largest_jump(lambda p: along(p)[0], points)
    kink, kink_at = _largest_jump(lambda p: along(p)[1], points)
    change = h.diff()
    noise = 1e-12 * float(h.abs().max())
    rises, falls = bool((change > noise).any()), bool((change < -noise).any())
    low = float(points[h.argmin()])
    near = torch.linspace(low - _STEP, low + _STEP, 2001, dtype=torch.float64, device="cpu").clamp(-REACH, REACH)
    directions = {(True, False): "rising", (False, True): "falling", (False, False): "constant"}
    return Curve(
        jump=jump,
        jump_at=jump_at,
        kink=kink,
        kink_at=kink_at,
        monotone=directions.get((rises, falls), "neither"),
        argmin=float(near[along(near)[0].argmin()]),
        dead=_dead(sample, name, points),
        saturated=saturated,
        steepest=float(slope.abs().max()),
    )


def _largest_jump(function: Callable[[Tensor], Tensor], points: Tensor) -> tuple[float, float]:
    """Return the largest jump and its position, by bisection of every step of the grid towards the larger change, to 2^-43."""
    left, right = points[:-1].clone(), points[1:].clone()
    f_left, f_right = function(left), function(right)
    for _ in range(33):
        middle = (left + right) / 2
        f_middle = function(middle)
        first = (f_middle - f_left).abs() >= (f_right - f_middle).abs()
        left, f_left = torch.where(first, left, middle), torch.where(first, f_left, f_middle)
        right, f_right = torch.where(first, middle, right), torch.where(first, f_middle, f_right)
    change = (f_right - f_left).abs()
    most = int(change.argmax())
    size = float(change[most])
    return (size, round(float(right[most]), 9) + 0.0) if size > 1e-6 else (0.0, math.nan)


def _dead(sample: Sampler, name: str, points: Tensor) -> list[tuple[float, float]]:
    others = [other for other in sample.names if other != name]
    dead = torch.ones(len(points), dtype=torch.bool, device="cpu")
    for value in (-3.0, -0.5, 1.0, 2.5) if others else (0.0,):
        h, slopes = sample(**{name: points}, **{other: torch.full_like(points, value) for other in others})
        dead &= (h == 0) & torch.stack(list(slopes.values())).eq(0).all(0)
    if int(dead.sum()) < 2:
        return []
    edges = torch.cat([dead.new_zeros(1), dead, dead.new_zeros(1)]).int().diff().nonzero().flatten().tolist()
    intervals = [(float(points[a]), float(points[b - 1])) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [(low, high) for low, high in intervals if high > low]


def _is_true_glu(sample: Sampler) -> bool:
    gate, up = torch.randn(2, 1024, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0)) * 3
    closed, _ = sample(gate=gate, up=torch.zeros_like(up))
    once, _ = sample(gate=gate, up=up)
    twice, _ = sample(gate=gate, up=2 * up)
    return bool((closed == 0).all()) and torch.allclose(twice, 2 * once, rtol=1e-12, atol=0.0)


def _warnings(result: Properties, h: Tensor, slopes: dict[str, Tensor]) -> list[str]:
    warnings = []
    flat = [name for name, slope in slopes.items() if bool((slope == 0).all())]
    if len(flat) == len(slopes):
        warnings.append("the gradient is 0 everywhere: nothing below this activation can learn")
    else:
        warnings += [f"h does not depend on {name} smoothly: its gradient is 0 everywhere" for name in flat]
    if not (h.isfinite().all() and all(slope.isfinite().all() for slope in slopes.values())):
        warnings.append(f"h or a slope is not finite for some |pre-activation| <= {REACH:g}")
    for name, curve in result.curves.items():
        if curve.jump:
            warnings.append(
                f"h jumps by {curve.jump:.3g} at {name} = {curve.jump_at:.4g}, which the gradient does not show"
            )
    if result.true_glu is False:
        warnings.append("not a true GLU: h is not proportional to up")
    return warnings
