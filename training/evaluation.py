"""Held-out text: nats a token, perplexity, bits a byte."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist

from data.batches import Dataset, held_out_count, held_out_windows
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
    before it. Data ranks take turns; one without a window in the last turn computes one that does not count, since under ZeRO-3
    the forward is collective.
    """
    data, replicas = engine.mesh.data, engine.mesh.replicas
    count = held_out_count(dataset, sequence_length)
    if tokens is not None:
        count = min(count, max(1, tokens // sequence_length))
    mine = range(data.rank, count, data.size)
    turns = -(-count // (data.size * engine.batch.micro_batch))
    windows = held_out_windows(dataset, sequence_length, engine.batch.micro_batch, mine)
    idle = next(held_out_windows(dataset, sequence_length, 1, [0]))
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)  # nats, targets
    for _ in range(turns):
        window = next(windows, None)
        inputs, targets = (torch.from_numpy(rows).to(engine.device) for rows in window or idle)
        measured = engine.evaluate(inputs, targets)
        if window:
            totals += torch.stack([figure.double() for figure in measured])
    dist.all_reduce(totals, group=replicas.group)
    return HeldOut(float(totals[0] / totals[1]), int(totals[1]))
