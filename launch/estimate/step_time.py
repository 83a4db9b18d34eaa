"""How long a step takes on a cluster: what is computed, read and sent, over what the hardware can do.

Two constants are fitted, to nine published runs on H100s (`python -m bench.estimate` prints them beside the model; all are
within 10%): the share of its peak that a GPU reaches in matrix products, and the share of its data sheet's rate that a
collective reaches. The rest is counted (launch/estimate/counts.py) or stands in conf/cluster:

    products    FLOPs with what is recomputed, at GEMM_EFFICIENCY of a peak that falls with the cube root of the power limit
    memory      reads and writes of all that is no matrix product, at the rate of the memory
    tensor      what tensor ranks send for every layer, which nothing hides; context likewise
    data        what ZeRO sends, less what is hidden behind products
    latency     of the rings that ZeRO sends in, which nothing hides: so many hops as there are ranks
    bubble      what a pipeline waits (published runs only: there are no pipeline stages here)
    optimizer   reads and writes of its step

Not in it: stragglers, failures, evaluation, checkpoints, input, and expert or pipeline parallelism.
"""

from __future__ import annotations

import dataclasses
import math

from conf.schema import HardwareConfig, ParallelConfig
from launch.estimate.counts import (
    Shape,
    context_traffic,
    flops_per_token,
    parameters,
    rank_parameters,
    tensor_traffic,
    zero_traffic,
)

GEMM_EFFICIENCY = 0.52
NETWORK_EFFICIENCY = 0.5
_OPTIMIZER_BYTES = (
    30  # read and written by a step of AdamW, a parameter: three fp32 numbers both ways, gradient, weight
)


@dataclasses.dataclass(frozen=True)
class ParallelLayout:
    """How a model is spread over GPUs, and how a step is cut.

    Args:
        gpus: in all; gpus_per_node: of them on a node.
        stage: of ZeRO.
        micro_batch: sequences of a rank at once; micro_batches: of a step, on a rank.
        recompute: the share of the layers' forward that is computed again in backward.
        hidden: the share of a step behind which ZeRO's traffic hides.
        gradient_width: bytes of a gradient on its way.
        bucket: elements that ZeRO sends at once.
        pipeline, interleaved: stages, and parts of a stage that take turns.
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
    hidden: float = 0.0
    bf16: bool = True
    gradient_width: int = 4
    bucket: int = 50_000_000
    offload: bool = False
    pipeline: int = 1
    interleaved: int = 1

    @property
    def replicas(self) -> int:
        """Ranks that ZeRO shares states among."""
        return self.gpus // (self.parallel.tensor * self.pipeline)

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return self.replicas // self.parallel.context * self.micro_batch * self.micro_batches * self.sequence_length


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part."""

    products: float
    memory: float
    tensor: float
    context: float
    data: float
    latency: float
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        return math.fsum(dataclasses.astuple(self))


def step_time(
    layout: ParallelLayout,
    hardware: HardwareConfig,
    efficiency: float = GEMM_EFFICIENCY,
    network_efficiency: float = NETWORK_EFFICIENCY,
) -> StepTime:
    """Return the seconds of a step."""
    shape, parallel, width = layout.shape, layout.parallel, 2 if layout.bf16 else 4
    cut = parallel.tensor * layout.pipeline
    tokens = layout.micro_batch * layout.sequence_length / parallel.context
    # A micro-batch.
    flops = flops_per_token(shape, layout.sequence_length)
    again = layout.recompute * (flops["attention"] + flops["ffn"]) / 3
    power = min(1.0, hardware.watts / hardware.full_watts) ** (1 / 3)
    peak = (hardware.bf16_flops if layout.bf16 else hardware.fp32_flops) * power
    products = (sum(flops.values()) + again) * tokens / cut / (peak * efficiency)
    memory = elementwise_bytes(shape, width, layout.recompute) * tokens / cut / hardware.memory_bandwidth
    # A step.
    sent = traffic(layout)
    tensor = sent["tensor"] / (_rate(parallel.tensor, 1, layout, hardware) * network_efficiency)
    context = sent["context"] / (_rate(parallel.context, parallel.tensor, layout, hardware) * network_efficiency)
    parts = [products * layout.micro_batches, memory * layout.micro_batches, tensor, context]
    bubble = math.fsum(parts) * (layout.pipeline - 1) / (layout.micro_batches * layout.interleaved)
    own = rank_parameters(shape, parallel.tensor) / layout.pipeline
    data = latency = 0.0
    if layout.replicas > 1:
        rate = _rate(layout.replicas, cut, layout, hardware) * network_efficiency
        data = max(0.0, sent["data"] / rate - layout.hidden * math.fsum(parts))
        latency = _rings(layout, own) * (layout.replicas - 1) * hardware.network_latency
    share = layout.replicas if layout.stage else 1
    through = hardware.host_bandwidth if layout.offload else hardware.memory_bandwidth
    return StepTime(*parts, data, latency, bubble, _OPTIMIZER_BYTES * own / share / through)


