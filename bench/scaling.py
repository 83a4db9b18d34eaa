"""Measure how tokens per second change with size, beside what the FLOPs predict: `python -m bench.scaling`.

    sweeps=a,b  of sequence, vocabulary, parameters and ranks; default: all
    rounds=2    how often each point runs
    steps=4     steps per run, after one that warms up
    quick=true  two tiny points per sweep, for the tests
    out=FILE    where the table goes
    KEY=VALUE   overrides for train.py, at every point

Each point is `nano` but for what its sweep changes: training steps of the engine of `train.py` on random tokens, in a process
of its own. A rank has one thread, so that two ranks have twice the means of one. The points of a sweep take turns, round after
round.

The expected speed is that of the sweep's first point, divided by the growth of FLOPs per token
(`launch.estimate.counts.flops_per_token`: attention and output projection included), and multiplied by the ranks. Measured over
expected is above 1 where a point uses the machine better than the first point does, and below 1 where something grows that the
FLOPs do not count: memory traffic, the optimizer, communication. The same ratio of tokens per second of processor time hardly
depends on what else runs, but leaves out how long ranks wait for each other.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time

from bench.ranks import as_rank, engine_of, on_ranks, random_tokens
from bench.records import claim_record
from bench.train import BusyElsewhere, machine
from conf.load import load
from conf.overrides import check_overrides
from conf.shape import shape_of
from kernels.common.commands import run_command
from kernels.common.errors import unknown
from kernels.common.files import atomic_write
from kernels.common.options import split_options
from launch.estimate.counts import flops_per_token, parameters
from launch.ranks import Ranks

_COMMON = ["telemetry_every=0", "logger=none", "steps=1000"]
_TINY = {
    "model.d_model": 64,
    "model.n_layers": 1,
    "model.n_heads": 1,
    "model.d_ff_gated": 128,
    "tokenizer.vocab_size": 512,
}
_EXPLANATION = """\
Training steps of `nano` but for what a sweep changes, one thread per rank. Expected: the speed of the first row, divided by the
growth of FLOPs per token and multiplied by the ranks. Measured: the median over the rounds, with their range.
By CPU time: the same ratio with the processor time of a rank instead of the time that passed, so without waiting, for a core or
for the other rank. Others: cores that other processes kept busy meanwhile; where they are many, only the CPU time counts."""
_HEAD = (
    "| {} | parameters | tokens per step | MFLOPs per token | tokens/s | expected "
    "| measured / expected | by CPU time | others |"
)


@dataclasses.dataclass(frozen=True)
class Point:
    """A configuration to measure: its label in the table, its overrides, and its ranks."""

    label: str
    overrides: dict[str, int]
    ranks: int = 1


@dataclasses.dataclass(frozen=True)
class Speeds:
    """A measured point: tokens/s of each round, by the clock and by a rank's CPU time; what kept cores busy elsewhere."""

    point: Point
    parameters: int
    tokens_per_step: int
    flops_per_token: int
    tokens_per_second: list[float]
    tokens_per_cpu_second: list[float]
    cores_busy_elsewhere: float


def main(argv: list[str]) -> None:
    if argv[:1] == ["--rank"]:
        from training.machine import keep_freed_memory

        keep_freed_memory()
        as_rank(lambda ranks: _seconds(ranks, int(argv[1]), argv[2:]))
    known = ",".join(sweeps(quick=False))
    defaults = {"rounds": 2, "steps": 4, "quick": False, "sweeps": known, "out": "bench/results/cpu-scaling.md"}
    options, overrides = split_options(argv, defaults, {"rounds": 1, "steps": 1})
    check_overrides(overrides, options)
    claim_record(options["out"], argv)
    points = sweeps(options["quick"])
    chosen = options["sweeps"].split(",")
    for name in chosen:
        if name not in points:
            raise unknown("sweep", name, points)
    command = " ".join(["python -m bench.scaling", *(a for a in argv if not a.startswith("out="))])
    lines = [f"# Tokens per second over size ({machine()}; `{command}`)", "", _EXPLANATION]
    for name in chosen:
        lines += ["", *table(name, measure(points[name], overrides, options["rounds"], options["steps"]))]
    with atomic_write(options["out"]) as file:
        file.write("\n".join(lines) + "\n")
    print(f"written to {options['out']}")


