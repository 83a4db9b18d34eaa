"""Planted faults are each named, with what to do; what is well is green; ranks really talk."""

from __future__ import annotations

import collections
import re
import resource
import shutil
import socket
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from conf.cluster_schema import ClusterConfig, HardwareConfig
from conf.load import load
from conf.shape import shape_of
from kernels.common.errors import TryAgain
from launch import doctor
from launch.doctor import GREEN, RED, YELLOW, Finding, collective, main
from launch.estimate.counts import checkpoint_bytes
from launch.ranks import Ranks
from tests.training.tiny import command, environment

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def quick(capsys, *words: str) -> tuple[int, dict[str, str]]:
    """Return the exit status, and the lines by the name of what was looked at."""
    status = main(["quick=true", *words])
    lines = capsys.readouterr().out.splitlines()
    return status, {line[7:].split(":")[0].strip(): line for line in lines}


def test_a_machine_that_is_well_is_green(capsys):
    status, lines = quick(capsys)
    assert status == 0
    for name in ("Python", "packages", "compiler", "ranks", "disk space", "shared memory"):
        assert lines[name].startswith("green "), lines[name]


def test_five_planted_faults_are_each_named(capsys, monkeypatch, tmp_path):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 1000))
    monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
    monkeypatch.setattr(doctor, "installed_gpus", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # and no RANK
    status, lines = quick(capsys, "model.attention=flash")
    assert status == 1
    assert lines["compiler"].startswith(
        "yellow compiler: there is no cc, gcc or clang: kernels run as plain torch, several"
    )
    expected = {
        "Python": "3.9.1 is not 3.10 to 3.13 -> make PYTHON=",
        "disk space": r"0.0 GB free in .*, 0.\d GB for 4 checkpoints -> free disk space",
        "model.attention=flash": "flash_attn is not installed -> pip install flash-attn",
        "ranks": "RANK, LOCAL_RANK is not set although WORLD_SIZE is: every process would train alone -> start it by",
    }
    for name, sentence in expected.items():
        assert lines[name].startswith("red "), lines[name]
        assert re.search(sentence, lines[name]), lines[name]
    assert {line.split()[0] for name, line in lines.items() if name not in expected} <= {"green", "yellow"}


@pytest.mark.parametrize(
    ("free", "held", "level", "says"),
    [
        (0.9, 0, RED, r"1\.3 GB free in .*, 5\.9 GB for 4 checkpoints$"),
        (1.1, 0, YELLOW, r"for 4 checkpoints$"),
        (4.1, 0, GREEN, r"for 4 checkpoints$"),
        (1.1, 2, YELLOW, r"for 2 more checkpoints$"),
        (1.1, 3, GREEN, r"for 1 more checkpoint$"),  # of a run that is queued again
        (1.1, 9, GREEN, r"for 1 more checkpoint$"),
        (0.9, 3, RED, r"for 1 more checkpoint$"),
    ],
)
def test_a_run_needs_room_for_what_it_does_not_hold_yet(monkeypatch, tmp_path, free, held, level, says):
    """`free` is in checkpoints of AdamW; keep_last=2, the best one and one being written are 4."""
    config = load([f"runs={tmp_path}", "run=a", "model=llama_125m"])
    size = checkpoint_bytes(shape_of(config), "adamw")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, free * size))
    folder = tmp_path / "a" / "checkpoints"
    for number in range(held):
        (folder / f"step_{number:08d}").mkdir(parents=True)
    for other in ("step_00000009.set_aside", ".step_00000010.tmp") if held else ():
        (folder / other).mkdir()
    finding = doctor.space(config)
    assert (finding.level, bool(re.search(says, finding.text))) == (level, True), finding
    if level == RED and held:  # what an interrupted save left makes room when it is removed
        with open(folder / ".step_00000010.tmp" / "rank_00000.safetensors", "wb") as file:
            file.truncate(int(0.2 * size))
        assert doctor.space(config).level == GREEN
    smaller = load([f"runs={tmp_path}", "run=a", "model=llama_125m", "optim=muon"])
    assert doctor.space(smaller).level != RED


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.attention=flash2"], "unknown model.attention 'flash2': did you mean 'flash'?"),
        (["data=text", "data.path=null"], "data=text needs the location of the text"),
        (["model.n_heads=5"], "model.n_heads=5 does not divide model.d_model=192"),
        (["parallel.tensor=2"], "parallel.tensor=2 does not divide the 3 heads"),
    ],
)
def test_a_configuration_that_cannot_train_is_red(capsys, monkeypatch, words, sentence):
    monkeypatch.setattr(doctor, "installed_gpus", lambda: 0)
    status, lines = quick(capsys, *words)
    assert (status, lines["configuration"][:4]) == (1, "red ")
    assert sentence in lines["configuration"]
    assert quick(capsys, "model=llama_1b", "parallel.tensor=2")[1]["configuration"].startswith("green ")
    status, lines = quick(capsys, "model.attention=flex")
    assert (status, lines["model.attention=flex"][:4]) == (1, "red ")


