"""The console: a summary before the first step, lines of steps above a progress bar, and messages.

A terminal shows a line per step, as wide as it is. A file or a pipe gets a line every few seconds.
Rank 0 alone prints; the other ranks hold a disabled console.
"""

from __future__ import annotations

import collections
import time

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table

from conf.schema import Config
from conf.shape import FFNShape, Shape
from conf.terminal import SafeConsole
from conf.validate import Batch
from kernels.common.units import duration, human
from launch.estimate.counts import flops_per_token, parameters


class RecentSpeed:
    """The speed of the last minute, evaluations and saves included; of a minute, or of one step if that takes longer."""

    WINDOW_SECONDS = 60.0

    def __init__(self, step: int) -> None:
        self._marks = collections.deque([(time.monotonic(), step)])  # (time, steps done)
        self._first = step + 1

    def mark(self, step: int) -> None:
        """Note that `step` steps are done."""
        if step == self._marks[-1][1]:
            return
        now = time.monotonic()
        if len(self._marks) == 2 and self._marks[1][1] == self._first:
            self._marks.popleft()  # the first step of a session compiles and allocates
        self._marks.append((now, step))
        while len(self._marks) > 2 and self._marks[1][0] < now - self.WINDOW_SECONDS:
            self._marks.popleft()

    def seconds_left(self, steps: int) -> float | None:
        """Return the estimated time up to step number `steps`; None before a step is done."""
        (started, first), (now, step) = self._marks[0], self._marks[-1]
        return (now - started) / (step - first) * (steps - step) if step > first else None


