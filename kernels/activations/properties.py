"""What can be said about an activation before it is trained: its cost, its shape, and what it does to normal pre-activations.

Values are computed in float64. "Sampled" is over |pre-activation| <= 10 in steps of 1/1024 (1/16 for pairs of gate and up);
learned parameters stand at their start. No printing here (`show.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from ..formula import Formula
from ..formula.functions import REGISTRY
from ..formula.program import Program
from ..formula.symbolic import Compiled
from . import reference
from .eager import plain
from .telemetry import SATURATED

REACH = 10.0
_STEP = 1 / 1024
_COST = {
    **dict.fromkeys(("add", "sub", "mul", "neg"), "add or multiply"),
    **dict.fromkeys(("gt", "ge", "select", "keep_nan"), "compare or select"),
    "div": "divide or root",
    **{name: function.cost for name, function in REGISTRY.items() if function.operation},
}


def cost(program: Program) -> Counter[str]:
    """Count operations per element by class."""
    classes: Counter[str] = Counter()
    for operation, count in program.count().items():
        classes[_COST[operation]] += count
    return classes


def bytes_moved(formula: Formula, itemsize: int = 2) -> dict[str, int]:
    """Return bytes an element of h that a fused kernel reads and writes.

    Forward reads the pre-activations and writes h; backward reads them and dh and writes their gradients, and h where asked.
    """
    streams = len(formula.pre_activations)
    forward, backward = (streams + 1) * itemsize, (2 * streams + 1) * itemsize
    return {"forward": forward, "backward": backward, "backward with h": backward + itemsize}


def saved_by_eager(formula: Formula, itemsize: int = 2) -> tuple[int, int]:
    """Return bytes an element that plain torch keeps for backward: without h, and with h, which the down projection keeps."""
    width, dtype = 4096, {2: torch.bfloat16, 4: torch.float32}[itemsize]
    pre = torch.randn((1, 2, width) if formula.gated else (1, width), dtype=dtype).requires_grad_()
    learned = {name: torch.full((1,), p.init, requires_grad=True) for name, p in formula.learned.items()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= width // 8:  # no scalars
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    alive = []  # a storage that is freed could give its address to the next
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (alive.append(t), keep(t))[1], lambda t: t):
        h = plain(formula)(pre, **learned)
    own = h.untyped_storage()
    without = {address: size for address, size in kept.items() if address != own.data_ptr()}
    total = without | {own.data_ptr(): own.nbytes()}
    return round(sum(without.values()) / width), round(sum(total.values()) / width)


@dataclasses.dataclass(frozen=True)
class Curve:
    """h along one pre-activation (the other one, if any, is 1).

    Attributes:
        jump, jump_at: the largest jump of h, and where; 0 and NaN if it has none.
        kink, kink_at: the same of the slope.
        monotone: "rising", "falling", "constant" or "neither".
        argmin: where h is smallest.
        dead: intervals in which h and all slopes are exactly 0, whatever the other pre-activation is.
        saturated: share of standard normal pre-activations at which the slope is smaller than `SATURATED`.
        steepest: the largest slope by size.
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
    """What `properties` finds. `curves` has one for each pre-activation; mean, std and rms are of h under N(0, 1)."""

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
    """h and its slopes at chosen points, in float64."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.names = compiled.formula.pre_activations
        self.learned = [torch.tensor([p.init], dtype=torch.float64) for p in compiled.formula.learned.values()]

    def __call__(self, **points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        parts = torch.broadcast_tensors(*(points[name] for name in self.names))
        shape, parts = parts[0].shape, [part.reshape(1, -1) for part in parts]
        pre = torch.stack(parts, 1) if len(parts) == 2 else parts[0]
        dpre, h, _ = reference.backward(self.compiled, pre, torch.ones_like(parts[0]), self.learned, with_h=True)
        assert h is not None
        slopes = [dpre[:, i] for i in range(2)] if len(parts) == 2 else [dpre]
        return h.reshape(shape), {n: s.reshape(shape) for n, s in zip(self.names, slopes, strict=True)}

    def along(self, name: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return the curve of h and its slope in one pre-activation, the other one being 1."""

        def curve(points: Tensor) -> tuple[Tensor, Tensor]:
            others = {other: torch.ones_like(points) for other in self.names if other != name}
            h, slopes = self(**{name: points}, **others)
            return h, slopes[name]

        return curve


