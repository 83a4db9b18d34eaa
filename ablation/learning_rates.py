"""Choose the learning rate at which an arm's seeds run, from its sweep, and estimate what missing the best one costs.

Near its minimum the loss is a parabola in the logarithm of the learning rate. The vertex of the parabola that is fitted to the
sweep beats the best of the rates that were tried: those lie at other distances from the optimum for each arm, and what they
cost would count as a difference between the arms, the surer the more seeds there are.

The fitted vertex scatters as the sweep's losses do. At it the slope of the true parabola, c x^2, has mean 0 and a variance that
follows from the fit. A slope of g costs g^2 / 4c nats, and the root of the mean square of that cost enters the standard error
of every comparison.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import TypeVar

import numpy as np

LossesByRate = Mapping[float, Mapping[int, float]]  # final losses of a sweep by learning rate, then by seed
_Row = TypeVar("_Row", str, float)  # of a table: an arm or a learning rate
_WINDOW = 1.01  # factors of two around the best rate within which all rates join the fit
_DIGITS = 4  # of a learning rate that is computed: all that a run's name has


@dataclasses.dataclass(frozen=True)
class Noise:
    """How an arm's losses scatter over runs, without what a seed adds to those of all arms and rates."""

    deviation: float = math.nan  # standard deviation of a run's loss, nats; nan while it is unknown
    freedom: float = 0.0  # degrees of freedom of the estimate


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The result of a learning-rate sweep of one arm."""

    best_lr: float  # at which the seeds run: the vertex or, while `edge` is set, the best of those tried
    loss: float  # mean loss there; of the parabola at its vertex
    edge: str  # "lowest" or "highest" where the optimum lies beyond those tried that did not diverge, else ""
    rise: float = math.nan  # nats lost at twice or half the best learning rate; nan where no parabola fits
    distance: float = 0.0  # log2 of `best_lr` over the vertex
    slope_variance: float = math.nan  # of the fitted slope at the vertex, per factor of 2, in units of a run's variance

    def vertex_variance(self, noise: Noise) -> float:
        """Return the variance of the vertex, in squared factors of two, from the scatter of the sweep's runs."""
        return noise.deviation**2 * self.slope_variance / (4 * self.rise**2)

    def regret(self, noise: Noise) -> float:
        """Return the root mean square of what missing the best learning rate costs, in nats; nan where no parabola fits."""
        variance = self.vertex_variance(noise)
        d2 = self.distance**2
        return self.rise * math.sqrt(d2**2 + 6 * d2 * variance + 3 * variance**2)

    def at(self, lr: float) -> SweepResult:
        """Return the result with the seeds at another learning rate, where they ran before the sweep grew."""
        if math.isnan(self.rise):
            return dataclasses.replace(self, best_lr=lr)
        distance = self.distance + math.log2(lr / self.best_lr)
        loss = self.loss + self.rise * (distance**2 - self.distance**2)
        return dataclasses.replace(self, best_lr=lr, loss=loss, distance=distance)


def mean_losses(losses: LossesByRate) -> dict[float, float]:
    """Return the mean loss of each learning rate, ascending; nan where a seed diverged."""
    means = {lr: float(np.mean(list(of_seeds.values()))) for lr, of_seeds in sorted(losses.items())}
    return {lr: mean if math.isfinite(mean) else math.nan for lr, mean in means.items()}


def sweep_result(losses: LossesByRate, vertex: bool = True) -> SweepResult:
    """Return the result of a sweep.

    Args:
        losses: by learning rate and seed, every seed at every rate; not finite where the run diverged.
        vertex: whether the seeds run at the vertex of the parabola, or at the best of the learning rates that were tried.

    Raises:
        ValueError: no learning rate has a finite loss.
    """
    means = mean_losses(losses)
    finite = [lr for lr, mean in means.items() if math.isfinite(mean)]
    if not finite:
        raise ValueError("no learning rate has a finite loss")
    best = min(finite, key=means.__getitem__)
    # For the best of those tried a rate that diverged is a neighbour like others; no parabola passes through it.
    tried = finite if vertex else list(means)
    edge = "lowest" if best == tried[0] else "highest" if best == tried[-1] else ""
    result = SweepResult(best, means[best], edge)
    if len(finite) < 3:
        return result
    center = min(max(finite.index(best), 1), len(finite) - 2)
    neighbours = finite[center - 1 : center + 2]
    near = [lr for lr in finite if lr in neighbours or abs(math.log2(lr / finite[center])) <= _WINDOW]
    seeds = min(len(losses[lr]) for lr in near)
    fit = next((fit for window in (near, neighbours) if (fit := _fit(window, means, finite, seeds))), None)
    if fit is None:
        return result
    if vertex:
        return fit
    if all(math.isfinite(means[lr]) for lr in tried[max(tried.index(best) - 1, 0) : tried.index(best) + 2]):
        distance = math.log2(best / fit.best_lr)
        return dataclasses.replace(fit, best_lr=best, loss=means[best], edge=edge, distance=distance)
    return result


