"""The training loop: train, evaluate, sample and save until the last step or a signal, then write the summary.

The ranks take the same decisions: they stop after the same step, and all of them take part in every save and evaluation.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from conf.identity import config_hash, settings_of
from conf.schema import Config
from conf.shape import Shape
from conf.validate import Batch
from data.batches import BatchStream, Dataset, sample_hash
from data.ranges import SampleRanges
from launch.endings import SessionEnding, write_ending
from launch.estimate.counts import parameters
from launch.launchers import Launchers
from launch.ranks import Ranks
from model.generate import generate
from model.health import Inspector
from model.weights import step_of
from training import machine, watchdog
from training.evaluation import HeldOut, evaluate
from training.guard import Guard
from training.peak_speed import PeakSpeed
from training.profiler import StepProfiler, copy_bandwidth, floors, part
from training.prompts import prompts_of
from training.recorder import RunRecorder
from training.resume import dtype_change
from training.rewind import course_of
from training.runfolder import RunFolder
from training.saves import Saves
from training.schedule import lr_scale, warmup_steps
from training.signals import DIVERGED, StopRequest
from training.throughput import Throughput

if TYPE_CHECKING:
    from training.engine import Engine


class TrainingLoop:
    """One session of a run, from its start or a checkpoint to the last step or a signal.

    `step` steps are done; `batches_hash` is the hash of this data rank's samples.
    """

    def __init__(
        self,
        config: Config,
        batch: Batch,
        ranks: Ranks,
        folder: RunFolder,
        dataset: Dataset,
        stream: BatchStream,
        shape: Shape,
        recorder: RunRecorder,
        engine: Engine,
        run_id: str,
        inspector: Inspector,
    ) -> None:
        # These import DeepSpeed, which takes seconds: bad input is refused before that.
        from training.checkpoint import CheckpointCollectives, Saver
        from training.telemetry import Telemetry

        self.config, self.batch, self.ranks, self.shape = config, batch, ranks, shape
        self.dataset, self.stream, self.recorder, self.console = dataset, stream, recorder, recorder.console
        self.engine, self.mesh = engine, engine.mesh
        self.run_id, self.settings = run_id, settings_of(config)
        self.inspector = inspector
        self.saver = Saver(engine, folder.checkpoints, CheckpointCollectives(), config.keep_last, inspector)
        self.saves = Saves(self.saver, recorder)
        self.telemetry = Telemetry(engine, config.telemetry_every, config.telemetry_window)
        self.profiler = StepProfiler(config.profile, folder.path, engine.device, ranks.rank == 0)
        self.step, self.batches_hash = 0, 0
        self.prompts = prompts_of(config, dataset)
        self.warmup_steps = warmup_steps(config.schedule, batch.steps)
        settle = functools.partial(self.saves.record, wait=True)
        self.guard = Guard(config, engine, stream, recorder, folder.checkpoints, batch.global_batch, settle)
        self.course = course_of(config)
        self.last_loss: torch.Tensor = torch.zeros(())  # of this rank
        self.last_norm: torch.Tensor | float = 0.0
        self.session_started = time.monotonic()
        self.earlier_seconds = 0.0  # wall-clock time of the run's earlier sessions
        self.last_eval: HeldOut | None = None
        self.evaluation_missed = False  # the previous session stopped at a step whose evaluation was due

    def resume(self, path: Path, previous_steps: int | None) -> None:
        """Load weights, optimizer state and counters from a checkpoint. Collective.

        Args:
            previous_steps: length of the run before this session, where the checkpoint does not know it.
        """
        from training import checkpoint

        watchdog.beat("load", 0)
        state = checkpoint.load(self.engine, path)
        self.step = self.recorder.step = state["step"]
        self.batches_hash = state["batches_hash"] if self.mesh.data.rank == 0 else 0
        self.earlier_seconds = state["wall_seconds"]
        self.evaluation_missed = state["evaluation_missed"]
        self.course = self.course or state.get("course")
        self.guard.spikes.load(state.get("spikes"))
        recorded = SampleRanges.of(state.get("skipped_samples", []))
        self.stream.skipped = recorded.extended(self.stream.skipped, self.step * self.batch.global_batch)
        if self.step >= self.batch.steps:  # the last step is saved before it is evaluated
            tokens = self.dataset.held_out.tokens
            recorded = self.recorder.folder.metrics.recorded_loss(self.step, tokens) if self.ranks.rank == 0 else None
            loss = self._broadcast(state["eval_loss"] if recorded is None else recorded)
            self.last_eval = None if loss is None else HeldOut(loss, tokens)
            self.recorder.repeats_evaluation = loss is None
        self.console.print(f"resuming {self.recorder.folder.path} after step {self.step} of {self.batch.steps}")
        if changed := dtype_change(state, self.engine.dtype):
            self.console.warn(changed)
        self._change_length(state.get("steps") or previous_steps, state.get("warmup_steps"))

    def _change_length(self, before: int | None, warmup: int | None) -> None:
        """Go on with a run that was to have `before` steps: do not warm up again, and report both learning rates."""
        schedule, steps = self.config.schedule, self.batch.steps
        if not self.step or before is None:
            return
        warmup = warmup_steps(schedule, before) if warmup is None else warmup
        self.warmup_steps = min(warmup, self.warmup_steps)
        if before == steps:
            return
        last = lr_scale(schedule, self.step - 1, before, warmup)
        following = lr_scale(schedule, self.step, steps, self.warmup_steps)
        report = self.console.print if math.isclose(last, following, rel_tol=0.01) else self.console.warn
        report(
            f"the length was changed from {before} to {steps} steps: the learning rate was {self.config.optim.lr * last:.3g} "
            f"at step {self.step} and is {self.config.optim.lr * following:.3g} at step {self.step + 1}"
        )
        for name, p in {n: p for layer in self.shape.ffn for n, p in layer.formula.scheduled.items()}.items():
            was, now = p.value(self.step, before), p.value(self.step, steps)
            if was != now:
                self.console.warn(
                    f"the scheduled parameter {name} was {was:.3g} after step {self.step} and is {now:.3g} now: its schedule "
                    "follows the length of the run unless its start and steps are whole numbers"
                )

    def run(self, peak: PeakSpeed, launchers: Launchers, launched_at: float) -> int:
        """Train to the last step or to a signal, and write the summary; return the exit status.

        Args:
            peak: of this rank.
            launched_at: time.monotonic() when the command started.
        """
        self.session_started = time.monotonic()
        try:
            status = self._train(peak, launchers, launched_at)
        except BaseException:
            watchdog.beat("finish", self.step)
            self.saves.complete()
            self._finish("failed")
            raise
        watchdog.beat("finish", self.step)
        self.console.stop()
        return self._finish(status)

    def _train(self, peak: PeakSpeed, launchers: Launchers, launched_at: float) -> str:
        """Train to the last step or to a signal; return the status."""
        config, batch = self.config, self.batch
        self.console.start(self.step, batch.steps, config.log_seconds)
        if self.step >= batch.steps:  # the previous session ended between its last checkpoint and its summary
            if self.last_eval is None:
                self._evaluate_last()
            self._sample()
        elif self.evaluation_missed:
            self._evaluate(config.eval_tokens)
        if config.profile and self.ranks.rank == 0:
            device, bf16 = self.engine.device, self.engine.dtype == torch.bfloat16
            on_gpu, dp_cp = device.type == "cuda", self.mesh.data_context.size
            speeds = (peak.flops, copy_bandwidth(device))
            self.profiler.floors = floors(config, self.shape, batch, dp_cp, bf16, *speeds, on_gpu)
        throughput, phase = Throughput(self.step), "first step"
        with StopRequest(launchers) as stop:
            while self.step < batch.steps:
                watchdog.beat(phase, self.step)
                phase = "step"
                scale = lr_scale(config.schedule, self.step, batch.steps, self.warmup_steps)
                self.profiler.before(self.step + 1)
                loss, grad_norm = self._train_step(scale)
                with throughput.paused():
                    self._end_profile()
                if self.guard.must_rewind(loss, grad_norm) and self._rewind():
                    throughput.restart(self.step)
                    continue
                if self.step == 1:
                    self.recorder.event("first_step", seconds_since_start=time.monotonic() - launched_at)
                last = self.step == batch.steps
                if self.step % config.log_every == 0 or last:
                    self._record_training(loss, grad_norm, scale, throughput, peak)
                    throughput.restart(self.step)
                self.console.advance(self.step)
                with throughput.paused():
                    reason = stop.agree(bool(self.saves.poison))
                    if reason == DIVERGED:
                        self._join_save()
                    self._evaluate_sample_save(last, bool(reason))
                if reason and not last:
                    resumable = "" if self.saves.failure else "; the same command resumes the run"
                    self.console.print(f"{reason}: stopped after step {self.step}{resumable}")
                    return "stopped"
        return "finished"

    def _train_step(self, scale: float) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Take one step with `scale` times the peak learning rate; return this rank's loss and the gradient norm."""
        data = self.mesh.data
        sequences = self.batch.global_batch // data.size
        first = self.step * self.batch.global_batch + data.rank * sequences
        self._schedule()
        with part("data"):
            rows = self.stream.samples(first, sequences)
            self.batches_hash = (self.batches_hash + sample_hash(first, rows)) % 2**64
            tokens = torch.from_numpy(rows).to(self.engine.device)  # (sequences, S + 1)
        arguments = (tokens, scale, self.telemetry.observer(self.step + 1), self.guard.refuse)
        self.last_loss, self.last_norm, applied = self.engine.train_step(*arguments)
        self._record_telemetry()  # of an earlier step: its reduction ran beside this one
        self.saves.record()
        self.step = self.recorder.step = self.step + 1
        self.telemetry.reduce(self.step, self.batch.tokens_per_step)
        numbers = self.stream.skipped.numbers(np.arange(first, first + sequences))
        self.recorder.folder.trained = True
        self.guard.count(applied, self.last_norm, tokens, numbers)
        self.guard.compare(tokens)
        return self.last_loss, self.last_norm

    def _schedule(self) -> None:
        """Give the scheduled parameters of formulas their values after the steps that are done."""
        self.engine.module.set_step(self.step, self.batch.steps)

    def _end_profile(self) -> None:
        """Print the table of a profile that ends with this step."""
        if table := self.profiler.after(self.step):
            for line in table.splitlines():
                self.console.print(line, wrap=False)

    def _rewind(self) -> bool:
        """Go back to the newest healthy checkpoint, and leave out the samples since; return False if none is. Collective."""
        self._record_telemetry()
        self._join_save()
        path, step, earlier = self.guard.checkpoint_before(self.inspector), self.step, self.earlier_seconds
        if path is None:
            self.console.warn("there is no checkpoint to go back to: the run goes on")
            return False
        skipped, batch = self.stream.skipped, self.batch.global_batch
        since = SampleRanges.of([[skipped.number(number * batch) for number in (step_of(path), step)]])
        self.stream.skipped = skipped | since
        self.resume(path, None)
        self.earlier_seconds = earlier
        self.recorder.rewind()
        self.recorder.event("rewound", from_step=step, skipped_samples=str(since))
        return True

    def _record_training(
        self,
        loss: torch.Tensor,
        grad_norm: torch.Tensor | float,
        scale: float,
        throughput: Throughput,
        peak: PeakSpeed,
    ) -> None:
        """Record the steps since the last log line. Collective.

        Args:
            loss: mean of this rank's tokens.
            peak: of this rank.
        """
        total = loss.clone()
        dist.all_reduce(total)
        self.guard.watch(float(total) / self.ranks.world_size, float(grad_norm))
        ranks, (steps, seconds) = self.ranks.world_size, throughput.measure(self.step)
        tokens_per_second = steps * self.batch.tokens_per_step / seconds
        self.recorder.training(
            loss=float(total) / ranks,
            grad_norm=float(grad_norm),
            lr=self.config.optim.lr * scale,
            tokens_per_second=tokens_per_second,
            mfu=peak.mfu(tokens_per_second * self.recorder.flops_per_token / ranks) if self.ranks.rank == 0 else None,
            memory_gib=machine.memory_gib(self.engine.device),
            scheduled=self.engine.module.scheduled(),
        )

    def _due(self, every: int) -> bool:
        """Whether this step is one of every `every` steps; 0: never."""
        return bool(every) and self.step % every == 0

    def _evaluate_sample_save(self, last: bool, stopping: bool) -> None:
        """Do what is due at this step. A run that is stopping saves at once, and does nothing else."""
        config, held_out = self.config, None
        self.evaluation_missed = self._due(config.eval_every) and stopping and not last
        if last:
            self._save(None, stopping)  # first: whatever fails in what follows, the weights are kept
            self._evaluate_last()
            if not stopping:
                self._sample()
            self._join_save()
            self.saver.prune()  # the last step may be the best one
            return
        if self._due(config.eval_every) and not stopping:
            held_out = self._evaluate(config.eval_tokens)
        if self._due(config.sample_every) and not stopping:
            self._sample()
        if stopping or self._due(config.save_every):
            self._save(held_out, stopping)
        if stopping:
            self._join_save()

    def _evaluate_last(self) -> None:
        """Evaluate on all held-out tokens, and before that on those of the periodic evaluations: their curve's last point."""
        periodic_tokens = self.config.eval_tokens
        if self.config.eval_every and periodic_tokens is not None and periodic_tokens < self.dataset.held_out.tokens:
            self._evaluate(periodic_tokens)
        self._evaluate(None)

    def _evaluate(self, tokens: int | None) -> HeldOut | None:
        """Evaluate on the first `tokens` held-out tokens, or on all; record and return the result (None: there are none)."""
        if not self.dataset.held_out.tokens:
            return None
        watchdog.beat("evaluate", self.step)
        self._schedule()
        # Only the whole held-out set is enough text to call a unit dead.
        with self.telemetry.dead_units() if tokens is None else contextlib.nullcontext([]) as dead:
            held_out = self.last_eval = evaluate(self.engine, self.dataset, self.config.sequence_length, tokens)
        self.recorder.evaluation(held_out, dead, self.engine.module.scheduled())
        return held_out

    def _record_telemetry(self) -> None:
        """Record the last activation telemetry sample, unless that was done."""
        if (sample := self.telemetry.take()) is not None:
            self.recorder.telemetry(*sample)

    def _sample(self) -> None:
        """Generate a text for each prompt."""
        config, texts = self.config, []
        self._schedule()
        for prompt in self.prompts:
            watchdog.beat("sample", self.step)
            arguments = (self.dataset.tokenizer, self.shape.n_layers, prompt, config.sample_tokens)
            with torch.no_grad():
                texts.append(generate(self.engine.logits, *arguments, device=self.engine.device))
        self.recorder.samples(texts)

    def _save(self, held_out: HeldOut | None, stopping: bool) -> None:
        """Start to save a checkpoint, the session's last one if it is stopping; `held_out` is the evaluation of this step."""
        watchdog.beat("save", self.step)
        self._record_telemetry()  # a run resumed from this checkpoint would not record it
        self._join_save()
        eval_loss = None
        if held_out is not None and held_out.tokens == self.dataset.held_out.tokens:
            eval_loss = held_out.loss
        state = {
            "step": self.step,
            "steps": self.batch.steps,
            "warmup_steps": self.warmup_steps,
            "samples": self.step * self.batch.global_batch,
            "tokens": self.recorder.tokens,
            "batches_hash": self._global_batches_hash(),
            "corpus_hash": self.dataset.corpus_hash,
            "tokenizer_hash": self.dataset.tokenizer.hash,
            "eval_loss": eval_loss,
            "evaluation_missed": self.evaluation_missed,
            "course": self.course,
            "skipped_samples": self.stream.skipped.ranges,
            "spikes": self.guard.spikes.state(),
            "wall_seconds": self._wall_seconds(),
            "run_id": self.run_id,
            "settings": self.settings,
            "dtype": machine.dtype_name(self.engine.dtype),
        }
        # The last step's weights are the run's result, if they are finite.
        doubt = "" if self.step == self.batch.steps else self.guard.doubt(self.last_loss, self.last_norm, stopping)
        self.saver.start(state, doubt)

    def _join_save(self) -> None:
        """Wait for a save that has started, and record its result. Collective.

        Raises:
            Diverged: a weight or a moment is not finite.
        """
        self.saves.record(wait=True)
        if self.saves.poison:
            self.recorder.event("diverged", reason=self.saves.poison)
            raise self.guard.diverged(self.saves.poison)

    def _finish(self, status: str) -> int:
        """Write the summary, close the loggers and print the end; return the exit status."""
        synchronised = status != "failed"  # an exception may be this rank's alone, and then a collective would hang
        if synchronised:
            status = "failed" if self.saves.failure else status
            dist.barrier()
        counts = parameters(self.shape)
        final, withheld = self.last_eval if status == "finished" else None, self.dataset.why_no_bits
        summary = {
            "status": status,
            "final_eval_loss": final.loss if final else None,
            "bits_per_byte": final.bits_per_byte(self.recorder.bytes_per_token) if final and not withheld else None,
            **({"bits_per_byte_withheld": withheld} if withheld else {}),
            "xz_bits_per_byte": self.dataset.xz_bits_per_byte,
            "parameters": sum(counts.values()),
            "vocab_size": self.shape.vocab_size,
            "ffn_parameters": counts["ffn"],
            "flops_per_token": self.recorder.flops_per_token,
            "data_order_hash": f"{self._global_batches_hash():016x}" if synchronised else None,
            "config_hash": config_hash(self.config),
            "run_id": self.run_id,
            "steps": self.step,
            "tokens": self.recorder.tokens,
            "wall_seconds": self._wall_seconds(),
        }
        unwritten = self.recorder.close(summary)
        if self.ranks.rank == 0 and status == "finished":
            self.recorder.print_end(summary, self.prompts)
        if synchronised:
            unwritten = self._broadcast(unwritten)
            dist.barrier()
            dist.destroy_process_group()
        exit_status = self.saves.failed_status if self.saves.failure else int(status == "failed") or unwritten
        if synchronised and self.ranks.rank == 0:
            reason = self.saves.failure or ("the summary could not be written" if unwritten else "")
            write_ending(self.recorder.folder.path, SessionEnding(status, exit_status, reason, step=self.step))
        return exit_status

    def _wall_seconds(self) -> float:
        """Return the wall-clock time of the run, over all of its sessions."""
        return self.earlier_seconds + time.monotonic() - self.session_started

    def _global_batches_hash(self) -> int:
        """Return the hash of all samples so far, over all data ranks. Collective."""
        # Tensor and context ranks of one data rank have the same samples: one of them counts.
        counts = self.mesh.tensor.rank == self.mesh.context.rank == 0
        hashes: list[Any] = [0] * self.ranks.world_size
        dist.all_gather_object(hashes, self.batches_hash if counts else 0)
        return sum(hashes) % 2**64

    def _broadcast(self, value: Any) -> Any:
        """Return rank 0's value. Collective."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
