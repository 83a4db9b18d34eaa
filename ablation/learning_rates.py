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
from collections.abc import Collection, Iterable, Mapping

import numpy as np

LossesByRate = Mapping[float, Mapping[int, float]]  # final losses of a sweep by learning rate, then by seed
_WINDOW = 1.01  # factors of two around the best rate within which all rates join the fit
_DIGITS = 4  # of a learning rate that is computed: all that a run's name has


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The result of a learning-rate sweep of one arm."""

    best_lr: float  # at which the seeds run: the vertex or, while `edge` is set, the best of those tried
    loss: float  # mean loss there; of the parabola at its vertex
    edge: str  # "lowest" or "highest" where the optimum lies beyond those tried that did not diverge, else ""
    rise: float = math.nan  # nats lost at twice or half the best learning rate; nan where no parabola fits
    distance: float = 0.0  # log2 of `best_lr` over the vertex
    slope_variance: float = math.nan  # of the fitted slope at the vertex, per factor of 2, in units of a run's variance

    def regret(self, noise: float) -> float:
        """Return the root mean square of what missing the best learning rate costs, in nats; nan where no parabola fits.

        Args:
            noise: standard deviation of a run's loss, without what its seed adds to the runs of all arms and rates.
        """
        variance = noise**2 * self.slope_variance / (4 * self.rise**2)  # of the vertex
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


def run_noise(tables: Iterable[Collection[Mapping[int, float]]]) -> tuple[float, int]:
    """Return the standard deviation of a run's loss without what its seed adds to every row, and its degrees of freedom.

    It is nan where there are none.

    Args:
        tables: of losses by seed, each row of an arm or of a learning rate. Rows and seeds that are not finite throughout are
            left out.
    """
    squares, freedom = 0.0, 0
    for table in tables:
        rows = [row for row in table if row and all(map(math.isfinite, row.values()))]
        seeds = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
        values = np.array([[row[seed] for seed in seeds] for row in rows])
        if min(len(rows), len(seeds)) > 1:
            residuals = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
            squares += float(np.sum(residuals**2))
            freedom += (len(rows) - 1) * (len(seeds) - 1)
    return math.sqrt(squares / freedom) if freedom else math.nan, freedom


def _rounded(lr: float) -> float:
    return float(f"{lr:.{_DIGITS}g}")
