"""The width that makes an arm's feed-forward layers cost what the baseline's cost, for four meanings of cost.

    parameters   of the feed-forward layers, learned ones of the formula included
    flops        of their matrix products, forward and backward; the formula's own are few, and hidden behind memory
    memory       their weights, gradients and optimizer state, and what `ffn.save` keeps of a micro-batch for backward
    wallclock    measured seconds of a step, which the caller brings
    none         no match: every arm has the width of the baseline, which gives a gated arm half as many parameters again

The width is a multiple of `tensor` x a tile, so that every tensor rank has whole tiles: of the coarsest tile whose best
width is within `WARN` of the target. Narrow models have few multiples of a coarse tile, and there an equal cost is worth more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from conf.schema import Config
from kernels.common.errors import UserError, unknown
from launch.estimate.counts import Shape, ffn_saved_bytes, flops_per_token, parameters, shape_of

BUDGETS = ("parameters", "flops", "memory", "wallclock", "none")
WARN, REFUSE = 0.005, 0.01  # of the target
_TILES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
_STATE = 16  # bytes a parameter: 2 + 2 + 12, the ZeRO paper's count for bf16 with fp32 masters


@dataclasses.dataclass(frozen=True)
class Width:
    """An arm's width, and what it costs beside what it may."""

    arm: str
    d_ff: int
    tile: int  # the width is a multiple of it on every tensor rank
    parameters: int  # of all feed-forward layers
    cost: float
    target: float

    @property
    def mismatch(self) -> float:
        """The share of the target by which the cost is off; above 0 it costs more."""
        return self.cost / self.target - 1


def match(
    arms: Mapping[str, Config],
    baseline: str,
    budget: str = "parameters",
    tensor: int = 1,
    tile: int = 128,
    tokens: int = 0,
    seconds: Callable[[str, int], float] | None = None,
    allowed: float = REFUSE,
) -> tuple[dict[str, Width], list[str]]:
    """Return every arm's width, and a warning for each that is more than 0.5% off.

    Args:
        arms: the configuration of each arm; the baseline's width is what its configuration says.
        tensor: tensor ranks, which a width must be divisible by.
        tile: the coarsest tile that a width may be rounded to.
        tokens: of a micro-batch, for `memory`.
        seconds: of a step of (arm, d_ff), for `wallclock`; rises with d_ff.
        allowed: the largest mismatch that is no error.

    Raises:
        UserError: an unknown budget or baseline, a budget that lacks what it needs, a baseline that tensor ranks cannot share,
            or an arm that cannot come close enough.
    """
    if budget not in BUDGETS:
        raise unknown("budget", budget, BUDGETS)
    if baseline not in arms:
        raise unknown("baseline", baseline, arms)
    if budget == "memory" and tokens < 1:
        raise UserError("budget=memory needs the tokens of a micro-batch: set micro_batch_size")
    if budget == "wallclock" and seconds is None:
        raise UserError("budget=wallclock needs measured step times")

    shapes = {arm: shape_of(config) for arm, config in arms.items()}

    def cost_of(arm: str) -> Callable[[int], float]:
        if budget == "wallclock":
            return lambda d_ff: seconds(arm, d_ff)
        return lambda d_ff: _cost(_with(shapes[arm], d_ff), arms[arm].sequence_length, budget, tokens)

    own = _widths(shapes[baseline])
    if own % tensor:
        raise UserError(f"parallel.tensor={tensor} does not divide the d_ff={own} of the baseline {baseline!r}")
    target = cost_of(baseline)(own)
    widths, warnings = {}, []
    for arm in arms:
        if arm == baseline or budget == "none":
            d_ff, of_tile = own, _tile_of(own // tensor, tile)
        else:
            d_ff, of_tile = _solve(cost_of(arm), target, own, tensor, tile)
        shape = _with(shapes[arm], d_ff)
        width = widths[arm] = Width(arm, d_ff, of_tile, parameters(shape)["ffn"], cost_of(arm)(d_ff), target)
        off = f"{arm}: d_ff={d_ff} costs {width.mismatch:+.2%} of the baseline's {budget}"
        if budget != "none" and abs(width.mismatch) > allowed:
            raise UserError(
                f"{off}, more than the {allowed:.2%} allowed: a wider model or fewer tensor ranks come closer"
            )
        if budget != "none" and abs(width.mismatch) > WARN:
            warnings.append(off)
    return widths, warnings


def _with(shape: Shape, d_ff: int) -> Shape:
    """Return the shape with another width of all feed-forward layers."""
    return dataclasses.replace(shape, ffn=tuple(dataclasses.replace(layer, d_ff=d_ff) for layer in shape.ffn))


def _widths(shape: Shape) -> int:
    return shape.ffn[0].d_ff  # the same in all layers


def _cost(shape: Shape, sequence_length: int, budget: str, tokens: int) -> float:
    if budget == "flops":
        return flops_per_token(shape, sequence_length)["ffn"]
    if budget == "memory":
        return _STATE * parameters(shape)["ffn"] + sum(tokens * ffn_saved_bytes(layer) for layer in shape.ffn)
    return parameters(shape)["ffn"]  # of "none" too: what is then unequal can be seen


def _tile_of(width: int, coarsest: int) -> int:
    return next(tile for tile in _TILES if tile <= max(coarsest, 1) and width % tile == 0)


def _solve(cost: Callable[[int], float], target: float, start: int, tensor: int, coarsest: int) -> tuple[int, int]:
    """Return the width and its tile. `cost` rises with the width."""
    best: tuple[float, int, int] | None = None
    for tile in _TILES:
        if tile > max(coarsest, 1):
            continue
        step = tile * tensor
        low, high = 0, max(1, start // step)  # in steps; cost(low) <= target
        while cost(high * step) < target:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle * step) <= target else (low, middle)
        off, d_ff = min((abs(cost(n * step) / target - 1), n * step) for n in (low, high) if n)
        if off <= WARN:
            return d_ff, tile
        if best is None or off < best[0]:
            best = (off, d_ff, tile)
    return best[1], best[2]
