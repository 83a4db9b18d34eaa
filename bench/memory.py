"""What a rank keeps under ZeRO 0 to 3 and tensor 1 and 2, beside the formula: `python -m bench.memory`.

    world=4     ranks on this machine (CPU, gloo)          and any override of train.py
    out=FILE    where the table goes

Every tensor that is alive in a process between backward and step is counted, each storage once, less DeepSpeed's buffers of
`zero.bucket_elements`, which do not grow with the model. The formula is `model.accounting.state_bytes`: 2 + 2 + 12 bytes a
parameter in bf16, shared as the ZeRO paper shares them; stage 0 is measured in fp32, 4 + 4 + 8.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import torch

from bench.ranks import engine_of, on_ranks, random_tokens, this_rank
from bench.train import machine, options_of
from conf.errors import UserError
from conf.files import atomic_write
from conf.load import run_command

_MODEL = [
    "model=nano",
    "model.d_model=512",
    "model.n_layers=8",
    "model.n_heads=8",
    "model.d_ff=1536",
    "sequence_length=16",
]
_MODEL += ["tokenizer.vocab_size=8192", "telemetry_every=0", "logger=none", "steps=2", "zero.bucket_elements=1000000"]


def main(argv: list[str]) -> None:
    if any(word in ("-h", "--help") for word in argv):
        print(__doc__)
        return
    if argv[:1] == ["--rank"]:
        _measure(argv[1:])
        return
    options, overrides = options_of(argv, world="4", out="bench/results/cpu-memory.md")
    if not options["world"].isdigit() or int(options["world"]) < 2:
        raise UserError("world=N is a whole number, 2 or more")
    world = int(options["world"])
    lines = [
        f"# Memory a rank, {world} ranks ({machine()}; `python -m bench.memory`)",
        "",
        "MiB of live tensors between backward and step, beside the formula: weights + gradients + optimizer.",
        "",
        "| tensor | ZeRO | dtype | parameters a tensor rank | measured | formula | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for tensor in (1, 2):
        for stage in (0, 1, 2, 3):
            precision = "fp32" if stage == 0 else "bf16"
            words = [*_MODEL, *overrides, f"zero={stage}", f"precision={precision}", f"parallel.tensor={tensor}"]
            told = on_ranks(world, "bench.memory", [*words, f"global_batch_size={world // tensor}"])
            worst = max(told, key=lambda rank: rank["measured"])
            measured, formula = worst["measured"], worst["formula"]
            lines.append(
                f"| {tensor} | {stage} | {precision} | {worst['parameters']:,} | {measured / 2**20:.1f} | "
                f"{formula / 2**20:.1f} | {measured / formula:.3f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    with atomic_write(options["out"]) as file:
        file.write("\n".join(lines) + "\n")


def _measure(words: list[str]) -> None:
    from unittest import mock

    from model.accounting import rank_parameters, state_bytes

    ranks = this_rank()
    before = _alive()
    engine, batch, shape = engine_of(words, ranks)
    config, seen = engine.config, []
    tokens = random_tokens(batch, shape, config.sequence_length, ranks.rank)

    def look(_: Any) -> None:
        gc.collect()
        seen.append({address: size for address, size in _alive().items() if address not in before})

    observer = mock.Mock(forward=mock.MagicMock(), backward=look)
    for _ in range(2):  # the optimizer's state exists from the first step on
        engine.train_step(tokens, 1.0, observer)
    buffers = {2 * config.zero.bucket_elements, 4 * config.zero.bucket_elements}
    measured = sum(size for size in seen[-1].values() if size not in buffers)
    formula = state_bytes(shape, engine.mesh.tensor.size, engine.mesh.replicas.size, engine.stage)
    parameters = rank_parameters(shape, engine.mesh.tensor.size)
    print(json.dumps({"measured": measured, "formula": sum(formula.values()), "parameters": parameters}))


def _alive() -> dict[int, int]:
    """Return the bytes of every storage of a tensor that is alive, by its address."""
    sizes = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


if __name__ == "__main__":
    run_command(main)
