"""The time of a step on a cluster: its FLOPs, memory traffic and communication over the hardware's rates.

Three constants are fitted to eleven published runs on H100s (`python -m bench.estimate` compares them; all are within 10%): the
fraction of its peak that a GPU reaches in matrix products, in bf16 and in FP8, and the fraction of its data sheet's bandwidth
that a collective reaches. Everything else is counted (launch/estimate/counts.py) or given by conf/cluster:

    products    FLOPs, recomputation included (`model.activation_checkpointing`, `ffn.save=input`), at GEMM_EFFICIENCY of a peak
                that falls with the cube root of the power limit
    memory      reads and writes of all other operations, the loss's chunks of logits among them, at the memory bandwidth
    tensor      traffic of the tensor ranks in every layer, never overlapped; likewise context
    data        ZeRO's traffic, less what overlaps compute (`overlapped`)
    latency     of ZeRO's rings, never overlapped: one hop per rank
    bubble      idle time of a pipeline (published runs only: pipeline parallelism is not offered here)
    host        traffic of weights that `zero.offload_parameters` keeps in the host's memory, less what overlaps compute
    optimizer   reads and writes of the optimizer step, its matrix products, and the traffic that brings matrices together

Not included: stragglers, failures, evaluation, checkpoints, input, and expert or pipeline parallelism.
"""

from __future__ import annotations

import dataclasses
import math

from conf.cluster_schema import HardwareConfig
from conf.schema import OptimConfig, ParallelConfig, ZeroConfig
from conf.shape import Shape
from launch.estimate.counts import (
    attention_recomputed_flops,
    by_rule,
    context_traffic,
    ffn_recomputed_flops,
    flops_per_token,
    host_traffic,
    logits_rows,
    parameters,
    rank_parameters,
    score_flops_per_token,
    tensor_traffic,
    zero_traffic,
)
from launch.estimate.optimizer import optimizer_flops, optimizer_traffic