def traffic(layout: ParallelLayout) -> dict[str, float]:
    """Return the bytes that a rank sends in a step to tensor ranks, to context ranks, and for ZeRO ("data")."""
    shape, parallel, width = layout.shape, layout.parallel, 2 if layout.bf16 else 4
    tokens = int(layout.micro_batch * layout.sequence_length / parallel.context)
    again, times = layout.recompute == 1, layout.micro_batches
    sent = dict.fromkeys(("tensor", "context", "data"), 0.0)
    if parallel.tensor > 1:
        of_layers = sum(tensor_traffic(shape, parallel, tokens, width, again).values())
        sent["tensor"] = times * of_layers / layout.pipeline
    if parallel.context > 1:
        sent["context"] = times * context_traffic(shape, parallel, tokens, width, again)
    if layout.replicas > 1:
        own = int(rank_parameters(shape, parallel.tensor) / layout.pipeline)
        sent["data"] = sum(
            zero_traffic(own, layout.replicas, layout.stage, times, width, layout.gradient_width).values()
        )
    return sent


def elementwise_bytes(shape: Shape, width: int, recompute: float = 0.0) -> float:
    """Return the bytes a token that are read and written outside of matrix products, forward and backward.

    Of a layer forward: two norms, two sums with the residual stream (10 d_model), rotation and attention (4 times the queries,
    4 times keys and values), and the activation, fused: its inputs and its result. Backward is twice that.
    """
    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    layers = sum(10 * shape.d_model + 4 * (queries + keys) + layer.matrices * layer.d_ff for layer in shape.ffn)
    return width * ((3 + recompute) * layers + 6 * shape.vocab_size)


def model_flops_utilization(
    layout: ParallelLayout, hardware: HardwareConfig, seconds: float, causal: bool = True
) -> float:
    """Return the share of the GPUs' peak that the model's own FLOPs take, recomputation not counted.

    Args:
        causal: whether attention counts as here, half of its square; else whole, with 6 FLOPs of every parameter, the
        embedding's too (as MPT and Megatron-LM quote it).
    """
    shape, length = layout.shape, layout.sequence_length
    if causal:
        flops = sum(flops_per_token(shape, length).values())
    else:
        flops = 6 * sum(parameters(shape).values()) + 12 * shape.n_layers * shape.n_heads * shape.head_dim * length
    return (
        flops * layout.tokens / seconds / (layout.gpus * (hardware.bf16_flops if layout.bf16 else hardware.fp32_flops))
    )


def _rate(ranks: int, apart: int, layout: ParallelLayout, hardware: HardwareConfig) -> float:
    """Return the bytes/s that each of a group sends to the next in a ring.

    Args:
        ranks: of the group; apart: how far two neighbours in it are from one another, in ranks.
    """
    if ranks * apart <= layout.gpus_per_node:
        return hardware.node_bandwidth
    # Each of the group's members on a node has its part of the ring's traffic to another node, and a network card.
    members = max(1, layout.gpus_per_node // apart)
    return min(hardware.node_bandwidth, members * hardware.network_bandwidth)


def _rings(layout: ParallelLayout, own: float) -> float:
    """Return how many collectives ZeRO makes in a step."""
    if layout.stage == 3:  # of every layer, the embedding and the output: gathered twice, reduced once
        return 3 * (layout.shape.n_layers / layout.pipeline + 2) * layout.micro_batches
    times = layout.micro_batches if layout.stage == 2 else 1
    return math.ceil(own / layout.bucket) * (2 * times + (layout.stage > 0))  # an all-reduce is two
