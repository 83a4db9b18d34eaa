"""Held-out text: nats a token, perplexity, bits a byte."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist

from data.batches import IGNORED, Dataset, held_out_count, held_out_windows
from training.engine import Engine


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A measurement of held-out text."""

    loss: float  # nats a token
    tokens: int  # targets measured

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Return bits a byte, given the held-out set's bytes a token."""
        return self.loss / math.log(2) / bytes_per_token


def evaluate(engine: Engine, dataset: Dataset, sequence_length: int, tokens: int | None = None) -> HeldOut:
    """Measure the mean loss of the held-out set, or of its first `tokens` tokens. Every rank must call it together.

    The set is cut into windows that do not overlap, so each token is a target once, with up to `sequence_length` - 1 tokens
    before it. Ranks take turns; a rank without a window in the last turn computes one that does not count, since under ZeRO-3
    the forward is collective.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    count = held_out_count(dataset, sequence_length)
    if tokens is not None:
        count = min(count, max(1, tokens // sequence_length))
    mine = range(rank, count, world)
    turns = -(-count // (world * engine.batch.micro_batch))
    windows = held_out_windows(dataset, sequence_length, engine.batch.micro_batch, mine)
    idle = next(held_out_windows(dataset, sequence_length, 1, [0]))
    nats, measured = 0.0, 0
    for _ in range(turns):
        window = next(windows, None)
        inputs, targets = (torch.from_numpy(rows).to(engine.device) for rows in window or idle)
        loss = engine.evaluate(inputs, targets)
        if window:
            valid = int((targets != IGNORED).sum())
            nats += float(loss) * valid
            measured += valid
    totals = torch.tensor([nats, measured], dtype=torch.float64, device=engine.device)
    dist.all_reduce(totals)
    return HeldOut(float(totals[0] / totals[1]), int(totals[1]))