def test_packages_that_are_missing_or_old_are_named(monkeypatch):
    real = metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise metadata.PackageNotFoundError
        return "1.0" if name == "sympy" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = {finding.name: finding for finding in doctor.packages()}
    assert (found["deepspeed"].level, found["deepspeed"].advice) == (RED, "make setup")
    assert (found["sympy"].level, found["sympy"].text) == (YELLOW, "1.0 is not >=1.13")


def test_on_a_gpu_a_compiler_and_python_h_are_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "installed_gpus", lambda: 8)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.delenv("CC", raising=False)
        finding = doctor.compiler()
    text = "Triton cannot launch its kernels: there is no C compiler (apt install gcc, or module load gcc, or set CC)"
    assert finding == Finding(RED, "compiler", text)
    monkeypatch.setattr(doctor, "triton_problem", lambda: "/usr/include has no Python.h (apt install python3.11-dev)")
    text = "Triton cannot launch its kernels: /usr/include has no Python.h (apt install python3.11-dev)"
    assert doctor.compiler() == Finding(RED, "compiler", text)


def test_a_compiler_that_fails_and_few_files_are_yellow(monkeypatch, tmp_path):
    bad = tmp_path / "cc"
    bad.write_text("#!/bin/sh\necho no OpenMP here >&2; exit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("CC", str(bad))
    assert doctor.compiler() == Finding(
        YELLOW, "compiler", f"{bad} does not compile with OpenMP: no OpenMP here", "apt install gcc libgomp1, or set CC"
    )
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 2**20))
    assert doctor.open_files().level == YELLOW


