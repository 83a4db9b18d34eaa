"""Compare runs: `python -m training.compare swiglu-run relu2-run`.

    RUN RUN ...    two or more runs, by name or by path
    runs=FOLDER    where run folders are; default: `runs`
    points=6       numbers of tokens at which losses are compared, the last one of the shortest run among them

Prints the settings that differ, the held-out and training losses at equal numbers of tokens, and speed and memory. It reads
config.yaml, metrics.jsonl and summary.json, so runs may still be in progress. A difference between single runs is no verdict:
the seed alone moves a loss. `python -m ablation.run` compares arms with seeds and statistics.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from conf.identity import NOT_LEARNED
from conf.load import find_run, values_of
from conf.overrides import as_typed
from conf.terminal import SafeConsole
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.json_files import is_number, read_metrics_file, read_summary
from kernels.common.options import read_positional
from kernels.common.units import duration, human

_LONGEST = 40  # characters of a setting
_SPIKE_LINES = 9  # of metrics.jsonl, over whose median a training loss is smoothed


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """A run as its folder tells it."""

    name: str
    values: dict[str, Any]  # of config.yaml, by dotted key
    lines: list[dict[str, Any]]  # of metrics.jsonl
    summary: dict[str, Any]

    def curve(self, kind: str, held_out_tokens: int | None = None) -> dict[int, float]:
        """Return {tokens: loss} of the lines of a kind, of evaluations those on that many held-out tokens."""
        return {
            line["tokens"]: line["loss"]
            for line in self.lines
            if line.get("kind") == kind
            and line.get("held_out_tokens") == held_out_tokens
            and is_number(line.get("loss"))
            and math.isfinite(line["loss"])
            and line.get("tokens") is not None
        }

    @property
    def held_out_tokens(self) -> set[int]:
        """The numbers of held-out tokens that the run was evaluated on."""
        measured = {line.get("held_out_tokens") for line in self.lines if line.get("kind") == "eval"}
        return {tokens for tokens in measured if tokens is not None}

    def median(self, figure: str) -> float:
        """Return the median of a figure over the training lines but the first, which includes compilation; else nan."""
        lines = [line for line in self.lines if line.get("kind") == "train"]
        values = [line[figure] for line in lines[1:] or lines if is_number(line.get(figure))]
        return statistics.median(values) if values else math.nan


def main(argv: list[str]) -> int:
    options, names = read_positional(argv, {"runs": "runs", "points": 6})
    if len(names) < 2:
        raise UserError("name two or more runs: python -m training.compare RUN RUN")
    if options["points"] < 1:
        raise UserError(f"points={options['points']} must be at least 1")
    runs = [read_run(find_run(name, options["runs"])) for name in names]
    if len({run.name for run in runs}) < len(runs):  # of several folders
        runs = [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    console = SafeConsole(highlight=False)
    if not console.is_terminal:
        console = SafeConsole(highlight=False, width=max(80, 30 + 16 * len(runs)))
    print_comparison(runs, options["points"], console)
    return 0


def read_run(folder: Path) -> ComparedRun:
    """Read a run's folder.

    Raises:
        UserError: it has no metrics yet, or its config.yaml cannot be read.
    """
    try:
        lines = read_metrics_file(folder / "metrics.jsonl").lines
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no metrics.jsonl: it has not taken a step yet") from error
    except OSError as error:
        raise UserError(f"cannot read {folder / 'metrics.jsonl'}: {error.strerror}") from error
    try:
        summary = read_summary(folder / "summary.json")
    except (OSError, ValueError):
        summary = {}
    return ComparedRun(folder.name, values_of(folder / "config.yaml"), lines, summary)


def print_comparison(runs: Sequence[ComparedRun], points: int, console: SafeConsole) -> None:
    """Print the tables of a comparison; the first run is what the others are compared with."""
    learned, others = differing_settings(runs)
    _print_table(console, "settings", runs, learned or [("nothing that decides what is learned", [""] * len(runs))])
    if others:
        _print_table(console, "settings of computation and records", runs, others)
    if any(key.startswith(("data.", "tokenizer.")) and key not in NOT_LEARNED for key, _ in learned):
        console.print("Text or tokenizer differ: losses per token do not compare; bits per byte do on the same text.\n")
    for kind, title in (("eval", "held-out loss"), ("train", "training loss")):
        rows = losses_at_equal_tokens(runs, kind, points)
        if rows:
            _print_table(console, f"{title} after tokens", runs, rows)
        else:
            console.print(f"{title}: the runs have no range of tokens in common, or other numbers of held-out tokens\n")
    _print_table(console, "speed and result", runs, _figures(runs))
    hashes = {run.summary.get("data_order_hash") for run in runs}
    if None not in hashes and len(hashes) == 1:
        console.print("All runs trained on the same batches in the same order.")
    console.print(
        "One run per setting shows no more than the seed's luck allows; python -m ablation.run compares arms."
    )


def differing_settings(
    runs: Sequence[ComparedRun],
) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
    """Return (key, a value per run) of the settings that differ: those that decide what is learned, and all others."""
    learned, others = [], []
    keys = sorted({key for run in runs for key in run.values} - {"run", "runs"})
    for key in keys:
        values = [run.values.get(key, "–") for run in runs]
        if any(value != values[0] for value in values):
            free = any(key == name or key.startswith(f"{name}.") for name in NOT_LEARNED) and key not in (
                "steps",
                "tokens",
            )
            (others if free else learned).append((key, [_shown(value) for value in values]))
    return learned, others


def _shown(value: Any) -> str:
    """Return a value as it is typed, cut at `_LONGEST` characters."""
    text = as_typed(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def losses_at_equal_tokens(runs: Sequence[ComparedRun], kind: str, points: int) -> list[tuple[str, list[str]]]:
    """Return (tokens, a loss per run) at up to `points` numbers of tokens; [] if no number of tokens is within all runs.

    The first run's loss, in nats per token, stands alone, the others' with their difference to it; ~ marks one between two
    measurements. Held-out losses compare on the same number of held-out tokens, training losses as medians of nearby lines.
    """
    measured = None
    if kind == "eval":
        common = set.intersection(*(run.held_out_tokens for run in runs))
        if not common:
            return []
        measured = max(common, key=lambda tokens: min(len(run.curve(kind, tokens)) for run in runs))
    curves = [run.curve(kind, measured) for run in runs]
    if kind == "train":
        curves = [_smoothed(curve) for curve in curves]
    if not all(curves):
        return []
    first, last = max(min(curve) for curve in curves), min(max(curve) for curve in curves)
    within = sorted({tokens for curve in curves for tokens in curve if first <= tokens <= last})
    if not within:
        return []
    if len(within) > points:
        within = sorted({within[round((len(within) - 1) * i / points)] for i in range(1, points + 1)})
    rows = []
    for tokens in within:
        base, *others = (_loss_at(curve, tokens) for curve in curves)
        rows.append(
            (human(tokens), [f"{base[1]}{base[0]:.4f}", *(f"{m}{v:.4f} ({v - base[0]:+.4f})" for v, m in others)])
        )
    return rows


def _loss_at(curve: dict[int, float], tokens: int) -> tuple[float, str]:
    """Return a curve's loss at a number of tokens inside of it, and "~" if it lies between two measurements."""
    if tokens in curve:
        return curve[tokens], ""
    before, after = max(at for at in curve if at < tokens), min(at for at in curve if at > tokens)
    part = (tokens - before) / (after - before)
    return curve[before] + part * (curve[after] - curve[before]), "~"


