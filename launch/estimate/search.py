"""Memory, time and cost of a configuration on a number of GPUs; a search for the fastest one that fits."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from conf.cluster_schema import ClusterConfig
from conf.schema import Config
from conf.shape import Shape, check_divisibility, shape_of
from conf.validate import Batch, trains_in_bf16, validate
from kernels.common.errors import UserError
from launch.estimate.counts import CHECKPOINTING, host_bytes, overlaps, peak_bytes
from launch.estimate.step_time import ParallelLayout, StepTime, model_flops_utilization, overlapped, step_time

_RESERVED = 0.08  # fraction of a GPU's memory: the CUDA context, NCCL and fragmentation
MOST_GPUS = 16384


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory, time and cost of a configuration on a number of GPUs."""

    config: Config
    cluster: ClusterConfig
    gpus: int
    batch: Batch
    shape: Shape
    memory: dict[str, float]  # bytes per GPU, by part
    layout: ParallelLayout

    @functools.cached_property
    def step(self) -> StepTime:
        """Seconds per step, by part: computed when asked for, since a search looks at memory first."""
        return step_time(self.layout, self.cluster.hardware)

    @property
    def fits(self) -> bool:
        """Whether a GPU has enough memory, a reserve included."""
        return sum(self.memory.values()) <= (1 - _RESERVED) * self.cluster.hardware.memory_gib * 2**30

    @property
    def host_memory(self) -> dict[str, float]:
        """Bytes of the host's memory per node that weights and optimizer state take instead of that of GPUs, by part."""
        ranks = self.layout.gpus_per_node if self.layout.on_gpu else 0
        per_rank = host_bytes(self.config, self.shape, self.layout.dp_cp, self.layout.bf16)
        return {part: ranks * size for part, size in per_rank.items() if ranks * size}

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
        """Energy of the nodes, without cooling. Of a node with GPUs that uses some, their fraction."""
        hardware, per_node = self.cluster.hardware, self.cluster.gpus_per_node or self.layout.gpus_per_node
        return self.hours * self.gpus * hardware.node_watts / per_node / 1e6

    @property
    def dollars(self) -> float:
        return self.hours * self.gpus * self.cluster.hardware.dollars_per_gpu_hour

    @property
    def precision(self) -> str:
        """What matrices are multiplied in."""
        return "fp8" if self.layout.fp8 else "bf16" if self.layout.bf16 else "fp32"

    @property
    def choice(self) -> tuple[int, int, int, bool | str, bool]:
        """The settings that `search` varies: tensor size, ZeRO stage, micro-batch, activation checkpointing, overlap."""
        config = self.config
        checkpoints, overlap = config.model.activation_checkpointing, overlaps(config.zero, self.layout.on_gpu)
        return config.parallel.tensor, config.zero.stage, self.batch.micro_batch, checkpoints, overlap


def estimate(config: Config, cluster: ClusterConfig, gpus: int, per_node: int) -> Estimate:
    """Return the memory, time and cost of a configuration.

    Raises:
        UserError: it cannot train on that many ranks.
    """
    batch = validate(config, gpus)
    shape = shape_of(config)
    check_divisibility(shape, config.parallel)
    zero, bf16 = config.zero, _in_bf16(config, cluster)
    gradient_width = 2 if bf16 and config.precision.reduce == "bf16" else 4
    overlap, overlap_weights = (0.0, False)
    checkpointing = config.model.activation_checkpointing
    on_gpu = cluster.gpus_per_node > 0
    fp8 = config.precision.name == "fp8" and on_gpu
    if fp8 and not cluster.hardware.fp8_flops:
        raise UserError(
            f"precision=fp8: {cluster.hardware.device or cluster.name} has no FP8 units; choose bf16 (or set "
            "cluster.hardware.fp8_flops)"
        )
    if overlaps(zero, on_gpu):
        overlap, overlap_weights = overlapped(zero.stage, bf16, batch.accumulation)
    layout = ParallelLayout(
        shape=shape,
        sequence_length=config.sequence_length,
        gpus=gpus,
        gpus_per_node=min(per_node, gpus),
        parallel=config.parallel,
        stage=zero.stage,
        micro_batch=batch.micro_batch,
        micro_batches=batch.accumulation,
        recompute=float(checkpointing is True),
        checkpointing=checkpointing if isinstance(checkpointing, str) else "",
        overlap=overlap,
        overlap_weights=overlap_weights,
        bf16=bf16,
        fp8=fp8,
        on_gpu=on_gpu,
        gradient_width=gradient_width,
        bucket=zero.bucket_elements,
        offload=zero.offload_optimizer and on_gpu,
        offload_parameters=zero.offload_parameters and on_gpu,
        optim=config.optim,
    )
    memory = peak_bytes(config, shape, layout.dp_cp, batch.micro_batch, batch.accumulation, bf16, layout.on_gpu)
    return Estimate(config, cluster, gpus, batch, shape, memory, layout)


