"""Measure the memory per rank under ZeRO 0 to 3 and tensor 1 and 2, against the formula: `python -m bench.memory`.

    world=4    ranks on this machine (CPU, gloo)
    out=FILE   where the table goes
    KEY=VALUE  overrides for train.py

The measurement counts every tensor that is alive in a process after a backward, each storage once, except DeepSpeed's buffers
of `zero.bucket_elements`, whose size does not depend on the model. It reports the largest count of a step's micro-batches. The
formula is `launch.estimate.counts.state_bytes`. The ZeRO paper's is 2 + 2 + 12 bytes per parameter in bf16 and 4 + 4 + 8 in
fp32, of which stage 1 shards the last term, stage 2 the gradients too, and stage 3 everything.
"""

from __future__ import annotations

import gc
import itertools
import sys

import torch

from bench.ranks import as_rank, engine_of, on_ranks, random_tokens
from bench.records import claim_record
from bench.train import machine
from conf.overrides import check_overrides
from kernels.common.commands import run_command
from kernels.common.files import atomic_write
from kernels.common.options import split_options
from launch.ranks import Ranks

_MODEL = [
    "model=nano",
    "model.d_model=512",
    "model.n_layers=4",
    "model.n_heads=8",
    "model.d_ff=1536",
    "sequence_length=16",
    "tokenizer.vocab_size=8192",
    "micro_batch_size=1",
    "telemetry_every=0",
    "logger=none",
    "steps=2",
    "++zero.bucket_elements=1000000",  # of no effect at stage 0
]


def main(argv: list[str]) -> None:
    if argv[:1] == ["--rank"]:
        as_rank(lambda ranks: _measured(ranks, argv[1:]))
    options, overrides = split_options(argv, {"world": 4, "out": "bench/results/cpu-memory.md"}, {"world": 2})
    check_overrides(overrides, options)
    claim_record(options["out"], argv)
    world = options["world"]
    lines = [
        f"# Memory per rank, {world} ranks ({machine()}; `python -m bench.memory`)",
        "",
        "MiB of live tensors after a backward, against the formula (weights + gradients + optimizer) and the ZeRO paper's.",
        "",
        "| tensor | ZeRO | dtype | micro-batches | parameters per tensor rank | measured | formula | ratio | paper | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    kinds = [(0, "fp32"), *itertools.product((1, 2, 3), ("fp32", "bf16"))]
    for tensor, (stage, precision), accumulation in itertools.product((1, 2), kinds, (1, 2)):
        batch = f"global_batch_size={accumulation * world // tensor}"
        run = [*_MODEL, *overrides, f"zero={stage}", f"precision={precision}", f"parallel.tensor={tensor}", batch]
        worst = max(on_ranks(world, "bench.memory", run), key=lambda rank: rank["measured"])
        sizes = "".join(
            f" {worst[name] / 2**20:.1f} | {worst['measured'] / worst[name]:.3f} |" for name in ("formula", "paper")
        )
        lines.append(
            f"| {tensor} | {stage} | {precision} | {accumulation} | {worst['parameters']:,} | "
            f"{worst['measured'] / 2**20:.1f} |{sizes}"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    with atomic_write(options["out"]) as file:
        file.write("\n".join(lines) + "\n")


def _measured(ranks: Ranks, overrides: list[str]) -> dict[str, float]:
    """Return the bytes of live tensors on this rank after a backward, and those of both formulas."""
    from launch.estimate.counts import rank_parameters, state_bytes

    before = alive()
    engine, batch, shape = engine_of(overrides, ranks)
    config = engine.config
    tokens = random_tokens(batch, shape, config.sequence_length, ranks.rank)
    buffers = {2 * config.zero.bucket_elements, 4 * config.zero.bucket_elements}
    backward = engine.deepspeed.backward
    measured: list[int] = []  # per micro-batch

    def backward_then_measure(objective: torch.Tensor) -> None:
        backward(objective)
        gc.collect()
        gradients = [
            parameter.grad for parameter in engine.module.parameters()
        ]  # otherwise the collector may not list them
        new = [size for address, size in alive().items() if address not in before]
        measured.append(sum(size for size in new if size not in buffers))
        del gradients

    engine.deepspeed.backward = backward_then_measure
    for _ in range(2):  # the optimizer's state exists from the first step on
        measured.clear()
        engine.train_step(tokens, 1.0)
    tensor, dp_cp, stage = engine.mesh.tensor.size, engine.mesh.data_context.size, config.zero.stage
    formula = state_bytes(
        shape, tensor, dp_cp, stage, config.precision.name == "bf16", batch.accumulation, optimizer=config.optim.name
    )
    own, width = rank_parameters(shape, tensor), 2 if config.precision.name == "bf16" else 4
    states = [width * own, width * own, (16 - 2 * width) * own]  # weights, gradients, optimizer
    paper = sum(size / (dp_cp if stage >= sharded else 1) for size, sharded in zip(states, (3, 2, 1), strict=True))
    return {"measured": max(measured), "formula": sum(formula.values()), "paper": paper, "parameters": own}


def alive() -> dict[int, int]:
    """Return {address: bytes} of the storages of all live tensors."""
    sizes = {}
    for candidate in gc.get_objects():
        if isinstance(candidate, torch.Tensor) and candidate.device.type == "cpu":
            storage = candidate.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


if __name__ == "__main__":
    run_command(main, __doc__)
