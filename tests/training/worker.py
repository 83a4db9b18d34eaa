"""A rank that runs the jobs on its standard input, one JSON object per line, and writes the result of each in the same way."""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import functools
import gc
import io
import itertools
import json
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed.utils.groups
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

from bench.traffic import Traffic
from conf.schema import ParallelConfig
from conf.shape import shape_of
from conf.validate import validate
from data.batches import BatchStream, open_dataset, sample_hash
from data.prepare import prepare
from kernels.common.commands import run_command
from kernels.common.errors import Failure, TryAgain, UserError
from launch.ranks import Ranks, find_ranks
from model import manifest
from model.attention import choose
from model.decoder import Cache
from model.health import outline_problem
from model.parallel import Mesh
from model.weights import MOMENTS, checkpoints
from tests.training.faults import FAULTS
from training import checkpoint, machine
from training.culprit import find_culprit
from training.engine import Engine, GradientFragment, mesh_from_config
from training.evaluation import evaluate
from training.fragments import fragments, inner_optimizer
from training.process_group import start_process_group
from training.resume import Decision, decide_together
from training.schedule import lr_scale
from training.silent import compare_repeated, compare_replicas
from training.telemetry import Telemetry
from training.zero import partition_range

RANKS = find_ranks()


@functools.cache
def mesh_of(parallel: tuple) -> Mesh:
    """Groups live as long as the process, so those of one mesh are created once."""
    return mesh_from_config(ParallelConfig(**dict(parallel)))


@functools.cache
def collectives() -> checkpoint.CheckpointCollectives:
    return checkpoint.CheckpointCollectives()