def _smoothed(curve: dict[int, float]) -> dict[int, float]:
    """Return a training curve whose losses are medians over `_SPIKE_LINES` lines around each."""
    tokens, losses, half = list(curve), list(curve.values()), _SPIKE_LINES // 2
    if len(losses) < 2 * _SPIKE_LINES:
        return curve
    return {at: statistics.median(losses[max(0, i - half) : i + half + 1]) for i, at in enumerate(tokens)}


def _figures(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Return (what, a text per run) of speed, memory, size and result."""
    figures: list[tuple[str, Callable[[ComparedRun], Any], Callable[[Any], str]]] = [
        ("state", lambda run: run.summary.get("status", "unfinished"), str),
        ("tokens trained on", lambda run: max((line.get("tokens") or 0 for line in run.lines), default=0), human),
        ("tokens/s, median", lambda run: run.median("tokens_per_second"), human),
        ("MFU, median", lambda run: run.median("mfu"), lambda value: f"{value:.1%}"),
        ("memory per rank, GiB", lambda run: run.median("memory_gib"), lambda value: f"{value:.2f}"),
        ("wall-clock time", lambda run: run.summary.get("wall_seconds"), duration),
        ("parameters", lambda run: run.summary.get("parameters"), human),
        ("FFN parameters", lambda run: run.summary.get("ffn_parameters"), human),
        ("FLOPs per token", lambda run: run.summary.get("flops_per_token"), human),
        ("final loss, all held-out text", lambda run: run.summary.get("final_eval_loss"), lambda value: f"{value:.4f}"),
        ("bits per byte", lambda run: run.summary.get("bits_per_byte"), lambda value: f"{value:.4f}"),
        ("commit", lambda run: (run.summary.get("provenance") or {}).get("commit"), lambda value: value[:12]),
    ]
    rows = []
    for what, get, write in figures:
        values = [get(run) for run in runs]
        missing = [value is None or (isinstance(value, float) and math.isnan(value)) for value in values]
        if not all(missing):
            rows.append((what, ["–" if m else write(value) for m, value in zip(missing, values, strict=True)]))
    return rows


def _print_table(
    console: SafeConsole, title: str, runs: Sequence[ComparedRun], rows: list[tuple[str, list[str]]]
) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, overflow="fold", ratio=2)
    for run in runs:
        table.add_column(escape(run.name), overflow="fold", ratio=3)
    for name, values in rows:
        table.add_row(*map(escape, (name, *values)))
    console.print(table)


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
