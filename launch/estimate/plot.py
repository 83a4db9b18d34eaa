"""MFU, hours and cost against the number of GPUs: `python -m launch.estimate ... --plot`."""

from __future__ import annotations

import dataclasses
import math

from conf.cluster_schema import ClusterConfig
from conf.schema import Config
from kernels.common.errors import UserError
from kernels.common.files import explain_os_errors
from launch.estimate.search import MOST_GPUS, Estimate, fast_then_small, search


def draw(config: Config, cluster: ClusterConfig, per_node: int, path: str) -> None:
    """Draw MFU, hours and cost of the fastest combination against the number of GPUs, 1 to 16,384, at the same batch.

    Raises:
        UserError: nothing fits on any number, or the file cannot be written.
    """
    import matplotlib.ticker
    from matplotlib.figure import Figure

    # Every power-of-two number of GPUs divides a power-of-two batch.
    config = dataclasses.replace(config, global_batch_size=2 ** round(math.log2(config.global_batch_size)))
    best: list[Estimate] = []  # of each number of GPUs
    gpus = 1
    while gpus <= MOST_GPUS:
        candidates = search(config, cluster, gpus, min(per_node, gpus))
        if fastest := min(candidates, key=fast_then_small, default=None):
            best.append(fastest)
        gpus *= 2
    if not best:
        raise UserError(f"nothing fits on any number of GPUs up to {MOST_GPUS}: there is nothing to draw")
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
    lower.set_xlabel(f"GPUs ({cluster.hardware.device or cluster.name}, {per_node} per node)")
    lower.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    lower.legend()
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    with explain_os_errors("write the picture", path):
        try:
            figure.savefig(path, dpi=150)
        except ValueError as error:
            raise UserError(f"cannot write the picture {path}: {error}") from error
