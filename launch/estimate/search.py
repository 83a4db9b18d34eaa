"""What a configuration needs and costs on a number of GPUs, and which ones would fit and be fastest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from conf.schema import ClusterConfig, Config
from conf.validate import Batch, validate
from kernels.common.errors import UserError
from launch.estimate.counts import Shape, check_divisibility, peak_bytes, shape_of
from launch.estimate.step_time import ParallelLayout, StepTime, model_flops_utilization, step_time

_SPARE = 0.08  # of a GPU's memory, for the CUDA context, NCCL and what the allocator cannot use
MOST_GPUS = 16384


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a configuration needs on a number of GPUs."""

    config: Config
    cluster: ClusterConfig
    gpus: int
    batch: Batch
    shape: Shape
    memory: dict[str, float]  # bytes a GPU, by part
    layout: ParallelLayout
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
    check_divisibility(shape, config.parallel)
    zero, bf16 = config.zero, config.precision.name != "fp32"
    reduce = 2 if bf16 and config.precision.reduce == "bf16" else 4
    # Stage 3 overlaps with the whole step, the others with the backward of the last micro-batch.
    hidden = (1.0 if zero.stage == 3 else 2 / 3 / batch.accumulation) if zero.overlap else 0.0
    layout = ParallelLayout(
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


def fast_then_small(found: Estimate) -> tuple[float, float]:
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


def overrides_of(best: Estimate) -> list[str]:
    tensor, stage, micro, checkpoints = best.choice
    return [
        f"parallel.tensor={tensor}", *(["parallel.sequence=true"] if tensor > 1 else []), f"zero={stage}",
        f"micro_batch_size={micro}", f"model.activation_checkpointing={str(checkpoints).lower()}",
    ]  # fmt: skip


def what_would_fit(asked: Estimate) -> str:
    """Return the sentence that says what would have to change when no combination fits."""
    config, cluster, per_node = asked.config, asked.cluster, asked.layout.gpus_per_node
    gpus = asked.gpus
    while gpus <= MOST_GPUS:
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
    needs = f"{sum(least.memory.values()) / 2**30:.1f} GiB with {' '.join(overrides_of(least))}"
    enough = gpus <= MOST_GPUS
    more = f"{gpus // per_node} nodes would do" if enough else f"no number of nodes up to {MOST_GPUS} GPUs would do"
    also = (
        "zero=3 zero.offload_optimizer=true keeps the optimizer's state on the host" if most == "optimizer"
        else "a shorter sequence_length or parallel.context=2 takes less" if most in ("activations", "working")
        else "a smaller model or GPUs with more memory"
    )  # fmt: skip
    return f"nothing fits: the least is {needs}, most of it {most}; {more}, or {also}"