def _fit(window: list[float], means: Mapping[float, float], finite: list[float], seeds: int) -> SweepResult | None:
    """Return the vertex of a parabola through the losses of a window; None unless it is a minimum among the finite rates."""
    middle = window[len(window) // 2]
    x = np.log2(np.array(window) / middle)
    powers = np.vander(x, 3, increasing=True)
    inverse = np.linalg.pinv(powers)
    constant, slope, curvature = inverse @ [means[lr] for lr in window]
    if not curvature > 0:
        return None
    at = float(-slope / (2 * curvature))
    if not math.log2(finite[0] / middle) <= at <= math.log2(finite[-1] / middle):
        return None
    lr = _rounded(middle * 2.0**at)
    variance = float(np.sum((np.array([0.0, 1.0, 2 * at]) @ inverse) ** 2)) / seeds
    loss = float(constant + slope * at + curvature * at**2)
    return SweepResult(lr, loss, "", float(curvature), 0.0, variance)


def next_learning_rate(tried: Collection[float], best: float, edge: str) -> float:
    """Return the learning rate that extends a sweep past its best one.

    Past the last rate it is further by the ratio of the last two there. Where the next rate diverged, it lies half-way to it.

    Args:
        edge: "lowest" or "highest".
    """
    beyond = [lr for lr in sorted(tried) if (lr < best if edge == "lowest" else lr > best)]
    if beyond:
        return _rounded(math.sqrt(best * (beyond[-1] if edge == "lowest" else beyond[0])))
    last, neighbour = (sorted(tried) if edge == "lowest" else sorted(tried, reverse=True))[:2]
    return float(f"{last * last / neighbour:.6g}")


def arm_noises(sweeps: Mapping[str, LossesByRate], compared: Mapping[str, Mapping[int, float]]) -> dict[str, Noise]:
    """Return how each arm's losses scatter.

    Its residuals count: of its sweep, from learning rates and seeds, and of its compared runs, from arms and seeds. In
    the latter, one part in n - 1 is the mean variance of all n arms, which steadies what a few runs say. An arm without
    residuals takes the scatter of all.

    Args:
        sweeps: final losses by arm, learning rate and seed.
        compared: final losses by arm and seed. Rows and seeds that are not finite throughout are left out, here as in sweeps.
    """
    squares = dict.fromkeys((*compared, *sweeps), 0.0)
    freedom = dict(squares)
    of_compared, each = _row_squares(compared)
    for arm, square in of_compared.items():
        squares[arm], freedom[arm] = square, each
    for arm, losses in sweeps.items():
        of_rates, each = _row_squares(losses)
        squares[arm] += sum(of_rates.values())
        freedom[arm] += each * len(of_rates)
    everything = sum(freedom.values())
    pooled = Noise(math.sqrt(sum(squares.values()) / everything), everything) if everything else Noise()
    return {
        arm: Noise(math.sqrt(square / freedom[arm]), freedom[arm]) if freedom[arm] else pooled
        for arm, square in squares.items()
    }


def _row_squares(table: Mapping[_Row, Mapping[int, float]]) -> tuple[dict[_Row, float], float]:
    """Return the sum of squares of each row of losses by seed, less its mean and its seeds', and the freedom of a row."""
    rows = {key: row for key, row in table.items() if row and all(map(math.isfinite, row.values()))}
    seeds = sorted(set.intersection(*(set(row) for row in rows.values()))) if rows else []
    if min(len(rows), len(seeds)) < 2:
        return {}, 0.0
    values = np.array([[row[seed] for seed in seeds] for row in rows.values()])
    residuals = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    squares = (residuals**2).sum(1).tolist()
    return dict(zip(rows, squares, strict=True)), (len(seeds) - 1) * (len(rows) - 1) / len(rows)


def _rounded(lr: float) -> float:
    return float(f"{lr:.{_DIGITS}g}")
