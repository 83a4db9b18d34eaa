"""Compare tokens per second of training with Transformers' LlamaForCausalLM: `python -m bench.train`.

    rounds=3    how often each contender runs          steps=24    steps per run; the first quarter warms up
    out=FILE    where the figures go (JSON)            and any override of train.py: model=... sequence_length=...

Contenders run one at a time, each in its own process, round after round, so that a disturbance of the machine affects all:

    ours          `python train.py` itself: DeepSpeed ZeRO-1, bf16 with fp32 master weights, data loading, metrics
    hf            Transformers' model of the same shape, bf16, in a plain loop: forward, backward, clip, fused AdamW
    hf+allocator  the same, with the memory allocator set as `train.py` sets it (training/machine.py: keep_freed_memory)

The speed of a run is the median over its steps. The report has the median over the rounds, with the range.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from conf.load import load
from conf.validate import validate
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import atomic_write
from kernels.common.options import split_options

CONTENDERS = ("ours", "hf", "hf+allocator")
_FIXED = ["++logger=none", "++eval_every=0", "save_every=0", "++prompts=[]", "log_every=1"]


def main(argv: list[str]) -> None:
    if argv[:1] == ["--contender"]:  # a child process: one run of a Transformers contender
        _measure_hf(argv[1], argv[2:])
        return
    defaults = {"rounds": 3, "steps": 24, "out": "bench/results/cpu-train.json"}
    options, overrides = split_options(argv, defaults, {"rounds": 1, "steps": 8})
    steps = options["steps"]
    config = load(overrides)
    validate(config, 1)
    runs: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(options["rounds"]):
        for name in CONTENDERS:
            seconds = seconds_of_steps(overrides, steps) if name == "ours" else _hf(name, overrides, steps)
            speed = config.global_batch_size * config.sequence_length / statistics.median(seconds[steps // 4 :])
            runs[name].append(speed)
            print(f"round {number + 1}  {name:<14}{speed:>9,.0f} tokens/s", flush=True)
    figures = _report(runs)
    result = {
        "machine": machine(),
        "overrides": overrides,
        "steps": steps,
        "tokens_per_second": runs,
        "ratios": figures,
    }
    Path(options["out"]).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options["out"]) as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    print(f"written to {options['out']}")


def _report(runs: dict[str, list[float]]) -> dict[str, Any]:
    """Print each contender's speed; return how many times faster ours is, from the ratio of each round."""
    figures = {}
    print()
    for name, speeds in runs.items():
        line = f"{name:<14}{statistics.median(speeds):>9,.0f} tokens/s  ({min(speeds):,.0f} to {max(speeds):,.0f})"
        if name != "ours":
            ratios = [ours / theirs for ours, theirs in zip(runs["ours"], speeds, strict=True)]
            figures[name] = {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
            line += f"   ours is {statistics.median(ratios):.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line)
    return figures


def seconds_of_steps(overrides: list[str], steps: int) -> list[float]:
    """Train for `steps` steps with `train.py`; return the seconds of each step, from the run's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        kept = [override for override in overrides if override.partition("=")[0] not in ("steps", "tokens")]
        command = [sys.executable, "train.py", *kept, *_FIXED, f"steps={steps}", "run=bench", f"runs={folder}"]
        _run(command)
        metrics = Path(folder, "bench", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        config = load(overrides)
        tokens = config.global_batch_size * config.sequence_length
        return [tokens / r["tokens_per_second"] for r in map(json.loads, metrics) if r["kind"] == "train"]


def _hf(name: str, overrides: list[str], steps: int) -> list[float]:
    return json.loads(_run([sys.executable, "-m", "bench.train", "--contender", name, str(steps), *overrides]))


def _run(command: list[str]) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def _measure_hf(name: str, arguments: list[str]) -> None:
    """Train Transformers' model and print the seconds of each step as JSON."""
    if name == "hf+allocator":
        from training.machine import keep_freed_memory

        keep_freed_memory()
    import time

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bench.huggingface import widths
    from data.batches import BatchStream, open_dataset
    from data.prepare import prepare
    from launch.estimate.counts import shape_of

    steps, config = int(arguments[0]), load(arguments[1:])
    dataset = open_dataset(prepare(config.data, config.tokenizer))
    stream = BatchStream(dataset, config.sequence_length, config.data_seed)
    shape = shape_of(config, dataset.vocab_size)
    settings = LlamaConfig(**widths(shape), max_position_embeddings=config.sequence_length, use_cache=False)
    model = LlamaForCausalLM(settings).bfloat16()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, weight_decay=0.1, fused=True)
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        rows = torch.from_numpy(stream.samples(step * config.global_batch_size, config.global_batch_size))[:, :-1]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds))


def machine() -> str:
    """Return the name of the CPU and its cores, for the head of a report."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    run_command(main, __doc__)
