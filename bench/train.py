"""Compare tokens per second of training with other libraries' models in a plain loop: `python -m bench.train`.

    rounds=3   how often each contender runs
    steps=24   steps per run; the first quarter warms up
    out=FILE   where the figures go (JSON)
    KEY=VALUE  overrides for train.py: model=..., sequence_length=...

Contenders run one at a time, each in its own process, round after round, so that a disturbance of the machine affects all:

    ours                             `python train.py` itself: DeepSpeed, data loading, metrics, guards
    transformers                     Transformers' model of the same shape in a plain loop: forward, backward, clip, fused AdamW
    transformers compiled            the same under torch.compile: the whole model, default mode
    litgpt compiled                  LitGPT's GPT and loss, compiled, as `litgpt pretrain` trains it
    torchtune                        torchtune's Llama 3.2 and chunked loss, not compiled: the default of its recipes
    transformers, default allocator  the first again, with the memory allocator as it comes
    engine alone                     the engine of `train.py` without its loop: no metrics, guards or saves
    matrix products alone            a step's projections, forward and backward, and nothing else: what no step can undercut

All others have the allocator, the threads and the treatment of denormal numbers that `train.py` sets (training/machine.py), and
all train in the dtype that `precision` gives on this machine. Compiling happens in the first step, so no figure includes it. A
library that cannot be imported is left out, and the report says so: `pip install --no-deps litgpt lightning lightning-utilities
jsonargparse torchmetrics`, and `pip install --no-deps torchtune torchao==0.13.0 torchdata tiktoken blobfile`, keep the torch
that is installed.

The speed of a run is the median over its steps. The report has the median over the rounds, with the range, and how many cores
other processes kept busy meanwhile. Where they are many, speeds say little. With OMP_NUM_THREADS=1 the processor time of a step
still does: the report compares the engine's with the others', too. With more threads, that of waiting threads is part of it.
"""

from __future__ import annotations

import dataclasses
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

from bench.records import claim_record
from conf.load import load
from conf.overrides import check_overrides
from conf.shape import shape_of
from conf.validate import validate
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import atomic_write
from kernels.common.options import split_options

OTHERS = (
    "transformers",
    "transformers compiled",
    "litgpt compiled",
    "torchtune",
    "transformers, default allocator",
    "engine alone",
    "matrix products alone",
)
_FIXED = ["++logger=none", "++eval_every=0", "save_every=0", "++prompts=[]", "log_every=1"]


def main(argv: list[str]) -> None:
    if argv[:1] == ["--contender"]:  # a child process: one run of a contender
        _run_contender(argv[1], int(argv[2]), argv[3:])
        return
    defaults = {"rounds": 3, "steps": 24, "out": "bench/results/cpu-train.json"}
    options, overrides = split_options(argv, defaults, {"rounds": 1, "steps": 8})
    check_overrides(overrides, options)
    steps = options["steps"]
    config = load(overrides)
    validate(config, 1)
    if {layer.arm.name for layer in shape_of(config).ffn} != {"swiglu"}:
        raise UserError("the other libraries' models are Llamas: compare them with ffn=swiglu")
    claim_record(options["out"], argv)
    measured = Measured(config.global_batch_size * config.sequence_length)
    for number in range(options["rounds"]):
        for name in ("ours", *OTHERS):
            if "left_out" not in measured.contenders.get(name, {}):
                others = BusyElsewhere()
                run = (
                    {"seconds": seconds_of_steps(overrides, steps)}
                    if name == "ours"
                    else _other(name, overrides, steps)
                )
                print(f"round {number + 1}  {measured.add(name, run, others.cores())}", flush=True)
    result = {
        "machine": machine(),
        "torch": importlib.metadata.version("torch"),
        "overrides": overrides,
        "steps": steps,
        **dataclasses.asdict(measured),
        "ratios": ratios(measured.tokens_per_second, "ours"),
        "ratios_by_cpu_time": ratios(measured.tokens_per_cpu_second, "engine alone"),
    }
    _print_report(measured, result["ratios"], result["ratios_by_cpu_time"])
    with atomic_write(options["out"]) as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    print(f"written to {options['out']}")


@dataclasses.dataclass
class Measured:
    """The runs of all contenders: figures per round, by contender, and facts about each."""

    tokens_per_step: int
    contenders: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    tokens_per_second: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    tokens_per_cpu_second: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    cores_busy_elsewhere: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, name: str, run: dict[str, Any], busy: float) -> str:
        """Add a run: its seconds per step, of which the first quarter warms up, or why it is left out. Return a line on it."""
        self.contenders[name] = {fact: value for fact, value in run.items() if not fact.endswith("seconds")}
        if "left_out" in run:
            return f"{name} is left out: {run['left_out']}"
        for kind, figures in (("seconds", self.tokens_per_second), ("cpu_seconds", self.tokens_per_cpu_second)):
            if kind in run:
                median = statistics.median(run[kind][len(run[kind]) // 4 :])
                figures.setdefault(name, []).append(self.tokens_per_step / median)
        self.cores_busy_elsewhere.setdefault(name, []).append(busy)
        return f"{name:<32}{self.tokens_per_second[name][-1]:>9,.0f} tokens/s   others: {busy:.2f} core(s)"


def ratios(runs: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Return how many times faster `base` is than each other contender, from the ratio of each round."""
    figures = {}
    for name in runs.keys() - {base}:
        rounds = [own / theirs for own, theirs in zip(runs[base], runs[name], strict=True)]
        figures[name] = {"median": statistics.median(rounds), "range": [min(rounds), max(rounds)], "rounds": rounds}
    return {name: figures[name] for name in runs if name in figures}


def _print_report(measured: Measured, by_time: dict[str, Any], by_cpu_time: dict[str, Any]) -> None:
    print()
    for name, speeds in measured.tokens_per_second.items():
        line = f"{name:<32}{statistics.median(speeds):>9,.0f} tokens/s  ({min(speeds):,.0f} to {max(speeds):,.0f})"
        for what, figures in (("ours is", by_time), ("by CPU time the engine is", by_cpu_time)):
            if name in figures:
                low, high = figures[name]["range"]
                line += f"   {what} {figures[name]['median']:.2f}x  ({low:.2f} to {high:.2f})"
        print(line)


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
