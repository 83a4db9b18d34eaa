"""Measure how far the order of arms at fewer tokens or parameters is that at more: before anything is extrapolated."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np

from ablation.multipliers import comparable_places
from ablation.results import Results

_SAMPLES = 2000  # of a bootstrap interval


@dataclasses.dataclass(frozen=True)
class RankAgreement:
    """How far the order of arms at one place is that at another."""

    one: str
    other: str
    tau: float  # Kendall's: 1 for the same order, -1 for the reverse; nan with fewer than two arms
    interval: tuple[float, float]  # 95%, from resampled seeds
    swapped: list[tuple[str, str]]  # pairs whose order changes; the first arm is ahead at the first place


def rank_agreement(
    smaller: Mapping[str, Mapping[int, float]], larger: Mapping[str, Mapping[int, float]], one: str, other: str
) -> RankAgreement:
    """Compare the order of the arms' mean losses, by arm and seed, at two places, over arms without a diverged seed."""
    arms = [arm for arm in smaller if _complete(smaller[arm]) and _complete(larger.get(arm, {}))]
    means = [np.array([np.mean(list(place[arm].values())) for arm in arms]) for place in (smaller, larger)]
    swapped = []
    for i, j in itertools.combinations(range(len(arms)), 2):
        before, after = (float(mean[i] - mean[j]) for mean in means)
        if before * after < 0:
            swapped.append((arms[i], arms[j]) if before < 0 else (arms[j], arms[i]))
    pairs = np.triu_indices(len(arms), 1)
    chance, taus = np.random.default_rng(0), []
    seeds = [
        sorted(set.intersection(*(set(place[arm]) for arm in arms))) if arms else [] for place in (smaller, larger)
    ]
    if len(arms) > 1 and min(map(len, seeds)) > 1:
        tables = [
            np.array([[place[arm][seed] for seed in common] for arm in arms])
            for place, common in zip((smaller, larger), seeds, strict=True)
        ]
        for _ in range(_SAMPLES):
            resampled = [t[:, chance.integers(0, t.shape[1], t.shape[1])].mean(1) for t in tables]
            taus.append(_tau(resampled[0], resampled[1], pairs))
    interval = tuple(map(float, np.quantile(taus, [0.025, 0.975]))) if taus else (math.nan, math.nan)
    return RankAgreement(one, other, _tau(means[0], means[1], pairs), (interval[0], interval[1]), swapped)


def _complete(losses: Mapping[int, float]) -> bool:
    return bool(losses) and all(map(math.isfinite, losses.values()))


def _tau(one: np.ndarray, other: np.ndarray, pairs: tuple[np.ndarray, np.ndarray]) -> float:
    """Return Kendall's tau-a of two series without ties, as means of floats are. By hand: SciPy's is slow for a bootstrap."""
    if not len(pairs[0]):
        return math.nan
    signs = [np.sign(side[pairs[0]] - side[pairs[1]]) for side in (one, other)]
    return float(np.mean(signs[0] * signs[1]))


def agreements(results: Results) -> list[RankAgreement]:
    """Return how far each shorter horizon of a size agrees with its full length, and each size with a larger one."""
    return [
        rank_agreement(results.losses(place), results.losses(last), place, last)
        for *others, last in comparable_places(results)
        for place in others
    ]
