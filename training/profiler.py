"""Profile some steps: `profile=10:13` writes a trace, a table of where the time went, and the memory over time.

Rank 0 is profiled, for steps 10 to 13, both included; the files are in the run's folder `profile/`:

    trace.json.gz   of PyTorch's profiler, for ui.perfetto.dev
    parts.md        seconds per step of each part, beside the least that the hardware would need
    memory.csv      bytes allocated over time; on a GPU also memory.pickle, for pytorch.org/memory_viz

A part is found by the names of operations. Matrix products count as such, but those of attention, the optimizer and the
communication count there; the loss is what is left of it. On a GPU the times are those of its kernels, idle is when none runs,
and every wait of the host for the device is reported. On a CPU they are those of operations, and Python is the rest, waits for
other ranks included.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conf.shape import Shape
from kernels.common.errors import UserError
from launch.estimate.counts import by_rule, flops_per_token, score_flops_per_token
from launch.estimate.optimizer import optimizer_flops
from launch.estimate.step_time import loss_bytes

if TYPE_CHECKING:  # bench/gpu.py uses this module where Hydra is not installed
    from conf.schema import Config
    from conf.validate import Batch

PARTS = (
    *("GEMM", "attention", "activation", "norm", "rotary", "loss", "optimizer", "communication", "data", "other"),
    *("Python", "idle"),
)
_GEMM = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm")
# Beginnings of names, and the part that everything inside counts to.
_WHOLE = {
    "part: data": "data",
    "part: optimizer": "optimizer",
    "c10d::": "communication",
    "gloo:": "communication",
    "nccl:": "communication",
    "_CausalAttention": "attention",
    "aten::scaled_dot_product_attention": "attention",
    "aten::_scaled_dot_product": "attention",
    "ScaledDotProduct": "attention",
    "aten::_flash_attention": "attention",
    "torch_attn::": "attention",
    "FlashAttn": "attention",
}
# The same, of which matrix products are counted apart.
_AROUND = {
    "_FeedForward": "activation",
    "_FusedMLP": "activation",
    "_Elementwise": "activation",
    "_RMSNorm": "norm",
    "_Rotate": "rotary",
    "_LinearCrossEntropy": "loss",
}


def check_steps(profile: str | None, steps: int) -> None:
    """Refuse a `profile` that is not of a run of this many steps.

    Raises:
        UserError: what is wrong, and what would be right.
    """
    if profile is not None and parse_steps(profile)[1] > steps:
        raise UserError(f"profile={profile}: the run has {steps:,} steps")


def parse_steps(text: str) -> tuple[int, int]:
    """Return the first and the last step of "FIRST:LAST".

    Raises:
        UserError: it is not of that form.
    """
    first, colon, last = text.partition(":")
    if colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise UserError(f"profile={text}: expected FIRST:LAST, two steps from 1 on, as profile=10:13")


class StepProfiler:
    """Profiles steps of a session on rank 0; on other ranks, and without `profile`, it does nothing.

    Args:
        folder: of the run.
        enabled: whether this is rank 0.
        floors: {part: the least seconds per step}; see `floors`.
    """

    def __init__(self, steps: str | None, folder: Path, device: torch.device, enabled: bool) -> None:
        self._first, self._last = parse_steps(steps) if steps else (0, 0)
        self._enabled = enabled and bool(steps)
        self._folder, self._device = folder / "profile", device
        self._running: contextlib.ExitStack | None = None
        self.floors: dict[str, float] = {}

    def before(self, step: int) -> None:
        """Start if `step` is the first one to be profiled, or a later one of a session that began within."""
        if not self._enabled or self._running is not None or not self._first <= step <= self._last:
            return
        self._began_at = step
        self._running = stack = contextlib.ExitStack()
        self._caught = stack.enter_context(warnings.catch_warnings(record=True))
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)
            torch.cuda.memory._record_memory_history(max_entries=100_000)
            torch.cuda.set_sync_debug_mode("warn")
        self._profile = stack.enter_context(torch.profiler.profile(activities=kinds, profile_memory=True))
        self._wall = time.perf_counter()

    def after(self, step: int) -> str:
        """Stop and write the files if `step` was the last one; return the table, or ""."""
        if self._running is None or step < self._last:
            return ""
        if self._device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize(self._device)
        wall = time.perf_counter() - self._wall
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._running.close()
        self._running, self._enabled = None, False
        steps = step - self._began_at + 1
        seconds = seconds_by_part(self._profile.events() or [], wall, self._device.type == "cuda")
        waits = Counter(str(each.message).splitlines()[0] for each in self._caught if "synchroniz" in str(each.message))
        self._profile.export_chrome_trace(str(self._folder / "trace.json.gz"))
        _write_memory(self._folder / "trace.json.gz", self._folder / "memory.csv")
        table = parts_table(seconds, self.floors, steps, waits)
        (self._folder / "parts.md").write_text(table, encoding="utf-8")
        return table


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Name what is computed inside for the profiler: data or optimizer."""
    with torch.profiler.record_function(f"part: {name}"):
        yield


