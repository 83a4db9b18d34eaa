"""The Markdown page of a record of `bench/gpu.py`, and the sentences about the checks that failed.

This module formats and judges; `bench/gpu.py` measures.
"""

from __future__ import annotations

import math
from typing import Any

from bench import fused

# Relative error of one rounding at the store; fp32 results may be off by 8 roundings on the way to it.
_ROUNDING = {"bfloat16": 1.01 * 2.0**-8, "float16": 1.01 * 2.0**-11, "float32": 8 * 2.0**-24}
_ERROR_RATIO = 1.1  # allowed against plain torch in the same dtype
_LARGEST_TELEMETRY_ERROR = 0.02  # roundings of a sum and slopes at a threshold stay below it; a wrong kernel does not
_LARGEST_ERROR_OF_LARGE_TENSORS = 0.01
# Of a sum in fp32: 8 roundings of each term, times the square root of their number, as terms of random signs cancel.
_ROUNDING_OF_SUMS = 8 * 2.0**-24
# Of FP8 products against the same roundings multiplied in fp32: a rounding to bf16, and the sums of FP8 units, of 14 bits.
_FP8_ERROR = 2.0**-8 + 2.0**-10


def page(record: dict[str, Any]) -> str:
    """Return a record as Markdown."""
    lines = [
        f"# First minutes on {record['device']}",
        "",
        f"Made by `bench/gpu.sh` with torch {record['torch']} and Triton {record['triton']}.",
        "",
        *_steps(record),
        *_errors(record),
        *_times(_worked(record["times"])),
        "",
        "## RMSNorm and rotary embedding",
        "",
        "Time of plain PyTorch divided by ours, and our error divided by its error.",
        "",
        fused.HEAD,
        *map(fused.line, _worked(record["fused"])),
    ]
    if tiles := _worked(record["tiles"]):
        lines += _tiles(tiles)
    if failed := failures(record):
        lines += ["", "## Failed", "", *(f"- {sentence}" for sentence in failed)]
    lines += ["", "## Left out", "", "; ".join(record["left_out"]) or "Nothing.", ""]
    return "\n".join(lines)


def _worked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "failed" not in row]


def _steps(record: dict[str, Any]) -> list[str]:
    lines = [
        "## Training steps",
        "",
        "A plain loop with AdamW. MFU is relative to the data sheet; memory is the peak beside weights, gradients and the",
        "optimizer's state, and its estimate.",
        "",
        "| model | parameters | tokens per step | ms per step | tokens/s | MFU | GiB | estimate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    worked = _worked(record["steps"])
    for row in worked:
        median, least, most = (1e3 * seconds for seconds in row["seconds"])
        memory = "" if row["activations_gib"] is None else f"{row['activations_gib']:.2f}"
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {row['tokens']:,} | {median:.1f} ({least:.1f} to {most:.1f}) "
            f"| {row['tokens_per_second']:,.0f} | {row['mfu']:.1%} | {memory} | {row['estimate_gib']:.2f} |"
        )
    for row in worked:
        total = sum(row["parts"].values())
        parts = sorted(row["parts"].items(), key=lambda part: -part[1])
        lines += ["", f"{row['model']}: " + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts) + "."]
    lines += [
        "",
        "| model | attention, loss, or products of the up projection | ms forward and backward | TFLOP/s | peak GiB |",
        "|---|---|---|---|---|",
    ]
    for row in (*record["attention"], *record["loss"], *record["products"]):
        if "failed" in row:
            lines.append(f"| {row['model']} | {row['method']} | {row['failed']} | | |")
            continue
        median, least, most = (1e3 * seconds for seconds in row["seconds"])
        speed = f"{row['flops_per_second'] / 1e12:.3g}" if "flops_per_second" in row else ""
        peak = f"{row['peak_gib']:.2f}" if row.get("peak_gib") is not None else ""
        lines.append(
            f"| {row['model']} | {row['method']} | {median:.2f} ({least:.2f} to {most:.2f}) | {speed} | {peak} |"
        )
    for row in _worked(record["resume"]):
        ends = "the same to the last bit" if row["equal"] else "other ones"
        lines += [
            "",
            f"A run of {row['model']} that was stopped after step {row['stopped_after']} ends with weights: {ends}.",
        ]
    return [*lines, ""]


