"""Compare tokens per second of training with other libraries' models in a plain loop: `python -m bench.train`.

    rounds=3    how often each contender runs          steps=24    steps per run; the first quarter warms up
    out=FILE    where the figures go (JSON)            and any override of train.py: model=... sequence_length=...

Contenders run one at a time, each in its own process, round after round, so that a disturbance of the machine affects all:

    ours                             `python train.py` itself: DeepSpeed, data loading, metrics, guards
    transformers                     Transformers' model of the same shape in a plain loop: forward, backward, clip, fused AdamW
    transformers compiled            the same under torch.compile: the whole model, default mode
    litgpt compiled                  LitGPT's GPT and loss, compiled, as `litgpt pretrain` trains it
    torchtune                        torchtune's Llama 3.2 and chunked loss, not compiled: the default of its recipes
    transformers, default allocator  the first again, with the memory allocator as it comes

All others have the allocator, the threads and the treatment of denormal numbers that `train.py` sets (training/machine.py), and
all train in the dtype that `precision` gives on this machine. Compiling happens in the first step, so no figure includes it. A
library that cannot be imported is left out, and the report says so: `pip install --no-deps litgpt lightning lightning-utilities
jsonargparse torchmetrics`, and `pip install --no-deps torchtune torchao==0.13.0 torchdata tiktoken blobfile`, keep the torch
that is installed.

The speed of a run is the median over its steps. The report has the median over the rounds, with the range, and how many cores
other processes kept busy meanwhile: figures of a machine that does other work say little.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from conf.load import load
from conf.validate import validate
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import atomic_write
from kernels.common.options import split_options
from launch.estimate.counts import shape_of

OTHERS = (
    "transformers",
    "transformers compiled",
    "litgpt compiled",
    "torchtune",
    "transformers, default allocator",
)
_FIXED = ["++logger=none", "++eval_every=0", "save_every=0", "++prompts=[]", "log_every=1"]


def main(argv: list[str]) -> None:
    if argv[:1] == ["--contender"]:  # a child process: one run of a contender
        _run_contender(argv[1], int(argv[2]), argv[3:])
        return
    defaults = {"rounds": 3, "steps": 24, "out": "bench/results/cpu-train.json"}
    options, overrides = split_options(argv, defaults, {"rounds": 1, "steps": 8})
    steps = options["steps"]
    config = load(overrides)
    validate(config, 1)
    if {layer.arm.name for layer in shape_of(config).ffn} != {"swiglu"}:
        raise UserError("the other libraries' models are Llamas: compare them with ffn=swiglu")
    tokens = config.global_batch_size * config.sequence_length
    runs: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for number in range(options["rounds"]):
        for name in ("ours", *OTHERS):
            if "left_out" in facts.get(name, {}):
                continue
            others = BusyElsewhere()
            run = {"seconds": seconds_of_steps(overrides, steps)} if name == "ours" else _other(name, overrides, steps)
            facts[name] = {fact: value for fact, value in run.items() if fact != "seconds"}
            if "left_out" in run:
                print(f"{name} is left out: {run['left_out']}", flush=True)
                continue
            speed = tokens / statistics.median(run["seconds"][steps // 4 :])
            runs.setdefault(name, []).append(speed)
            busy.setdefault(name, []).append(others.cores())
            line = f"round {number + 1}  {name:<32}{speed:>9,.0f} tokens/s   others: {busy[name][-1]:.2f} core(s)"
            print(line, flush=True)
    result = {
        "machine": machine(),
        "torch": importlib.metadata.version("torch"),
        "overrides": overrides,
        "steps": steps,
        "tokens_per_step": tokens,
        "contenders": facts,
        "tokens_per_second": runs,
        "cores_busy_elsewhere": busy,
        "ratios": _report(runs),
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
        line = f"{name:<32}{statistics.median(speeds):>9,.0f} tokens/s  ({min(speeds):,.0f} to {max(speeds):,.0f})"
        if name != "ours":
            ratios = [ours / theirs for ours, theirs in zip(runs["ours"], speeds, strict=True)]
            median = statistics.median(ratios)
            figures[name] = {"median": median, "range": [min(ratios), max(ratios)], "rounds": ratios}
            line += f"   ours is {median:.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})"
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


def _other(name: str, overrides: list[str], steps: int) -> dict[str, Any]:
    return json.loads(_run([sys.executable, "-m", "bench.train", "--contender", name, str(steps), *overrides]))


def _run(command: list[str]) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def _run_contender(name: str, steps: int, overrides: list[str]) -> None:
    """Train one contender in this process and print what `measure` returns as JSON."""
    if name != "transformers, default allocator":
        from training.machine import keep_freed_memory

        keep_freed_memory()  # before anything allocates a tensor
    from bench.contenders import measure

    print(json.dumps(measure(name, overrides, steps)))


class BusyElsewhere:
    """Counts the processor time of processes that are neither this one nor its children, from when it is made."""

    def __init__(self) -> None:
        self._started, self._start_seconds = time.perf_counter(), self._seconds()

    def cores(self) -> float:
        """Return the cores that other processes kept busy since the start, on average; children must have ended."""
        seconds = self._seconds() - self._start_seconds
        return max(0.0, seconds / (time.perf_counter() - self._started))

    @staticmethod
    def _seconds() -> float:
        times = psutil.cpu_times()
        # Linux counts guests' time in `user` as well; a core that the host withholds (steal) is busy, too.
        idle = (
            times.idle
            + getattr(times, "iowait", 0.0)
            + getattr(times, "guest", 0.0)
            + getattr(times, "guest_nice", 0.0)
        )
        own = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(times) - idle - sum(usage.ru_utime + usage.ru_stime for usage in own)


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
