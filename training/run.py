"""A run from the command to its exit status: check, prepare, build the engine, resume, and enter the loop.

Every user error is found before the process group exists. The loop itself is in `loop.py`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from conf.schema import Config, TokenizerConfig
from conf.validate import Batch, validate
from data.batches import BatchStream, Dataset, open_dataset, refuse_repetition
from data.prepare import prepare
from kernels.common.errors import UserError
from kernels.common.files import explain_os_errors
from launch.estimate.counts import Shape, check_divisibility, shape_of
from launch.launchers import Launchers, refuse_taken_port
from launch.ranks import Ranks
from model.attention import choose
from model.decoder import Decoder
from model.feed_forward import check_arms
from model.weights import CheckpointReader, check_shapes, newest_intact
from training import machine
from training.console import Console
from training.loop import TrainingLoop
from training.memory import MemoryBudget
from training.recorder import RunRecorder, held_out_line
from training.runfolder import RunFolder

if TYPE_CHECKING:
    from training.engine import Engine


def train(config: Config, ranks: Ranks, launchers: Launchers) -> int:
    """Train, and return the exit status: 0 if the run finished, or was stopped by a signal and saved; 1 if it failed.

    Raises:
        UserError: bad input, found before any process group exists.
    """
    launched_at = time.monotonic()
    batch = validate(config, ranks.world_size)
    console = Console(enabled=ranks.rank == 0)
    device = machine.find_device(ranks)
    dtype = machine.find_dtype(config, device)
    attention = choose(config.model.attention, device, dtype, config.sequence_length)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    folder = RunFolder(config)
    try:
        if ranks.rank == 0:
            folder.claim(config)
        dataset = _open_corpus(config, folder, ranks, console)
        shape = _shape(config, dataset)
        for warning in check_arms(shape.ffn, device, dtype, statistics=bool(config.telemetry_every)):
            console.warn(warning)
        checkpoint, warnings = newest_intact(folder.checkpoints)
        for warning in warnings:
            console.warn(warning)
        if checkpoint:
            _check_checkpoint(checkpoint, dataset, shape, config)
            # A run killed between its last checkpoint and its summary still needs the summary.
            complete = CheckpointReader(checkpoint).state["step"] >= batch.steps
            if complete and folder.read_summary().get("status") == "finished":
                return _already_finished(console, folder, batch)
        stream = BatchStream(dataset, config.sequence_length, config.data_seed)  # refuses a sequence beyond the text
        if checkpoint is None or (folder.previous_steps or batch.steps) < batch.steps:
            _refuse_repetition(dataset, config, batch)
        recorder = RunRecorder(config, batch, shape, dataset, folder, console, enabled=ranks.rank == 0)
        memory = MemoryBudget(config, batch, shape, ranks, device, dtype == torch.bfloat16)
        memory.check()
        with memory.explained():
            engine = _build_engine(config, batch, ranks, folder, dataset, shape, device, dtype, attention)
            loop = TrainingLoop(config, batch, ranks, folder, dataset, stream, shape, recorder, engine)
            if checkpoint:
                loop.resume(checkpoint, folder.previous_steps)
            if ranks.rank == 0:
                _copy_tokenizer(dataset, folder.path)
            recorder.open(f"{machine.describe(device)} x {ranks.world_size}")
            peak = machine.PeakSpeed(device, dtype)
            if not checkpoint:
                rows = recorder.summary_rows(device, dtype, attention, peak, ranks.world_size)
                console.summary(config, shape, batch, rows)
            event = "resumed" if checkpoint else "started"
            recorder.event(event, world_size=ranks.world_size, wall_seconds=loop.earlier_seconds)
            return loop.run(peak, launchers, launched_at)
    except BaseException:
        if ranks.rank == 0:
            folder.discard()
        raise
    finally:
        console.stop()
        folder.close()


def _open_corpus(config: Config, folder: RunFolder, ranks: Ranks, console: Console) -> Dataset:
    """Prepare the corpus unless that was done, open it, and say what cannot be measured on it."""
    dataset = open_dataset(prepare(config.data, own_tokenizer(config.tokenizer, folder.path), show=ranks.rank == 0))
    if not dataset.held_out.tokens:
        console.warn("no text of this corpus is held out: the run is trained without evaluation")
    if dataset.why_no_bits:
        console.warn(f"bits per byte are withheld: {dataset.why_no_bits}")
    return dataset


def _refuse_repetition(dataset: Dataset, config: Config, batch: Batch) -> None:
    samples = batch.steps * batch.global_batch
    refuse_repetition(dataset, config.sequence_length, samples, config.data.max_epochs)


def _build_engine(
    config: Config,
    batch: Batch,
    ranks: Ranks,
    folder: RunFolder,
    dataset: Dataset,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
) -> Engine:
    """Start the process group, and return the engine. Collective."""
    from training.engine import Engine, mesh_from_config, redirect_deepspeed_log, start_process_group

    refuse_taken_port(ranks)
    start_process_group(ranks, device, config.parallel.timeout_minutes)
    document_start = dataset.eos_id if config.model.mask_documents else None
    with folder.quiet():
        mesh = mesh_from_config(config.parallel)
        engine = Engine(config, batch, shape, device, dtype, attention, document_start, mesh)
        redirect_deepspeed_log(folder.path / "deepspeed.log")
    return engine


def _shape(config: Config, dataset: Dataset) -> Shape:
    """Return the sizes of the model.

    Raises:
        UserError: the vocabulary is too small for the tokenizer, or sizes do not divide over the ranks.
    """
    if config.model.vocab_size and config.model.vocab_size < dataset.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's vocabulary of {dataset.vocab_size}"
        )
    shape = shape_of(config, dataset.vocab_size)
    check_divisibility(shape, config.parallel)
    return shape


def own_tokenizer(tokenizer: TokenizerConfig, run: Path) -> TokenizerConfig:
    """Return the tokenizer's keys, with the run's own copy in place of a file that is gone, as after moving `runs`."""
    copy = run / "tokenizer"
    if tokenizer.path and not Path(tokenizer.path).expanduser().exists() and copy.is_dir():
        return dataclasses.replace(tokenizer, path=str(copy))
    return tokenizer


def _check_checkpoint(path: Path, dataset: Dataset, shape: Shape, config: Config) -> None:
    """Refuse a checkpoint of another model or of other text, before the process group exists.

    Raises:
        UserError: it is one.
    """
    reader = CheckpointReader(path)
    with torch.device("meta"):
        check_shapes(Decoder(shape, config.model, "sdpa"), reader)
    if reader.state["tokenizer_hash"] != dataset.tokenizer.hash:
        if config.tokenizer.path is None:  # trained on the corpus, so it is the text that differs
            raise UserError(
                f"{path} was trained on other text than what data={config.data.name} holds today, whose tokenizer differs: "
                "bring the text back, or give this run another name (run=NAME)"
            )
        raise UserError(f"{path} was trained with another tokenizer than the one in {dataset.folder}")
    if reader.state["corpus_hash"] not in (None, dataset.corpus_hash):  # None: an imported model
        raise UserError(
            f"{path} was trained on other text than what is in {dataset.folder}: give this run another name (run=NAME)"
        )


def _already_finished(console: Console, folder: RunFolder, batch: Batch) -> int:
    """Print that there is nothing to do; return the exit status."""
    summary = folder.read_summary()
    console.print(f"{folder.path} has finished its {batch.steps} steps: there is nothing to do")
    if summary.get("final_eval_loss"):
        console.print(held_out_line(summary))
    console.print("give a new run another name (run=NAME), or override a setting: python train.py --help")
    return 0


def _copy_tokenizer(dataset: Dataset, run: Path) -> None:
    """Copy the tokenizer into the run folder, so that the folder can be moved and still generate text."""
    target = run / "tokenizer"
    if not target.exists():
        with explain_os_errors("write to the run folder", run):
            partial = run / ".tokenizer.tmp"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            dataset.tokenizer.save(partial)
            partial.rename(target)
