"""What happens inside the layers, every `telemetry_every` steps: of the activations, from inside their kernels
(`kernels/telemetry.py`), and of the gradients, from the pieces that this rank holds anyway.

Ranks reduce what they saw in two collectives that run beside the next step; the line is written when that step is done. No
weight depends on any of this: a run has the same losses with and without it, bit for bit.
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

from kernels.telemetry import Statistics, figures
from model.decoder import Decoder
from training.engine import Engine, GradientPiece


class Telemetry:
    """The statistics of a model's layers.

    Args:
        engine: whose model is looked at.
        every: steps between looks; 0: never.
        window: tokens that were looked at without seeing a unit active before it is called dead. It begins anew when a run is
            resumed.
    """

    def __init__(self, engine: Engine, every: int, window: int) -> None:
        self.engine, self.every = engine, every
        self._module: Decoder = engine.module
        self._window = Window(window)
        self._look: _Look | None = None  # of the step that runs
        self._pending: tuple[int, _Look] | None = None  # the last look, which is being reduced, and its step

    def of(self, step: int) -> _Look | None:
        """Return what `Engine.train_step` tells of step number `step`, if it is to be looked at."""
        self._look = _Look(self._module, self.engine.device) if self.every and step % self.every == 0 else None
        return self._look

    def reduce(self, step: int, tokens: int) -> None:
        """Begin to reduce over ranks what was seen in a step of `tokens` tokens. Collective; does not wait."""
        if self._look is not None:
            self._look.tokens = tokens
            self._look.reduce()
            self._pending, self._look = (step, self._look), None

    def finished(self) -> tuple[int, dict[str, Any]] | None:
        """Return the step of the last look and its figures, once; a list has a figure for each layer, None where undefined."""
        if self._pending is None:
            return None
        (step, look), self._pending = self._pending, None
        look.wait()
        return step, look.figures() | self._window.figures(look.active(), look.tokens)

    @contextlib.contextmanager
    def dead_units(self) -> Iterator[list[float | None]]:
        """Look at the forward passes inside, and return a list that holds each layer's share of dead units afterwards.

        Collective. Empty if nothing is ever to be looked at.
        """
        shares: list[float | None] = []
        if not self.every:
            yield shares
            return
        look = _Look(self._module, self.engine.device)
        with look.forward():
            yield shares
        look.reduce()
        look.wait()
        shares += [_share(active == 0) for active in look.active()]


class _Look:
    """One look at all layers. The engine calls `forward` and `backward` (`engine.Observer`)."""

    def __init__(self, module: Decoder, device: torch.device) -> None:
        self.layers, self.tensor = [layer.ffn for layer in module.layers], module.mesh.tensor
        self.statistics = [Statistics(f.activation.compiled, f.d_ff // self.tensor.size, device) for f in self.layers]
        self.squares = torch.zeros(len(self.layers), dtype=torch.float64, device=device)  # of each layer's gradient
        self.signs = torch.zeros(len(self.layers), module.shape.d_model, dtype=torch.float64, device=device)
        self.tokens = 0

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """While it is entered, the layers' kernels tell of themselves."""
        for ffn, statistics in zip(self.layers, self.statistics, strict=True):
            ffn.statistics = statistics
        try:
            yield
        finally:
            for ffn in self.layers:
                ffn.statistics = None

    def backward(self, pieces: Iterator[GradientPiece]) -> None:
        """Take in the gradient of the whole batch, in the pieces that this rank holds."""
        for piece in pieces:
            kind, _, rest = piece.name.partition(".")
            if kind == "layers" and not (piece.shared and self.tensor.rank):
                index, _, name = rest.partition(".")
                norm = torch.linalg.vector_norm(piece.values, dtype=torch.float32)  # in one pass, with no copy
                self.squares[int(index)] += norm.double().square()
                if name == "ffn.down":
                    add_signs(self.signs[int(index)], piece)

    def reduce(self) -> None:
        """Begin the two collectives."""
        parts = [part for s in self.statistics for part in (s.sums, self._among_all(s.active))]
        self.sums = torch.cat([*parts, self.squares, self.signs.flatten()])
        self.peaks = torch.cat([statistics.peak for statistics in self.statistics])
        self._works = [
            dist.all_reduce(self.sums, async_op=True),
            dist.all_reduce(self.peaks, op=dist.ReduceOp.MAX, async_op=True),
        ]

    def wait(self) -> None:
        """Wait for them; what was reduced is in the host's memory from here on."""
        for work in self._works:
            work.wait()
        self.sums, self.peaks = self.sums.cpu(), self.peaks.cpu()

    def figures(self) -> dict[str, Any]:
        """Return the reduced figures."""
        squares, signs = self._whole[2 * len(self.layers) :]
        peaks = self.peaks.tolist()
        layers = [
            figures(statistics.names, statistics.pre_activations, sums.tolist(), peak)
            for statistics, sums, peak in zip(self.statistics, self._whole[0 : 2 * len(peaks) : 2], peaks, strict=True)
        ]
        norms = squares.sqrt().tolist()
        widths = torch.tensor([ffn.d_ff for ffn in self.layers])
        agreement = (signs.view(len(self.layers), -1).abs().mean(1) / widths).tolist()
        names = dict.fromkeys(name for layer in layers for name in layer)
        return {
            **{name: [_finite(layer.get(name, math.nan)) for layer in layers] for name in names},
            "gradient_norm": [_finite(norm) for norm in norms],
            "gradient_first_over_last": _finite(norms[0] / norms[-1] if norms[-1] else math.nan),
            "sign_agreement": [_finite(value) for value in agreement],
        }

    def active(self) -> list[Tensor]:
        """Return, for each layer, for how many tokens each unit was active; reduced."""
        return self._whole[1 : 2 * len(self.layers) : 2]

    @property
    def _whole(self) -> list[Tensor]:
        sizes = [size for s, f in zip(self.statistics, self.layers, strict=True) for size in (s.sums.numel(), f.d_ff)]
        return list(self.sums.split([*sizes, self.squares.numel(), self.signs.numel()]))

    def _among_all(self, units: Tensor) -> Tensor:
        """Put this tensor rank's units where they stand among those of the layer; the others are 0."""
        after = self.tensor.size - 1 - self.tensor.rank
        return F.pad(units, (self.tensor.rank * len(units), after * len(units)))


