"""A run, from its first line to its last: check, prepare, build, resume, train, evaluate, save, sum up.

Everything that a user can have got wrong is found before the ranks join. Ranks then take the same decisions: they stop after
the same step, and all take part in every save and evaluation.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.errors import UserError
from conf.files import say_why
from conf.schema import Config
from conf.validate import Batch, config_hash, validate
from data.batches import BatchStream, Dataset, open_dataset, sample_hash
from data.prepare import prepare
from launch.estimate.counts import Shape, check_divisibility, parameters, shape_of
from launch.launchers import Launchers
from launch.ranks import Ranks
from model.attention import choose
from model.decoder import Decoder
from model.feed_forward import check_arms
from model.generate import generate
from model.weights import CheckpointReader, check_shapes, newest_intact
from training import machine
from training.console import Console
from training.evaluation import HeldOut, evaluate
from training.report import Report, held_out_line
from training.runfolder import RunFolder
from training.schedule import rate
from training.signals import StopRequest

MOST_SKIPPED = 20  # steps in a row without a finite gradient: the run has diverged


def train(config: Config, ranks: Ranks, launchers: Launchers) -> int:
    """Train, and return the exit status: 0 when the run finished or was stopped by a signal and saved, 1 when it failed.

    Raises:
        UserError: bad input, found before any process group exists.
    """
    started = time.monotonic()
    batch = validate(config, ranks.world_size)
    console = Console(speaks=ranks.rank == 0)
    device = machine.find_device(ranks)
    dtype = machine.find_dtype(config, device)
    attention = choose(config.model.attention, device, dtype, config.sequence_length)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    folder = RunFolder(config)
    if ranks.rank == 0:
        folder.claim(config)
    try:
        dataset = open_dataset(prepare(config.data, config.tokenizer, show=ranks.rank == 0))
        shape = _shape(config, dataset)
        for sentence in check_arms(shape.ffn, device, dtype, statistics=bool(config.telemetry_every)):
            console.warn(sentence)
        resumed, passed_over = newest_intact(folder.checkpoints)
        for sentence in passed_over:
            console.warn(sentence)
        if resumed:
            _check_checkpoint(resumed, dataset, shape, config)
            # One killed between its last checkpoint and its summary still has to be summed up.
            done = CheckpointReader(resumed).state["step"] >= batch.steps
            if done and folder.read_summary().get("status") == "finished":
                return _already_finished(console, folder, batch)
        report = Report(config, batch, shape, dataset, folder, console, speaks=ranks.rank == 0)
        run = _Run(config, batch, ranks, folder, dataset, report)
        run.build(shape, device, dtype, attention)
        if resumed:
            run.resume(resumed)
        if ranks.rank == 0:
            _copy_tokenizer(dataset, folder.path)
        report.open()
        peak, peak_from = machine.peak_flops(device, dtype)
        if resumed:
            console.say(f"going on with {folder.path} after step {run.step} of {batch.steps}")
        else:
            console.summary(
                config, shape, batch, report.rows(device, dtype, attention, peak, peak_from, ranks.world_size)
            )
        event = "resumed" if resumed else "started"
        report.event(event, world_size=ranks.world_size, wall_seconds=run.trained_seconds)
        return run.go(peak, launchers, started)
    finally:
        console.stop()
        folder.close()


class _Run:
    """The state of a run while it trains. `step` steps are done, and `batches_hash` is the hash of this data rank's samples."""

    def __init__(
        self, config: Config, batch: Batch, ranks: Ranks, folder: RunFolder, dataset: Dataset, report: Report
    ) -> None:
        self.config, self.batch, self.ranks = config, batch, ranks
        self.folder, self.dataset, self.report, self.console = folder, dataset, report, report.console
        self.stream = BatchStream(dataset, config.sequence_length, config.data_seed)
        self.step, self.batches_hash = 0, 0
        self.trained_seconds = 0.0  # wall-clock of this run's earlier sittings
        self.last_eval: HeldOut | None = None
        self.evaluation_missed = False  # the sitting before stopped at a step whose evaluation was due
        self.save_failed = ""  # why the newest checkpoint could not be saved, the same on every rank

    def build(self, shape: Shape, device: torch.device, dtype: torch.dtype, attention: str) -> None:
        """Join the ranks and make the engine."""
        from training.checkpoint import Exchange, Saver
        from training.engine import Engine, join_mesh, send_deepspeed_log_to, start_process_group
        from training.telemetry import Telemetry

        self.shape = shape
        start_process_group(self.ranks, device, self.config.parallel.timeout_minutes)
        document_start = self.dataset.eos_id if self.config.model.mask_documents else None
        with self.folder.quiet():
            self.mesh = join_mesh(self.config.parallel)
            self.engine = Engine(self.config, self.batch, shape, device, dtype, attention, document_start, self.mesh)
            send_deepspeed_log_to(self.folder.path / "deepspeed.log")
        exchange = Exchange()
        self.saver = Saver(self.engine, self.folder.checkpoints, exchange, self.config.keep_last)
        self.telemetry = Telemetry(self.engine, self.config.telemetry_every, self.config.telemetry_window)

    def resume(self, path: Path) -> None:
        """Take up weights, optimizer and counters from a checkpoint."""
        from training import checkpoint

        state = checkpoint.load(self.engine, path)
        self.step = self.report.step = state["step"]
        self.batches_hash = state["batches_hash"] if self.mesh.data.rank == 0 else 0
        self.trained_seconds = state["wall_seconds"]
        self.evaluation_missed = state["evaluation_missed"]
        if state["eval_loss"] is not None:
            self.last_eval = HeldOut(state["eval_loss"], self.dataset.held_out.tokens)

    def go(self, peak: float, launchers: Launchers, launched: float) -> int:
        """Train to the end, or to a signal, and sum up; return the exit status."""
        self.started = time.monotonic()
        try:
            status = self._train(peak, launchers, launched)
        except BaseException:
            self._finish("failed")
            raise
        self.console.stop()
        return self._finish(status)

    def _train(self, peak: float, launchers: Launchers, launched: float) -> str:
        """Train to the last step, or to a signal; return the status."""
        config, batch, world_size, data = self.config, self.batch, self.ranks.world_size, self.mesh.data
        per_rank = batch.global_batch // data.size
        self.console.start(self.step, batch.steps)
        if self.step >= batch.steps and self.last_eval is None:
            self._evaluate(None)
        elif self.evaluation_missed:
            self._evaluate(config.eval_tokens)
        skipped = 0
        clock, clock_step, clock_pause = time.perf_counter(), self.step, 0.0
        with StopRequest(launchers) as stop:
            while self.step < batch.steps:
                first = self.step * batch.global_batch + data.rank * per_rank
                rows = self.stream.samples(first, per_rank)
                self.batches_hash = (self.batches_hash + sample_hash(first, rows)) % 2**64
                tokens = torch.from_numpy(rows).to(self.engine.device)
                share = rate(config.schedule, self.step, batch.steps)
                loss, norm, applied = self.engine.train_step(tokens, share, self.telemetry.of(self.step + 1))
                self._tell()  # of a step before, by now reduced
                self._saved()
                self.step = self.report.step = self.step + 1
                self.telemetry.reduce(self.step, batch.tokens_per_step)
                if self.step == 1:
                    self.report.event("first_step", seconds_since_start=time.monotonic() - launched)
                skipped = 0 if applied else skipped + 1
                if not applied:
                    self.report.event("skipped_step", grad_norm=float(norm))
                    self.console.warn(f"step {self.step} had a gradient that is not finite and was skipped")
                    if skipped >= MOST_SKIPPED:
                        self.report.event("diverged", skipped=skipped)
                        raise RuntimeError(
                            f"{MOST_SKIPPED} steps in a row had no finite gradient: the run has diverged"
                        )
                last = self.step == batch.steps
                if self.step % config.log_every == 0 or last:
                    dist.all_reduce(loss)
                    seconds = time.perf_counter() - clock - clock_pause
                    speed = (self.step - clock_step) * batch.tokens_per_step / max(seconds, 1e-9)
                    lr, memory = config.optim.lr * share, machine.memory_gib(self.engine.device)
                    self.report.train(float(loss) / world_size, float(norm), lr, speed, peak * world_size, memory)
                    clock, clock_step, clock_pause = time.perf_counter(), self.step, 0.0
                self.console.advance(self.step)
                pause = time.perf_counter()
                reason = stop.agreed()
                self._periodic(last, bool(reason))
                clock_pause += time.perf_counter() - pause
                if reason and not last:
                    from_here = "" if self.save_failed else "; the same command goes on from here"
                    self.console.say(f"{reason}: stopped after step {self.step}{from_here}")
                    return "stopped"
        return "finished"

    def _periodic(self, last: bool, stopping: bool) -> None:
        """Evaluate, sample and save where this step asks for it. A run that is stopping saves at once, and no more."""
        config = self.config
        due = lambda every: bool(every) and self.step % every == 0  # noqa: E731
        held_out = None
        self.evaluation_missed = due(config.eval_every) and stopping and not last
        if last or (due(config.eval_every) and not stopping):
            some, every = config.eval_tokens, self.dataset.held_out.tokens
            if last and config.eval_every and some is not None and some < every:
                self._evaluate(some)  # the end of the curve, on the tokens of its other points
            held_out = self._evaluate(None if last else config.eval_tokens)
        if (last or due(config.sample_every)) and not stopping:
            self._sample()
        if last or stopping or due(config.save_every):
            self._save(held_out)
        if last or stopping:
            self._saved(wait=True)

    def _evaluate(self, tokens: int | None) -> HeldOut:
        # All of it, then all units can be judged by it.
        with self.telemetry.dead_units() if tokens is None else contextlib.nullcontext([]) as dead:
            held_out = self.last_eval = evaluate(self.engine, self.dataset, self.config.sequence_length, tokens)
        self.report.held_out(held_out, dead)
        return held_out

    def _tell(self) -> None:
        """Report what was seen inside the layers, if a look at them is not told of yet."""
        if (seen := self.telemetry.finished()) is not None:
            self.report.telemetry(*seen)

    def _sample(self) -> None:
        texts = []
        for prompt in self.config.prompts:
            arguments = (self.dataset.tokenizer, self.shape.n_layers, prompt, self.config.sample_tokens)
            with torch.no_grad():
                texts.append(generate(self.engine.logits, *arguments, device=self.engine.device))
        self.report.samples(texts)

    def _save(self, held_out: HeldOut | None) -> None:
        self._tell()  # a run that goes on from here would not
        self._saved(wait=True)
        whole = held_out is not None and held_out.tokens == self.dataset.held_out.tokens
        state = {
            "step": self.step,
            "samples": self.step * self.batch.global_batch,
            "tokens": self.report.tokens,
            "batches_hash": self._whole_hash(),
            "corpus_hash": self.dataset.corpus_hash,
            "tokenizer_hash": self.dataset.tokenizer.hash,
            "eval_loss": held_out.loss if whole else None,
            "evaluation_missed": self.evaluation_missed,
            "wall_seconds": self._wall(),
        }
        self.saver.begin(state)

    def _saved(self, wait: bool = False) -> None:
        """Tell how the last save ended, if it has ended. One that failed costs nothing that was saved before."""
        saved = self.saver.ended(wait)
        if saved is None:
            return
        self.save_failed = saved.failure
        if saved.failure:
            self.console.warn(f"the checkpoint of step {saved.step} could not be saved: {saved.failure}")
            self.report.event("save_failed", saved.step, path=saved.path.name, reason=saved.failure)
        else:
            seconds = {"seconds": saved.seconds, "waited_seconds": saved.waited_seconds}
            self.report.event("saved", saved.step, path=saved.path.name, **seconds)
        if saved.warning:
            self.console.warn(f"older checkpoints could not be removed: {saved.warning}")

    def _finish(self, status: str) -> int:
        """Write the summary, close the mirrors, and tell the end; return the exit status."""
        together = status != "failed"  # an exception may be this rank's alone: no collective is safe after it
        if together:
            status = "failed" if self.save_failed else status
            dist.barrier()
        counts = parameters(self.shape)
        final = self.last_eval if status == "finished" else None
        summary = {
            "status": status,
            "final_eval_loss": final.loss if final else None,
            "bits_per_byte": final.bits_per_byte(self.report.bytes_per_token) if final else None,
            "xz_bits_per_byte": self.dataset.xz_bits_per_byte,
            "parameters": sum(counts.values()),
            "vocab_size": self.shape.vocab_size,
            "ffn_parameters": counts["ffn"],
            "flops_per_token": self.report.flops_per_token,
            "data_order_hash": f"{self._whole_hash():016x}" if together else None,
            "config_hash": config_hash(self.config),
            "steps": self.step,
            "tokens": self.report.tokens,
            "wall_seconds": self._wall(),
        }
        written = self.report.close(summary)
        if self.ranks.rank == 0 and status == "finished":
            self.report.end(summary)
        if together:
            written = self._from_rank_0(written)
            dist.barrier()
            dist.destroy_process_group()
        return 1 if status == "failed" or not written else 0

    def _wall(self) -> float:
        return self.trained_seconds + time.monotonic() - self.started

    def _whole_hash(self) -> int:
        """Return the hash of all samples so far, over all data ranks. Collective."""
        parts: list[int | None] = [None] * self.ranks.world_size
        counts = self.mesh.tensor.rank == self.mesh.context.rank == 0  # the others have the same samples
        dist.all_gather_object(parts, self.batches_hash if counts else 0)
        return sum(parts) % 2**64  # type: ignore[arg-type]

    def _from_rank_0(self, value: Any) -> Any:
        """Return what rank 0 passed. Collective."""
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]


