"""`python -m launch.estimate`: what it prints and draws, and its complaints."""

from __future__ import annotations

import re
import sys

import pytest

from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from conf.load import load
from kernels.common.errors import UserError
from launch.estimate.__main__ import main
from launch.estimate.search import estimate
from launch.estimate.step_time import traffic
from tests.training.tiny import command

H100, _ = read_group("cluster", ClusterConfig, ["cluster=h100"], "cluster")


def step_sent(printed: str) -> float:
    """Return the gigabytes that a GPU sends per step, as the command prints them."""
    return float(re.search(r"ZeRO traffic, not overlapped.* ([\d.]+) *$", printed, re.MULTILINE)[1])


def asked_traffic(words: list[str]) -> float:
    sent = traffic(estimate(load(words), H100, 16, 8).layout)
    return sent["gradients"] + sent["weights"]


def test_the_command_says_it_all_and_draws(tmp_path, capsys):
    picture = tmp_path / "estimate.png"
    assert main(["cluster=h100", "nodes=2", "model=llama_1b", f"--plot={picture}"]) == 0
    printed = capsys.readouterr().out
    sent = step_sent(printed)
    assert sent == pytest.approx(asked_traffic(["model=llama_1b"]) / 1e9, rel=1e-3)
    for part in (
        "parameters",
        "weights",
        "optimizer",
        "fits",
        "matrix products",
        "MFU",
        "hours",
        "MWh",
        "$",
        "overrides of the first: ",
    ):
        assert part in printed, part
    assert picture.read_bytes().startswith(b"\x89PNG")
    first = re.search(r"overrides of the first: (.*)", printed)[1].split()
    config = load(["model=llama_1b", *first])
    assert estimate(config, H100, 16, 8).fits


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["model=nano"], "cluster=NAME is missing: choose a cluster from"),
        (["cluster=h100", "nodes=3", "model=llama3_8b"], "is not divisible by the 24"),
        (["cluster=h100", "ranks_per_node=9"], "a node of h100 has 8 GPUs"),
        (
            ["cluster=h100", "parallel.tensor=3", "ranks_per_node=3", "model=llama3_8b"],
            "parallel.tensor=3 does not divide",
        ),
        (["cluster=h100", "cluster.hardware.wats=3"], "wats"),
        (
            ["cluster=h100", "cluster.hardware.network_bandwidth=0"],
            "cluster h100: hardware.network_bandwidth=0: expected a finite number above 0",
        ),
        (["cluster=h100", "cluster.hardware.memory_bandwidth=0"], "hardware.memory_bandwidth=0: expected a finite"),
        (["cluster=h100", "cluster.hardware.full_watts=0"], "hardware.full_watts=0: expected a finite number above 0"),
        (["cluster=h100", "cluster.hardware.node_bandwidth=-1"], "hardware.node_bandwidth=-1: expected a finite"),
        (["cluster=h100", "cluster.hardware.bf16_flops=nan"], "hardware.bf16_flops=nan: expected a finite number"),
        (["cluster=h100", "cluster.hardware.memory_gib=.inf"], "hardware.memory_gib=inf: expected a finite number"),
        (
            ["cluster=h100", "cluster.hardware.dollars_per_gpu_hour=-3"],
            "hardware.dollars_per_gpu_hour=-3: expected a finite number, 0 or above",
        ),
        (["cluster=cpu", "plot=/nowhere/e.png"], "cannot write the picture /nowhere/e.png"),
        (["cluster=cpu", "plot=/tmp/e.what"], "cannot write the picture /tmp/e.what"),
    ],
)
def test_bad_input_is_one_sentence(words, why):
    with pytest.raises(UserError, match=re.escape(why)):
        main(words)


def test_what_is_on_the_host_is_printed(capsys):
    assert main(["cluster=h100", "model=llama_1b", "zero=offload", "zero.overlap=false"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"in the host's memory, GiB per node: weights \d+\.\d \+ optimizer \d+\.\d\n", printed)
    assert re.search(r"weights from the host, not overlapped +\d", printed)


def test_it_needs_neither_torch_nor_a_gpu():
    code = (
        "import sys; from launch.estimate.__main__ import main; main(['cluster=h100']); print('torch' in sys.modules)"
    )
    result = command(sys.executable, "-c", code)
    assert result.status == 0, result.err
    assert result.out.splitlines()[-1] == "False"
