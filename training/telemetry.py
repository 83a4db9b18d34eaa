"""Activation telemetry samples: what happens inside the layers, every `telemetry_every` steps.

Activation statistics come from inside the kernels (`kernels/telemetry.py`), gradient statistics from the fragments that each
rank holds anyway. Two collectives reduce them over ranks while the next step runs; the line is written when that step is done.
No weight depends on any of this: the losses of a run are the same with and without telemetry, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.activations.telemetry import ActivationStats, figures
from model.decoder import Decoder
from model.feed_forward import FeedForward
from training.engine import Engine, GradientFragment


class Telemetry:
    """Take samples of a model's layers during training.

    Args:
        engine: trains the model.
        every: steps between samples; 0: none.
        window: sampled tokens without activity after which a unit counts as dead. A resumed run starts a new window.
    """

    def __init__(self, engine: Engine, every: int, window: int) -> None:
        self.engine, self.every = engine, every
        self._module: Decoder = engine.module
        self._window = ActivityWindow(window)
        self._sample: Sample | None = None  # of the step in progress
        self._pending: tuple[int, int, ReducedSample] | None = None  # (step, tokens, sample in reduction)

    def observer(self, step: int) -> Sample | None:
        """Return the observer that `Engine.train_step` takes for step number `step`; None if that step is not sampled."""
        sampled = self.every and step % self.every == 0
        self._sample = Sample(self._module, self.engine.device) if sampled else None
        return self._sample

    def reduce(self, step: int, tokens: int) -> None:
        """Start to reduce the sample of a step of `tokens` tokens, if there is one. Collective; does not wait."""
        if self._sample is not None:
            self._pending, self._sample = (step, tokens, ReducedSample(self._sample)), None

    def take(self) -> tuple[int, dict[str, Any]] | None:
        """Return (step, figures) of the last sample, once; None if there is none.

        A list has a figure for each layer, None where it is undefined.
        """
        if self._pending is None:
            return None
        (step, tokens, reduced), self._pending = self._pending, None
        reduced.wait()
        return step, reduced.figures() | self._window.update(reduced.active(), tokens)

    @contextlib.contextmanager
    def dead_units(self) -> Iterator[list[float | None]]:
        """Sample the forward passes inside; afterwards the yielded list holds the fraction of dead units of each layer.

        The list stays empty if telemetry is off. Collective.
        """
        fractions: list[float | None] = []
        if not self.every:
            yield fractions
            return
        sample = Sample(self._module, self.engine.device)
        with sample.forward():
            yield fractions
        reduced = ReducedSample(sample)
        reduced.wait()
        fractions += [_fraction(active == 0) for active in reduced.active()]


class Sample:
    """One sample of all layers on this rank: the `engine.Observer` of a step."""

    def __init__(self, module: Decoder, device: torch.device) -> None:
        self.layers = [child for child in module.modules() if isinstance(child, FeedForward)]  # first to last
        self.tensor = module.mesh.tensor
        self.statistics = [
            ActivationStats(f.activation.compiled, f.d_ff // self.tensor.size, device) for f in self.layers
        ]
        # Squared gradient norm of each layer, and sums over each row of the signs of its down projection's gradient.
        self.squares = torch.zeros(len(self.layers), dtype=torch.float64, device=device)
        self.signs = torch.zeros(len(self.layers), module.shape.d_model, dtype=torch.float64, device=device)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """While entered, the layers use the forward kernel with telemetry."""
        for ffn, statistics in zip(self.layers, self.statistics, strict=True):
            ffn.statistics = statistics
        try:
            yield
        finally:
            for ffn in self.layers:
                ffn.statistics = None

    def backward(self, fragments: Iterator[GradientFragment]) -> None:
        """Add the gradient of the whole batch, in the fragments that this rank holds."""
        for fragment in fragments:
            kind, _, rest = fragment.name.partition(".")
            if kind == "layers" and not (fragment.replicated and self.tensor.rank):
                index, _, name = rest.partition(".")
                norm = torch.linalg.vector_norm(fragment.values, dtype=torch.float32)  # one pass, without a copy
                self.squares[int(index)] += norm.double().square()
                if name == "ffn.down":
                    add_signs(self.signs[int(index)], fragment)


class ReducedSample:
    """A sample reduced over all ranks by two collectives, which the constructor starts. Collective."""

    def __init__(self, sample: Sample) -> None:
        self.layers, self.statistics, self._tensor = sample.layers, sample.statistics, sample.tensor
        parts = [part for s in self.statistics for part in (s.sums, self._pad_to_layer(s.active))]
        sizes = [size for s, f in zip(self.statistics, self.layers, strict=True) for size in (s.sums.numel(), f.d_ff)]
        self._sizes = [*sizes, sample.squares.numel(), sample.signs.numel()]
        self._sums = torch.cat([*parts, sample.squares, sample.signs.flatten()])
        self._peaks = torch.cat([statistics.peak for statistics in self.statistics])
        self._works = [
            dist.all_reduce(self._sums, async_op=True),
            dist.all_reduce(self._peaks, op=dist.ReduceOp.MAX, async_op=True),
        ]

    def wait(self) -> None:
        """Wait for the collectives, and copy their results to host memory."""
        for work in self._works:
            assert work is not None, "every rank is a member of the default group"
            work.wait()
        self._sums, self._peaks = self._sums.cpu(), self._peaks.cpu()

    def figures(self) -> dict[str, Any]:
        """Return the figures of the sample; a list has a figure for each layer."""
        *per_layer, squares, signs = self._sums.split(self._sizes)
        layers = [
            figures(statistics.names, statistics.pre_activations, sums.tolist(), peak)
            for statistics, sums, peak in zip(self.statistics, per_layer[::2], self._peaks.tolist(), strict=True)
        ]
        norms = squares.sqrt().tolist()
        widths = torch.tensor([ffn.d_ff for ffn in self.layers])
        agreement = (signs.view(len(self.layers), -1).abs().mean(1) / widths).tolist()
        names = dict.fromkeys(name for layer in layers for name in layer)  # a formula may lack figures that others have
        return {
            **{name: [_finite(layer.get(name, math.nan)) for layer in layers] for name in names},
            "gradient_norm": [_finite(norm) for norm in norms],
            "gradient_first_over_last": _finite(norms[0] / norms[-1] if norms[-1] else math.nan),
            "sign_agreement": [_finite(value) for value in agreement],
        }

    def active(self) -> list[Tensor]:
        """Return, for each layer, the number of tokens for which each unit was active: (d_ff,)."""
        return list(self._sums.split(self._sizes)[1 : 2 * len(self.layers) : 2])

    def _pad_to_layer(self, units: Tensor) -> Tensor:
        """(d_ff / T,) of this tensor rank -> (d_ff,) of the layer, 0 for the units of other ranks."""
        after = self._tensor.size - 1 - self._tensor.rank
        return F.pad(units, (self._tensor.rank * len(units), after * len(units)))


class ActivityWindow:
    """Which units were active in the last `size` sampled tokens."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sampled_tokens = 0
        # For each layer: `sampled_tokens` after the sample in which each unit was last active, and whether it is dead.
        self._last_active: list[Tensor] = []
        self._dead: list[Tensor] = []

    def update(self, active: list[Tensor], tokens: int) -> dict[str, Any]:
        """Add a sample of `tokens` tokens: for each layer, the number of tokens for which each unit was active.

        Returns:
            dead: fraction of the units that were active for none of the last `window_tokens` tokens.
            revived: fraction of the units that were dead at the previous sample and are active now.
            window_tokens: `size`, or all sampled tokens if they are fewer.
        """
        first = not self._last_active
        if first:
            self._last_active = [torch.zeros_like(units) for units in active]
            self._dead = [torch.zeros_like(units, dtype=torch.bool) for units in active]
        self.sampled_tokens += tokens
        window = min(self.size, self.sampled_tokens)
        dead, revived = [], []
        for layer, units in enumerate(active):
            self._last_active[layer] = torch.where(units > 0, float(self.sampled_tokens), self._last_active[layer])
            revived.append(_fraction(self._dead[layer] & (units > 0)))
            self._dead[layer] = self.sampled_tokens - self._last_active[layer] >= window
            dead.append(_fraction(self._dead[layer]))
        return {"dead": dead, "revived": [None] * len(dead) if first else revived, "window_tokens": window}


def add_signs(totals: Tensor, fragment: GradientFragment) -> None:
    """Add to `totals` (rows,) the sum over each row of the signs of a matrix's gradient, as far as the fragment has them."""
    columns = fragment.shape[-1]
    first_row, offset = divmod(fragment.start, columns)
    padding = (offset, -(offset + fragment.values.numel()) % columns)  # to whole rows
    signs = F.pad(fragment.values.sign(), padding).view(-1, columns)
    totals[first_row : first_row + len(signs)] += signs.sum(1, dtype=torch.float64)


def _fraction(units: Tensor) -> float | None:
    """Return the fraction of units that are true; None if there are no units."""
    return _finite(float(units.double().mean()))


def _finite(value: float) -> float | None:
    """Return a number rounded to six digits, or None if it is not finite: JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
