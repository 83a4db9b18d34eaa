"""What `python -m launch.estimate` prints."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from launch.estimate.counts import flops_per_token, parameters
from launch.estimate.search import Estimate, overrides_of, what_would_fit
from launch.estimate.step_time import traffic

_SHOWN = 5
_PARTS = {
    "products": "matrix products and attention",
    "memory": "norms, rotation, activations",
    "tensor": "tensor-parallel traffic",
    "context": "context-parallel traffic",
    "data": "ZeRO's traffic, not hidden",
    "latency": "ZeRO's latency",
    "optimizer": "optimizer step",
}


def show(asked: Estimate, found: list[Estimate], console: Console) -> None:
    config, cluster, shape = asked.config, asked.cluster, asked.shape
    hardware, batch = cluster.hardware, asked.batch
    flops = sum(flops_per_token(shape, config.sequence_length).values())
    nodes = -(-asked.gpus // asked.layout.gpus_per_node)
    device = "GPU" if cluster.gpus_per_node else "rank"
    lines = [
        f"{config.model.name} with {config.ffn.name}: {sum(parameters(shape).values()):,} parameters, "
        f"{flops:.4g} FLOPs a token",
        f"{nodes} node(s) of {asked.layout.gpus_per_node} x {hardware.device or cluster.name}; "
        f"tensor {config.parallel.tensor}, context {config.parallel.context}, ZeRO {config.zero.stage}, "
        f"micro-batch {batch.micro_batch} x {batch.accumulation}, "
        f"checkpointing {'on' if config.model.activation_checkpointing else 'off'}",
        f"{batch.tokens:,} tokens in {batch.steps:,} steps of {batch.tokens_per_step:,}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
    memory = Table(f"memory of a {device}", "GiB", box=box.SIMPLE)
    for part, size in asked.memory.items():
        memory.add_row(part, f"{size / 2**30:.2f}")
    verdict = "fits" if asked.fits else "does not fit"
    memory.add_row("together", f"{sum(asked.memory.values()) / 2**30:.2f}  of {hardware.memory_gib:g}: {verdict}")
    console.print(memory)
    step, sent = Table("a step", "seconds", "share", f"GB sent by a {device}", box=box.SIMPLE), traffic(asked.layout)
    for part, name in _PARTS.items():
        seconds, gigabytes = getattr(asked.step, part), sent.get(part, 0.0) / 1e9
        if seconds or gigabytes:
            step.add_row(
                name, f"{seconds:.4g}", f"{seconds / asked.step.total:.1%}", f"{gigabytes:,.4g}" if gigabytes else ""
            )
    step.add_row("together", f"{asked.step.total:.4g}", "", f"{sum(sent.values()) / 1e9:,.4g}")
    console.print(step)
    console.print(
        f"{asked.tokens_per_second:,.0f} tokens/s, {asked.tokens_per_second / asked.gpus:,.0f} a {device}; "
        f"MFU {asked.mfu:.1%}; {asked.hours:,.1f} hours, {asked.hours * asked.gpus:,.0f} {device} hours, "
        f"{asked.megawatt_hours:,.3g} MWh, ${asked.dollars:,.0f} at ${hardware.dollars_per_gpu_hour:g} an hour",
        soft_wrap=True,
    )
    if not found:
        console.print(what_would_fit(asked), soft_wrap=True)
        return
    table = Table("tensor", "ZeRO", "micro", "recompute", "GiB", "s a step", "MFU", "hours", box=box.SIMPLE)
    for best in found[:_SHOWN]:
        tensor, stage, micro, checkpoints = best.choice
        table.add_row(
            f"{tensor}", f"{stage}", f"{micro}", "on" if checkpoints else "off", f"{sum(best.memory.values()) / 2**30:.1f}",
            f"{best.step.total:.4g}", f"{best.mfu:.1%}", f"{best.hours:,.1f}",
        )  # fmt: skip
    console.print(f"fastest of the {len(found)} combinations that fit:")
    console.print(table)
    console.print(f"the first: {' '.join(overrides_of(found[0]))}", soft_wrap=True)
