"""What a run needs and costs, before it is started: `python -m launch.estimate cluster=h100 nodes=8 model=llama3_8b`.

    cluster=NAME            a machine of conf/cluster      nodes=1              how many
    cluster.KEY=VALUE       another value of it            ranks_per_node=N     one for each GPU of a node if not said
    KEY=VALUE               as for train.py                --plot[=FILE]        draw MFU and cost against the number of GPUs

Prints the memory of a GPU, the time of a step, and what the whole run takes; and which tensor size, ZeRO stage, micro-batch
and checkpointing would fit and be fastest. No GPU is needed. How it is reckoned: model/accounting.py and launch/step_time.py;
how far that is from what was published and measured: bench/results/estimate.md.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from conf.errors import UserError
from conf.load import choices, load, read_group, run_command
from conf.options import read_options
from conf.schema import ClusterConfig, Config
from conf.validate import Batch, validate
from launch.sbatch import check
from launch.step_time import Layout, StepTime, model_flops_utilization, step_time, traffic
from model.accounting import Shape, check_shares, flops_per_token, parameters, peak_bytes, shape_of

_OPTIONS = {"nodes": 1, "ranks_per_node": 0, "plot": ""}
_SPARE = 0.08  # of a GPU's memory, for the CUDA context, NCCL and what the allocator cannot use
_SHOWN = 5
_MOST_GPUS = 16384
_PARTS = {
    "products": "matrix products and attention",
    "memory": "norms, rotation, activations",
    "tensor": "tensor-parallel traffic",
    "context": "context-parallel traffic",
    "data": "ZeRO's traffic, not hidden",
    "latency": "ZeRO's latency",
    "optimizer": "optimizer step",
}


def main(argv: list[str]) -> int:
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(__doc__)
        print(f"clusters: {', '.join(choices('cluster'))}; a file in conf/cluster makes another")
        return 0
    argv = ["plot=estimate.png" if word == "--plot" else word.removeprefix("--") for word in argv]
    own = [word for word in argv if word.partition("=")[0] in _OPTIONS]
    options = read_options(own, _OPTIONS, {"nodes": 1, "ranks_per_node": 1})
    cluster, words = read_group("cluster", ClusterConfig, [word for word in argv if word not in own], "cluster")
    per_node = options["ranks_per_node"] or max(1, cluster.gpus_per_node)
    check(cluster, per_node)
    config, gpus = load(words), options["nodes"] * per_node
    asked = estimate(config, cluster, gpus, per_node)
    found = sorted(search(config, cluster, gpus, per_node), key=_fast_then_small)
    console = Console(file=sys.stdout, highlight=False, markup=False)
    _show(asked, found, console)
    if options["plot"]:
        draw(config, cluster, per_node, options["plot"])
        console.print(f"MFU and cost against GPUs: {options['plot']}")
    return 0


# ---------------------------------------------------------------------------------------------------------- reckoning


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a configuration needs on a number of GPUs."""

    config: Config
    cluster: ClusterConfig
    gpus: int
    batch: Batch
    shape: Shape
    memory: dict[str, float]  # bytes a GPU, by part
    layout: Layout
    step: StepTime

    @property
    def fits(self) -> bool:
        """Whether a GPU has that much memory, less a spare."""
        return sum(self.memory.values()) <= (1 - _SPARE) * self.cluster.hardware.memory_gib * 2**30

    @property
    def tokens_per_second(self) -> float:
        return self.batch.tokens_per_step / self.step.total

    @property
    def mfu(self) -> float:
        return model_flops_utilization(self.layout, self.cluster.hardware, self.step.total)

    @property
    def hours(self) -> float:
        return self.step.total * self.batch.steps / 3600

    @property
    def megawatt_hours(self) -> float:
        """Of the nodes, cooling not counted."""
        hardware, per_node = self.cluster.hardware, max(1, self.cluster.gpus_per_node)
        return self.hours * self.gpus * hardware.node_watts / per_node / 1e6

    @property
    def dollars(self) -> float:
        return self.hours * self.gpus * self.cluster.hardware.dollars_per_gpu_hour

    @property
    def choice(self) -> tuple[int, int, int, bool]:
        """What `search` varies: tensor size, ZeRO stage, micro-batch, checkpointing."""
        config = self.config
        checkpoints = config.model.activation_checkpointing
        return config.parallel.tensor, config.zero.stage, self.batch.micro_batch, checkpoints


def estimate(config: Config, cluster: ClusterConfig, gpus: int, per_node: int, shape: Shape | None = None) -> Estimate:
    """Return what a configuration needs.

    Raises:
        UserError: it cannot train on that many ranks.
    """
    batch = validate(config, gpus)
    shape = shape or shape_of(config)
    check_shares(shape, config.parallel)
    zero, bf16 = config.zero, config.precision.name != "fp32"
    reduce = 2 if bf16 and config.precision.reduce == "bf16" else 4
    # Stage 3 overlaps with the whole step, the others with the backward of the last micro-batch.
    hidden = (1.0 if zero.stage == 3 else 2 / 3 / batch.accumulation) if zero.overlap else 0.0
    layout = Layout(
        shape, config.sequence_length, gpus, min(per_node, gpus), config.parallel, zero.stage, batch.micro_batch,
        batch.accumulation, float(config.model.activation_checkpointing), hidden, bf16, reduce, zero.bucket_elements,
        zero.offload_optimizer,
    )  # fmt: skip
    memory = peak_bytes(config, shape, layout.replicas, batch.micro_batch, batch.accumulation, bf16)
    return Estimate(config, cluster, gpus, batch, shape, memory, layout, step_time(layout, cluster.hardware))


