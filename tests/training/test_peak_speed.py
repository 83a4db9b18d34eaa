"""The FLOP/s that MFU is relative to: from data sheets by name and dtype, or measured."""

from __future__ import annotations

import pytest
import torch

from training import peak_speed
from training.peak_speed import PeakSpeed, data_sheet_peaks, peak_flops


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.4, 67),
        ("NVIDIA H200 NVL", 835.5, 60),
        ("NVIDIA GH200 480GB", 989.4, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA B300 SXM6 AC", 2250, 75),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA RTX A6000", 154.8, 38.7),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 91.1),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 4090 D", 147, 73.5),
        ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
        ("AMD Instinct MI300X", 1307.4, 163.4),
        ("AMD Instinct MI355X", 2516.6, 157.3),
    ],
)
def test_gpu_peaks_are_from_data_sheets(name, bf16, fp32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    gpu = torch.device("cuda")
    assert peak_flops(gpu, torch.bfloat16) == (1e12 * bf16, f"data sheet of {name}, dense bf16")
    assert peak_flops(gpu, torch.float32) == (1e12 * fp32, f"data sheet of {name}, fp32")


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 2080 Ti",
        "NVIDIA A1000",
    ],
)
def test_another_gpu_of_a_similar_name_is_measured(name):
    assert data_sheet_peaks(name) is None


def test_a_gpu_that_is_not_listed_is_timed_by_its_own_events(monkeypatch):
    """Each product is timed between two events of the device; the host waits once, at the end."""
    log: list[str] = []

    class Event:
        number = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.at, Event.number = Event.number, Event.number + 1

        def elapsed_time(self, other: Event) -> float:
            assert other.at == self.at + 1
            return 4.0 if self.at else 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU of next year")
    for name in ("randn", "empty"):
        monkeypatch.setattr(torch, name, lambda *_, **__: None)
    monkeypatch.setattr(torch, "mm", lambda *_, **__: log.append("mm"))
    peak, source = peak_flops(torch.device("cuda"), torch.bfloat16)
    assert peak == 2 * 8192**3 / 2e-3
    assert source == "measured, bfloat16 matmul of 8192 x 8192"
    assert log == ["mm", "record"] * 21 + ["synchronize"]


def test_the_peak_of_a_cpu_is_measured():
    peak, where = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15
    assert where == "measured, float32 matmul of 1024 x 1024"


def test_a_peak_that_was_measured_beside_other_work_is_measured_again(monkeypatch):
    measured = iter([1e9, 0.5e9, 4e9, 1e9, 1e9])
    monkeypatch.setattr(peak_speed, "peak_flops", lambda *_: (next(measured), "measured, by a test"))
    peak = PeakSpeed(torch.device("cpu"), torch.float32)
    assert peak.mfu(0.5e9) == 0.5
    assert peak.mfu(2e9) == 0.5  # of the third measurement
    assert peak.mfu(5e9) is None
    assert peak.mfu(5e9) is None  # and is not measured for ever
    assert peak.mfu(1e9) == 0.25


def test_a_peak_of_a_data_sheet_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(peak_speed, "peak_flops", lambda *_: (1e12, "data sheet of a GPU"))
    peak = PeakSpeed(torch.device("cpu"), torch.bfloat16)
    assert peak.mfu(2.79e12) is None
