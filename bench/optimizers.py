"""Measure the time of a step under each optimizer: `python -m bench.optimizers`.

    models=nano,60m  of these models
    steps=24         steps of each optimizer, in turn in one process, so that a disturbance of the machine affects all of them
    quick=true       a tiny model, for the tests
    out=FILE         where the table goes
    KEY=VALUE        overrides for train.py, for every model

Training steps of the engine of `train.py` (ZeRO-1) on random tokens: on one rank with all cores, and on two ranks that share
them. The ratio to AdamW is that of the medians, with its range over thirds of the steps. The share of Newton-Schulz is the time
in which matrices are computed, over the time of the step, on the rank that spends most; the rest of what Muon adds is copying,
and on two ranks the exchange of matrices.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from bench.overhead import ratios_of_medians
from bench.ranks import as_rank, engine_of, on_ranks, random_tokens
from bench.records import claim_record
from bench.train import machine
from conf.overrides import check_overrides
from kernels.common.commands import run_command
from kernels.common.errors import unknown
from kernels.common.files import atomic_write
from kernels.common.options import split_options
from launch.ranks import Ranks

OPTIMIZERS = ("adamw", "muon", "normuon")
_COMMON = ["model=nano", "telemetry_every=0", "logger=none", "steps=1000", "zero=1"]
_MODELS = {
    "nano": [],
    "60m": [
        *("model.d_model=640", "model.n_layers=11", "model.n_heads=10", "model.d_ff_gated=1728"),
        *("sequence_length=256", "global_batch_size=8"),
    ],
}
_TINY = {
    "nano": [
        *("model.d_model=64", "model.n_layers=1", "model.n_heads=1", "model.d_ff_gated=96", "tokenizer.vocab_size=256"),
        *("sequence_length=32", "global_batch_size=4"),
    ]
}
_WARM_UP = 2


def main(argv: list[str]) -> None:
    if argv[:1] == ["--rank"]:
        from training.machine import keep_freed_memory

        keep_freed_memory()
        as_rank(lambda ranks: _measured(ranks, int(argv[1]), argv[2:]))
    defaults = {"steps": 24, "quick": False, "models": "nano,60m", "out": "bench/results/cpu-optimizers.md"}
    options, overrides = split_options(argv, defaults, {"steps": 3})
    check_overrides(overrides, options)
    claim_record(options["out"], argv)
    models = _TINY if options["quick"] else _MODELS
    chosen = list(models) if options["quick"] else options["models"].split(",")
    command = " ".join(["python -m bench.optimizers", *(word for word in argv if not word.startswith("out="))])
    lines = [
        f"# Seconds per step by optimizer ({machine()}; `{command}`)",
        "",
        "| model | tokens per step | ranks | optimizer | seconds | over AdamW | share of Newton-Schulz |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in chosen:
        if name not in models:
            raise unknown("model", name, models)
        for world in (1, 2):
            lines += _rows(name, world, options["steps"], [*_COMMON, *models[name], *overrides])
    with atomic_write(options["out"]) as file:
        file.write("\n".join(lines) + "\n")
    print(f"written to {options['out']}")


def _rows(name: str, world: int, steps: int, overrides: list[str]) -> list[str]:
    """Return the lines of a model on some ranks; print them, too."""
    threads = max(1, len(os.sched_getaffinity(0)) // world)
    ranks = on_ranks(world, "bench.optimizers", [str(steps), *overrides], threads=threads)
    # A step ends when its last rank has.
    seconds = {
        key: [max(each) for each in zip(*(rank["seconds"][key] for rank in ranks), strict=True)] for key in OPTIMIZERS
    }
    lines = []
    for optimizer in OPTIMIZERS:
        own = statistics.median(seconds[optimizer])
        ratios = ratios_of_medians(seconds[optimizer], seconds["adamw"])
        share = max(rank["computing"][optimizer] for rank in ranks) / sum(seconds[optimizer])
        beside = f"{ratios[0]:.2f} ({min(ratios[1:]):.2f} to {max(ratios[1:]):.2f}) | {share:.1%}"
        lines.append(
            f"| {name} | {ranks[0]['tokens']:,} | {world} | {optimizer} | {own:.3f} | "
            + (beside if optimizer != "adamw" else " | ")
            + " |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def _measured(ranks: Ranks, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Return the seconds of every step of each optimizer, and the sum of those in which it computed matrices."""
    built = {name: engine_of([*overrides, f"optim={name}"], ranks) for name in OPTIMIZERS}
    engines = {name: engine for name, (engine, _, _) in built.items()}
    engine, batch, shape = built["adamw"]
    tokens = random_tokens(batch, shape, engine.config.sequence_length, ranks.rank)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    computing = dict.fromkeys(engines, 0.0)
    for number in range(steps + _WARM_UP):
        for name, engine in engines.items():
            with _timed(engine.matrix_optimizer) as spent:
                start = time.perf_counter()
                engine.train_step(tokens, 1.0)
                if number >= _WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
                    computing[name] += sum(spent)
    return {"seconds": seconds, "computing": computing, "tokens": batch.tokens_per_step}


@contextlib.contextmanager
def _timed(optimizer: Any) -> Iterator[list[float]]:
    """Yield a list of the seconds of each call in which an optimizer computes matrices."""
    spent: list[float] = []
    if optimizer is None:
        yield spent
        return
    original = optimizer.compute

    def compute(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = original(*arguments)
        spent.append(time.perf_counter() - start)
        return result

    optimizer.compute = compute
    try:
        yield spent
    finally:
        del optimizer.compute  # that of the class again


if __name__ == "__main__":
    run_command(main, __doc__)
