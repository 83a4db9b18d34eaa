"""What a person sees: a summary before the first step, a line a step under a progress bar, and the end of the run.

Rank 0 alone has a console; the other ranks hold a silent one.
"""

from __future__ import annotations

import datetime
import time

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from conf.schema import Config
from conf.validate import Batch
from launch.estimate.counts import FFNShape, Shape, flops_per_token, parameters


def human(number: float) -> str:
    """Return a number with three digits and a suffix: 2.62M, 15.3G."""
    for suffix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5 or suffix == "E":
            return f"{number:.3g}{suffix}"
        number /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Return seconds as 4.2s, 3m 20s or 2h 05m."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {seconds:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def _runs_of_layers(shape: Shape) -> list[tuple[str, FFNShape]]:
    """Return the arms from the first layer to the last, neighbours that are equal as one: ("layers 0-3  ", arm)."""
    runs: list[tuple[list[int], FFNShape]] = []
    for index, ffn in enumerate(shape.ffn):
        if runs and runs[-1][1] == ffn:
            runs[-1][0].append(index)
        else:
            runs.append(([index], ffn))
    if len(runs) == 1:
        return [("", runs[0][1])]
    names = [f"layer {i[0]}" if len(i) == 1 else f"layers {i[0]}-{i[-1]}" for i, _ in runs]
    return [(f"{name}  ", ffn) for name, (_, ffn) in zip(names, runs, strict=True)]


class Console:
    """Prints for rank 0; `speaks=False` swallows everything."""

    def __init__(self, speaks: bool = True) -> None:
        self.out = RichConsole(quiet=not speaks, highlight=False)
        if not self.out.is_terminal:
            self.out = RichConsole(quiet=not speaks, highlight=False, width=120)  # a log file has no width of its own
        self._progress: Progress | None = None
        self._task = None

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.out.print(escape(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line that should not be overlooked."""
        self.out.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    def summary(self, config: Config, shape: Shape, batch: Batch, rows: list[tuple[str, str]]) -> None:
        """Print what is going to be trained, on what, and how much of it. `rows` are added at the end."""
        counts, flops = parameters(shape), flops_per_token(shape, config.sequence_length)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        heads = f"{shape.n_heads} heads of {shape.head_dim}"
        if shape.n_kv_heads != shape.n_heads:
            heads += f", {shape.n_kv_heads} of keys and values"
        table.add_row("run", escape(str(config.run)))
        for layers, ffn in _runs_of_layers(shape):
            arm = f"{'gated' if ffn.matrices == 3 else 'ungated'}, {ffn.matrices} matrices, d_ff {ffn.d_ff}"
            table.add_row("ffn", escape(f"{layers}{ffn.arm.name}: {ffn.arm.formula}   ({arm})"))
        gated = 3 * shape.d_model * config.model.d_ff_gated * shape.n_layers
        if counts["ffn"] != gated:
            share = counts["ffn"] / gated - 1
            table.add_row("", f"FFN parameters differ from the preset's gated arm by {share:+.2%}")
        width = f"{config.model.name}: {shape.n_layers} layers, d_model {shape.d_model}, {heads}"
        table.add_row("model", f"{width}, vocabulary {shape.vocab_size}")
        total = sum(counts.values())
        table.add_row(
            "parameters", f"{human(total)} = " + " + ".join(f"{k} {human(v)}" for k, v in counts.items() if v)
        )
        step = f"{human(sum(flops.values()))} = " + " + ".join(f"{k} {human(v)}" for k, v in flops.items())
        table.add_row("FLOPs a token", step)
        arithmetic = (
            f"{batch.micro_batch} sequences x {batch.accumulation} micro-batch(es) x {batch.data_parallel} rank(s)"
        )
        table.add_row("batch", f"{batch.global_batch} sequences = {arithmetic}, of {config.sequence_length} tokens")
        epoch = f"{batch.steps} steps x {batch.tokens_per_step} = {human(batch.tokens)}"
        table.add_row("tokens", f"{epoch} ({batch.tokens / total:.1f} a parameter)")
        for name, value in rows:
            table.add_row(name, escape(value))
        self.out.print(table)

    def start(self, done: int, steps: int) -> None:
        """Show the progress bar, where the console is a terminal."""
        columns = (
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        if self.out.is_terminal and not self.out.quiet:
            self._progress = Progress(*columns, console=self.out, transient=True, speed_estimate_period=60)
            self._task = self._progress.add_task("train", total=steps, completed=done)
            self._progress.start()
        self._started, self._done = time.monotonic(), done

    def step(self, step: int, steps: int, record: dict[str, float]) -> None:
        """Print the line of a step."""
        taken = max(1, step - self._done)
        left = (time.monotonic() - self._started) / taken * (steps - step)
        eta = str(datetime.timedelta(seconds=round(left)))
        self.out.print(
            f"step {step:>{len(str(steps))}}/{steps} ({step / steps:4.0%})  loss {record['loss']:.4f}  lr {record['lr']:.2e}"
            f"  grad norm {record['grad_norm']:.3f}  {human(record['tokens_per_second']):>5} tok/s"
            f"  MFU {record['mfu']:.1%}  ETA {eta}",
            soft_wrap=True,
        )

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def stop(self) -> None:
        """Take the progress bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
