"""Estimate how far a difference between two arms depends on the held-out text: its standard error over documents.

The mean difference per token is a ratio of sums over documents, of nats and of tokens. So its standard error is that of a ratio
estimator (Cochran 1977, section 2.11): the root of the sum of squares of each document's nats less its tokens times the mean,
divided by all tokens. Documents are the unit because the losses of one document's tokens go together; where folders were held
out whole (`data.held_out_by`), the losses of a folder's documents do, and folders are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from kernels.common.json_files import DocumentLosses


@dataclasses.dataclass(frozen=True)
class TextScatter:
    """How a mean difference scatters over documents, for the runs that were compared."""

    documents: int
    error: float  # standard error, nats per token
    freedom: float  # degrees of freedom: those of as many documents of equal length as outweigh each other as much
    unit: str = "documents"  # or folders, where these were held out whole


def text_scatter(own: Mapping[int, DocumentLosses], base: Mapping[int, DocumentLosses]) -> TextScatter | None:
    """Return the scatter over documents of the difference of two arms, from the losses of both by seed.

    None: they have no seed in common, were measured on different texts, or on one document.
    """
    seeds = sorted(own.keys() & base.keys())
    pairs = [(own[seed], base[seed]) for seed in seeds]
    if not pairs or len({(side.held_out, tuple(side.tokens)) for pair in pairs for side in pair}) > 1:
        return None
    tokens = np.array(pairs[0][0].tokens, float)  # (documents,)
    differences = np.mean([np.array(one.nats) - np.array(other.nats) for one, other in pairs], 0)
    count = len(tokens)
    if count < 2 or not np.isfinite(differences).all():
        return None
    residuals = differences - tokens * differences.sum() / tokens.sum()
    error = math.sqrt(count / (count - 1) * np.sum(residuals**2)) / tokens.sum()
    freedom = float(tokens.sum() ** 2 / np.sum(tokens**2)) - 1
    return TextScatter(count, error, freedom, pairs[0][0].unit)
