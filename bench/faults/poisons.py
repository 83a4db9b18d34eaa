"""Poison runs and let their numbers spike: `python -m bench.faults campaign=poisons folder=FOLDER`.

A case sets a number to NaN or infinity, or scales all numbers by 1e4 or 50, in the fifth of eight steps and on the last rank:
in a gradient, the loss, the embedding of a batch, a weight, its master or a moment; in fp32 and bf16, under ZeRO 0 to 3, on one
and two ranks. Required of each:

- every rank takes part in the same decision, and all end with the same status: 3 where numbers stay non-finite, else 0;
- it is noticed in the first step that it changes: at once, or in the next one for what only the optimizer reads;
- what is not finite is named with its rank and tensor; what is finite is reported as a spike;
- every checkpoint that is kept is healthy, and where the run diverged that of step 4 is among them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from bench.faults.runs import TINY, write_corpus
from kernels.common.commands import run_command

STEP = 5  # in which a run is poisoned; a checkpoint is saved every two steps
PLACES = ("gradient", "loss", "batch", "weight", "master", "moment")
VALUES = {"NaN": math.nan, "inf": math.inf, "1e4x": 1e4, "x50": 50.0}
TENSOR = "layers.1.ffn.down"
_LATER = ("master", "moment")  # what only the optimizer reads: the step after shows it
# What RMSNorm takes out again, and what moves no weight far enough to show: no spike to be seen.
_INVISIBLE_OF_TWO = ("weight", "1e4x", 2)  # the gradient of that rank is zero, and of the mean a half is left
_INVISIBLE = {("batch", "1e4x"), ("batch", "x50"), ("moment", "x50"), ("moment", "1e4x")}


@dataclasses.dataclass(frozen=True)
class PoisonCase:
    """What is poisoned, how, and in which run."""

    place: str
    value: str
    zero: int
    precision: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.value} in a {self.place}, ZeRO {self.zero}, {self.precision}, {self.ranks} rank(s)"

    @property
    def finite(self) -> bool:
        """Whether a spike is all that there is to notice."""
        return math.isfinite(VALUES[self.value])


@dataclasses.dataclass(frozen=True)
class PoisonedEnding:
    """How the ranks of a run ended: their statuses (None: hung), and all that they printed."""

    statuses: list[int | None]
    output: str


def cases(number: int, seed: int) -> list[PoisonCase]:
    """Return a sample of all cases, in random order."""
    every = [
        PoisonCase(place, value, zero, precision, ranks)
        for place, value, (zero, precision), ranks in itertools.product(
            PLACES,
            VALUES,
            [*((stage, "fp32") for stage in range(4)), *((stage, "bf16") for stage in (1, 2, 3))],
            (1, 2),
        )
        if (place, value) not in _INVISIBLE and (place, value, ranks) != _INVISIBLE_OF_TWO
    ]
    return random.Random(seed).sample(every, min(number, len(every)))


def run_campaign(folder: Path, number: int, seed: int, overrides: list[str]) -> int:
    """Run the cases, print what came of each and a table; return 1 if something was wrong, else 0."""
    import torch.distributed  # noqa: F401 (imported here once, and not by each of the processes that are forked)

    import training.engine
    import training.telemetry  # noqa: F401

    write_corpus(folder / "corpus")
    words = [*TINY, *_RUN, f"data.path={folder / 'corpus'}", f"data.prepared={folder / 'prepared'}", *overrides]
    rows: dict[tuple[str, str], list[int]] = {}
    wrong = 0
    for case in cases(number, seed):
        run = folder / "runs" / f"{case.place}-{case.value}-{case.zero}-{case.precision}-{case.ranks}"
        own = [f"runs={run.parent}", f"run={run.name}", f"zero={case.zero}", f"precision={case.precision}"]
        problems = judge(case, run, train([*words, *own], case))
        wrong += bool(problems)
        row = rows.setdefault((case.place, case.value), [0, 0])
        row[0] += 1
        row[1] += bool(problems)
        print(f"{case}: {'; '.join(problems) or 'noticed'}", flush=True)
    for (place, value), (tried, bad) in sorted(rows.items()):
        print(f"{place:10} {value:5} {tried:4d} tried {bad:4d} wrong")
    print(f"{sum(tried for tried, _ in rows.values())} poisons and spikes, {wrong} wrong")
    return 1 if wrong else 0


_RUN = ["steps=8", "save_every=2", "keep_last=2", "guard.skip_limit=3", "guard.spike_window=8", "optim.lr=0.001"]


def judge(case: PoisonCase, run: Path, ending: PoisonedEnding) -> list[str]:
    """Return what is wrong with the way in which a poisoned run ended."""
    from model.health import damage
    from model.weights import checkpoints, step_of

    problems = []
    if len(set(ending.statuses)) != 1 or ending.statuses[0] not in (0, 3):
        return [f"ended with {ending.statuses}: {ending.output[-600:]}"]
    kept = list(checkpoints(run / "checkpoints"))
    problems += [f"{path.name} is kept and {problem}" for path in kept if (problem := damage(path))]
    if ending.statuses[0] == 3 and 4 not in map(step_of, kept):
        problems.append("the checkpoint of step 4 is gone")
    if ending.statuses[0] == 0 and 8 not in map(step_of, kept):
        problems.append("the last checkpoint is missing")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = ("spike", "zero_gradient") if case.finite else ("skipped_step", "save_refused")
    noticed = [line for line in lines if line.get("event") in kinds and line["step"] >= STEP]
    if not noticed:
        return [*problems, "nothing was noticed"]
    if noticed[0]["step"] > STEP + (case.place in _LATER):
        problems.append(f"noticed in step {noticed[0]['step']}")
    if not case.finite:
        told = str(noticed[0].get("culprit") or noticed[0].get("reason"))
        place = {"loss": "the loss", "batch": "the output of embedding"}.get(case.place, TENSOR)
        if (
            place not in told
            or f"rank {case.ranks - 1} " not in told
            or ("computes" not in told and "holds" not in told)
        ):
            problems.append(f"the culprit is told as {told!r}")
        kind = "" if case.place in (*_LATER, "loss", "batch") else case.value  # an infinity becomes NaN on its way
        if kind not in told:
            problems.append(f"{case.value} is told as {told!r}")
    return problems


# ------------------------------------------------------------------------------------------------------- inside a rank


@contextlib.contextmanager
def poisoned(case: PoisonCase, rank: int) -> Iterator[None]:
    """Poison a step of the run that is trained while entered, if this is the rank."""
    from training.engine import Engine

    original, taken = Engine.train_step, itertools.count(1)

    def train_step(engine: Engine, *arguments: Any) -> Any:
        if next(taken) != STEP or rank != case.ranks - 1:
            return original(engine, *arguments)
        undo = _POISONS[case.place](engine, VALUES[case.value])
        _UNDO.append(undo)
        return original(engine, *arguments)

    def train_step_clean(engine: Engine, *arguments: Any) -> Any:
        while _UNDO:  # only now: the guard has computed the samples of the step once more
            _UNDO.pop()()
        return train_step(engine, *arguments)

    with mock.patch.object(Engine, "train_step", train_step_clean):
        with mock.patch("training.peak_speed.peak_flops", return_value=(1e12, "assumed")):  # seconds in bf16
            yield


_UNDO: list[Callable[[], Any]] = []


def _spoil(values: Any, value: float) -> Any:
    """Set an element to what is not finite, or scale all by what is; return the same tensor."""
    if math.isfinite(value):
        values.mul_(value)
    elif values.numel():
        values.view(-1)[0] = value
    return values


def _gradient(engine: Any, value: float) -> Callable[[], Any]:
    parameter = dict(engine.module.named_parameters())[TENSOR]
    return parameter.register_hook(lambda gradient: _spoil(gradient.clone(), value)).remove


def _loss(engine: Any, value: float) -> Callable[[], Any]:
    def scale(_: Any, __: Any, outputs: Any) -> Any:
        return tuple(output * value for output in outputs)

    return engine.module.register_forward_hook(scale).remove


def _batch(engine: Any, value: float) -> Callable[[], Any]:
    return engine.module.embedding.register_forward_hook(lambda _, __, output: _spoil(output.clone(), value)).remove


def _weight(engine: Any, value: float) -> Callable[[], Any]:
    for name, parameter in engine.module.named_parameters():
        if name == TENSOR or math.isfinite(value):  # one matrix too large is taken out again by the norms
            _spoil(parameter.data, value)
            if engine.stage == 3:  # which keeps small parameters whole beside their partitions
                _spoil(parameter.ds_tensor.data, value)
    return lambda: None


def _state(key: str) -> Callable[[Any, float], Callable[[], Any]]:
    def spoil(engine: Any, value: float) -> Callable[[], Any]:
        import torch

        from training.fragments import fragments

        with torch.no_grad():
            for fragment in fragments(engine):
                if fragment.size and (fragment.name == TENSOR or math.isfinite(value)):
                    _spoil(fragment.read(key), value)
        return lambda: None

    return spoil


_POISONS: dict[str, Callable[[Any, float], Callable[[], Any]]] = {
    "gradient": _gradient,
    "loss": _loss,
    "batch": _batch,
    "weight": _weight,
    "master": _state(""),
    "moment": _state("exp_avg"),
}


def train(arguments: list[str], case: PoisonCase, timeout: int = 300) -> PoisonedEnding:
    """Run train.py on the case's ranks, forks of this process, and poison them.

    Args:
        timeout: seconds after which a rank counts as hung.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    reader, writer = os.pipe()
    children = []
    for rank in range(case.ranks):
        child = os.fork()
        if not child:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            signal.alarm(timeout)
            if case.ranks > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks}
                os.environ.update({name: str(value) for name, value in names.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            from launch.ranks import leave_after
            from train import main

            sys.argv = ["train.py", *arguments]
            with poisoned(case, rank):
                leave_after(lambda: run_command(main))
        children.append(child)
    os.close(writer)
    with open(reader, "rb") as pipe:
        output = pipe.read().decode("utf-8", errors="replace")
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return PoisonedEnding([None if status == -signal.SIGALRM else status for status in statuses], output)
