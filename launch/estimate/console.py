"""The console output of `python -m launch.estimate`."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from conf.terminal import SafeConsole
from kernels.common.units import duration
from launch.estimate.counts import CONVENTION, flops_per_token, parameters
from launch.estimate.search import Estimate, overrides_of, what_would_fit
from launch.estimate.step_time import traffic

_NARROW: dict[str, Any] = {"box": box.SIMPLE, "padding": (0, 1, 0, 0), "pad_edge": False}  # fits 80 columns
_LISTED = 5  # of the combinations that fit
_CHECKPOINTING = {False: "off", "attention": "attention", "selective": "selective", True: "whole layers"}
_PARTS = {
    "products": "matrix products and attention",
    "memory": "norms, rotary embedding, activations",
    "tensor": "tensor-parallel traffic",
    "context": "context-parallel traffic",
    "data": "ZeRO traffic, not overlapped",
    "latency": "ZeRO latency",
    "host": "weights from the host, not overlapped",
    "optimizer": "optimizer step",
}


def show(requested: Estimate, candidates: list[Estimate], console: SafeConsole) -> None:
    """Print the requested configuration's memory, time and cost, then the fastest of the candidates that fit."""
    config, cluster, shape = requested.config, requested.cluster, requested.shape
    hardware, batch = cluster.hardware, requested.batch
    flops = sum(flops_per_token(shape, config.sequence_length).values())
    nodes = -(-requested.gpus // requested.layout.gpus_per_node)
    device = "GPU" if cluster.gpus_per_node else "rank"
    lines = [
        f"{config.model.name} with {config.ffn.name}: {sum(parameters(shape).values()):,} parameters, "
        f"{flops:.4g} FLOPs per token",
        f"{nodes} node(s) of {requested.layout.gpus_per_node} x {hardware.device or cluster.name}; "
        f"tensor {config.parallel.tensor}, context {config.parallel.context}, ZeRO {config.zero.stage}, "
        f"micro-batch {batch.micro_batch} x {batch.accumulation}, "
        f"checkpointing {_CHECKPOINTING[config.model.activation_checkpointing]}, in {requested.precision}",
        f"{batch.tokens:,} tokens in {batch.steps:,} steps of {batch.tokens_per_step:,}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
    memory = Table(f"memory per {device}", "GiB", box=box.SIMPLE)
    for part, size in requested.memory.items():
        memory.add_row(part, f"{size / 2**30:.2f}")
    verdict = "fits" if requested.fits else "does not fit"
    memory.add_row("total", f"{sum(requested.memory.values()) / 2**30:.2f}  of {hardware.memory_gib:g}: {verdict}")
    console.print(memory)
    if on_host := requested.host_memory:
        parts = " + ".join(f"{part} {size / 2**30:,.1f}" for part, size in on_host.items())
        console.print(f"in the host's memory, GiB per node: {parts}", soft_wrap=True)
    sent, mwh = traffic(requested.layout), requested.megawatt_hours
    energy = f"{mwh:,.0f}" if mwh >= 100 else f"{mwh:.3g}"
    step = Table("per step", "seconds", "fraction", f"GB sent per {device}", **_NARROW)
    for part, name in _PARTS.items():
        gigabytes = (sent["gradients"] + sent["weights"] if part == "data" else sent.get(part, 0.0)) / 1e9
        seconds = getattr(requested.step, part)
        if seconds or gigabytes:
            step.add_row(
                name,
                f"{seconds:.4g}",
                f"{seconds / requested.step.total:.1%}",
                f"{gigabytes:,.4g}" if gigabytes else "",
            )
    step.add_row("total", f"{requested.step.total:.4g}", "", f"{sum(sent.values()) / 1e9:,.4g}")
    console.print(step)
    console.print(
        f"{requested.tokens_per_second:,.0f} tokens/s, {requested.tokens_per_second / requested.gpus:,.0f} per {device}; "
        f"MFU {requested.mfu:.1%} ({CONVENTION}{', of the peak in bf16' if requested.layout.fp8 else ''}); "
        f"{duration(3600 * requested.hours)}, {requested.hours * requested.gpus:,.0f} {device} hours, "
        f"{energy} MWh, ${requested.dollars:,.0f} at ${hardware.dollars_per_gpu_hour:.2f} per GPU hour",
        soft_wrap=True,
    )
    if candidates:
        _show_fastest(candidates, console)
    else:
        console.print(what_would_fit(requested), soft_wrap=True)


def _show_fastest(candidates: list[Estimate], console: SafeConsole) -> None:
    heads = ("tensor", "ZeRO", "micro", "checkpointing", "overlap", "GiB", "s/step", "MFU", "time")
    table = Table(*heads, **_NARROW)
    for candidate in candidates[:_LISTED]:
        tensor, stage, micro, checkpoints, overlap = candidate.choice
        gib = sum(candidate.memory.values()) / 2**30
        table.add_row(
            f"{tensor}", f"{stage}", f"{micro}", _CHECKPOINTING[checkpoints], "on" if overlap else "off", f"{gib:.1f}",
            f"{candidate.step.total:.4g}", f"{candidate.mfu:.1%}", duration(3600 * candidate.hours),
        )  # fmt: skip
    console.print(f"fastest of the {len(candidates)} combinations that fit:")
    console.print(table)
    console.print(f"overrides of the first: {' '.join(overrides_of(candidates[0]))}", soft_wrap=True)