class Console:
    """Prints if `enabled`, as on rank 0; otherwise does nothing."""

    def __init__(self, enabled: bool = True) -> None:
        self.out = SafeConsole(quiet=not enabled, highlight=False)
        if not self.out.is_terminal:
            self.out = SafeConsole(quiet=not enabled, highlight=False, width=120)  # a log file has no width
        self._progress: Progress | None = None
        self._task = TaskID(0)  # of `_progress`
        self._steps, self._seconds = 0, 0.0
        self._speed, self._last_line = RecentSpeed(0), -float("inf")  # time of the last line of a step

    def print(self, text: str, wrap: bool = True) -> None:
        """Print a text above the progress bar, on a terminal wrapped between words; commands and samples are not wrapped."""
        self.out.print(escape(text), soft_wrap=not (wrap and self.out.is_terminal))

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.out.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=not self.out.is_terminal)

    def summary(self, config: Config, shape: Shape, batch: Batch, rows: list[tuple[str, str]]) -> None:
        """Print what is going to be trained, on what, and for how long; `rows` come last."""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in (*_model_rows(config, shape), *_batch_rows(config, shape, batch), *rows):
            table.add_row(name, escape(value))
        self.out.print(table)

    def start(self, done: int, steps: int, seconds: float = 0.0) -> None:
        """Start to estimate the time left after `done` of `steps` steps, and show the progress bar on a terminal.

        Args:
            seconds: between lines of steps where the output is no terminal; the first and the last are always printed.
        """
        if self.out.is_terminal and not self.out.quiet:
            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
            self._progress = Progress(*columns, console=self.out, transient=True)
            self._task = self._progress.add_task("train", total=steps, completed=done, left="")
            self._progress.start()
        self._steps, self._seconds = steps, seconds
        self._speed, self._last_line = RecentSpeed(done), -float("inf")

    def step(self, step: int, record: dict[str, float | None]) -> None:
        """Print the line of a step: what is known of it, as far as it fits, the least important figures left out first."""
        now = time.monotonic()
        if not self.out.is_terminal and step < self._steps and now - self._last_line < self._seconds:
            return
        self._last_line = now
        mfu = record["mfu"]
        figures = [  # (importance, text)
            (9, f"step {step:>{len(str(self._steps))}}/{self._steps}"),
            (1, f"({step / self._steps:4.0%})"),
            (9, f"loss {record['loss']:.4f}"),
            (4, f"lr {record['lr']:.2e}"),
            (3, f"grad norm {record['grad_norm']:.3f}"),
            (8, f"{human(record['tokens_per_second'] or 0.0):>5} tok/s"),
            (5, "MFU unknown" if mfu is None else f"MFU {mfu:.1%}"),
        ]
        if self._progress is None:
            figures.append((7, self._time_left(step)))
        while (
            len(line := "  ".join(text for _, text in figures).replace("  (", " (")) > self.out.width
            and len(figures) > 2
        ):
            figures.remove(min(figures, key=lambda figure: figure[0]))
        self.out.print(line, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        self._speed.mark(step)
        seconds = self._speed.seconds_left(self._steps)
        return "" if seconds is None else f"ETA {duration(seconds)}"

    def advance(self, step: int) -> None:
        """Move the progress bar, and note the time of this step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, left=self._time_left(step))
        else:
            self._speed.mark(step)

    def stop(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _model_rows(config: Config, shape: Shape) -> list[tuple[str, str]]:
    """Return the rows of the summary about the model: (name, text)."""
    counts, flops = parameters(shape), flops_per_token(shape, config.sequence_length)
    rows = [("run", str(config.run))]
    for layers, ffn in _group_equal_layers(shape):
        kind = f"{'gated' if ffn.matrices == 3 else 'ungated'}, {ffn.matrices} matrices, d_ff {ffn.d_ff}"
        rows.append(("ffn", f"{layers}{ffn.arm.name}: {ffn.arm.formula}   ({kind})"))
    gated_ffn_parameters = 3 * shape.d_model * config.model.d_ff_gated * shape.n_layers
    if counts["ffn"] != gated_ffn_parameters:
        difference = counts["ffn"] / gated_ffn_parameters - 1
        rows.append(("", f"FFN parameters differ from the preset's gated arm by {difference:+.2%}"))
    heads = f"{shape.n_heads} heads of {shape.head_dim}"
    if shape.n_kv_heads != shape.n_heads:
        heads += f", {shape.n_kv_heads} of keys and values"
    size = f"{config.model.name}: {shape.n_layers} layers, d_model {shape.d_model}, {heads}"
    rows.append(("model", f"{size}, vocabulary {shape.vocab_size}"))
    terms = " + ".join(f"{name} {human(count)}" for name, count in counts.items() if count)
    rows.append(("parameters", f"{human(sum(counts.values()))} = {terms}"))
    terms = " + ".join(f"{name} {human(count)}" for name, count in flops.items())
    rows.append(("FLOPs per token", f"{human(sum(flops.values()))} = {terms}"))
    return rows


def _batch_rows(config: Config, shape: Shape, batch: Batch) -> list[tuple[str, str]]:
    """Return the rows of the summary about batch size and token budget: (name, text)."""
    sequences = f"{batch.micro_batch} sequences x {batch.accumulation} micro-batch(es) x {batch.data_parallel} rank(s)"
    tokens = f"{batch.steps} steps x {batch.tokens_per_step} = {human(batch.tokens)}"
    tokens_per_parameter = batch.tokens / sum(parameters(shape).values())
    return [
        ("batch", f"{batch.global_batch} sequences = {sequences}, of {config.sequence_length} tokens"),
        ("tokens", f"{tokens} ({tokens_per_parameter:.1f} per parameter)"),
    ]


def _group_equal_layers(shape: Shape) -> list[tuple[str, FFNShape]]:
    """Return (layers, arm) from the first layer to the last, consecutive layers of one arm as one: ("layers 0-3  ", arm)."""
    groups: list[tuple[list[int], FFNShape]] = []
    for index, ffn in enumerate(shape.ffn):
        if groups and groups[-1][1] == ffn:
            groups[-1][0].append(index)
        else:
            groups.append(([index], ffn))
    if len(groups) == 1:
        return [("", groups[0][1])]
    return [
        (f"layer {layers[0]}  " if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}  ", ffn)
        for layers, ffn in groups
    ]
