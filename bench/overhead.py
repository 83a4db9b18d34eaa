"""What DeepSpeed and ZeRO cost a step: `python -m bench.overhead`.

    steps=60    steps of each contender, taken in turn in one process, so that what disturbs one disturbs all
    out=FILE    where the figures go (JSON)            and any override of train.py

On one rank: the engine of `train.py` (ZeRO-1, tensor 1) against a plain PyTorch loop of the same model with the same kernels:
forward, backward, clip by the norm, fused AdamW; in bf16 the loop keeps fp32 masters too. On two ranks, in fp32: ZeRO 1 and 2
against stage 0. What is reported is the ratio of the medians over the steps, and its range over thirds of the run.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.ranks import as_rank, engine_of, on_ranks, random_tokens
from bench.train import machine
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
    result: dict[str, Any] = {"machine": machine(), "overrides": overrides, "ratios": {}}
    for world, precision in ((1, "bf16"), (1, "fp32"), (2, "fp32")):
        words = [str(options["steps"]), *_COMMON, *overrides, f"precision={precision}"]
        seconds = on_ranks(world, "bench.overhead", words)[0]
        first = next(iter(seconds))
        for name in list(seconds)[1:]:
            ratios = _ratios(seconds[name], seconds[first])
            what = f"{name} / {first}, {world} rank(s), {precision}"
            result["ratios"][what] = ratios
            print(f"{what}: {ratios[0]:.3f} ({min(ratios[1:]):.3f} to {max(ratios[1:]):.3f})", flush=True)
    with atomic_write(options["out"]) as file:
        json.dump(result, file, indent=2)
        file.write("\n")


def _ratios(a: list[float], b: list[float]) -> list[float]:
    """Return the ratio of the medians: over all steps, and over each third."""
    third = len(a) // 3
    cuts = [slice(None), *(slice(n * third, (n + 1) * third) for n in range(3))]
    return [statistics.median(a[cut]) / statistics.median(b[cut]) for cut in cuts]


def _seconds(ranks: Ranks, steps: int, words: list[str]) -> dict[str, list[float]]:
    contenders: dict[str, Callable[[torch.Tensor], Any]] = {}
    for stage in (1,) if ranks.world_size == 1 else (0, 1, 2):
        engine, batch, shape = engine_of([*words, f"zero={stage}"], ranks)
        contenders[f"ZeRO-{stage}"] = lambda tokens, engine=engine: engine.train_step(tokens, 1.0)
    if ranks.world_size == 1:
        contenders = {"plain loop": _plain(engine), **contenders}
    tokens = random_tokens(batch, shape, engine.config.sequence_length, ranks.rank)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(steps + 3):
        for name, step in contenders.items():
            start = time.perf_counter()
            step(tokens)
            if number >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _plain(engine: Any) -> Callable[[torch.Tensor], Any]:
    """Return a step of a plain loop over a model like the engine's."""
    from conf.schema import Config
    from model.decoder import Decoder
    from model.initialise import initialise
    from training.engine import parameter_groups

    config: Config = engine.config
    model = Decoder(engine.module.shape, config.model, engine.module.layers[0].attention.backend)
    initialise(model, engine.module.shape, config.seed)
    model.to(engine.dtype)
    own = list(model.parameters())
    halves = engine.dtype != torch.float32
    masters = [p.detach().float().requires_grad_() for p in own] if halves else own
    of = dict(zip(own, masters, strict=True))
    groups = parameter_groups(model, config.optim.weight_decay)
    for group in groups:
        group["params"] = [of[p] for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(tokens: torch.Tensor) -> None:
        objective, _ = model(tokens[:, :-1], tokens[:, 1:])
        objective.backward()
        if halves:
            for p, master in of.items():
                master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, config.optim.clip, foreach=True)
        optimizer.step()
        if halves:
            with torch.no_grad():
                torch._foreach_copy_(own, masters)
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    run_command(main, __doc__)