def properties(compiled: Compiled) -> Properties:
    """Sample an activation."""
    sample = Sampler(compiled)
    names, gated = sample.names, compiled.formula.gated
    axis = torch.arange(-REACH, REACH + _STEP / 2, 1 / 16 if gated else _STEP, dtype=torch.float64)
    grid = dict(zip(names, torch.meshgrid(*[axis] * len(names), indexing="ij"), strict=True))
    h, slopes = sample(**grid)
    normal = torch.arange(-8.0, 8.0 + 1e-9, 1 / 64 if gated else 1 / 1024, dtype=torch.float64)
    weight = torch.exp(-(normal**2) / 2)
    weight /= weight.sum()
    weights = weight[:, None] * weight if gated else weight
    hn, slopes_n = sample(**dict(zip(names, torch.meshgrid(*[normal] * len(names), indexing="ij"), strict=True)))
    mean = round(float((weights * hn).sum()), 12) + 0.0  # the rounding of a sum is no mean
    square = float((weights * hn**2).sum())
    curves = {name: _curve(sample, name, float((weights * (slopes_n[name].abs() < SATURATED)).sum())) for name in names}
    zero = dict.fromkeys(names, torch.zeros(1, dtype=torch.float64))
    result = Properties(
        at_zero=float(sample(**zero)[0]),
        low=float(h.min()),
        high=float(h.max()),
        mean=mean,
        std=math.sqrt(max(square - mean**2, 0.0)),
        rms=math.sqrt(square),
        true_glu=_is_true_glu(sample) if gated else None,
        curves=curves,
        warnings=[],
    )
    result.warnings.extend(_warnings(result, h, slopes))
    return result


def _curve(sample: Sampler, name: str, saturated: float) -> Curve:
    along = sample.along(name)
    points = torch.arange(-REACH, REACH + _STEP / 2, _STEP, dtype=torch.float64)
    h, slope = along(points)
    jump, kink = _largest_jump(lambda p: along(p)[0], points), _largest_jump(lambda p: along(p)[1], points)
    change = h.diff()
    noise = 1e-12 * float(h.abs().max())
    rises, falls = bool((change > noise).any()), bool((change < -noise).any())
    low = float(points[h.argmin()])
    near = torch.linspace(low - _STEP, low + _STEP, 2001, dtype=torch.float64).clamp(-REACH, REACH)
    return Curve(
        *jump,
        *kink,
        monotone={(True, False): "rising", (False, True): "falling", (False, False): "constant"}.get(
            (rises, falls), "neither"
        ),
        argmin=float(near[along(near)[0].argmin()]),
        dead=_dead(sample, name, points),
        saturated=saturated,
        steepest=float(slope.abs().max()),
    )


def _largest_jump(function: Callable[[Tensor], Tensor], points: Tensor) -> tuple[float, float]:
    """Return the largest jump and its place: every step of the grid is halved, towards the larger change, to 2^-43."""
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
    dead = torch.ones(len(points), dtype=torch.bool)
    for value in (-3.0, -0.5, 1.0, 2.5) if others else (0.0,):
        h, slopes = sample(**{name: points}, **{other: torch.full_like(points, value) for other in others})
        dead &= (h == 0) & torch.stack(list(slopes.values())).eq(0).all(0)
    if int(dead.sum()) < 2:
        return []
    edges = torch.cat([torch.tensor([False]), dead, torch.tensor([False])]).int().diff().nonzero().flatten().tolist()
    intervals = [(float(points[a]), float(points[b - 1])) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [(low, high) for low, high in intervals if high > low]


def _is_true_glu(sample: Sampler) -> bool:
    gate, up = torch.randn(2, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    nothing, _ = sample(gate=gate, up=torch.zeros_like(up))
    once, _ = sample(gate=gate, up=up)
    twice, _ = sample(gate=gate, up=2 * up)
    return bool((nothing == 0).all()) and torch.allclose(twice, 2 * once, rtol=1e-12, atol=0.0)


def _warnings(found: Properties, h: Tensor, slopes: dict[str, Tensor]) -> list[str]:
    said = []
    if all(bool((slope == 0).all()) for slope in slopes.values()):
        said.append("the gradient is 0 everywhere: nothing below this activation can learn")
    else:
        said += [f"h does not depend on {name} smoothly: its gradient is 0 everywhere" for name, slope in slopes.items()
                 if bool((slope == 0).all())]  # fmt: skip
    if not (h.isfinite().all() and all(slope.isfinite().all() for slope in slopes.values())):
        said.append(f"h or a slope is not finite for some |pre-activation| <= {REACH:g}")
    for name, curve in found.curves.items():
        if curve.jump:
            said.append(
                f"h jumps by {curve.jump:.3g} at {name} = {curve.jump_at:.4g}: the gradient does not know of it"
            )
    if found.true_glu is False:
        said.append("not a true GLU: h is not proportional to up")
    return said
