"""Held-out loss: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist

from data.batches import Dataset, held_out_count, held_out_windows
from training import watchdog
from training.engine import Engine


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A measurement on held-out text."""

    loss: float  # nats per token
    tokens: int  # targets measured

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Return bits per byte, given the bytes per token of the held-out set."""
        return self.loss / math.log(2) / bytes_per_token


def evaluate(engine: Engine, dataset: Dataset, sequence_length: int, tokens: int | None = None) -> HeldOut:
    """Return the mean loss on the held-out set, or on its first `tokens` tokens. Collective.

    The set is split into windows that do not overlap. Each token is a target once, with up to `sequence_length` - 1 tokens
    before it. Data ranks take windows in turn. A rank without a window in the last round evaluates one that does not count,
    because under ZeRO-3 the forward pass is collective.
    """
    data = engine.mesh.data
    n_windows = held_out_count(dataset, sequence_length)
    if tokens is not None:
        n_windows = min(n_windows, max(1, tokens // sequence_length))
    own_windows = range(data.rank, n_windows, data.size)
    rounds = -(-n_windows // (data.size * engine.batch.micro_batch))
    batches = held_out_windows(dataset, sequence_length, engine.batch.micro_batch, own_windows)
    filler = next(held_out_windows(dataset, sequence_length, 1, [0]))
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)  # nats, targets
    for _ in range(rounds):
        batch = next(batches, None)
        inputs, targets = (torch.from_numpy(rows).to(engine.device) for rows in batch or filler)  # (rows, S) each
        watchdog.alive()
        nats, count = engine.evaluate(inputs, targets)
        if batch is not None:
            totals += torch.stack([nats.double(), count.double()])
    dist.all_reduce(totals, group=engine.mesh.data_context.group)
    return HeldOut(float(totals[0] / totals[1]), int(totals[1]))
