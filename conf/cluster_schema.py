"""The typed schema of clusters: every key of `cluster=`, which the commands of `launch/` and `ablation.run` read.

Values of the clusters are in `conf/cluster/<cluster>.yaml`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Optional

from conf.schema import key

# Of HardwareConfig: 0 where there is none of it. Times are divided by the others.
_MAY_BE_ZERO = ("bf16_flops", "fp8_flops", "network_latency", "node_watts", "dollars_per_gpu_hour")


@dataclass
class HardwareConfig:
    """The hardware of a node. Bandwidths are unidirectional; FLOP/s are dense, without sparsity."""

    device: str = key("", "name of the GPU")
    memory_gib: float = key(80.0, "memory per GPU, GiB")
    bf16_flops: float = key(1e15, "peak FLOP/s per GPU in bf16")
    fp32_flops: float = key(6.7e13, "peak FLOP/s per GPU in fp32")
    fp8_flops: float = key(0.0, "peak FLOP/s per GPU in FP8; 0: it has no FP8 units")
    memory_bandwidth: float = key(3.35e12, "bytes/s between a GPU and its memory")
    node_bandwidth: float = key(4.5e11, "bytes/s from a GPU to others of its node")
    network_bandwidth: float = key(5e10, "bytes/s from a GPU to other nodes")
    network_latency: float = key(2e-6, "seconds per hop between two ranks of a ring")
    host_bandwidth: float = key(5.5e10, "bytes/s between a GPU and the host's memory")
    watts: float = key(700.0, "power limit per GPU")
    full_watts: float = key(700.0, "power per GPU at which it reaches its peak")
    node_watts: float = key(10200.0, "power of a whole node under load, without cooling")
    dollars_per_gpu_hour: float = key(2.5, "price per GPU hour, rented or owned")

    def __post_init__(self) -> None:
        """Refuse numbers that no hardware has.

        Raises:
            ValueError: it names the key.
        """
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if name == "device":
                continue
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                expected = "a finite number, 0 or above" if name in _MAY_BE_ZERO else "a finite number above 0"
                raise ValueError(f"hardware.{name}={value:g}: expected {expected}")


@dataclass
class ClusterConfig:
    """`cluster=`: the cluster of `launch.slurm` and `launch.estimate`; override its keys as `cluster.KEY=VALUE`."""

    name: str = key("", "name of the choice")
    gpus_per_node: int = key(8, "GPUs per node; 0: none, ranks share its cores")
    cpus_per_node: int = key(96, "cores per node")
    partition: Optional[str] = key(None, "SLURM partition")
    cpu_partition: Optional[str] = key(
        None,
        "SLURM partition of the job that prepares a corpus, with no qos, constraint, memory or sbatch; null: the same",
    )
    account: Optional[str] = key(None, "SLURM account")
    qos: Optional[str] = key(None, "SLURM QOS")
    constraint: Optional[str] = key(None, "SLURM: features that nodes must have")
    memory: Optional[str] = key("0", "memory per node, as SLURM's --mem; 0: all")
    time: str = key("24:00:00", "time limit of a job; an unfinished run resumes in another job")
    signal_seconds: int = key(120, "seconds before the time limit at which SLURM signals the run to save")
    gpu_request: str = key(
        "--gpus-per-node", "how GPUs are requested: --gpus-per-node, --gres, or none", only="cluster.gpus_per_node>0"
    )
    tasks: str = key("gpu", "srun tasks: gpu, one per GPU; node, one per node, which starts its ranks itself")
    python: Optional[str] = key(None, "interpreter; null: the one that submits, or python inside a container")
    container: str = key("none", "none, apptainer, or pyxis")
    image: Optional[str] = key(None, "container image", only="cluster.container!=none")
    mounts: list[str] = key([], "container mounts, HOST:INSIDE", only="cluster.container!=none")
    modules: list[str] = key([], "environment modules to load")
    setup: list[str] = key([], "shell lines to run first, such as activating an environment")
    environment: dict[str, str] = key({}, "environment variables of every rank, such as NCCL_SOCKET_IFNAME")
    sbatch: list[str] = key([], "further options of sbatch, one per item")
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