class Trainer:
    """What training/loop.py does around an engine, without its files: `do` runs one instruction of a script."""

    def __init__(self, config: str) -> None:
        deepspeed.utils.groups.mpu = None  # DeepSpeed keeps that of the previous engine
        self.config = pickle.loads(base64.b64decode(config))
        self.batch = validate(self.config, RANKS.world_size)
        device = machine.find_device(RANKS)
        dtype = machine.find_dtype(self.config, device)
        attention = choose(self.config.model.attention, device, dtype, self.config.sequence_length).backend
        self.dataset = open_dataset(prepare(self.config.data, self.config.tokenizer))
        self.stream = BatchStream(self.dataset, self.config.sequence_length, self.config.data_seed)
        shape = shape_of(self.config, self.dataset.vocab_size)
        document_start = self.dataset.eos_id if self.config.model.mask_documents else None
        self.mesh = mesh_of(tuple(dataclasses.asdict(self.config.parallel).items()))
        self.engine = Engine(self.config, self.batch, shape, device, dtype, attention, document_start, self.mesh)
        self.step, self.hash = 0, 0
        self.telemetry = Telemetry(self.engine, self.config.telemetry_every, self.config.telemetry_window)
        names = ("losses", "norms", "applied", "evaluations", "values", "telemetry", "refused", "culprits")
        self.results: dict[str, list[Any]] = {name: [] for name in names}

    def do(self, verb: str, *arguments: Any) -> None:
        getattr(self, verb)(*arguments)

    def train(self, steps: int) -> None:
        """Take steps; record the mean loss over ranks, the norm, and whether the step was applied."""
        for _ in range(steps):
            first, sequences = self._samples(self.step)
            rows = self.stream.samples(first, sequences)
            self.hash = (self.hash + sample_hash(first, rows)) % 2**64
            scale = lr_scale(self.config.schedule, self.step, self.batch.steps)
            self.engine.module.set_step(self.step, self.batch.steps)
            observer = self.telemetry.observer(self.step + 1)
            loss, norm, applied = self.engine.train_step(torch.from_numpy(rows), scale, observer)
            dist.all_reduce(loss)
            self.step += 1
            self.telemetry.reduce(self.step, self.batch.tokens_per_step)
            if (sample := self.telemetry.take()) is not None:
                self.results["telemetry"].append(sample)
            self.results["losses"].append(float(loss) / RANKS.world_size)
            self.results["norms"].append(float(norm))
            self.results["applied"].append(applied)

    def poison(self, name: str, rank: int, value: float) -> None:
        """Take one step in which a gradient of `rank` has a non-finite element."""

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            if RANKS.rank == rank:
                gradient.view(-1)[0] = value
            return gradient

        hook = dict(self.engine.module.named_parameters())[name].register_hook(spoil)
        self.train(1)
        first, sequences = self._samples(self.step - 1)
        tokens = torch.from_numpy(self.stream.samples(first, sequences))
        self.results["culprits"].append(find_culprit(self.engine, tokens, np.arange(first, first + sequences)))
        hook.remove()

    def refuse(self) -> None:
        """Take one step that is left out; record the loss and the norm by which that was decided."""
        decided: list[float] = []
        original = self.engine.train_step
        self.engine.train_step = lambda *arguments: original(
            *arguments, refuse=lambda *by: bool(decided.extend(by) or 1)
        )
        self.train(1)
        self.engine.train_step = original
        self.results["values"].append(decided)

    def compare(self, ranks: list[int] = [], tensor: str = "norm.weight", moment: str = "") -> None:  # noqa: B006
        """Flip a bit of a weight or moment on some ranks; record what comparing replicas says, and flip it back."""
        parameter = self.engine.module.get_parameter(tensor)
        values = self.engine.optimizer.state[parameter][moment] if moment else parameter.data
        bits = values.view(-1)[2:3].view(torch.int16 if values.element_size() == 2 else torch.int32)
        for _ in range(2):
            bits ^= int(RANKS.rank in ranks)
            if _ == 0:
                self._record(lambda: compare_replicas(self.engine))

    def repeat(self, rank: int = -1) -> None:
        """Record what computing a gradient twice says, where `rank` computes another one each time."""
        calls = itertools.count(1)
        spoiled = self.engine.module.get_parameter("layers.0.ffn.down")
        hook = spoiled.register_hook(lambda g: g * (1 + next(calls) * 2**-20) if RANKS.rank == rank else g)
        first, sequences = self._samples(self.step)
        tokens = torch.from_numpy(self.stream.samples(first, sequences))
        self._record(lambda: compare_repeated(self.engine, tokens))
        hook.remove()

    def _record(self, action: Callable[[], Any]) -> None:
        """Record the sentence with which an action fails, or ""."""
        try:
            action()
            self.results["values"].append("")
        except Failure as error:
            self.results["values"].append(str(error))

    @torch.no_grad()
    def pad(self, value: float) -> None:
        """Fill what stage 3 never initialises: the padding of this rank's weights, masters and moments."""
        for _, parameter in self.engine.module.named_parameters() if self.engine.stage == 3 else ():
            state = [safe_get_local_optimizer_state(parameter, key) for key in MOMENTS]
            for values in (parameter.ds_tensor, safe_get_local_fp32_param(parameter), *state):
                values[partition_range(parameter, self.mesh.data_context.rank)[1] :] = value

    @torch.no_grad()
    def set(self, name: str, key: str, rank: int, value: float) -> None:
        """Set an element of a weight (key "") or moment that `rank` holds."""
        for fragment in fragments(self.engine):
            if fragment.name == name and fragment.size and RANKS.rank == rank:
                values = fragment.read(key).clone()
                values[0] = value
                fragment.write(key, values)

    def _samples(self, step: int) -> tuple[int, int]:
        """Return the first sample of this rank in a step, and how many there are."""
        sequences = self.batch.global_batch // self.mesh.data.size
        return step * self.batch.global_batch + self.mesh.data.rank * sequences, sequences

    def count_traffic(self) -> None:
        """Take one step; record the bytes that this rank sends during it, by group and collective."""
        mesh = self.mesh
        axes = {"tensor": mesh.tensor, "context": mesh.context, "data_context": mesh.data_context}
        names = {tuple(dist.get_process_group_ranks(axis.group)): name for name, axis in axes.items() if axis.size > 1}
        original, self.engine.train_step = self.engine.train_step, self._counted
        self.train(1)
        self.engine.train_step = original
        sent_bytes: dict[str, Any] = collections.defaultdict(float)
        for (ranks, collective), sent in self.traffic.sent.items():
            if len(ranks) > 1:
                sent_bytes[f"{names.get(ranks, 'world')} {collective.strip('_')}"] += sent
        self.results["values"].append(sent_bytes)

    def _counted(self, *arguments: Any) -> Any:
        with Traffic() as self.traffic:
            return Engine.train_step(self.engine, *arguments)

    def add_up_fragments(self) -> None:
        """Take one step; record the sum of the squares of all ranks' fragments of its gradient."""
        squares = torch.zeros(1, dtype=torch.float64)

        def add_up(fragments: Iterator[GradientFragment]) -> None:
            for fragment in fragments:
                squares.add_(fragment.values.double().square().sum())

        self._train_observed(add_up)
        dist.all_reduce(squares)
        self.results["values"].append(float(squares))

    def observe(self, expression: str) -> None:
        """Take one step; record the value of an expression about the engine while the gradient exists."""
        self._train_observed(lambda _: self.inspect(expression))

    def _train_observed(self, backward: Callable[[Iterator[GradientFragment]], None]) -> None:
        observer = mock.Mock(forward=contextlib.nullcontext, backward=backward)
        telemetry, self.telemetry = self.telemetry, mock.Mock(observer=lambda _: observer, take=lambda: None)
        self.train(1)
        self.telemetry = telemetry

    def save(self, folder: str) -> str:
        """Save; record why that was refused; return why it failed, or ""."""
        saver = checkpoint.Saver(self.engine, Path(folder), collectives())
        saver.start({"step": self.step})
        result = saver.take_result(wait=True)
        self.results["refused"].append([result.refused, result.poisoned])
        return result.failure

    def load(self, folder: str) -> None:
        self.step = checkpoint.load(self.engine, Path(folder))["step"]

    def evaluate(self, tokens: int | None = None) -> None:
        with self.telemetry.dead_units() as dead:
            held_out = evaluate(self.engine, self.dataset, self.config.sequence_length, tokens)
        self.results["evaluations"].append([held_out.loss, held_out.tokens, *([dead] if dead else [])])
        if held_out.documents is not None:
            self.results["documents"] = [held_out.documents.nats.tolist(), held_out.documents.tokens.tolist()]

    def logits(self, tokens: list[list[int]]) -> None:
        """Record the logits of the last token of these consecutive stretches."""
        cache = Cache(len(self.engine.module.layers))
        for stretch in tokens:
            result = self.engine.logits(torch.tensor([stretch]), cache)
        self.results["values"].append(result[0, -1].tolist())

    def inspect(self, expression: str) -> None:
        """Record the value of an expression about the engine."""
        names = {
            "engine": self.engine,
            "deepspeed": self.engine.deepspeed,
            "torch": torch,
            "optimizer": self.engine.optimizer,
        }
        self.results["values"].append(eval(expression, names | {"inner": inner_optimizer(self.engine)}))