GEMM_EFFICIENCY = 0.52
# Of the peak in FP8, roundings apart: the gain of two published runs with FP8 over the same in bf16.
FP8_EFFICIENCY = 0.40
NETWORK_EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True)
class ParallelLayout:
    """How a model is distributed over GPUs, and a step over micro-batches.

    Args:
        gpus, gpus_per_node: in total, and per node.
        stage: of ZeRO.
        micro_batch: sequences per rank at once.
        micro_batches: per step and rank.
        recompute: fraction of the layers' forward that is recomputed in backward.
        checkpointing: as `model.activation_checkpointing`, if it recomputes attention without the rest of a layer.
        overlap: fraction of a step that the traffic of ZeRO's gradients can overlap.
        overlap_weights: whether that of its weights can too.
        fp8: whether the projections of attention and FFN multiply in FP8.
        gradient_width: bytes per gradient element in communication.
        bucket: elements that ZeRO sends at once.
        offload, offload_parameters: whether the optimizer's state, and the weights, are in the host's memory.
        pipeline, interleaved: pipeline stages, and virtual stages per rank.
    """

    shape: Shape
    sequence_length: int
    gpus: int
    gpus_per_node: int
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    stage: int = 1
    micro_batch: int = 1
    micro_batches: int = 1
    recompute: float = 0.0
    checkpointing: str = ""
    overlap: float = 0.0
    overlap_weights: bool = False
    bf16: bool = True
    fp8: bool = False
    on_gpu: bool = True
    gradient_width: int = 4
    bucket: int = 50_000_000
    offload: bool = False
    offload_parameters: bool = False
    pipeline: int = 1
    interleaved: int = 1
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)

    @property
    def dp_cp(self) -> int:
        """Data-parallel times context-parallel ranks: those that ZeRO partitions states over."""
        return self.gpus // (self.parallel.tensor * self.pipeline)

    @property
    def tokens(self) -> int:
        """Per step, over all ranks."""
        return self.dp_cp // self.parallel.context * self.micro_batch * self.micro_batches * self.sequence_length


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds per step, by part."""

    products: float
    memory: float
    tensor: float
    context: float
    data: float
    latency: float
    bubble: float
    optimizer: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return math.fsum(dataclasses.astuple(self))


def overlapped(stage: int, bf16: bool, micro_batches: int) -> tuple[float, bool]:
    """Return the fraction of a step that gradient traffic overlaps under `zero.overlap=true`, and whether weights' does too.

    Stage 3 gathers ahead and reduces behind, over the whole step. Stage 2 reduces during every backward, two thirds of a step,
    and stage 1 during the last one; their weights are gathered after the optimizer step, which nothing overlaps. Stage 0, and
    DeepSpeed's optimizer for stage 1 with fp32 sums of bf16 gradients, which accumulation takes, reduce after backward.
    """
    if stage == 3:
        return 1.0, True
    if stage == 0 or (stage == 1 and bf16 and micro_batches > 1):
        return 0.0, False
    return (2 / 3 if stage == 2 else 2 / 3 / micro_batches), False


def step_time(
    layout: ParallelLayout,
    hardware: HardwareConfig,
    efficiency: float = GEMM_EFFICIENCY,
    network_efficiency: float = NETWORK_EFFICIENCY,
) -> StepTime:
    """Return the seconds per step, by part."""
    shape, parallel, width = layout.shape, layout.parallel, 2 if layout.bf16 else 4
    shards = parallel.tensor * layout.pipeline  # of the model
    tokens = layout.micro_batch * layout.sequence_length / parallel.context
    # Per micro-batch.
    flops = flops_per_token(shape, layout.sequence_length)
    recomputed = layout.recompute * (flops["attention"] + flops["ffn"]) / 3 + ffn_recomputed_flops(shape)
    if layout.checkpointing:
        recomputed += attention_recomputed_flops(shape, layout.sequence_length)
    power = min(1.0, hardware.watts / hardware.full_watts) ** (1 / 3)
    peak = (hardware.bf16_flops if layout.bf16 else hardware.fp32_flops) * power
    total = sum(flops.values()) + recomputed
    if layout.fp8:  # the projections, as so many FLOPs in bf16 as take their time
        projections = total - flops["output"] - score_flops_per_token(shape, layout.sequence_length)
        faster = hardware.fp8_flops * FP8_EFFICIENCY / (hardware.bf16_flops * GEMM_EFFICIENCY)
        total -= projections * (1 - 1 / faster)
    products = total * tokens / shards / (peak * efficiency)
    traffic_bytes = elementwise_bytes(shape, width, layout.recompute, layout.checkpointing) * tokens / shards
    traffic_bytes += loss_bytes(shape, int(tokens), width, parallel.tensor, layout.on_gpu) / layout.pipeline
    if layout.fp8:
        traffic_bytes += rounding_bytes(shape, tokens) / shards
    memory = traffic_bytes / hardware.memory_bandwidth
    # Per step.
    sent = traffic(layout)
    tensor = sent["tensor"] / (_ring_bandwidth(parallel.tensor, 1, layout, hardware) * network_efficiency)
    context = sent["context"] / (
        _ring_bandwidth(parallel.context, parallel.tensor, layout, hardware) * network_efficiency
    )
    products, memory = products * layout.micro_batches, memory * layout.micro_batches
    compute = math.fsum([products, memory, tensor, context])  # what ZeRO's traffic can overlap
    bubble = compute * (layout.pipeline - 1) / (layout.micro_batches * layout.interleaved)
    own = rank_parameters(shape, parallel.tensor) / layout.pipeline
    data = latency = 0.0
    if layout.dp_cp > 1:
        bandwidth = _ring_bandwidth(layout.dp_cp, shards, layout, hardware) * network_efficiency
        gradients, weights = sent["gradients"] / bandwidth, sent["weights"] / bandwidth
        if layout.overlap_weights:
            data = max(0.0, gradients + weights - layout.overlap * compute)
        else:
            data = max(0.0, gradients - layout.overlap * compute) + weights
        latency = _collectives(layout, own) * (layout.dp_cp - 1) * hardware.network_latency
    # Over a link of its own: what ZeRO sends overlaps it.
    host = sent["host"] / hardware.host_bandwidth
    host = max(0.0, host - layout.overlap * compute) if layout.overlap_weights else host
    partitions = layout.dp_cp if layout.stage else 1
    state_bandwidth = hardware.host_bandwidth if layout.offload else hardware.memory_bandwidth
    moved = by_rule(shape, parallel.tensor, layout.optim.name, lambda rule: rule.bytes_moved) / layout.pipeline
    optimizer = moved / partitions / state_bandwidth
    optimizer += optimizer_flops(shape, layout.optim, layout.gpus) / (peak * efficiency)
    optimizer += sent["optimizer"] / (_ring_bandwidth(layout.gpus, 1, layout, hardware) * network_efficiency)
    return StepTime(products, memory, tensor, context, data, latency, bubble, optimizer, host)


def traffic(layout: ParallelLayout) -> dict[str, float]:
    """Return the bytes that a rank sends per step to tensor ranks, to context ranks, for ZeRO's gradients and weights, from and
    to the host's memory, and in the optimizer's step.
    """
    shape, parallel, width = layout.shape, layout.parallel, 2 if layout.bf16 else 4
    tokens = int(layout.micro_batch * layout.sequence_length / parallel.context)
    times = layout.micro_batches
    checkpointing = True if layout.recompute == 1 else layout.checkpointing
    sent = {"tensor": 0.0, "context": 0.0, "gradients": 0.0, "weights": 0.0}
    if parallel.tensor > 1:
        per_micro_batch = sum(tensor_traffic(shape, parallel, tokens, width, checkpointing).values())
        sent["tensor"] = times * per_micro_batch / layout.pipeline
    if parallel.context > 1:
        sent["context"] = times * context_traffic(shape, parallel, tokens, width, checkpointing)
    own = int(rank_parameters(shape, parallel.tensor) / layout.pipeline)
    zero = ZeroConfig(layout.stage, layout.offload, layout.offload_parameters)
    sent["host"] = host_traffic(own, zero, layout.dp_cp, times, width)
    if layout.dp_cp > 1:
        sent |= zero_traffic(own, layout.dp_cp, layout.stage, times, width, layout.gradient_width)
    sent["optimizer"] = optimizer_traffic(shape, layout.optim, parallel.tensor, layout.dp_cp, layout.stage, width)
    return sent


def elementwise_bytes(shape: Shape, width: int, recompute: float = 0.0, checkpointing: str = "") -> float:
    """Return the bytes per token read and written in the layers outside of matrix products, forward and backward.

    Per layer in forward: two norms and two residual additions (10 d_model), rotary embedding and attention (4 times the
    queries, 4 times keys and values), and the fused activation: its inputs and its output. Backward is twice that; where h was
    saved, backward need not write it again. Where attention is recomputed, its part of forward comes a third time, and the
    norms (4 d_model).
    """
    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    layers = shape.n_layers * (10 * shape.d_model + 4 * (queries + keys))
    layers += shape.ffn_sum(lambda layer: layer.matrices * layer.d_ff)
    saved = shape.ffn_sum(lambda layer: layer.d_ff if layer.arm.save in ("everything", "output") else 0)
    again = shape.n_layers * 4 * (shape.d_model + queries + keys) if checkpointing else 0
    return width * ((3 + recompute) * layers + again - saved)


def rounding_bytes(shape: Shape, tokens: float) -> float:
    """Return the bytes that rounding the operands of all projections to FP8, a scale per row, moves in a micro-batch.

    Each operand is rounded along its rows, 3 bytes per element (2 read, 1 written), and for another product along its columns,
    5 bytes, since their maxima take a pass of their own. The activation's kernel writes the rows of h.
    """
    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    attention = 2 * (shape.d_model + queries + keys)  # inputs and outputs of its two products
    ffn = shape.ffn_sum(lambda layer: 8 * (2 * shape.d_model + layer.matrices * layer.d_ff) - 3 * layer.d_ff)
    by_part = parameters(shape)
    return tokens * (8 * shape.n_layers * attention + ffn) + 8 * (by_part["attention"] + by_part["ffn"])


def loss_bytes(shape: Shape, tokens: int, width: int, tensor: int, on_gpu: bool) -> float:
    """Return the bytes that the loss of a micro-batch reads and writes on a rank, beside its products' inputs.

    Logits are written by a product, read and overwritten by the softmax's gradient, and read by two products: 5, and once more
    on the way through the cache. The fp32 sum of the weight's gradient is read and written once per chunk, then rounded, and
    multiplied by the gradient of the loss in backward.
    """
    vocabulary = shape.vocab_size / tensor
    chunks = math.ceil(tokens / logits_rows(tokens, int(vocabulary), on_gpu))
    return 6 * width * tokens * vocabulary + (8 * chunks + 4 + 3 * width) * vocabulary * shape.d_model


def model_flops_utilization(
    layout: ParallelLayout, hardware: HardwareConfig, seconds: float, causal: bool = True
) -> float:
    """Return MFU: the fraction of the GPUs' peak that the model's own FLOPs reach, without recomputation.

    Args:
        causal: count half of the attention matrix, as `flops_per_token` does; else all of it, and 6 FLOPs for every
            parameter, the embedding's included (as MPT and Megatron-LM quote it).
    """
    shape, length = layout.shape, layout.sequence_length
    if causal:
        flops = sum(flops_per_token(shape, length).values())
    else:
        flops = 6 * sum(parameters(shape).values()) + 12 * shape.n_layers * shape.n_heads * shape.head_dim * length
    return (
        flops * layout.tokens / seconds / (layout.gpus * (hardware.bf16_flops if layout.bf16 else hardware.fp32_flops))
    )


def _ring_bandwidth(ranks: int, stride: int, layout: ParallelLayout, hardware: HardwareConfig) -> float:
    """Return the bytes/s that each rank of a group sends to the next in a ring.

    Args:
        ranks: size of the group.
        stride: distance in ranks between two neighbours of the group.
    """
    if ranks * stride <= layout.gpus_per_node:
        return hardware.node_bandwidth
    # Each member on a node carries its part of the traffic to other nodes, on a network card of its own.
    members = max(1, layout.gpus_per_node // stride)
    return min(hardware.node_bandwidth, members * hardware.network_bandwidth)


def _collectives(layout: ParallelLayout, own: float) -> float:
    """Return the number of collectives of ZeRO per step."""
    if layout.stage == 3:  # per layer, embedding and output: gathered twice, reduced once
        return 3 * (layout.shape.n_layers / layout.pipeline + 2) * layout.micro_batches
    times = layout.micro_batches if layout.stage == 2 else 1
    return math.ceil(own / layout.bucket) * (2 * times + (layout.stage > 0))  # an all-reduce counts as two
