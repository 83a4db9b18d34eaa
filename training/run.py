"""A run from the command to its exit status: check, prepare, build the engine, resume, and enter the loop.

Every user error is found before the process group exists. The loop itself is in `loop.py`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from conf.schema import Config, TokenizerConfig
from conf.shape import Shape, check_divisibility, shape_of
from conf.validate import Batch, validate
from data.batches import BatchStream, Dataset, open_dataset, refuse_repetition
from data.prepare import prepare
from data.ranges import SampleRanges
from kernels.common.errors import UserError
from kernels.common.files import explain_os_errors
from launch.launchers import Launchers, refuse_taken_port, refuse_unknown_master
from launch.ranks import Ranks
from model.attention import choose
from model.feed_forward import check_arms
from model.health import Inspector
from model.manifest import run_of
from model.products import products_of
from model.weights import CheckpointReader, step_of
from training import machine, watchdog
from training.console import Console
from training.failure import explain
from training.loop import TrainingLoop
from training.memory import MemoryBudget
from training.peak_speed import PeakSpeed
from training.process_group import record_collectives, start_process_group
from training.profiler import check_steps
from training.recorder import RunRecorder, held_out_line
from training.resume import Decision, choose_checkpoint, decide_together, remove_leftovers, unknown_origin, why_unfit
from training.rewind import named_checkpoint, set_aside
from training.runfolder import RunFolder

if TYPE_CHECKING:
    from training.engine import Engine


def train(config: Config, ranks: Ranks, launchers: Launchers) -> int:
    """Train, and return the exit status: 0 if the run finished, or was stopped by a signal and saved; 1 if it failed.

    Raises:
        UserError: bad input, found before any process group exists.
    """
    launched_at = time.monotonic()
    batch, skipped = validate(config, ranks.world_size), SampleRanges.parse(config.guard.skip_samples)
    check_steps(config.profile, batch.steps)
    console = Console(enabled=ranks.rank == 0)
    device, dtype, attention, doubts = _find_hardware(config, ranks)
    _set_determinism(config)
    folder = RunFolder(config)
    watch = watchdog.Watchdog(config.watchdog, ranks, folder.path, launchers.gone)
    try:
        warnings = folder.claim(config) if ranks.rank == 0 else []
        dataset = _open_corpus(config, folder, ranks, console)
        watch.start()  # a corpus may take hours to prepare, and its processes are forks
        shape = _shape(config, dataset)
        arms = check_arms(shape.ffn, device, dtype, statistics=bool(config.telemetry_every))
        for warning in (*warnings, *doubts, *arms):
            console.warn(warning)
        if ranks.world_size > 1:  # rank 0 tells the others what it decides
            _start_group(config, ranks, device, folder.path)
        inspector = Inspector()
        explained = explain_os_errors("go on from the run folder", folder.path)
        decide = explained(lambda verify: _decide(config, batch, folder, dataset, shape, console, inspector, verify))
        decision = decide_together(ranks, decide)
        if decision.finished:
            return _end_group(ranks)
        stream = BatchStream(dataset, config.sequence_length, config.data_seed, skipped)
        recorder = RunRecorder(config, batch, shape, dataset, folder, console, enabled=ranks.rank == 0)
        memory = MemoryBudget(config, batch, shape, ranks, device, dtype == torch.bfloat16)
        memory.check()
        with memory.explained():
            if ranks.world_size == 1:
                _start_group(config, ranks, device, folder.path)
            engine = _build_engine(config, batch, folder, dataset, shape, device, dtype, attention)
            loop = TrainingLoop(
                config, batch, ranks, folder, dataset, stream, shape, recorder, engine, decision.run_id, inspector
            )
            if decision.checkpoint:
                loop.resume(decision.checkpoint, decision.previous_steps)
            if ranks.rank == 0:
                _copy_tokenizer(dataset, folder.path)
            recorder.open(f"{machine.describe(device)} x {ranks.world_size}")
            peak = PeakSpeed(device, dtype)
            if not decision.checkpoint:
                rows = recorder.summary_rows(device, dtype, attention, peak, ranks.world_size)
                console.summary(config, shape, batch, rows)
            recorder.session("resumed" if decision.checkpoint else "started", loop.earlier_seconds, decision.run_id)
            return loop.run(peak, launchers, launched_at)
    except BaseException as error:
        raise _end_badly(error, ranks, folder, watch) from None
    finally:
        watch.stop()
        console.stop()
        folder.close()


def _find_hardware(config: Config, ranks: Ranks) -> tuple[torch.device, torch.dtype, str, list[str]]:
    """Return the device, the dtype, the backend of attention, and what to warn about these choices.

    Raises:
        UserError: what the configuration names does not run here.
    """
    device = machine.find_device(ranks)
    dtype = machine.find_dtype(config, device)
    attention = choose(config.model.attention, device, dtype, config.sequence_length)
    _, warning = products_of(config.precision, device)
    return device, dtype, attention.backend, [*attention.warnings, *([warning] if warning else [])]


def _set_determinism(config: Config) -> None:
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _end_badly(error: BaseException, ranks: Ranks, folder: RunFolder, watch: watchdog.Watchdog) -> BaseException:
    """Say why this rank ends, and return what to raise instead of its exception."""
    watch.fail()
    reason = explain(error, ranks, folder.path, watch.step, folder.trained, watch.began)
    if ranks.rank == 0:
        folder.discard()
    return reason


def _open_corpus(config: Config, folder: RunFolder, ranks: Ranks, console: Console) -> Dataset:
    """Prepare the corpus unless that was done, open it, and say what cannot be measured on it."""
    if ranks.rank == 0:
        named_checkpoint(folder.checkpoints, config)  # refuses a wrong resume_from before a corpus takes its time
    dataset = open_dataset(prepare(config.data, own_tokenizer(config.tokenizer, folder.path), show=ranks.rank == 0))
    if not dataset.held_out.tokens:
        console.warn("no text of this corpus is held out: the run is trained without evaluation")
    if dataset.why_no_bits:
        console.warn(f"bits per byte are withheld: {dataset.why_no_bits}")
    return dataset


def _decide(
    config: Config,
    batch: Batch,
    folder: RunFolder,
    dataset: Dataset,
    shape: Shape,
    console: Console,
    inspector: Inspector,
    verify: Callable[[Path], str],
) -> Decision:
    """Return, on rank 0, what this run goes on from.

    Args:
        verify: returns what is wrong with the contents of a checkpoint.

    Raises:
        UserError: no checkpoint of the run can be used, or it would repeat its corpus too often.
    """

    def contents(path: Path) -> str:
        problem = verify(path)
        inspector.record(path, problem)
        return problem

    named = named_checkpoint(folder.checkpoints, config)
    checkpoint, warnings = choose_checkpoint(
        folder.checkpoints, folder.run_id, contents, lambda path: why_unfit(path, dataset, shape, config), named
    )
    for warning in warnings:
        console.warn(warning)
    if checkpoint is None:
        folder.refuse_to_start_over()
    else:
        folder.run_id = folder.run_id or run_of(checkpoint)
        done = step_of(checkpoint)
        state, typed = CheckpointReader(checkpoint).state, SampleRanges.parse(config.guard.skip_samples)
        SampleRanges.of(state.get("skipped_samples", [])).extended(typed, done * batch.global_batch)
        folder.refuse_fewer_steps(batch.steps, done)
        # A run killed between its last checkpoint and its summary still needs the summary.
        if done >= batch.steps and (summary := folder.finished_summary(done)):
            _print_finished(console, folder, batch, summary)
            return Decision(finished=True)
        if unchecked := unknown_origin(checkpoint):
            console.print(unchecked)
    if checkpoint is None or (folder.previous_steps or batch.steps) < batch.steps:
        _refuse_repetition(dataset, config, batch)
    folder.run_id = folder.run_id or uuid.uuid4().hex
    if named is not None and (names := set_aside(folder.checkpoints, named)):
        console.print(f"{named} is the newest checkpoint again; later ones are now called {', '.join(names)}")
    remove_leftovers(folder.checkpoints)
    return Decision(checkpoint, folder.run_id, folder.previous_steps)


def _refuse_repetition(dataset: Dataset, config: Config, batch: Batch) -> None:
    samples = batch.steps * batch.global_batch
    refuse_repetition(dataset, config.sequence_length, samples, config.data.max_epochs)


def _start_group(config: Config, ranks: Ranks, device: torch.device, run: Path) -> None:
    """Start the process group. Collective."""
    refuse_unknown_master(ranks)
    refuse_taken_port(ranks)
    if device.type == "cuda":
        record_collectives(run)
    start_process_group(ranks, device, config.parallel.timeout_minutes)


def _end_group(ranks: Ranks) -> int:
    """End the process group of a run that has nothing to do; return the exit status. Collective."""
    if ranks.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 0


def _build_engine(
    config: Config,
    batch: Batch,
    folder: RunFolder,
    dataset: Dataset,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
) -> Engine:
    """Return the engine. Collective."""
    from training.engine import Engine, mesh_from_config, redirect_deepspeed_log

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


def _print_finished(console: Console, folder: RunFolder, batch: Batch, summary: dict[str, Any]) -> None:
    """Print that there is nothing to do."""
    console.print(f"{folder.path} has finished its {batch.steps} steps: there is nothing to do")
    if summary["final_eval_loss"]:
        console.print(held_out_line(summary))
    console.print("give a new run another name (run=NAME), or override a setting: python train.py --help")


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
