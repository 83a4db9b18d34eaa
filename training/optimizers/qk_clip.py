"""QK-clip (Kimi K2, arXiv 2507.20534): no head keeps attention logits above a bound.

Where the largest logit of a head was above it during a step, the rows of q and k that gave it are scaled down after the step,
by the root of the excess each, so that the same tokens would reach the bound. Query heads that share a key head get the rest of
their own factor.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from model.decoder import Attention, Decoder
from model.parallel import Mesh


class QKClip:
    """Watches the attention logits of a model's forward passes, and says by what to multiply the rows of q, k and v.

    Args:
        limit: the largest logit that a head keeps.
    """

    def __init__(self, module: Decoder, limit: float, mesh: Mesh, device: torch.device) -> None:
        self._attentions = {f"{name}.qkv": each for name, each in module.named_modules() if isinstance(each, Attention)}
        self._limit, self._mesh = limit, mesh
        heads, self._keys, _ = next(iter(self._attentions.values())).head_counts  # of this tensor rank
        self._largest = torch.empty(len(self._attentions), heads, device=device)
        own = heads // mesh.context.size
        for row, attention in zip(self._largest, self._attentions.values(), strict=True):
            attention.largest_logits = row[mesh.context.rank * own :][:own]  # a view: forward passes write it
        self.reset()

    def reset(self) -> None:
        """Forget the logits seen so far."""
        self._largest.fill_(-math.inf)

    def row_factors(self) -> dict[str, Tensor]:
        """Return {parameter: (rows,)} of this rank's shards of q, k and v; none where no logit was too large. Collective."""
        if self._mesh.data_context.size > 1:
            dist.all_reduce(self._largest, dist.ReduceOp.MAX, group=self._mesh.data_context.group)
        if not bool((self._largest > self._limit).any()):
            return {}
        heads = (self._limit / self._largest.clamp(min=self._limit)).unflatten(1, (self._keys, -1))  # (layers, K, G)
        keys = heads.amin(2).sqrt()  # (layers, K)
        queries = (heads / keys.unsqueeze(2)).flatten(1)  # (layers, H)
        by_head = torch.cat([queries, keys, torch.ones_like(keys)], 1)
        dims = (attention.head_dim for attention in self._attentions.values())
        return {
            name: row.repeat_interleave(dim) for name, row, dim in zip(self._attentions, by_head, dims, strict=True)
        }
