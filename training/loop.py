"""A run, from its first line to its last: check, prepare, build, resume, train, evaluate, save, sum up.

Everything that a user can have got wrong is found before the ranks join. Ranks then take the same decisions: they stop after
the same step, and all take part in every save and evaluation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.errors import UserError
from conf.files import say_why
from conf.load import flatten, to_dict
from conf.schema import Config
from conf.validate import NOT_LEARNED, Batch, validate
from data.batches import BatchStream, Dataset, open_dataset, sample_hash
from data.prepare import prepare
from launch.ranks import Ranks
from model.accounting import Shape, flops_per_token, parameters, shape_of
from model.attention import choose
from model.decoder import Decoder
from model.generate import generate
from model.weights import CheckpointReader, check_shapes, newest_intact
from training import machine
from training.console import Console, duration
from training.evaluation import HeldOut, evaluate
from training.loggers import Mirrors
from training.runfolder import RunFolder
from training.schedule import rate
from training.signals import StopRequest

MOST_SKIPPED = 20  # steps in a row without a finite gradient: the run has diverged


def train(config: Config, ranks: Ranks) -> int:
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
        stream = BatchStream(dataset, config.sequence_length, config.data_seed)
        shape = _shape(config, dataset)
        resumed, passed_over = newest_intact(folder.checkpoints)
        for sentence in passed_over:
            console.warn(sentence)
        if resumed:
            _check_checkpoint(resumed, dataset, shape, config)
            # One killed between its last checkpoint and its summary still has to be summed up.
            done = CheckpointReader(resumed).state["step"] >= batch.steps
            if done and folder.read_summary().get("status") == "finished":
                return _already_finished(console, folder, batch)
        run = _Run(config, batch, ranks, device, dtype, attention, folder, dataset, stream, shape, console)
        return run.go(resumed, started)
    finally:
        console.stop()
        folder.close()


class _Run:
    """The state of a run while it trains. `step` steps are done, and `batches_hash` is the hash of their samples."""

    def __init__(
        self,
        config: Config,
        batch: Batch,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
        attention: str,
        folder: RunFolder,
        dataset: Dataset,
        stream: BatchStream,
        shape: Shape,
        console: Console,
    ) -> None:
        self.config, self.batch, self.ranks, self.device, self.dtype = config, batch, ranks, device, dtype
        self.attention, self.folder, self.dataset, self.stream, self.shape = attention, folder, dataset, stream, shape
        self.console, self.step, self.batches_hash = console, 0, 0
        self.bytes_per_token = dataset.held_out_bytes / max(1, dataset.held_out.tokens)
        self.flops = sum(flops_per_token(shape, config.sequence_length).values())
        self.trained_seconds = 0.0  # wall-clock of this run, earlier sittings included
        self.last_eval: HeldOut | None = None
        self.last_sample = ""
        self.save_failed = ""  # why the newest checkpoint could not be saved, the same on every rank

    def go(self, resumed: Path | None, started: float) -> int:
        from training.engine import Engine, send_deepspeed_log_to, start_process_group

        start_process_group(self.ranks, self.device, self.config.parallel.timeout_minutes)
        document_start = self.dataset.eos_id if self.config.model.mask_documents else None
        arguments = (self.device, self.dtype, self.attention, document_start)
        with self.folder.quiet():
            self.engine = Engine(self.config, self.batch, self.shape, *arguments)
            send_deepspeed_log_to(self.folder.path / "deepspeed.log")
        if resumed:
            self._resume(resumed)
        if self.ranks.rank == 0:
            self.folder.rewind_metrics(self.step)
            _copy_tokenizer(self.dataset, self.folder.path)
        self.peak, peak_from = machine.peak_flops(self.device, self.dtype)
        self.mirrors = self._mirrors()
        if not resumed:
            self.console.summary(self.config, self.shape, self.batch, self._rows(peak_from))
        else:
            self.console.say(f"going on with {self.folder.path} after step {self.step} of {self.batch.steps}")
        self._event(
            "resumed" if resumed else "started", world_size=self.ranks.world_size, wall_seconds=self.trained_seconds
        )
        self.started = time.monotonic()
        try:
            status = self._train(started)
        except BaseException:
            self._finish("failed")
            raise
        self.console.stop()
        return self._finish(status)

    def _train(self, launched: float) -> str:
        """Train to the last step, or to a signal; return the status."""
        config, batch = self.config, self.batch
        per_rank = batch.global_batch // self.ranks.world_size
        self.console.start(self.step, batch.steps)
        if self.step >= batch.steps and self.last_eval is None:
            self._evaluate(None)
        skipped = 0
        clock, clock_step, clock_pause = time.perf_counter(), self.step, 0.0
        with StopRequest() as stop:
            while self.step < batch.steps:
                first = self.step * batch.global_batch + self.ranks.rank * per_rank
                rows = self.stream.samples(first, per_rank)
                self.batches_hash = (self.batches_hash + sample_hash(first, rows)) % 2**64
                tokens = torch.from_numpy(rows).to(self.device)
                share = rate(config.schedule, self.step, batch.steps)
                loss, norm, applied = self.engine.train_step(tokens, share)
                self.step += 1
                if self.step == clock_step + 1 and clock_step == 0:
                    self._event("first_step", seconds_since_start=time.monotonic() - launched)
                skipped = 0 if applied else skipped + 1
                if not applied:
                    self._event("skipped_step", grad_norm=float(norm))
                    self.console.warn(f"step {self.step} had a gradient that is not finite and was skipped")
                    if skipped >= MOST_SKIPPED:
                        raise RuntimeError(
                            f"{MOST_SKIPPED} steps in a row had no finite gradient: the run has diverged"
                        )
                last = self.step == batch.steps
                if self.step % config.log_every == 0 or last:
                    dist.all_reduce(loss)
                    seconds = time.perf_counter() - clock - clock_pause
                    speed = (self.step - clock_step) * batch.tokens_per_step / max(seconds, 1e-9)
                    self._log_step(float(loss) / self.ranks.world_size, float(norm), share, speed)
                    clock, clock_step, clock_pause = time.perf_counter(), self.step, 0.0
                self.console.advance(self.step)
                pause = time.perf_counter()
                signal_name = stop.agreed()
                self._periodic(last, bool(signal_name))
                clock_pause += time.perf_counter() - pause
                if signal_name and not last:
                    from_here = "" if self.save_failed else "; the same command goes on from here"
                    self.console.say(f"{signal_name}: stopped after step {self.step}{from_here}")
                    return "stopped"
        return "finished"

    def _periodic(self, last: bool, stopping: bool) -> None:
        """Evaluate, sample and save where this step asks for it. A run that is stopping saves at once, and no more."""
        config = self.config
        due = lambda every: every and self.step % every == 0  # noqa: E731
        held_out = None
        if last or (due(config.eval_every) and not stopping):
            held_out = self._evaluate(None if last else config.eval_tokens)
        if (last or due(config.sample_every)) and not stopping:
            self._sample()
        if last or stopping or due(config.save_every):
            self._save(held_out)

    def _evaluate(self, tokens: int | None) -> HeldOut:
        held_out = self.last_eval = evaluate(self.engine, self.dataset, self.config.sequence_length, tokens)
        bits = held_out.bits_per_byte(self.bytes_per_token)
        figures = {"loss": held_out.loss, "perplexity": held_out.perplexity, "bits_per_byte": bits}
        self._log({"kind": "eval", **self._where(), **figures, "held_out_tokens": held_out.tokens})
        part = "" if held_out.tokens == self.dataset.held_out.tokens else f" (on {held_out.tokens} tokens)"
        self.console.say(
            f"held-out: loss {held_out.loss:.4f} nats a token, perplexity {held_out.perplexity:.2f}, "
            f"{bits:.4f} bits a byte{part}"
        )
        return held_out

    def _sample(self) -> None:
        config = self.config
        texts = []
        for prompt in config.prompts:
            arguments = (self.dataset.tokenizer, self.shape.n_layers, prompt, config.sample_tokens)
            with torch.no_grad():
                texts.append(generate(self.engine.logits, *arguments, device=self.device))
        if self.ranks.rank == 0 and texts:
            rule = "-" * 80
            self.folder.append_samples("".join(f"{rule}\nstep {self.step}\n{rule}\n{text}\n" for text in texts))
        self.last_sample = texts[-1] if texts else ""

    def _save(self, held_out: HeldOut | None) -> None:
        from training import checkpoint

        whole = held_out is not None and held_out.tokens == self.dataset.held_out.tokens
        state = {
            "step": self.step,
            "samples": self.step * self.batch.global_batch,
            "tokens": self.step * self.batch.tokens_per_step,
            "batches_hash": self._whole_hash(),
            "corpus_hash": self.dataset.corpus_hash,
            "tokenizer_hash": self.dataset.tokenizer.hash,
            "eval_loss": held_out.loss if whole else None,
            "wall_seconds": self._wall(),
        }
        start = time.perf_counter()
        self.save_failed = ""
        try:
            path = checkpoint.save(self.engine, self.folder.checkpoints, state)
            if self.ranks.rank == 0:
                checkpoint.prune(self.folder.checkpoints, self.config.keep_last)
            self._event("saved", path=path.name, seconds=time.perf_counter() - start)
        except OSError as error:  # rank 0 only; the run goes on, what was saved before is untouched
            self.save_failed = str(error)
            self.console.warn(f"the checkpoint of step {self.step} could not be saved: {error}")
            with contextlib.suppress(OSError):
                self._event("save_failed", reason=str(error))
        told = [self.save_failed]
        dist.broadcast_object_list(told, src=0)
        self.save_failed = told[0]

    def _resume(self, path: Path) -> None:
        from training import checkpoint

        state = checkpoint.load(self.engine, path)
        self.step = state["step"]
        self.batches_hash = state["batches_hash"] if self.ranks.rank == 0 else 0
        self.trained_seconds = state["wall_seconds"]
        if state["eval_loss"] is not None:
            self.last_eval = HeldOut(state["eval_loss"], self.dataset.held_out.tokens)

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
            "bits_per_byte": final.bits_per_byte(self.bytes_per_token) if final else None,
            "xz_bits_per_byte": self.dataset.xz_bits_per_byte,
            "parameters": sum(counts.values()),
            "ffn_parameters": counts["ffn"],
            "flops_per_token": self.flops,
            "data_order_hash": f"{self._whole_hash():016x}" if together else None,
            "config_hash": config_hash(self.config),
            "steps": self.step,
            "tokens": self.step * self.batch.tokens_per_step,
            "wall_seconds": self._wall(),
        }
        if self.ranks.rank == 0:
            with contextlib.suppress(OSError) if status == "failed" else contextlib.nullcontext():
                self.folder.write_summary(summary)
            self.mirrors.finish(summary)
            if status == "finished":
                self._tell_end(summary)
        if together:
            dist.barrier()
            dist.destroy_process_group()
        return 1 if status == "failed" else 0

    def _tell_end(self, summary: dict[str, Any]) -> None:
        console, config, path = self.console, self.config, self.folder.path
        console.say("")
        console.say(f"finished in {duration(summary['wall_seconds'])} after {summary['tokens']:,} tokens")
        held_out = (
            f"held-out text: {summary['bits_per_byte']:.4f} bits a byte ({summary['final_eval_loss']:.4f} nats a token)"
        )
        xz = self.dataset.xz_bits_per_byte
        console.say(held_out + (f"; xz -9 on the same text: {xz:.4f}" if xz else ""))
        if self.last_sample:
            console.say(f"a sample:\n{self.last_sample}\n")
        console.say(f"everything is in {path}/: config.yaml metrics.jsonl summary.json checkpoints/ samples.txt")
        for note in self.mirrors.notes:
            console.say(note)
        runs = "" if config.runs == "runs" else f" runs={config.runs}"
        console.say("go on with")
        console.say(f"  python -m model.generate run={config.run}{runs} prompt='import '")
        console.say("  deepspeed train.py ffn=relu2          # another arm, the same FFN parameters")
        console.say("  python train.py --help")

    def _log_step(self, loss: float, norm: float, share: float, tokens_per_second: float) -> None:
        figures = {
            "loss": loss,
            "lr": self.config.optim.lr * share,
            "grad_norm": norm,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self.flops / (self.peak * self.ranks.world_size),
            "memory_gib": machine.memory_gib(self.device),
        }
        self._log({"kind": "train", **self._where(), **figures})
        self.console.step(self.step, self.batch.steps, figures)

    def _event(self, event: str, **details: Any) -> None:
        self._log({"kind": "event", **self._where(), "event": event, **details})

    def _log(self, record: dict[str, Any]) -> None:
        if self.ranks.rank == 0:
            self.folder.append_metrics(record)
            self.mirrors.log(record)

    def _where(self) -> dict[str, int]:
        return {"step": self.step, "tokens": self.step * self.batch.tokens_per_step}

    def _wall(self) -> float:
        return self.trained_seconds + time.monotonic() - self.started

    def _whole_hash(self) -> int:
        """Return the hash of all samples so far, over all ranks. Collective."""
        parts: list[int | None] = [None] * self.ranks.world_size
        dist.all_gather_object(parts, self.batches_hash)
        return sum(parts) % 2**64  # type: ignore[arg-type]

    def _mirrors(self) -> Mirrors:
        if self.ranks.rank != 0:
            quiet = Config()
            quiet.logger.wandb = quiet.logger.tensorboard = False
            return Mirrors(quiet, self.folder.path, lambda _: None)
        return Mirrors(self.config, self.folder.path, self.console.warn)

    def _rows(self, peak_from: str) -> list[tuple[str, str]]:
        dataset, config = self.dataset, self.config
        tokens = sum(part.train.tokens for part in dataset.parts)
        epochs = self.batch.tokens / max(1, tokens)
        held_out = dataset.held_out.tokens
        corpus = f"{config.data.name}: {tokens:,} tokens to train on ({epochs:.1f} epochs), {held_out:,} held out"
        stage = f"ZeRO stage {config.zero.stage}"
        dtype = str(self.dtype).removeprefix("torch.")
        masters = " with fp32 master weights" if self.dtype == torch.bfloat16 else ""
        expected = self.batch.tokens * self.flops / (0.4 * self.peak * self.ranks.world_size)
        return [
            ("data", f"{corpus}, {self.bytes_per_token:.2f} bytes a token"),
            ("machine", f"{machine.describe(self.device)} x {self.ranks.world_size}, {dtype}{masters}, {stage}"),
            ("optimizer", f"{config.optim.name}, peak rate {config.optim.lr:g}, {config.schedule.name}"),
            ("attention", self.attention),
            ("peak", f"{self.peak / 1e12:.3g} TFLOP/s a rank ({peak_from})"),
            ("expected time", f"about {duration(expected)} at 40% of peak"),
        ]


def config_hash(config: Config) -> str:
    """Return a hash of what decides what is learned."""
    flat = flatten(to_dict(config))
    kept = {k: v for k, v in flat.items() if not any(k == n or k.startswith(n + ".") for n in NOT_LEARNED)}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()


def _shape(config: Config, dataset: Dataset) -> Shape:
    if config.model.vocab_size and config.model.vocab_size < dataset.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is less than the tokenizer's {dataset.vocab_size} pieces"
        )
    return shape_of(config, dataset.vocab_size)


def _check_checkpoint(path: Path, dataset: Dataset, shape: Shape, config: Config) -> None:
    """Refuse a checkpoint of another model or of other text, before the ranks join."""
    reader = CheckpointReader(path)
    with torch.device("meta"):
        check_shapes(Decoder(shape, config.model, config.ffn, "sdpa"), reader)
    if reader.state["tokenizer_hash"] != dataset.tokenizer.hash:
        raise UserError(f"{path} was trained with another tokenizer than the one in {dataset.folder}")
    if reader.state["corpus_hash"] != dataset.corpus_hash:
        raise UserError(
            f"{path} was trained on other text than what is in {dataset.folder}: give this run a name (run=NAME)"
        )


def _already_finished(console: Console, folder: RunFolder, batch: Batch) -> int:
    summary = folder.read_summary()
    console.say(f"{folder.path} has finished its {batch.steps} steps: there is nothing to do")
    if summary.get("bits_per_byte"):
        console.say(
            f"held-out text: {summary['bits_per_byte']:.4f} bits a byte ({summary['final_eval_loss']:.4f} nats a token)"
        )
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