def test_contradictory_ranks_are_red(monkeypatch):
    for name, value in (("RANK", "4"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert doctor.launcher().level == RED
    assert "RANK=4 does not fit WORLD_SIZE=4" in doctor.launcher().text


@pytest.mark.parametrize(
    ("told", "levels"),
    [
        ({}, {"collective": GREEN}),
        ({"bytes_per_second": 1e9}, {"collective": YELLOW}),
        ({"hosts": ["a", "b"], "clock_skew": 0.2}, {"collective": GREEN, "clocks": GREEN}),
        (
            {"hosts": ["a", "b"], "clock_skew": 0.2, "matmul_seconds": [1.0, 9.0]},
            {"collective": GREEN, "clocks": GREEN, "slow node": RED},
        ),
        ({"hosts": ["a", "b"], "clock_skew": 9.0}, {"collective": GREEN, "clocks": YELLOW}),
        ({"versions": [{"torch": "1"}, {"torch": "2"}]}, {"collective": GREEN, "versions": RED}),
    ],
)
def test_what_a_collective_shows_is_judged(monkeypatch, told, levels):
    usual = {"bytes_per_second": 1e11, "bytes": 2**26, "backend": "nccl", "world_size": 2, "hosts": ["a"] * 2,
             "versions": [{"torch": "1"}] * 2, "clock_skew": 9.0, "matmul_seconds": [1.0, 1.0]}  # fmt: skip
    said = doctor.json.dumps(usual | told) + "\n"
    done = subprocess.CompletedProcess([], 0, stdout=said, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    cluster = ClusterConfig(name="h100", hardware=HardwareConfig(node_bandwidth=4.5e11))
    assert {finding.name: finding.level for finding in collective(Ranks(), cluster)} == levels


@pytest.mark.parametrize(
    ("nodes", "per_node", "speed", "level", "says"),
    [
        (2, 1, 5e10, GREEN, "100% of the 50 GB/s of h100"),  # the gate of a job: a GPU and its card per node
        (64, 1, 5e10, GREEN, "100% of the 50 GB/s of h100"),
        (64, 1, 5e9, YELLOW, "10% of the 50 GB/s of h100"),
        (2, 8, 4e11, GREEN, "100% of the 400 GB/s of h100"),
        (2, 16, 4.5e11, GREEN, "100% of the 450 GB/s of h100"),  # not more than a GPU sends within its node
        (1, 8, 4.5e11, GREEN, "100% of the 450 GB/s of h100"),
        (1, 8, 5e10, YELLOW, "11% of the 450 GB/s of h100"),
        (1, 1, 0.0, GREEN, "nccl, 1 rank, all-reduce of 64 MiB: 0.00 GB/s"),
    ],
)
def test_bandwidth_is_compared_with_the_network_cards_in_use(monkeypatch, nodes, per_node, speed, level, says):
    hosts = [f"node{rank // per_node}" for rank in range(nodes * per_node)]
    world = len(hosts)
    result = {"bytes_per_second": speed, "bytes": 2**26, "backend": "nccl", "world_size": world, "hosts": hosts,
              "versions": [{}] * world, "clock_skew": 0.0, "matmul_seconds": [1.0] * world}  # fmt: skip
    done = subprocess.CompletedProcess([], 0, stdout=doctor.json.dumps(result), stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    cluster = ClusterConfig(name="h100", hardware=HardwareConfig(node_bandwidth=4.5e11, network_bandwidth=5e10))
    found = next(collective(Ranks(), cluster))
    assert (found.level, found.text.endswith(says)) == (level, True), found


@pytest.mark.parametrize(("visible", "world"), [(1, 1), (2, 2), (8, 8), (0, 2)])
def test_there_is_a_rank_per_gpu_that_is_visible(monkeypatch, visible, world):
    """Of a node's eight, an allocation may have one: further ranks would share it, which NCCL refuses."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="Error: stop here")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(doctor, "installed_gpus", lambda: 8)
    list(collective(Ranks(), None))
    assert f"--nproc-per-node={world}" in commands[0]


def test_a_node_that_cannot_find_rank_0_is_red(monkeypatch):
    def refuse(_: Ranks) -> None:
        raise TryAgain("node2 finds no address for node1: add it to DNS")

    monkeypatch.setattr(doctor, "export", lambda _: None)
    monkeypatch.setattr(doctor, "refuse_unknown_master", refuse)
    [finding] = collective(Ranks(1, 2, 0, 1), None)
    assert finding == Finding(RED, "collective", "node2 finds no address for node1", "add it to DNS")


def test_a_node_on_which_the_port_of_rank_0_is_taken_is_left_out(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setattr(doctor, "export", lambda _: None)
        [finding] = collective(Ranks(0, 2, 0, 1), None)
    assert (finding.level, finding.node, finding.text) == (
        RED,
        True,
        f"port {port} is taken (Address already in use), perhaps by another run",
    )
    monkeypatch.setenv("MASTER_PORT", "x")
    [finding] = collective(Ranks(0, 2, 0, 1), None)
    assert (finding.level, finding.node) == (RED, False)


def test_ranks_that_cannot_talk_are_red(monkeypatch):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nDistNetworkError: no route\nsee above\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    [finding] = collective(Ranks(), None)
    assert (finding.level, finding.text) == (RED, "2 ranks could not communicate: DistNetworkError: no route")


def test_the_whole_of_it_on_this_machine():
    result = command(sys.executable, "-m", "launch.doctor")
    assert result.status == 0, result.out + result.err
    assert re.search(r"green +collective: gloo, 2 ranks, all-reduce of 64 MiB: \d+\.\d\d GB/s", result.out)
    for name in ("disk: ", "torch: ", "DeepSpeed: imports"):
        assert name in result.out


def test_under_a_launcher_every_rank_looks_and_one_tells_what_is_well():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["launch/run_module.py", "launch.doctor", "quick=true", "model.attention=flash"]
    result = subprocess.run([*launcher, *words], env=environment(), capture_output=True, text=True)
    assert result.returncode == 1
    assert len(re.findall(r"^red .*model.attention=flash", result.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"^green .*Python", result.stdout, re.MULTILINE)) == 1