def script(config: str, steps: list[list[Any]], prelude: str = "") -> dict[str, Any]:
    """Run some code, build an engine, and run the steps with it."""
    exec(prelude, {})
    trainer = Trainer(config)
    for step in steps:
        trainer.do(*step)
    result = trainer.results | {"hash": trainer.hash}
    trainer.engine.deepspeed.destroy()
    del trainer
    gc.collect()
    gc.freeze()  # modules and caches remain: DeepSpeed collects garbage with every engine, and would visit them all
    dist.barrier()
    return result


def failing_save(config: str, folder: str, faults: list[list[Any]]) -> list[Any]:
    """Save, train on, and try to save under each (fault, rank); return each failure, and the names in the folder."""
    trainer = Trainer(config)
    trainer.train(1)
    trainer.save(folder)
    results = []
    for fault, rank in faults:
        trainer.train(1)
        with FAULTS[fault]() if RANKS.rank == rank else contextlib.nullcontext():
            failure = trainer.save(folder)
        dist.barrier()
        results.append([failure, sorted(os.listdir(folder))])
        dist.barrier()
    trainer.train(1)
    trainer.save(folder)
    trainer.engine.deepspeed.destroy()
    return [*results, [trainer.results["losses"], sorted(os.listdir(folder))]]


def agree(config: str, folder: str, per_node: int, bad_rank: int = -1, bad_file: str = "") -> list[Any]:  # noqa: ARG001
    """Let rank 0 decide on a checkpoint, where one rank reads wrong bytes of one file; return the decision and what was hashed.

    Args:
        per_node: ranks on a node, as they believe.
    """
    hashed: list[str] = []

    def file_hash(path: Path, *watch: Any) -> str:
        hashed.append(f"{path.parent.name}/{path.name}")
        return "" if RANKS.rank == bad_rank and hashed[-1] == bad_file else manifest.file_hash(path, *watch)

    def decide(verify: Callable[[Path], str]) -> Decision:
        problems = ((path, outline_problem(path) or verify(path)) for path in checkpoints(Path(folder)))
        found = next((path for path, problem in problems if not problem), None)
        if found is None:
            raise TryAgain("none is left")
        return Decision(found, "run")

    ranks = Ranks(RANKS.rank, RANKS.world_size, RANKS.rank % per_node, per_node)
    with mock.patch("model.health.file_hash", file_hash):
        try:
            decision = decide_together(ranks, decide)
        except UserError as error:
            return [str(error), int(error.status), sorted(hashed)]
    return [decision.checkpoint and decision.checkpoint.name, sorted(hashed)]


def command(module: str, arguments: list[str], fault: str | None = None) -> dict[str, Any]:
    """Run `python -m module arguments` in this process, under a fault; return its status and output."""
    import importlib

    main = importlib.import_module(module).main
    variables, before = dict(os.environ), sys.argv
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with FAULTS[fault]() if fault else contextlib.nullcontext():
                run_command(main)
    except SystemExit as error:
        status = error.code
    except BaseException:
        status = traceback.format_exc()
    finally:
        sys.argv = before
        os.environ.clear()
        os.environ.update(variables)
    joined = dist.is_initialized()
    _forget_groups()
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "joined": joined}


def _forget_groups() -> None:
    """Destroy the groups of a training that did not end well; DeepSpeed keeps its own for the life of the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
    groups = sys.modules.get("deepspeed.utils.groups")
    for name, value in list(vars(groups).items()) if groups else ():
        if isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)


JOBS = {"script": script, "failing_save": failing_save, "agree": agree, "command": command}


def main() -> None:
    responses = os.fdopen(os.dup(1), "w", buffering=1)
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)  # the output of DeepSpeed must not be taken for a response
    os.dup2(log, 2)
    if "RANK" in os.environ:
        start_process_group(RANKS, machine.find_device(RANKS), 2.0)
    for line in sys.stdin:
        parameters = json.loads(line)
        try:
            response = {"result": JOBS[parameters.pop("job")](**parameters)}
        except (Exception, UserError):
            response = {"error": traceback.format_exc()}
        responses.write(json.dumps(response) + "\n")


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
