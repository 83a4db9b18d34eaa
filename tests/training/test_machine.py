"""Devices, dtypes and memory: the defaults, and that freed memory is kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from conf.schema import Config
from kernels.common.errors import UserError
from launch.ranks import Ranks
from tests.training.tiny import PATIENCE, ROOT, environment
from training import machine


def dtype_of(precision: str, stage: int, fast: bool, monkeypatch) -> torch.dtype:
    monkeypatch.setattr(machine, "_cpu_has_bf16", lambda: fast)
    config = Config()
    config.precision.name, config.zero.stage = precision, stage
    return machine.find_dtype(config, torch.device("cpu"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_auto_is_bf16_if_the_machine_multiplies_it(stage, monkeypatch):
    assert dtype_of("auto", stage, True, monkeypatch) == torch.bfloat16
    assert dtype_of("auto", stage, False, monkeypatch) == torch.float32


def test_auto_is_fp32_at_stage_0(monkeypatch):
    assert dtype_of("auto", 0, True, monkeypatch) == torch.float32


def test_an_explicit_precision_is_used(monkeypatch):
    assert dtype_of("fp32", 1, True, monkeypatch) == torch.float32
    assert dtype_of("bf16", 1, False, monkeypatch) == torch.bfloat16


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(UserError, match=r"rank 3 has local rank 2, but its node has 2 GPU\(s\)"):
        machine.find_device(Ranks(3, 4, 2, 4))


def seen_gpus(monkeypatch, visible: int, installed: int) -> list[int]:
    """Pretend that this process sees GPUs of a node; return the list of those that it will have selected."""
    selected: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    monkeypatch.setattr(machine, "installed_gpus", lambda: installed)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "5")
    return selected


@pytest.mark.parametrize(("visible", "index"), [(8, 5), (1, 0)], ids=["every GPU", "its own GPU alone"])
def test_a_rank_takes_its_own_gpu(monkeypatch, visible, index):
    """`srun --gpus-per-task=1` shows each task one GPU, which is number 0 to it; DeepSpeed reads LOCAL_RANK."""
    selected = seen_gpus(monkeypatch, visible, 8)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "5")
    assert machine.find_device(Ranks(5, 8, 5, 8)) == torch.device("cuda", index)
    assert selected == [index]
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(index)


@pytest.mark.parametrize(("visible", "installed", "seen"), [(1, 4, 1), (2, 8, 2)])
def test_a_rank_that_does_not_see_its_gpu_is_refused(monkeypatch, visible, installed, seen):
    seen_gpus(monkeypatch, visible, installed)
    text = rf"rank 5 has local rank 5, but its node has {installed} GPU\(s\), of which this process sees {seen}"
    with pytest.raises(UserError, match=text):
        machine.find_device(Ranks(5, 8, 5, 8))


@pytest.mark.parametrize("gpu", [False, True], ids=["CPU", "GPU"])
def test_torchrun_does_not_leave_a_rank_with_one_thread(monkeypatch, gpu):
    """On a GPU the threads step the optimizer that is offloaded to the host."""
    if gpu:
        seen_gpus(monkeypatch, 2, 2)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(machine, "_usable_cores", lambda: 32)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    machine.find_device(Ranks(1, 2, 1, 2))
    assert threads == []  # without torchrun the user has set it
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    machine.find_device(Ranks(1, 2, 1, 2))
    assert threads == [16]


def test_memory_is_that_of_this_process():
    assert 0.05 < machine.memory_gib(torch.device("cpu")) < 1024


GIVEN_BACK = """
import resource, sys
from training.machine import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
import torch
size = lambda: int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
torch.ones(2**24)
tensor = torch.ones(2**24)  # 64 MB
alive = size()
del tensor
print(kept, alive - size())
"""


def given_back(mode: str) -> tuple[bool, int]:
    """Return whether the settings were accepted, and by how many bytes the address space shrinks when 64 MB are freed.

    Not page faults: a kernel that is short of memory takes pages of any process, and gives them back with a fault.
    """
    arguments = [sys.executable, "-c", GIVEN_BACK, mode]
    output = subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    ).stdout
    return output.split()[0] == "True", int(output.split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_is_kept():
    assert given_back("leave") == (False, pytest.approx(2**26, abs=2**16))
    assert given_back("keep") == (True, 0)


def test_a_library_without_these_settings_is_no_error(monkeypatch):
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: object())
    assert machine.keep_freed_memory() is False
