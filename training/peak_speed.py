"""The peak FLOP/s of a device, to which MFU is relative: from its data sheet, or measured.

MFU counts the FLOPs of the model: `launch/estimate/counts.py` defines them.
"""

from __future__ import annotations

import itertools
import re
import time
from typing import NamedTuple

import torch


class Peaks(NamedTuple):
    """Peak FLOP/s of a GPU, in units of 1e12: dense products in bf16 with fp32 sums, fp32 without tensor cores, and fp8."""

    bf16: float
    fp32: float
    fp8: float | None = None  # None: it has none


# From the vendors' data sheets, halved where those count sparse products. What a device's name contains, as whole words; the
# first match counts, so that variants stand before the card that they are named after.
_DATA_SHEETS = {
    "GB300": Peaks(2500, 80, 5000),
    "B300": Peaks(2250, 75, 4500),
    "GB200": Peaks(2500, 80, 5000),
    "B200": Peaks(2250, 75, 4500),
    "GH200": Peaks(989.4, 67, 1979),
    "H200 NVL": Peaks(835.5, 60, 1671),
    "H200": Peaks(989.4, 67, 1979),
    "H100 NVL": Peaks(835.5, 60, 1671),
    "H100 PCIe": Peaks(756, 51, 1513),
    "H100": Peaks(989.4, 67, 1979),
    "H800 PCIe": Peaks(756, 51, 1513),
    "H800": Peaks(989.4, 67, 1979),
    "H20": Peaks(148, 44, 296),
    "A100": Peaks(312, 19.5),
    "A800": Peaks(312, 19.5),
    "A40": Peaks(149.7, 37.4),
    "A30": Peaks(165, 10.3),
    "A10": Peaks(125, 31.2),
    "L40S": Peaks(362, 91.6, 733),
    "L40": Peaks(181, 90.5, 362),
    "L4": Peaks(121, 30.3, 242),
    "RTX PRO 6000": Peaks(503.8, 126, 1007.6),
    "RTX 6000 Ada": Peaks(364.2, 91.1, 728.5),
    "RTX A6000": Peaks(154.8, 38.7),
    "RTX 5090": Peaks(209.5, 104.8, 419),
    "RTX 4090 D": Peaks(147, 73.5, 294),
    "RTX 4090": Peaks(165.2, 82.6, 330.3),
    "RTX 3090": Peaks(71, 35.6),
    "MI355X": Peaks(2516.6, 157.3, 5033.2),
    "MI350X": Peaks(2306.9, 144.2, 4613.7),
    "MI325X": Peaks(1307.4, 163.4, 2614.9),
    "MI300X": Peaks(1307.4, 163.4, 2614.9),
}
# Names of parts and of slower relatives, whose peak is another one.
_OTHERS = re.compile(r"\bMIG\b|\bLaptop\b|\bMax-Q\b")
_SIDES = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied to measure


def data_sheet_peaks(name: str) -> Peaks | None:
    """Return the peaks of a GPU by the name that its driver gives it; None: it is not listed."""
    if _OTHERS.search(name):
        return None
    return next((peaks for model, peaks in _DATA_SHEETS.items() if re.search(rf"\b{model}\b", name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return (peak FLOP/s of this device in this dtype, the source of that figure)."""
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peaks = data_sheet_peaks(name)
        if peaks is not None:
            fp32 = dtype == torch.float32
            return 1e12 * (
                peaks.fp32 if fp32 else peaks.bf16
            ), f"data sheet of {name}, {'fp32' if fp32 else 'dense bf16'}"
    side = _SIDES[device.type]
    return 2 * side**3 / _matmul_seconds(device, dtype, side), f"measured, {kind} matmul of {side} x {side}"


def _matmul_seconds(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Return the seconds of the fastest of some matmuls of side x side matrices, of a tenth of a second in all.

    On a GPU they follow each other without the host: each is timed between events of the device.
    """
    a, out = torch.randn(side, side, device=device, dtype=dtype), torch.empty(side, side, device=device, dtype=dtype)
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
        for event in events:
            torch.mm(a, a, out=out)  # the one before the first event loads the kernel
            event.record()
        torch.cuda.synchronize(device)
        return min(start.elapsed_time(end) for start, end in itertools.pairwise(events)) / 1e3
    seconds: list[float] = []
    while len(seconds) < 5 or (len(seconds) < 20 and sum(seconds) < 0.1):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class PeakSpeed:
    """Peak FLOP/s of this rank's device, to which MFU is relative.

    Attributes:
        flops: FLOP/s. source: of that figure, for the console.
    """

    MEASUREMENTS = 5  # at most; each takes a tenth of a second

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype, self._left = device, dtype, self.MEASUREMENTS - 1
        self.flops, self.source = peak_flops(device, dtype)

    def mfu(self, flops_per_second: float) -> float | None:
        """Return the model FLOPs utilization of this rank; None if it is unknown.

        Beside other work a peak is measured too low. Above 100% it is measured again; what stays above is not plausible.
        """
        while flops_per_second > self.flops and self._left and self.source.startswith("measured"):
            self._left -= 1
            self.flops = max(self.flops, peak_flops(self._device, self._dtype)[0])
        return flops_per_second / self.flops if flops_per_second <= self.flops else None
