"""Check the hardware of a node before a job trains on it: GPUs, their errors, locked memory, and speed beside the other nodes.

`launch.doctor gate=FILE` prints these findings, and the job leaves nodes out whose own finding is red.
"""

from __future__ import annotations

import collections
import re
import resource
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from conf.cluster_schema import ClusterConfig
from launch.finding import GREEN, RED, YELLOW, Finding

# Per GPU, as nvidia-smi prints them: errors that ECC could not correct since the driver was loaded, and rows of memory that it
# could not, or could only after a reset, replace. https://docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt
_QUERY = ("index", "ecc.errors.uncorrected.volatile.total", "remapped_rows.failure", "remapped_rows.pending")
# What it prints where a GPU does not count errors or rows, or does not say. Anything else in place of a number, such as
# [GPU is lost], [GPU requires reset] or [Unknown Error], is a fault of the GPU.
_NOT_COUNTED = {"N/A", "[N/A]", "[Not Supported]", "[Insufficient Permissions]"}
# Messages of the driver after which a GPU needs a reset, and its node a restart: https://docs.nvidia.com/deploy/xid-errors
_FATAL_XIDS = {
    48: "double-bit ECC error",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    95: "uncontained ECC error",
    119: "the GPU's firmware does not answer",
    120: "the GPU's firmware has failed",
}
_MIN_LOCKED = 2**30  # bytes that RDMA registers
_INFINIBAND = Path("/sys/class/infiniband")
_SLOW, _BROKEN = 1.25, 2.0  # times the median of the nodes


def node_findings(gpus: int) -> Iterator[Finding]:
    """Yield the findings about this node's hardware.

    Args:
        gpus: that the job uses on each node; 0: none.
    """
    if gpus:
        yield gpu_errors(gpus)
        yield driver_messages()
    yield locked_memory()


def gpu_errors(needed: int) -> Finding:
    """Count the GPUs, and read their memory errors."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(
            RED, "GPUs", f"nvidia-smi does not answer ({type(error).__name__})", "drain this node", node=True
        )
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]
    for cells in rows:
        # It also prints messages between the rows, such as that a GPU's infoROM is corrupted, with status 0.
        if len(cells) != len(_QUERY) or not cells[0].isdigit():
            text = f"nvidia-smi prints {', '.join(cells)!r} in place of a GPU's errors"
            return Finding(RED, "GPUs", text, "drain this node, and reset or replace the GPU", node=True)
        if fault := next((cell for cell in cells[1:] if not _is_count(cell)), ""):
            text = f"GPU {cells[0]} reports {fault}"
            return Finding(RED, "GPUs", text, "drain this node, and reset or replace the GPU", node=True)
    if len(rows) < needed:
        return Finding(RED, "GPUs", f"{len(rows)} of the {needed} that this job needs", "drain this node", node=True)
    for index, errors, failure, pending in rows:
        if errors.isdigit() and int(errors):
            text = f"GPU {index} has {errors} memory errors that ECC could not correct"
            return Finding(RED, "GPUs", text, "drain this node, and reset or replace the GPU", node=True)
        if "1" in (failure, pending) or "Yes" in (failure, pending):
            text = f"GPU {index} has broken rows of memory that it has not replaced"
            return Finding(RED, "GPUs", text, "drain this node, and reset or replace the GPU", node=True)
    return Finding(GREEN, "GPUs", f"{len(rows)}, without memory errors")


def _is_count(cell: str) -> bool:
    return cell.isdigit() or cell in ("Yes", "No") or cell in _NOT_COUNTED


def driver_messages() -> Finding:
    """Look for errors of GPUs in the kernel's messages, where users may read them."""
    try:
        text = subprocess.run(["dmesg"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return Finding(GREEN, "Xid", "the kernel's messages cannot be read here")
    numbers = [int(number) for number in re.findall(r"NVRM: Xid \([^)]*\): (\d+)", text)]
    for number in numbers:
        if number in _FATAL_XIDS:
            text = f"{number} since the last start: {_FATAL_XIDS[number]}"
            return Finding(RED, "Xid", text, "drain this node, and restart it", node=True)
    if numbers:
        return Finding(YELLOW, "Xid", f"{', '.join(map(str, sorted(set(numbers))))} since the last start", "see dmesg")
    return Finding(GREEN, "Xid", "none since the last start")


def locked_memory() -> Finding:
    """Check that InfiniBand can register memory: with a small limit NCCL fails, or falls back to TCP."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding(GREEN, "locked memory", "unlimited")
    text = f"limit {soft / 2**20:,.0f} MiB"
    if _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()) and soft < _MIN_LOCKED:
        advice = "LimitMEMLOCK=infinity for slurmd, and PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
        return Finding(RED, "locked memory", f"{text}, which is too little for InfiniBand", advice, node=True)
    return Finding(GREEN, "locked memory", text)


def sheet_bandwidth(cluster: ClusterConfig, hosts: Sequence[str]) -> float:
    """Return the bytes/s that each rank can send in a ring over all ranks, by the cluster's data sheet.

    Between nodes a rank sends through the network card of its own GPU and those of the other ranks of its node: with one rank
    per node, as the check of a job has, through a single card.

    Args:
        hosts: of every rank.
    """
    hardware, on_a_node = cluster.hardware, collections.Counter(hosts)
    if len(on_a_node) == 1:
        return hardware.node_bandwidth
    return min(hardware.node_bandwidth, min(on_a_node.values()) * hardware.network_bandwidth)


def slow_nodes(hosts: Sequence[str], seconds: Sequence[float], rank: int, on_gpus: bool) -> Iterator[Finding]:
    """Name the nodes that compute more slowly than the median.

    Args:
        hosts: of every rank.
        seconds: that every rank took for the same matmul.
        rank: of this process, which is told whether its own node is at fault.
        on_gpus: cores may be shared with others, so without GPUs a slow node is no fault.
    """
    median = statistics.median_low(seconds)  # of two nodes the faster one
    for number, (host, took) in enumerate(zip(hosts, seconds, strict=True)):
        if took > _SLOW * median:
            broken = on_gpus and took > _BROKEN * median
            text = f"{host} takes {took / median:.1f} times as long as the median for a matmul: every step waits for it"
            advice = "drain it, or leave it out: sbatch --exclude=NODE"
            yield Finding(RED if broken else YELLOW, "slow node", text, advice, node=broken and number == rank)