class Window:
    """Which units were active in the last `size` tokens that were looked at."""

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self._last: list[Tensor] = []  # for each unit: `seen` after the look in which it was last active
        self._dead: list[Tensor] = []

    def figures(self, active: list[Tensor], tokens: int) -> dict[str, Any]:
        """Take in a look at `tokens` tokens: for each layer, for how many of them each unit was active.

        Returns:
            dead: share of the units that were active for none of the last `window_tokens` tokens.
            revived: share of the units that were dead at the look before and are active now.
            window_tokens: `size`, or what has been looked at so far if that is less.
        """
        first = not self._last
        if first:
            self._last = [torch.zeros_like(units) for units in active]
            self._dead = [torch.zeros_like(units, dtype=torch.bool) for units in active]
        self.seen += tokens
        window = min(self.size, self.seen)
        dead, revived = [], []
        for layer, units in enumerate(active):
            self._last[layer] = torch.where(units > 0, float(self.seen), self._last[layer])
            revived.append(_share(self._dead[layer] & (units > 0)))
            self._dead[layer] = self.seen - self._last[layer] >= window
            dead.append(_share(self._dead[layer]))
        return {"dead": dead, "revived": [None] * len(dead) if first else revived, "window_tokens": window}


def add_signs(totals: Tensor, piece: GradientPiece) -> None:
    """Add to `totals` (rows,) the sums over each row of the signs of a matrix's gradient, as far as the piece has them."""
    columns = piece.shape[-1]
    first, offset = divmod(piece.start, columns)
    signs = F.pad(piece.values.sign(), (offset, -(offset + piece.values.numel()) % columns)).view(-1, columns)
    totals[first : first + len(signs)] += signs.sum(1, dtype=torch.float64)


def _share(units: Tensor) -> float | None:
    """Return the share of units that are true, None of no units."""
    return _finite(float(units.double().mean()))


def _finite(value: float) -> float | None:
    """Return the first six digits of a number, and None for what is none: JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
