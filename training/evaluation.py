"""Held-out loss: nats per token, perplexity, bits per byte, and the loss of each document."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.batches import Dataset, held_out_windows, measured_windows
from training import watchdog
from training.engine import Engine

MOST_DOCUMENTS = 10_000  # whose losses are kept one by one; of more, neighbours are added up


@dataclasses.dataclass(frozen=True, eq=False)
class LossByDocument:
    """The losses of all held-out documents, in the order of the text. Each has its end-of-text token."""

    text: str  # hash of the held-out text
    nats: np.ndarray  # (documents,) float64, summed over the tokens of each
    tokens: np.ndarray  # (documents,) int64
    folders: np.ndarray | None = None  # documents of each folder, if folders were held out

    def as_json(self) -> dict[str, Any]:
        """Return what documents.json holds (`kernels.common.json_files.read_document_losses` reads it).

        Documents of one held-out folder, which resemble each other, are added up.
        """
        nats, tokens, unit = self.nats, self.tokens, "documents"
        if self.folders is not None and self.folders.sum() == len(tokens):
            starts, unit = np.cumsum(self.folders) - self.folders, "folders"
            nats, tokens = (np.add.reduceat(values, starts) for values in (nats, tokens))
        starts = np.unique(np.linspace(0, len(tokens), MOST_DOCUMENTS, endpoint=False).astype(int))
        nats, tokens = (np.add.reduceat(values, starts) for values in (nats, tokens))
        losses = {"nats": [round(n, 4) for n in nats.tolist()], "tokens": tokens.tolist()}
        return {"held_out": self.text, "unit": unit, **losses}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A measurement on held-out text."""

    loss: float  # nats per token
    tokens: int  # targets measured
    documents: LossByDocument | None = None  # None: a part of the text was measured

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Return bits per byte, given the bytes per token of the held-out set."""
        return self.loss / math.log(2) / bytes_per_token


def evaluate(engine: Engine, dataset: Dataset, sequence_length: int, tokens: int | None = None) -> HeldOut:
    """Return the mean loss on the held-out set, with that of each document, or on about `tokens` tokens of it. Collective.

    The set is split into windows that do not overlap. Each token is a target once, with up to `sequence_length` - 1 tokens
    before it. Data ranks take windows in turn. A rank without a window in the last round evaluates one that does not count,
    because under ZeRO-3 the forward pass is collective.
    """
    data, micro_batch = engine.mesh.data, engine.batch.micro_batch
    windows = measured_windows(dataset, sequence_length, tokens)
    own_windows = windows[data.rank :: data.size]
    rounds = -(-len(windows) // (data.size * micro_batch))
    batches = held_out_windows(dataset, sequence_length, micro_batch, own_windows)
    filler = next(held_out_windows(dataset, sequence_length, 1, [0]))
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)  # nats, targets
    by_document = _ByDocument(engine, dataset, sequence_length) if tokens is None else None
    for number in range(rounds):
        batch = next(batches, None)
        inputs, targets = (torch.from_numpy(rows).to(engine.device) for rows in batch or filler)  # (rows, S) each
        watchdog.alive()
        nats, count, token_nats = engine.evaluate(inputs, targets)
        if batch is not None:
            totals += torch.stack([nats.double(), count.double()])
            if by_document is not None:
                by_document.add(own_windows[number * micro_batch :][: len(targets)], token_nats)
    dist.all_reduce(totals, group=engine.mesh.data_context.group)
    documents = by_document.result() if by_document is not None else None
    return HeldOut(float(totals[0] / totals[1]), int(totals[1]), documents)


class _ByDocument:
    """Adds up the losses of tokens by the document that they are in."""

    def __init__(self, engine: Engine, dataset: Dataset, sequence_length: int) -> None:
        self.engine, self.text = engine, dataset.held_out.hash
        groups = dataset.held_out_groups
        self.folders = np.array(groups) if groups else None
        self.ends = dataset.held_out.document_ends()  # (documents,)
        self.sequence_length = sequence_length
        self.nats = torch.zeros(len(self.ends), dtype=torch.float64, device=engine.device)

    def add(self, windows: Sequence[int], token_nats: Tensor) -> None:
        """Add the losses (rows, S / C) of these windows; a target that is ignored has the loss 0."""
        places = np.array(windows)[:, None] * self.sequence_length + np.arange(self.sequence_length)  # (rows, S)
        documents = np.searchsorted(self.ends, places, side="right").clip(max=len(self.ends) - 1)
        here = self.engine.context_shard(torch.from_numpy(documents)).to(token_nats.device)
        self.nats.index_add_(0, here.flatten(), token_nats.flatten().double())

    def result(self) -> LossByDocument:
        """Return the losses over all ranks. Collective."""
        dist.all_reduce(self.nats, group=self.engine.mesh.data_context.group)
        return LossByDocument(self.text, self.nats.cpu().numpy(), np.diff(self.ends, prepend=0), self.folders)
