"""Measure what DeepSpeed and ZeRO add to the time of a step: `python -m bench.overhead`.

    steps=60   steps of each contender, in turn in one process, so that a disturbance of the machine affects all of them
    out=FILE   where the figures go (JSON)
    KEY=VALUE  overrides for train.py

On one rank: the engine of `train.py` (ZeRO-1, tensor 1) against a plain PyTorch loop of the same model with the same kernels:
forward, backward, clipping by the norm, fused AdamW; in bf16 the loop keeps fp32 master weights too. On two ranks, in fp32:
ZeRO 1 and 2 against stage 0. It reports the ratio of the medians over the steps, and its range over thirds of the run.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.ranks import as_rank, engine_of, on_ranks, random_tokens
from bench.records import claim_record
from bench.train import machine
from conf.overrides import check_overrides
from conf.shape import Shape
from conf.validate import Batch
from kernels.common.commands import run_command
from kernels.common.files import atomic_write
from kernels.common.options import split_options
from launch.ranks import Ranks

_COMMON = ["telemetry_every=0", "logger=none", "steps=1000"]


def main(argv: list[str]) -> None:
    if argv[:1] == ["--rank"]:
        from training.machine import keep_freed_memory

        keep_freed_memory()
        as_rank(lambda ranks: _seconds(ranks, int(argv[1]), argv[2:]))
    options, overrides = split_options(argv, {"steps": 60, "out": "bench/results/cpu-overhead.json"}, {"steps": 12})
    check_overrides(overrides, options)
    claim_record(options["out"], argv)
    result: dict[str, Any] = {"machine": machine(), "overrides": overrides, "ratios": {}}
    for world, precision in ((1, "bf16"), (1, "fp32"), (2, "fp32")):
        arguments = [str(options["steps"]), *_COMMON, *overrides, f"precision={precision}"]
        seconds = on_ranks(world, "bench.overhead", arguments)[0]
        baseline, *others = seconds
        for name in others:
            ratios = ratios_of_medians(seconds[name], seconds[baseline])
            comparison = f"{name} / {baseline}, {world} rank(s), {precision}"
            result["ratios"][comparison] = ratios
            print(f"{comparison}: {ratios[0]:.3f} ({min(ratios[1:]):.3f} to {max(ratios[1:]):.3f})", flush=True)
    with atomic_write(options["out"]) as file:
        json.dump(result, file, indent=2)
        file.write("\n")


def ratios_of_medians(a: list[float], b: list[float]) -> list[float]:
    """Return the ratio of the medians, over all steps and over each third of them."""
    third = len(a) // 3
    spans = [slice(None), *(slice(n * third, (n + 1) * third) for n in range(3))]
    return [statistics.median(a[span]) / statistics.median(b[span]) for span in spans]


def _seconds(ranks: Ranks, steps: int, overrides: list[str]) -> dict[str, list[float]]:
    """Return the seconds of every step of each contender, the baseline first."""
    contenders: dict[str, Callable[[torch.Tensor], Any]] = {}

    def add(stage: int) -> tuple[Any, Batch, Shape]:
        engine, batch, shape = engine_of([*overrides, f"zero={stage}"], ranks)
        contenders[f"ZeRO-{stage}"] = lambda tokens: engine.train_step(tokens, 1.0)
        return engine, batch, shape

    if ranks.world_size == 1:
        engine, batch, shape = add(1)
        contenders = {"plain loop": _plain_loop(engine), **contenders}
    else:
        add(0)
        add(1)
        engine, batch, shape = add(2)
    tokens = random_tokens(batch, shape, engine.config.sequence_length, ranks.rank)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(steps + 3):
        for name, step in contenders.items():
            start = time.perf_counter()
            step(tokens)
            if number >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _plain_loop(engine: Any) -> Callable[[torch.Tensor], Any]:
    """Return a step of a plain PyTorch loop over a model like the engine's."""
    from conf.schema import Config
    from model.decoder import Decoder
    from model.initialise import initialise
    from model.scaling import scaling_of
    from training.optimizers import UPDATES
    from training.optimizers.groups import parameter_groups

    config: Config = engine.config
    model = Decoder(engine.module.shape, config.model, engine.module.layers[0].attention.backend)
    initialise(model, engine.module.shape, config.seed)
    model.to(engine.dtype)
    weights: list[torch.Tensor] = list(model.parameters())
    low_precision = engine.dtype != torch.float32
    masters = [weight.detach().float().requires_grad_() for weight in weights] if low_precision else weights
    master_of = dict(zip(weights, masters, strict=True))
    groups = parameter_groups(model, config.optim, scaling_of(config.optim, engine.module.shape))
    for group in groups:
        group["params"] = [master_of[weight] for weight in group["params"]]
    optimizer = UPDATES[config.optim.name](groups, config.optim)

    def step(tokens: torch.Tensor) -> None:
        objective, *_ = model(tokens[:, :-1], tokens[:, 1:])
        objective.backward()
        if low_precision:
            for weight, master in master_of.items():
                assert weight.grad is not None
                master.grad = weight.grad.float()
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, config.optim.clip, foreach=True)
        optimizer.step()
        if low_precision:
            with torch.no_grad():
                # A private name, but the fast way to copy many small tensors; torch's own optimizers use it.
                torch._foreach_copy_(weights, masters)  # pyright: ignore[reportPrivateImportUsage]
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    run_command(main, __doc__)