def _shape(config: Config, dataset: Dataset) -> Shape:
    if config.model.vocab_size and config.model.vocab_size < dataset.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is less than the tokenizer's {dataset.vocab_size} pieces"
        )
    shape = shape_of(config, dataset.vocab_size)
    check_divisibility(shape, config.parallel)
    return shape


def _check_checkpoint(path: Path, dataset: Dataset, shape: Shape, config: Config) -> None:
    """Refuse a checkpoint of another model or of other text, before the ranks join."""
    reader = CheckpointReader(path)
    with torch.device("meta"):
        check_shapes(Decoder(shape, config.model, "sdpa"), reader)
    if reader.state["tokenizer_hash"] != dataset.tokenizer.hash:
        raise UserError(f"{path} was trained with another tokenizer than the one in {dataset.folder}")
    if reader.state["corpus_hash"] not in (None, dataset.corpus_hash):  # None: imported, trained on nothing here
        raise UserError(
            f"{path} was trained on other text than what is in {dataset.folder}: give this run a name (run=NAME)"
        )


def _already_finished(console: Console, folder: RunFolder, batch: Batch) -> int:
    summary = folder.read_summary()
    console.say(f"{folder.path} has finished its {batch.steps} steps: there is nothing to do")
    if summary.get("bits_per_byte"):
        console.say(held_out_line(summary))
    console.say("give another one a name (run=NAME), or override something: python train.py --help")
    return 0


def _copy_tokenizer(dataset: Dataset, run: Path) -> None:
    """Keep the tokenizer beside the weights, so that a run folder can be moved and still write text."""
    target = run / "tokenizer"
    if not target.exists():
        with say_why("write to the run folder", run):
            partial = run / ".tokenizer.tmp"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            dataset.tokenizer.save(partial)
            partial.rename(target)
