"""What a run tells of itself: lines of metrics.jsonl, their mirrors, samples, the summary, and the console's longer texts.

Rank 0 alone tells; on the other ranks every call returns at once. Nothing here can end a run: a line that a full disk refuses
is said once, kept, and written when there is room again.
"""

from __future__ import annotations

from typing import Any

import torch

from conf.schema import Config
from conf.validate import Batch
from data.batches import Dataset
from launch.estimate.counts import Shape, flops_per_token
from training import machine
from training.console import Console, duration
from training.evaluation import HeldOut
from training.loggers import Mirrors
from training.runfolder import RunFolder


class Report:
    """The voice of one run. `step` is the last step that is done; every line carries it."""

    def __init__(
        self,
        config: Config,
        batch: Batch,
        shape: Shape,
        dataset: Dataset,
        folder: RunFolder,
        console: Console,
        speaks: bool,
    ) -> None:
        self.config, self.batch, self.dataset = config, batch, dataset
        self.folder, self.console, self.speaks = folder, console, speaks
        self.step = 0
        self.bytes_per_token = dataset.held_out_bytes / max(1, dataset.held_out.tokens)
        self.flops_per_token = sum(flops_per_token(shape, config.sequence_length).values())
        self.last_sample = ""
        self._unwritten = False
        self._mirrors: Mirrors | None = None

    def open(self) -> None:
        """Drop what was written after `step`, which is going to be written again, and start the mirrors."""
        if self.speaks:
            self.folder.rewind(self.step)
            self._mirrors = Mirrors(self.config, self.folder.path, self.console.warn)

    @property
    def tokens(self) -> int:
        return self.step * self.batch.tokens_per_step

    def event(self, event: str, step: int | None = None, **details: Any) -> None:
        """Tell of something that happened in or after a step: this one, or an earlier one."""
        self._line("event", step, event=event, **details)

    def train(
        self, loss: float, grad_norm: float, lr: float, tokens_per_second: float, peak: float, memory: float
    ) -> None:
        """Tell of the steps since the last such line.

        Args:
            loss: nats a token, of the last step.
            grad_norm: before clipping.
            lr: the rate that was applied.
            tokens_per_second: over all ranks.
            peak: FLOP/s of all ranks together.
            memory: GiB.
        """
        figures = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self.flops_per_token / peak,
            "memory_gib": memory,
        }
        self._line("train", **figures)
        self.console.step(self.step, self.batch.steps, figures)

    def held_out(self, held_out: HeldOut, dead: list[float | None]) -> None:
        """Tell of an evaluation; `dead` has each layer's share of units that none of it made active, or is empty."""
        bits = held_out.bits_per_byte(self.bytes_per_token)
        figures = {"loss": held_out.loss, "perplexity": held_out.perplexity, "bits_per_byte": bits}
        self._line("eval", **figures, held_out_tokens=held_out.tokens, **({"dead": dead} if dead else {}))
        part = "" if held_out.tokens == self.dataset.held_out.tokens else f" (on {held_out.tokens} tokens)"
        self.console.say(
            f"held-out: loss {held_out.loss:.4f} nats a token, perplexity {held_out.perplexity:.2f}, "
            f"{bits:.4f} bits a byte{part}"
        )

    def telemetry(self, step: int, figures: dict[str, Any]) -> None:
        """Tell what was seen inside the layers in a step that may be an earlier one."""
        self._line("telemetry", step, **figures)

    def samples(self, texts: list[str]) -> None:
        """Add texts that the model wrote to samples.txt."""
        if self.speaks and texts:
            rule = "-" * 80
            try:
                self.folder.append_samples("".join(f"{rule}\nstep {self.step}\n{rule}\n{text}\n" for text in texts))
            except OSError as error:
                self.console.warn(f"samples.txt could not be written: {error}")
        self.last_sample = texts[-1] if texts else ""

    def close(self, summary: dict[str, Any]) -> bool:
        """Write the summary and close the mirrors; return whether everything is on the disk."""
        if not self.speaks:
            return True
        written = True
        try:
            self.folder.write_metrics()
            self.folder.write_summary(summary)
        except OSError as error:
            written = False
            self.console.warn(f"the end of the run could not be written: {error}")
        if self._mirrors is not None:
            self._mirrors.finish(summary)
        return written

    def end(self, summary: dict[str, Any]) -> None:
        """Print the last lines of a run that finished."""
        console, config, path = self.console, self.config, self.folder.path
        console.say("")
        console.say(f"finished in {duration(summary['wall_seconds'])} after {summary['tokens']:,} tokens")
        xz = summary["xz_bits_per_byte"]
        console.say(held_out_line(summary) + (f"; xz -9 on the same text: {xz:.4f}" if xz else ""))
        if self.last_sample:
            console.say(f"a sample:\n{self.last_sample}\n")
        console.say(f"everything is in {path}/: config.yaml metrics.jsonl summary.json checkpoints/ samples.txt")
        for note in self._mirrors.notes if self._mirrors is not None else ():
            console.say(note)
        runs = "" if config.runs == "runs" else f" runs={config.runs}"
        console.say("go on with")
        console.say(f"  python -m model.generate run={config.run}{runs} prompt='import '")
        console.say("  deepspeed train.py ffn=relu2          # another arm, the same FFN parameters")
        console.say("  python train.py --help")

    def rows(
        self, device: torch.device, dtype: torch.dtype, attention: str, peak: float, peak_from: str, ranks: int
    ) -> list:
        """Return the rows of the summary before the first step that tell of data and machine: (name, text)."""
        dataset, config = self.dataset, self.config
        tokens = sum(part.train.tokens for part in dataset.parts)
        epochs = self.batch.tokens / max(1, tokens)
        corpus = f"{tokens:,} tokens to train on ({epochs:.1f} epochs), {dataset.held_out.tokens:,} held out"
        masters = " with fp32 master weights" if dtype == torch.bfloat16 else ""
        numbers = f"{str(dtype).removeprefix('torch.')}{masters}, ZeRO stage {config.zero.stage}"
        shares = config.parallel
        ways = [f"tensor {shares.tensor}{' with sequence' if shares.sequence else ''}"] if shares.tensor > 1 else []
        ways += [f"context {shares.context}"] if shares.context > 1 else []
        expected = self.batch.tokens * self.flops_per_token / (0.4 * peak * ranks)
        return [
            ("data", f"{config.data.name}: {corpus}, {self.bytes_per_token:.2f} bytes a token"),
            ("machine", f"{machine.describe(device)} x {ranks}, {numbers}"),
            *([("parallel", " x ".join([*ways, f"data {self.batch.data_parallel}"]))] if ways else []),
            ("optimizer", f"{config.optim.name}, peak rate {config.optim.lr:g}, {config.schedule.name}"),
            ("attention", attention),
            ("peak", f"{peak / 1e12:.3g} TFLOP/s a rank ({peak_from})"),
            ("expected time", f"about {duration(expected)} at 40% of peak"),
        ]

    def _line(self, kind: str, step: int | None = None, **figures: Any) -> None:
        if not self.speaks:
            return
        step = self.step if step is None else step
        record = {"kind": kind, "step": step, "tokens": step * self.batch.tokens_per_step} | figures
        try:
            self.folder.append_metrics(record)
            self._unwritten = False
        except OSError as error:
            if not self._unwritten:
                self.console.warn(f"metrics.jsonl cannot be written, its lines are kept in memory: {error}")
            self._unwritten = True
        if self._mirrors is not None:
            self._mirrors.log(record)


def held_out_line(summary: dict[str, Any]) -> str:
    """Return the held-out figures of a summary as one line."""
    return f"held-out text: {summary['bits_per_byte']:.4f} bits a byte ({summary['final_eval_loss']:.4f} nats a token)"