def search(config: Config, cluster: ClusterConfig, gpus: int, per_node: int) -> Iterator[Estimate]:
    """Yield what fits of all tensor sizes within a node, ZeRO stages, micro-batches and checkpointing on or off."""
    shape = shape_of(config)
    for tried in _combinations(config, gpus, per_node):
        try:
            found = estimate(tried, cluster, gpus, per_node, shape)
        except UserError:
            continue
        if found.fits:
            yield found


def _fast_then_small(found: Estimate) -> tuple[float, float]:
    """Order by time, and where that is the same to a hundredth by memory."""
    return round(math.log(found.step.total), 2), sum(found.memory.values())


def _combinations(config: Config, gpus: int, per_node: int) -> Iterator[Config]:
    share = config.global_batch_size * config.parallel.context
    for tensor in (size for size in (1, 2, 4, 8, 16) if size <= min(per_node, gpus)):
        own = share * tensor // gpus  # sequences of a rank in a step
        for stage, micro in ((stage, 2**n) for stage in (1, 2, 3) for n in range(7) if 2**n <= max(1, own)):
            for checkpoints in (False, True):
                yield dataclasses.replace(
                    config,
                    micro_batch_size=micro,
                    zero=dataclasses.replace(config.zero, stage=stage),
                    parallel=dataclasses.replace(config.parallel, tensor=tensor, sequence=tensor > 1),
                    model=dataclasses.replace(config.model, activation_checkpointing=checkpoints),
                )


# ------------------------------------------------------------------------------------------------------- how it looks


def _show(asked: Estimate, found: list[Estimate], console: Console) -> None:
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
    console.print(f"the first: {' '.join(_words(found[0]))}", soft_wrap=True)


def _words(best: Estimate) -> list[str]:
    tensor, stage, micro, checkpoints = best.choice
    return [
        f"parallel.tensor={tensor}", *(["parallel.sequence=true"] if tensor > 1 else []), f"zero={stage}",
        f"micro_batch_size={micro}", f"model.activation_checkpointing={str(checkpoints).lower()}",
    ]  # fmt: skip


def what_would_fit(asked: Estimate) -> str:
    """Return the sentence that says what would have to change when no combination fits."""
    config, cluster, per_node = asked.config, asked.cluster, asked.layout.gpus_per_node
    gpus = asked.gpus
    while gpus <= _MOST_GPUS:
        if any(True for _ in search(config, cluster, gpus, per_node)):
            break
        gpus *= 2
    sizes = []
    for tried in _combinations(config, asked.gpus, per_node):
        try:
            sizes.append(estimate(tried, cluster, asked.gpus, per_node, asked.shape))
        except UserError:
            continue
    least = min(sizes, key=lambda e: sum(e.memory.values()), default=asked)
    most = max(least.memory, key=least.memory.get)
    needs = f"{sum(least.memory.values()) / 2**30:.1f} GiB with {' '.join(_words(least))}"
    enough = gpus <= _MOST_GPUS
    more = f"{gpus // per_node} nodes would do" if enough else f"no number of nodes up to {_MOST_GPUS} GPUs would do"
    also = (
        "zero=3 zero.offload_optimizer=true keeps the optimizer's state on the host" if most == "optimizer"
        else "a shorter sequence_length or parallel.context=2 takes less" if most in ("activations", "working")
        else "a smaller model or GPUs with more memory"
    )  # fmt: skip
    return f"nothing fits: the least is {needs}, most of it {most}; {more}, or {also}"


def draw(config: Config, cluster: ClusterConfig, per_node: int, path: str) -> None:
    """Draw MFU, hours and cost of the fastest combination against the number of GPUs, 1 to 16,384, at the same batch.

    Raises:
        UserError: nothing fits on any number, or the file cannot be written.
    """
    import matplotlib.ticker
    from matplotlib.figure import Figure

    from conf.files import say_why

    # A power of two can be shared by every number of GPUs that is one.
    config = dataclasses.replace(config, global_batch_size=2 ** round(math.log2(config.global_batch_size)))
    best: list[Estimate] = []
    gpus = 1
    while gpus <= _MOST_GPUS:
        found = search(config, cluster, gpus, min(per_node, gpus))
        if fastest := min(found, key=_fast_then_small, default=None):
            best.append(fastest)
        gpus *= 2
    if not best:
        raise UserError(f"nothing fits on any number of GPUs up to {_MOST_GPUS}: there is nothing to draw")
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    counts = [e.gpus for e in best]
    upper.plot(counts, [100 * e.mfu for e in best], marker="o", color="#2563eb")
    upper.set_ylabel("MFU, %")
    upper.set_ylim(0, 110 * max(e.mfu for e in best))
    first, last = best[0], best[-1]
    upper.set_title(
        f"{config.model.name} with {config.ffn.name}, {config.global_batch_size:,} sequences of {config.sequence_length:,}:\n"
        f"{first.mfu:.0%} MFU on {first.gpus:,} GPU(s), {last.mfu:.0%} on {last.gpus:,}",
        fontsize=11,
    )
    lower.plot(counts, [e.dollars for e in best], marker="o", color="#b45309", label="dollars")
    lower.plot(counts, [e.hours for e in best], marker="s", color="#047857", label="hours")
    lower.set_yscale("log")
    lower.set_xscale("log", base=2)
    lower.set_xlabel(f"GPUs ({cluster.hardware.device or cluster.name}, {per_node} a node)")
    lower.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    lower.legend()
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    with say_why("write the picture", path):
        try:
            figure.savefig(path, dpi=150)
        except ValueError as error:
            raise UserError(f"cannot write the picture {path}: {error}") from error


if __name__ == "__main__":
    run_command(main)
