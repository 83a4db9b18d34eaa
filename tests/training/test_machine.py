"""Devices, dtypes and memory: the defaults, and that freed memory is kept."""

from __future__ import annotations

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


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12)])
def test_gpu_peaks_are_from_data_sheets(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert machine.peak_flops(torch.device("cuda"), torch.bfloat16) == (peak, f"data sheet of {name}, dense bf16")


def test_the_peak_of_a_cpu_is_measured():
    peak, where = machine.peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15
    assert where == "measured, float32 matmul of 1024 x 1024"


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


def test_a_peak_that_was_measured_beside_other_work_is_measured_again(monkeypatch):
    measured = iter([1e9, 0.5e9, 4e9, 1e9, 1e9])
    monkeypatch.setattr(machine, "peak_flops", lambda *_: (next(measured), "measured, by a test"))
    peak = machine.PeakSpeed(torch.device("cpu"), torch.float32)
    assert peak.mfu(0.5e9) == 0.5
    assert peak.mfu(2e9) == 0.5  # of the third measurement
    assert peak.mfu(5e9) is None
    assert peak.mfu(5e9) is None  # and is not measured for ever
    assert peak.mfu(1e9) == 0.25


def test_a_peak_of_a_data_sheet_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(machine, "peak_flops", lambda *_: (1e12, "data sheet of a GPU"))
    peak = machine.PeakSpeed(torch.device("cpu"), torch.bfloat16)
    assert peak.mfu(2.79e12) is None
