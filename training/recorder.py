"""The record of a run: lines of metrics.jsonl and their copies in loggers, samples, the summary, and longer console texts.

Rank 0 alone records; on the other ranks every call returns at once. A full disk does not end a run: a line that cannot be
written is kept in memory, with one warning, and written when there is space again.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch
import torch.distributed as dist

from conf.identity import differences
from conf.load import load
from conf.provenance import provenance
from conf.schema import Config
from conf.shape import Shape
from conf.validate import Batch
from data.batches import Dataset, epochs
from kernels.common.errors import ExitStatus, UserError
from kernels.common.files import problem_of, status_of
from kernels.common.json_files import DOCUMENTS
from kernels.common.text import command_text
from kernels.common.units import duration
from launch.estimate.counts import CONVENTION, flops_per_token
from model.products import describe_products
from training import machine
from training.console import Console
from training.evaluation import HeldOut
from training.loggers import Loggers
from training.peak_speed import PeakSpeed
from training.runfolder import RunFolder, provenances

_OF_ONE_RUN = ("ffn", "run", "resume_from", "resume_optimizer")
EXPECTED_MFU = 0.4  # assumed by the expected time, before anything is measured


class RunRecorder:
    """Records one run. `step` is the last step that is done; every line carries it.

    Args:
        enabled: whether this rank records: rank 0.
    """

    def __init__(
        self,
        config: Config,
        batch: Batch,
        shape: Shape,
        dataset: Dataset,
        folder: RunFolder,
        console: Console,
        enabled: bool,
    ) -> None:
        self.config, self.batch, self.dataset = config, batch, dataset
        self.folder, self.console, self.enabled = folder, console, enabled
        self.step = 0
        self.repeats_evaluation = False  # whether a resumed run evaluates its last step again
        self.bytes_per_token = dataset.bytes_per_token
        self.flops_per_token = sum(flops_per_token(shape, config.sequence_length).values())
        self._last_sample = ""
        self._write_failed = False  # whether the newest line of metrics.jsonl waits for space
        self._loggers: Loggers | None = None
        self._provenance: dict[str, Any] = {}

    def open(self, device: str = "") -> None:
        """Delete what was written after `step`, which will be written again; write the provenance, and start the loggers.

        Args:
            device: description of what is trained on.
        """
        if self.enabled:
            if unreadable := self.folder.rewind(self.step, self.repeats_evaluation):
                self.console.warn(f"{unreadable} line(s) of metrics.jsonl could not be read and were left out")
            self._provenance = provenance(device)
            self.folder.append_provenance(self._provenance)
            self._loggers = Loggers(self.config, self.folder.path, self.console.warn)

    def rewind(self) -> None:
        """Delete what was written after `step` in this session: it will be written again."""
        if self.enabled:
            self.folder.rewind(self.step)

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.step * self.batch.tokens_per_step

    def event(self, event: str, step: int | None = None, **details: Any) -> None:
        """Record an event of the current step, or of an earlier one."""
        self._write_line("event", {"event": event, **details}, step)

    def session(self, event: str, wall_seconds: float, run_id: str) -> None:
        """Record that a session has `started` or `resumed` the run, after `wall_seconds` of earlier ones."""
        self.event(event, world_size=dist.get_world_size(), wall_seconds=wall_seconds, run_id=run_id)

    def saved(self, step: int, **details: Any) -> None:
        """Record that a checkpoint is complete. The run has a name from then on, by which it knows its checkpoints."""
        self.event("saved", step, **details)
        if self.enabled:
            try:
                self.folder.write_run_id()
            except OSError as error:
                self.console.warn(f"the file run_id could not be written: {problem_of(error, self.folder.path)}")

    def training(
        self,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens_per_second: float,
        mfu: float | None,
        memory_gib: float,
        scheduled: Mapping[str, Any],
    ) -> None:
        """Record the steps since the last such line, and print the line of the step.

        Args:
            loss: nats per token, of the last step.
            grad_norm: before clipping.
            lr: the learning rate that was applied.
            tokens_per_second: over all ranks.
            mfu: model FLOPs utilization; None: unknown.
            memory_gib: peak memory of this rank.
            scheduled: the values of formulas' scheduled parameters that were applied, as `Decoder.scheduled` returns them.
        """
        figures: dict[str, float | None] = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "memory_gib": memory_gib,
        }
        self._write_line("train", figures | _named(scheduled))
        self.console.step(self.step, figures)

    def evaluation(self, held_out: HeldOut, dead: list[float | None], scheduled: Mapping[str, Any]) -> None:
        """Record and print an evaluation.

        Args:
            dead: each layer's fraction of units that were active for none of its tokens; empty if that was not measured.
            scheduled: the values of formulas' scheduled parameters, as `Decoder.scheduled` returns them.
        """
        # Before the line that says that this step has been evaluated.
        if self.enabled and held_out.documents is not None:
            try:
                self.folder.write_document_losses(self.step, held_out.documents.as_json())
            except OSError as error:
                self.console.warn(f"{DOCUMENTS} could not be written: {problem_of(error, self.folder.path)}")
        bits = None if self.dataset.why_no_bits else held_out.bits_per_byte(self.bytes_per_token)
        figures: dict[str, Any] = {
            "loss": held_out.loss,
            "perplexity": held_out.perplexity,
            "held_out_tokens": held_out.tokens,
        }
        if bits is not None:
            figures["bits_per_byte"] = bits
        if dead:
            figures["dead"] = dead
        self._write_line("eval", figures | _named(scheduled))
        partial = "" if held_out.tokens == self.dataset.held_out.tokens else f" (on {held_out.tokens} tokens)"
        per_byte = "" if bits is None else f", {bits:.4f} bits per byte"
        self.console.print(
            f"held-out: loss {held_out.loss:.4f}, perplexity {held_out.perplexity:.2f}{per_byte}{partial}"
        )

    def telemetry(self, step: int, figures: dict[str, Any]) -> None:
        """Record an activation telemetry sample of the current step or of an earlier one."""
        self._write_line("telemetry", figures, step)

    def samples(self, texts: list[str]) -> None:
        """Append generated texts to samples.txt."""
        if self.enabled and texts:
            rule = "-" * 80
            try:
                self.folder.append_samples("".join(f"{rule}\nstep {self.step}\n{rule}\n{text}\n" for text in texts))
            except OSError as error:
                self.console.warn(f"samples.txt could not be written: {problem_of(error, self.folder.path)}")
        self._last_sample = texts[-1] if texts else ""

    def close(self, summary: dict[str, Any]) -> int:
        """Write the summary and close the loggers; return 0 if everything is on disk, else the exit status of the run."""
        if not self.enabled:
            return ExitStatus.DONE
        status, summary = ExitStatus.DONE, {**summary, "provenance": self._provenance}
        writes = {
            "the last metrics": self.folder.metrics.sync,
            "the summary": lambda: self.folder.write_summary(summary),
        }
        for what, write in writes.items():
            try:
                write()
            except OSError as error:
                status = status_of(error)
                lost = self.folder.metrics.unwritten if what == "the last metrics" else ""
                self.console.warn(f"{what} could not be written: {problem_of(error, self.folder.path)}{lost}")
        if self._loggers is not None:
            self._loggers.finish(summary)
        return status

    def print_end(self, summary: dict[str, Any], prompts: list[str]) -> None:
        """Print the last lines of a run that finished; `prompts` are those of its samples."""
        console, config, path = self.console, self.config, self.folder.path
        console.print("")
        console.print(f"finished in {duration(summary['wall_seconds'])} after {summary['tokens']:,} tokens")
        xz = summary["xz_bits_per_byte"]
        console.print(
            held_out_line(summary) + (f"; xz -9 on the same text: {xz:.4f}" if xz and summary["bits_per_byte"] else "")
        )
        if self._last_sample:
            console.print(f"a sample:\n{self._last_sample}\n", wrap=False)
        console.print(f"run folder: {path}/ (config.yaml metrics.jsonl summary.json checkpoints/ samples.txt)")
        for note in self._loggers.notes if self._loggers is not None else ():
            console.print(note)
        runs = "" if config.runs == "runs" else f" runs={shlex.quote(config.runs)}"
        prompt = shlex.quote(prompts[0].splitlines()[0]) if prompts and prompts[0].strip() else "'The '"
        name = shlex.quote(str(config.run))
        console.print("next steps:")
        console.print(f"  python -m model.generate run={name}{runs} prompt={prompt}", wrap=False)
        if command := self._with_another_arm():
            console.print(f"  {command}   # another arm, as many FFN parameters", wrap=False)
        console.print("  python train.py --help")

    def _with_another_arm(self) -> str:
        """Return the command that began the run, with another arm; "" if the two runs would differ by more than that.

        The command does not tell all of a run that a swap or an import has written, and a width that is typed fits one arm.
        """
        [first, *_] = provenances(self.folder.path) or [{}]
        began: list[str] = []
        with contextlib.suppress(ValueError):  # of a command that was damaged
            began = shlex.split(first.get("command") or "")
        typed = [word for word in began if "=" in word and not word.startswith("-")]
        kept = [word for word in typed if re.split("[.=]", word.lstrip("+~"))[0] not in _OF_ONE_RUN]
        if not any(PurePath(word).name == "train.py" for word in began) or any("model.d_ff=" in word for word in kept):
            return ""
        try:
            changed = differences(load(kept), self.config)
        except UserError:
            return ""
        if any(not line.startswith("ffn.") for line in changed):
            return ""
        other = "relu2" if self.config.ffn.name != "relu2" else "swiglu"
        return command_text(["deepspeed", "train.py", f"ffn={other}", *kept])

    def summary_rows(
        self, device: torch.device, dtype: torch.dtype, attention: str, peak: PeakSpeed, ranks: int
    ) -> list[tuple[str, str]]:
        """Return the rows of the console's summary about data and machine: (name, text).

        Args:
            peak: of a rank.
            ranks: the world size.
        """
        dataset, config, parallel = self.dataset, self.config, self.config.parallel
        tokens = sum(part.train.tokens for part in dataset.parts)
        of_part = epochs(dataset, config.sequence_length, self.batch.steps * self.batch.global_batch)
        repeated = [
            f"{number:.1f} epochs{f' of {name}' if len(of_part) > 1 else ''}" for name, number in of_part.items()
        ]
        held_out = f"{dataset.held_out.tokens:,} held out" if dataset.held_out.tokens else "none held out"
        corpus = f"{tokens:,} training tokens ({', '.join(repeated)}), {held_out}"
        masters = " with fp32 master weights" if dtype == torch.bfloat16 else ""
        products = describe_products(config.precision)
        numbers = f"{str(dtype).removeprefix('torch.')}{masters}{products}, ZeRO stage {config.zero.stage}"
        rows = [
            ("data", f"{config.data.name}: {corpus}, {self.bytes_per_token:.2f} bytes per token"),
            ("machine", f"{machine.describe(device)} x {ranks}, {numbers}"),
        ]
        axes = []
        if parallel.tensor > 1:
            axes.append(f"tensor {parallel.tensor}{' with sequence' if parallel.sequence else ''}")
        if parallel.context > 1:
            axes.append(f"context {parallel.context}")
        if axes:
            rows.append(("parallel", " x ".join([*axes, f"data {self.batch.data_parallel}"])))
        expected_seconds = self.batch.tokens * self.flops_per_token / (EXPECTED_MFU * peak.flops * ranks)
        return [
            *rows,
            ("optimizer", f"{config.optim.name}, peak lr {config.optim.lr:g}, {config.schedule.name}"),
            ("attention", attention),
            ("peak", f"{peak.flops / 1e12:.3g} TFLOP/s per rank ({peak.source}); MFU: {CONVENTION}"),
            ("expected time", f"about {duration(expected_seconds)} at {EXPECTED_MFU:.0%} MFU"),
        ]

    def _write_line(self, kind: str, figures: dict[str, Any], step: int | None = None) -> None:
        """Write a line of metrics.jsonl and pass it to the loggers."""
        if not self.enabled:
            return
        step = self.step if step is None else step
        record = {"kind": kind, "step": step, "tokens": step * self.batch.tokens_per_step, **figures}
        try:
            self.folder.metrics.append(record)
            self._write_failed = False
        except OSError as error:
            if not self._write_failed:
                problem = problem_of(error, self.folder.path)
                self.console.warn(f"metrics.jsonl cannot be written; its lines are kept in memory: {problem}")
            self._write_failed = True
        if self._loggers is not None:
            self._loggers.log(record)


def _named(scheduled: Mapping[str, Any]) -> dict[str, Any]:
    return {f"scheduled.{name}": value for name, value in scheduled.items()}


def held_out_line(summary: dict[str, Any]) -> str:
    """Return the held-out figures of a summary as one line."""
    if summary["final_eval_loss"] is None:
        return "held-out text: none, the run was trained without evaluation"
    if summary["bits_per_byte"] is None:
        reason = f"bits per byte are withheld: {summary.get('bits_per_byte_withheld')}"
        return f"held-out text: {summary['final_eval_loss']:.4f} nats per token; {reason}"
    return (
        f"held-out text: {summary['bits_per_byte']:.4f} bits per byte ({summary['final_eval_loss']:.4f} nats per token)"
    )