def seconds_by_part(events: Iterable[Any], wall: float, on_gpu: bool) -> dict[str, float]:
    """Return the seconds of each part over all profiled steps.

    Args:
        events: of the profiler.
        wall: seconds that passed.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    busy: list[tuple[float, float]] = []  # intervals in which a kernel ran, in microseconds
    for event in events:
        if event.device_type.name != "CPU":
            busy.append((event.time_range.start, event.time_range.end))
        elif on_gpu:
            seconds[part_of(event)] += sum(kernel.duration for kernel in event.kernels) / 1e6
        elif event.name != "[memory]":
            seconds[part_of(event)] += event.self_cpu_time_total / 1e6
    if on_gpu:
        seconds["idle"] = max(0.0, wall - _covered(busy) / 1e6)
        return seconds
    seconds["Python"] = max(0.0, wall - sum(seconds.values()))
    return seconds


def part_of(event: Any) -> str:
    """Return the part that an operation's own time counts to."""
    names: list[str] = []
    within = event
    while within is not None:
        names.append(within.name.removeprefix("autograd::engine::evaluate_function: "))
        within = within.cpu_parent
    if (whole := _first_match(names, _WHOLE)) is not None:
        return whole
    if event.name in _GEMM:
        return "GEMM"
    return _first_match(names, _AROUND) or "other"


def _first_match(names: list[str], parts: dict[str, str]) -> str | None:
    """Return the part of the innermost name that begins like one of `parts`."""
    found = (kind for name in names for beginning, kind in parts.items() if name.startswith(beginning))
    return next(found, None)


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def floors(
    config: Config, shape: Shape, batch: Batch, dp_cp: int, bf16: bool, flops: float, bandwidth: float, on_gpu: bool
) -> dict[str, float]:
    """Return the least seconds per step of each part: its FLOPs at the peak, or its bytes at the memory's bandwidth.

    Args:
        dp_cp: ranks that ZeRO partitions over.
        flops: peak FLOP/s of a rank's device.
        bandwidth: bytes per second of a copy, reads and writes together.
    """
    parallel, width = config.parallel, 2 if bf16 else 4
    tokens = batch.micro_batch * config.sequence_length // parallel.context
    shards, times = parallel.tensor, batch.accumulation
    by_part = flops_per_token(shape, config.sequence_length)
    scores = score_flops_per_token(shape, config.sequence_length)

    def by_bytes(per_token: float) -> float:
        return times * tokens * width * per_token / shards / bandwidth

    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    partitions, name = dp_cp if config.zero.stage else 1, config.optim.name
    moved = by_rule(shape, parallel.tensor, name, lambda rule: rule.bytes_moved - (0 if bf16 else 2))
    return {
        "GEMM": times * tokens * (sum(by_part.values()) - scores) / shards / flops,
        "attention": times * tokens * scores / shards / flops,
        "activation": by_bytes(3 * sum(layer.matrices * layer.d_ff for layer in shape.ffn)),
        "norm": by_bytes(3 * 10 * shape.d_model * shape.n_layers),
        "rotary": by_bytes(2 * 2 * (queries + keys) * shape.n_layers),
        "loss": times * loss_bytes(shape, tokens, width, parallel.tensor, on_gpu) / bandwidth,
        "optimizer": moved / partitions / bandwidth
        + optimizer_flops(shape, config.optim, parallel.tensor * dp_cp) / flops,
    }


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a copy reads and writes: the best of five of 64 MiB."""
    source = torch.ones(2**24, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):  # the first one maps the memory
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def parts_table(seconds: dict[str, float], least: dict[str, float], steps: int, waits: Counter[str]) -> str:
    """Return the table of a profile as Markdown.

    Args:
        seconds: over all profiled steps.
        least: the floors, per step.
        waits: how often each warning of a wait for the device came.
    """
    total = sum(seconds.values())
    lines = [
        f"# {steps} step(s), {total / steps:.4g} seconds each\n",
        "| part | seconds per step | fraction | floor | of the floor |",
        "|---|---|---|---|---|",
    ]
    for name in PARTS:
        mean, floor = seconds[name] / steps, least.get(name, 0.0)
        if mean or floor:
            beside = f"{floor:.4g} | {mean / floor:.1f}x" if floor and mean else " | "
            lines.append(f"| {name} | {mean:.4g} | {seconds[name] / total:.1%} | {beside} |")
    lines.append("\nThe floor is a part's FLOPs at the device's peak, or its bytes at the bandwidth of a copy.")
    if waits:
        lines.append("\nThe host waited for the device:\n")
        lines += [f"- {number} times: {text}" for text, number in waits.most_common()]
    return "\n".join(lines) + "\n"


def _write_memory(trace: Path, to: Path) -> None:
    """Write the bytes that were allocated over time, as the trace has them."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Device Type"], event["args"].get("Total Allocated", 0), event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    with open(to, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("microseconds", "device_type", "allocated_bytes", "change"))
        first = changes[0][0] if changes else 0
        writer.writerows((round(at - first, 1), device, total, change) for at, device, total, change in changes)
