"""What a swap came to: held-out losses of a run on its way to another arm, beside the same run without the swap."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from conf.terminal import SafeConsole
from kernels.common.json_files import read_metrics_file

_ROWS = 12  # evaluations that are shown at most


@dataclasses.dataclass(frozen=True)
class SwapCurve:
    """A run as its metrics.jsonl tells it.

    Attributes:
        losses: {step: held-out loss} of the periodic evaluations, and `final` of the last, on all held-out text; None: none.
        held_out_tokens: of the periodic evaluations.
        zeros: {step: fraction of h that is exactly 0, the mean over layers}.
        first_loss: training loss of the first step; None: it was not logged.
    """

    losses: dict[int, float]
    final: float | None
    held_out_tokens: int | None
    zeros: dict[int, float]
    first_loss: float | None

    def zeros_at(self, step: int) -> float | None:
        """Return the share of zeros in the last sample up to a step; in the first one, where that comes later."""
        before = [sampled for sampled in self.zeros if sampled <= step] or sorted(self.zeros)[:1]
        return self.zeros[max(before)] if before else None


def curve_of(run: Path) -> SwapCurve:
    """Return the curves of a run."""
    lines = read_metrics_file(run / "metrics.jsonl").lines
    evaluated = list(_lines(lines, "eval", "loss"))
    losses = {line["step"]: float(line["loss"]) for line in reversed(evaluated)}  # the last step has a second line
    tokens = evaluated[0].get("held_out_tokens") if evaluated else None
    of_layers = {
        line["step"]: [z for z in line["zeros"] if z is not None] for line in _lines(lines, "telemetry", "zeros")
    }
    zeros = {step: statistics.fmean(layers) for step, layers in of_layers.items() if layers}
    first = [float(line["loss"]) for line in _lines(lines, "train", "loss") if line["step"] == 1]
    final = float(evaluated[-1]["loss"]) if evaluated else None
    return SwapCurve(losses, final, tokens, zeros, first[0] if first else None)


def _lines(lines: Sequence[dict[str, Any]], kind: str, key: str) -> Iterator[dict[str, Any]]:
    return (line for line in lines if line["kind"] == kind and line.get(key) is not None)


def table_of(swapped: SwapCurve, control: SwapCurve | None, start: float | None, steps: int) -> Table:
    """Return the table of losses over steps.

    Args:
        start: held-out loss of the checkpoint that both began with; None: unknown.
        steps: over which the arm changed.
    """
    columns = ["step", "t", "zeros of h", "held-out loss"]
    table = Table(*columns, *(["without the swap", "difference"] if control else []), box=box.SIMPLE)
    for column in table.columns:
        column.justify = "right"
    at = [step for step in sorted(swapped.losses) if control is None or step in control.losses]
    chosen = at if len(at) <= _ROWS else [at[round(i * (len(at) - 1) / (_ROWS - 1))] for i in range(_ROWS)]
    if start is not None:
        shown = f"{start:.4f}"
        table.add_row("0", "0", "", shown, *([shown, "+0.0000"] if control else []))
    for step in chosen:
        loss, zeros = swapped.losses[step], swapped.zeros_at(step)
        row = [str(step), f"{min(1.0, step / steps):.2f}", "" if zeros is None else f"{zeros:.1%}", f"{loss:.4f}"]
        other = control.losses[step] if control else math.nan
        table.add_row(*row, *([f"{other:.4f}", f"{loss - other:+.4f}"] if control else []))
    return table


def report(swapped: Path, control: Path | None, source: Path, step: int, steps: int) -> None:
    """Print the losses of a swapped run, beside those without the swap.

    Args:
        swapped, control, source: run folders; `source` is that of the run both came from.
        step: of the checkpoint of `source`.
        steps: over which the arm changed.
    """
    curve, other = curve_of(swapped), curve_of(control) if control else None
    console = SafeConsole(file=sys.stdout, highlight=False, markup=False)
    start = curve_of(source)
    known = start.losses.get(step) if start.held_out_tokens == curve.held_out_tokens else None
    console.print(table_of(curve, other, known, steps))
    if curve.final is not None:
        beside = "" if other is None or other.final is None else f", without the swap {other.final:.4f}"
        console.print(f"on all held-out text: {curve.final:.4f}{beside}", soft_wrap=True)
    if other is not None and curve.first_loss is not None and other.first_loss is not None:
        console.print(
            f"training loss of the first step: {curve.first_loss:.5f}, without the swap {other.first_loss:.5f}",
            soft_wrap=True,
        )
    if curve.zeros:
        first, last = min(curve.zeros), max(curve.zeros)
        before = "" if other is None or not other.zeros else f"; {other.zeros[max(other.zeros)]:.1%} without the swap"
        console.print(
            f"zeros of h: {curve.zeros[first]:.1%} at step {first}, {curve.zeros[last]:.1%} at step {last}{before}",
            soft_wrap=True,
        )
    console.print(f"python -m model.export run={swapped} to=FOLDER   writes the model with the new arm", soft_wrap=True)