def _errors(record: dict[str, Any]) -> list[str]:
    lines = [
        "## Errors",
        "",
        "Norm of the error divided by the norm of the float64 result; in parentheses, plain torch in the same dtype.",
        "",
        "Telemetry: the error of the forward kernel with telemetry, of its h against the forward kernel's and of its worst "
        "statistic.",
        "",
        "| formula | dtype | shape | h | gradient of pre | gradient of learned | not finite | sums repeat | telemetry |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in _worked(record["checks"]):
        lines.append(
            f"| {row['formula']} | {row['dtype']} | {' x '.join(map(str, row['shape']))} "
            f"| {row['h']:.2g} ({row['h_eager']:.2g}) | {row['dpre']:.2g} ({row['dpre_eager']:.2g}) "
            f"| {row['learned']:.2g} | {row['not_finite']} | {row['repeats']} "
            f"| {row['telemetry']['h']:.2g}, {row['telemetry']['statistics']:.2g} |"
        )
    lines += ["", "| formula | dtype | NaN propagates | finite in float64, not finite here |", "|---|---|---|---|"]
    for row in _worked(record["extremes"]):
        lines.append(f"| {row['formula']} | {row['dtype']} | {row['nan_kept']} | {row['finite_lost']} |")
    lines += ["", "| formula | elements of pre | error in the first and last rows |", "|---|---|---|"]
    for row in _worked(record["large"]):
        lines.append(f"| {row['formula']} | {row['elements']:,} | {row['error']:.2g} |")
    return lines


def _times(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Times",
        "",
        "Median of interleaved rounds (minimum to maximum). Bandwidth is relative to that of a copy in the same rounds, of as",
        "many bytes as forward moves; every method is credited with the bytes that it must move. Saved: the bytes kept for",
        "backward, inputs included. Times are the GPU's own, without the host's to launch the calls.",
        "",
        "| formula | tokens x d_ff | pass | method | µs | fraction of copy bandwidth | saved, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for direction in ("forward", "backward"):
            copy_bandwidth = row["copy_bytes"] / row[direction]["copy"][0]
            for method, (median, least, most) in row[direction].items():
                moved = row["copy_bytes"] if method == "copy" else row[f"{direction}_bytes"]
                saved = f"{row['saved_bytes'][method] / 2**20:.0f}" if method in row["saved_bytes"] else ""
                lines.append(
                    f"| {row['formula']} | {row['rows']} x {row['d_ff']} | {direction} | {method} "
                    f"| {_microseconds(median, least, most)} | {moved / median / copy_bandwidth:.0%} | {saved} |"
                )
    return lines


def _tiles(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["", "## Columns per tile", "", "| formula | pass and columns | µs |", "|---|---|---|"]
    for row in rows:
        for method, seconds in row["seconds"].items():
            lines.append(f"| {row['formula']} | {method} | {_microseconds(*seconds)} |")
    return lines


def _microseconds(median: float, least: float, most: float) -> str:
    return f"{median * 1e6:.0f} ({least * 1e6:.0f} to {most * 1e6:.0f})"


def failures(record: dict[str, Any]) -> list[str]:
    """Return a sentence for each check that failed, and for each part that ended in an error.

    An error may be 1.1 times that of plain torch, or that of the one rounding at the store; in fp32, that of 8 roundings. The
    gradient of a learned parameter is a sum in fp32. An attention, loss or product that does not run here is no failure.
    """
    failed = [sentence for row in _worked(record["checks"]) for sentence in _failures_of_check(row)]
    for section in ("attention", "loss", "products"):
        failed += [f"{row['model']}, {row['method']}: {row['failed']}" for row in record[section] if "crashed" in row]
    for section in ("checks", "extremes", "large", "fused", "times", "tiles"):
        failed += [_failure_of_part(section, row) for row in record[section] if "failed" in row]
    for row in record["steps"]:
        if "failed" in row:
            failed.append(f"training {row['model']}: {row['failed']}")
        elif not row["losses"][-1] < row["losses"][0]:
            failed.append(
                f"training {row['model']}: the loss went from {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}"
            )
    for row in record["products"]:  # a GPU without FP8 units is no failure
        if not row.get("error", 0.0) <= _FP8_ERROR:
            failed.append(f"{row['model']}, products in {row['method']}: error {row['error']:.2g}")
    for row in record["resume"]:
        if not row.get("equal", False):
            what = row.get("failed", "its weights differ from those of a run that was not stopped")
            failed.append(f"{row['model']}, {row['method']}: {what}")
    for row in _worked(record["extremes"]):
        if not row["nan_kept"]:
            failed.append(f"{row['formula']} in {row['dtype']}: NaN does not propagate")
        if row["finite_lost"]:
            failed.append(
                f"{row['formula']} in {row['dtype']}: {row['finite_lost']} results overflow that are finite in float64"
            )
    for row in _worked(record["large"]):
        if not row["error"] < _LARGEST_ERROR_OF_LARGE_TENSORS:
            failed.append(f"{row['formula']} beyond 2**31 elements: error {row['error']:.2g}")
    for row in _worked(record["fused"]):
        if not row["error"] <= _ERROR_RATIO:
            failed.append(f"{row['operation']} in {row['dtype']}: {row['error']:.2f} times the error of plain PyTorch")
    return failed


def _failure_of_part(section: str, row: dict[str, Any]) -> str:
    sizes = [" x ".join(map(str, row.get("shape") or [row[key] for key in ("rows", "d_ff") if key in row]))]
    what = [row.get("formula") or row.get("operation"), row.get("dtype"), *sizes]
    return f"{section} of {', '.join(filter(None, what))}: {row['failed']}"


def _failures_of_check(row: dict[str, Any]) -> list[str]:
    where = f"{row['formula']} in {row['dtype']}, {row['shape']}"
    rounding = _ROUNDING[row["dtype"]]
    failed = []
    for result in ("h", "dpre"):
        plain = row[f"{result}_eager"]
        if not row[result] <= max(_ERROR_RATIO * plain, rounding):
            failed.append(f"{where}: the error of {result} is {row[result]:.2g}, plain torch's {plain:.2g}")
    terms = math.prod(row["shape"])
    if not row["learned"] <= max(rounding, _ROUNDING_OF_SUMS * math.sqrt(terms)):
        failed.append(f"{where}: the error of the gradient of the learned parameters is {row['learned']:.2g}")
    if not row["kernels_differ"] <= rounding:
        failed.append(f"{where}: the forward kernel and the two of backward differ by {row['kernels_differ']:.2g}")
    telemetry = row["telemetry"]
    if not telemetry["h"] <= rounding or not telemetry["statistics"] < _LARGEST_TELEMETRY_ERROR:
        failed.append(f"{where}: the forward kernel with telemetry is off: {telemetry}")
    if row["not_finite"] or not row["repeats"]:
        failed.append(f"{where}: {row['not_finite']} numbers are not finite, sums repeat: {row['repeats']}")
    return failed
