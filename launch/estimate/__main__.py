"""Estimate memory, time and cost before a run starts: `python -m launch.estimate cluster=h100 nodes=8 model=llama3_8b`.

    cluster=NAME       a file of conf/cluster
    cluster.KEY=VALUE  overrides one of its keys
    nodes=1            number of nodes
    ranks_per_node=N   default: one per GPU of a node
    KEY=VALUE          as for train.py
    --plot[=FILE]      plot MFU and cost against the number of GPUs

Prints the memory per GPU, the time per step, and the cost of the whole run; then the tensor sizes, ZeRO stages, micro-batches
and checkpointing settings that fit, fastest first. No GPU is needed. launch/estimate/counts.py and
step_time.py beside it define the estimate; bench/results/estimate.md compares it with published and measured runs.
"""

from __future__ import annotations

import sys

from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from conf.help import key_lines
from conf.keys import choices
from conf.load import load
from conf.overrides import check_overrides
from conf.terminal import SafeConsole
from kernels.common.commands import run_command
from kernels.common.options import split_options
from launch.estimate.console import show
from launch.estimate.plot import draw
from launch.estimate.search import estimate, fast_then_small, search
from launch.sbatch import check

_OPTIONS = {"nodes": 1, "ranks_per_node": 0, "plot": ""}


def usage() -> str:
    """Return the text of `--help`: the module's docstring, the clusters, and the keys of one."""
    clusters = f"clusters: {', '.join(choices('cluster'))}; add your own as a file in conf/cluster"
    return "\n".join([__doc__ or "", clusters, "", "keys of a cluster", *key_lines(ClusterConfig, "cluster.")])


def main(argv: list[str]) -> int:
    minimum = {"nodes": 1, "ranks_per_node": 1}
    options, arguments = split_options(argv, _OPTIONS, minimum, flags={"plot": "estimate.png"})
    cluster, overrides = read_group("cluster", ClusterConfig, arguments, "cluster")
    check_overrides(overrides, _OPTIONS)
    per_node = options["ranks_per_node"] or max(1, cluster.gpus_per_node)
    check(cluster, per_node)
    config, gpus = load(overrides), options["nodes"] * per_node
    requested = estimate(config, cluster, gpus, per_node)
    candidates = sorted(search(config, cluster, gpus, per_node), key=fast_then_small)
    console = SafeConsole(file=sys.stdout, highlight=False, markup=False)
    show(requested, candidates, console)
    if options["plot"]:
        draw(config, cluster, per_node, options["plot"])
        console.print(f"MFU and cost against GPUs: {options['plot']}")
    return 0


if __name__ == "__main__":
    run_command(main, usage, needs_arguments=True)