def sweeps(quick: bool) -> dict[str, list[Point]]:
    """Return {sweep: its points, smallest first}. The quick ones change the same keys, between two tiny points each."""
    base: dict[str, int] = _TINY if quick else {}
    lengths = (32, 64) if quick else (512, 1024, 2048, 4096, 8192)
    vocabularies = (512, 1024) if quick else (4096, 16384, 32768, 65536, 131072)
    # (d_model, layers, d_ff). In full: about 1, 3, 16, 30 and 60 million parameters with a vocabulary of 4,096.
    tiny, full = (
        [(64, 1, 128), (128, 2, 256)],
        [(128, 1, 352), (192, 4, 512), (384, 7, 1024), (512, 8, 1408), (640, 11, 1728)],
    )
    length = 32 if quick else 256
    long_step = lengths[-1]  # tokens, so that the longest sequence fits
    base_step = {"sequence_length": length, "global_batch_size": 8}
    return {
        "sequence": [
            Point(f"{tokens:,}", base | {"sequence_length": tokens, "global_batch_size": long_step // tokens})
            for tokens in lengths
        ],
        "vocabulary": [Point(f"{rows:,}", base | base_step | {"tokenizer.vocab_size": rows}) for rows in vocabularies],
        "parameters": [
            Point(f"{layers} layers of {width}", base | base_step | _shape(width, layers, d_ff))
            for width, layers, d_ff in (tiny if quick else full)
        ],
        "ranks": [Point(str(ranks), base | base_step, ranks) for ranks in (1, 2)],
    }


def _shape(width: int, layers: int, d_ff: int) -> dict[str, int]:
    return {
        "model.d_model": width,
        "model.n_layers": layers,
        "model.n_heads": width // 64,
        "model.d_ff_gated": d_ff,
    }


def measure(points: list[Point], overrides: list[str], rounds: int, steps: int) -> list[Speeds]:
    """Run every point `rounds` times, in turn, `steps` steps each; return their speeds in the order of `points`."""
    speeds: list[list[float]] = [[] for _ in points]
    cpu_speeds: list[list[float]] = [[] for _ in points]
    busy: list[list[float]] = [[] for _ in points]
    results = []
    settings = [_overrides(point, overrides) for point in points]
    for _ in range(rounds):
        for number, point in enumerate(points):
            config = load(settings[number])
            others = BusyElsewhere()
            of_ranks = on_ranks(point.ranks, "bench.scaling", [str(steps), *settings[number]])
            # A step ends when its last rank has: the longest of each step, by the clock and in CPU time.
            seconds, cpu_seconds = (
                [max(step) for step in zip(*kind, strict=True)] for kind in zip(*of_ranks, strict=True)
            )
            tokens = config.global_batch_size * config.sequence_length
            speeds[number].append(tokens / statistics.median(seconds))
            cpu_speeds[number].append(tokens / statistics.median(cpu_seconds))
            busy[number].append(others.cores())
            line = f"{point.label:<20}{speeds[number][-1]:>12,.0f} tokens/s   others: {busy[number][-1]:.2f} core(s)"
            print(line, file=sys.stderr, flush=True)
    for number, point in enumerate(points):
        config = load(settings[number])
        shape, tokens = shape_of(config), config.global_batch_size * config.sequence_length
        flops = sum(flops_per_token(shape, config.sequence_length).values())
        counted = (sum(parameters(shape).values()), tokens, flops)
        results.append(Speeds(point, *counted, speeds[number], cpu_speeds[number], statistics.mean(busy[number])))
    return results


def expected(row: Speeds, first: Speeds, by_cpu_time: bool = False) -> float:
    """Return the tokens/s of a point at the FLOP/s per rank of the first point, or the tokens per second of CPU time."""
    speeds = first.tokens_per_cpu_second if by_cpu_time else first.tokens_per_second
    flops_per_second = first.flops_per_token * statistics.median(speeds) / first.point.ranks
    return row.point.ranks * flops_per_second / row.flops_per_token


def table(name: str, rows: list[Speeds]) -> list[str]:
    """Return the lines of a sweep's table, whose first row is what the others are expected from; print them, too."""
    lines = [_HEAD.format(name), "|---" * 9 + "|"]
    for row in rows:
        speed, predicted = statistics.median(row.tokens_per_second), expected(row, rows[0])
        by_cpu_time = statistics.median(row.tokens_per_cpu_second) / expected(row, rows[0], by_cpu_time=True)
        lines.append(
            f"| {row.point.label} | {row.parameters:,} | {row.tokens_per_step:,} | {row.flops_per_token / 1e6:.1f} | "
            f"{speed:,.0f} ({min(row.tokens_per_second):,.0f} to {max(row.tokens_per_second):,.0f}) | {predicted:,.0f} | "
            f"{speed / predicted:.2f} | {by_cpu_time:.2f} | {row.cores_busy_elsewhere:.1f} |"
        )
    print("\n".join(lines), flush=True)
    return lines


def _overrides(point: Point, overrides: list[str]) -> list[str]:
    return [*_COMMON, *(f"{key}={value}" for key, value in point.overrides.items()), *overrides]


def _seconds(ranks: Ranks, steps: int, overrides: list[str]) -> tuple[list[float], list[float]]:
    """Return the seconds of `steps` steps on this rank, after one that is not counted, and their seconds of CPU time."""
    engine, batch, shape = engine_of(overrides, ranks)
    tokens = random_tokens(batch, shape, engine.config.sequence_length, ranks.rank)
    seconds, cpu_seconds = [], []
    for _ in range(steps + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        engine.train_step(tokens, 1.0)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return seconds[1:], cpu_seconds[1:]


if __name__ == "__main__":
    run_command(main, __doc__)