def search(config: Config, cluster: ClusterConfig, gpus: int, per_node: int) -> Iterator[Estimate]:
    """Yield what fits among all tensor sizes within a node, ZeRO stages, micro-batches, kinds of checkpointing, and overlap.

    Overlap is left out where DeepSpeed ignores it: the same would come twice.
    """
    for candidate in _combinations(config, cluster, gpus, per_node):
        try:
            estimated = estimate(candidate, cluster, gpus, per_node)
        except UserError:
            continue
        if estimated.fits:
            yield estimated


def fast_then_small(candidate: Estimate) -> tuple[float, float]:
    """Return a sort key: by time, and where times agree to one percent by memory."""
    return round(math.log(candidate.step.total), 2), sum(candidate.memory.values())


def _in_bf16(config: Config, cluster: ClusterConfig, stage: int | None = None) -> bool:
    """Return whether a configuration trains in bf16 on a cluster, at its own stage of ZeRO or at another one."""
    stage = config.zero.stage if stage is None else stage
    return trains_in_bf16(config.precision.name, stage, has_bf16=cluster.hardware.bf16_flops > 0)


def _combinations(config: Config, cluster: ClusterConfig, gpus: int, per_node: int) -> Iterator[Config]:
    sequences = config.global_batch_size * config.parallel.context
    for tensor in (size for size in (1, 2, 4, 8, 16) if size <= min(per_node, gpus)):
        per_rank = sequences * tensor // gpus  # in a step
        for stage, micro in ((stage, 2**n) for stage in (1, 2, 3) for n in range(7) if 2**n <= max(1, per_rank)):
            accumulation = max(1, per_rank // micro)
            bf16 = _in_bf16(config, cluster, stage)
            can_overlap = overlapped(stage, bf16, accumulation)[0] > 0 and per_rank < sequences
            for checkpoints, overlap in itertools.product(CHECKPOINTING, (False, True) if can_overlap else (False,)):
                yield dataclasses.replace(
                    config,
                    micro_batch_size=micro,
                    zero=dataclasses.replace(config.zero, stage=stage, overlap=overlap),
                    parallel=dataclasses.replace(config.parallel, tensor=tensor, sequence=tensor > 1),
                    model=dataclasses.replace(config.model, activation_checkpointing=checkpoints),
                )


def overrides_of(candidate: Estimate) -> list[str]:
    """Return the overrides that select what `search` varies, and what `zero=STAGE` would undo of what it keeps."""
    tensor, stage, micro, checkpoints, overlap = candidate.choice
    overrides = [f"parallel.tensor={tensor}"]
    if tensor > 1:
        overrides.append("parallel.sequence=true")
    offloads = [key for key in ("offload_optimizer", "offload_parameters") if getattr(candidate.config.zero, key)]
    overrides += [f"zero={stage}", *(f"zero.{key}=true" for key in offloads), f"micro_batch_size={micro}"]
    overrides.append(f"zero.overlap={str(overlap).lower()}")
    return [*overrides, f"model.activation_checkpointing={str(checkpoints).lower()}"]


def what_would_fit(requested: Estimate) -> str:
    """Return a sentence on what would have to change so that a combination fits."""
    config, cluster, per_node = requested.config, requested.cluster, requested.layout.gpus_per_node
    sizes = []
    for candidate in _combinations(config, cluster, requested.gpus, per_node):
        try:
            sizes.append(estimate(candidate, cluster, requested.gpus, per_node))
        except UserError:
            continue
    gpus = requested.gpus
    fits = any(estimated.fits for estimated in sizes)
    while not fits and (gpus := 2 * gpus) <= MOST_GPUS:
        fits = any(True for _ in search(config, cluster, gpus, per_node))
    least = min(sizes, key=lambda e: sum(e.memory.values()), default=requested)
    largest = max(least.memory, key=lambda part: least.memory[part])
    needs = f"{sum(least.memory.values()) / 2**30:.1f} GiB with {' '.join(overrides_of(least))}"
    more = f"{gpus // per_node} nodes would do" if fits else f"no number of nodes up to {MOST_GPUS} GPUs would do"
    also = (
        "zero=3 zero.offload_optimizer=true keeps the optimizer's state on the host" if largest == "optimizer"
        else "a shorter sequence_length or parallel.context=2 takes less" if largest in ("activations", "working")
        else "a smaller model or GPUs with more memory"
    )  # fmt: skip
    return f"nothing fits: the least is {needs}, most of it {largest}; {more}, or {also}"
