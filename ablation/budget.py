"""Find the width at which an arm's feed-forward layers cost as much as the baseline's. Cost has five meanings:

    parameters   parameters of the feed-forward layers, including the learned parameters of the formula
    flops        FLOPs of their matrix products, forward and backward. The formula's own FLOPs are few, and memory-bound
    memory       their weights, gradients and optimizer state, and the activations that `ffn.save` keeps for backward
    wallclock    measured seconds per step, passed in by the caller
    none         no matching: every arm gets the baseline's width, so a gated arm has 1.5 times the parameters

A width is a multiple of `tensor` x tile, so that every tensor rank holds whole tiles. The tile is the coarsest one whose best
width lies within `WARN` of the target: narrow models have few multiples of a coarse tile, and there equal cost matters more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from conf.schema import Config
from conf.shape import Shape, shape_of
from kernels.common.errors import UserError, unknown
from launch.estimate.counts import ffn_saved_bytes, flops_per_token, parameters

BUDGETS = ("parameters", "flops", "memory", "wallclock", "none")
WARN, REFUSE = 0.005, 0.01  # fractions of the target
_TILES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
_STATE_BYTES = 16  # per parameter: 2 + 2 + 12, the ZeRO paper's count for bf16 with fp32 master weights


@dataclasses.dataclass(frozen=True)
class Width:
    """The width of an arm, its cost, and the cost it should have."""

    arm: str
    d_ff: int
    tile: int  # on every tensor rank the width is a multiple of it
    parameters: int  # of all feed-forward layers
    cost: float
    target: float

    @property
    def mismatch(self) -> float:
        """Relative difference of the cost to the target; positive where the arm costs more."""
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
    """Return the width of every arm, and a warning for each arm whose cost is off by more than 0.5%.

    Args:
        arms: the configuration of each arm. The baseline keeps the width of its configuration.
        tensor: tensor ranks, which must divide every width.
        tile: the coarsest tile that a width may be rounded to.
        tokens: tokens per micro-batch, for `memory`.
        seconds: seconds per step of (arm, d_ff), for `wallclock`. Must increase with d_ff.
        allowed: the largest relative mismatch that is accepted.

    Raises:
        UserError: unknown budget or baseline, a budget without its inputs, a baseline width that the tensor ranks do not
            divide, or an arm whose cost cannot come close enough.
    """
    if budget not in BUDGETS:
        raise unknown("budget", budget, BUDGETS)
    if baseline not in arms:
        raise unknown("baseline", baseline, arms)
    if budget == "memory" and tokens < 1:
        raise UserError("budget=memory needs the tokens per micro-batch: set micro_batch_size")
    if budget == "wallclock" and seconds is None:
        raise UserError("budget=wallclock needs measured step times")
    shapes = {arm: shape_of(config) for arm, config in arms.items()}
    base_width = shapes[baseline].ffn[0].d_ff  # the same in all layers
    if base_width % tensor:
        raise UserError(f"parallel.tensor={tensor} does not divide d_ff={base_width} of the baseline {baseline!r}")
    costs = {
        arm: _measured_cost(seconds, arm) if budget == "wallclock" else _counted_cost(config, budget, tokens)
        for arm, config in arms.items()
    }
    target = costs[baseline](base_width)
    widths, warnings = {}, []
    for arm, cost in costs.items():
        if arm == baseline or budget == "none":
            d_ff, arm_tile = base_width, _tile_of(base_width // tensor, tile)
        else:
            d_ff, arm_tile = _solve(cost, target, base_width, tensor, tile)
        ffn_parameters = parameters(_with_width(shapes[arm], d_ff))["ffn"]
        width = widths[arm] = Width(arm, d_ff, arm_tile, ffn_parameters, cost(d_ff), target)
        message = f"{arm}: d_ff={d_ff} differs by {width.mismatch:+.2%} from the baseline's {budget}"
        if budget != "none" and abs(width.mismatch) > allowed:
            raise UserError(
                f"{message}, more than the {allowed:.2%} allowed: a wider model or fewer tensor ranks come closer"
            )
        if budget != "none" and abs(width.mismatch) > WARN:
            warnings.append(message)
    return widths, warnings


def _with_width(shape: Shape, d_ff: int) -> Shape:
    """Return the shape with another width of all feed-forward layers."""
    wide = {id(layer): dataclasses.replace(layer, d_ff=d_ff) for layer, _ in shape.ffn_counts}
    return dataclasses.replace(shape, ffn=tuple(wide[id(layer)] for layer in shape.ffn))


def _measured_cost(seconds: Callable[[str, int], float] | None, arm: str) -> Callable[[int], float]:
    """Return the seconds per step of an arm as a function of its width."""
    assert seconds is not None  # checked by `match`
    return lambda d_ff: seconds(arm, d_ff)


def _counted_cost(config: Config, budget: str, tokens: int) -> Callable[[int], float]:
    """Return the counted cost of an arm as a function of its width."""
    own_shape = shape_of(config)

    def cost(d_ff: int) -> float:
        shape = _with_width(own_shape, d_ff)
        if budget == "flops":
            return flops_per_token(shape, config.sequence_length)["ffn"]
        if budget == "memory":
            return _STATE_BYTES * parameters(shape)["ffn"] + shape.ffn_sum(
                lambda layer: tokens * ffn_saved_bytes(layer)
            )
        return parameters(shape)["ffn"]  # for "none" too, so that the mismatch is visible

    return cost


def _tile_of(width: int, coarsest: int) -> int:
    return next(tile for tile in _TILES if tile <= max(coarsest, 1) and width % tile == 0)


def _solve(cost: Callable[[int], float], target: float, start: int, tensor: int, coarsest: int) -> tuple[int, int]:
    """Return the width and its tile, for a cost that increases with the width."""
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
    assert best is not None  # a tile of 1 is always tried
    return best[1], best[2]
