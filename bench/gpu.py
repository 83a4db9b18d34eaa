"""The Triton kernels on a GPU: are they right, and how near to the memory's bandwidth do they come? `bash bench/gpu.sh`.

Needs torch with CUDA, Triton, NumPy, SymPy and PyYAML; Liger-Kernel is measured beside it where it is installed. Checks come
first, then times, and all ends when the minutes are used up: the page lists what was left out. With TRITON_INTERPRET=1 and
--tiny it runs without a GPU, to see that it runs; such times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import fused
from bench.formulas import formulas
from kernels import activation
from kernels.activations import reference, triton_backend
from kernels.activations.eager import plain
from kernels.triton import runtime

RESULTS = Path(__file__).parent / "results"
SHAPES = ((8192, 5632), (16384, 2816), (32768, 8192))  # tokens, d_ff
ODD_WIDTHS = (1, 7, 8, 127, 1030, 5624)
ROUNDS, CALLS = 15, 4  # a round times each method in turn, so many calls at once


@dataclasses.dataclass
class Minutes:
    """How long the run may take, and what it did not get to."""

    seconds: float
    began: float = dataclasses.field(default_factory=time.monotonic)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def allow(self, what: str) -> bool:
        if time.monotonic() - self.began < self.seconds:
            return True
        self.left_out.append(what)
        return False


@dataclasses.dataclass(frozen=True)
class Case:
    """A formula with pre-activations (rows, d_ff) or (rows, 2, d_ff), the gradient of h, and learned parameters."""

    name: str
    pre: Tensor
    dh: Tensor
    learned: dict[str, Tensor]

    @property
    def function(self) -> Any:
        return activation(*formulas()[self.name], "triton")

    def eager(self, pre: Tensor, **learned: Tensor) -> Tensor:
        return plain(self.function.formula)(pre, **learned)

    def double(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return h, the gradient of pre and those of the learned parameters in float64."""
        exact = activation(*formulas()[self.name], "reference")
        learned = [value.double() for value in self.learned.values()]
        dpre, h, dlearned = exact.backward(self.pre.double(), self.dh.double(), learned, with_h=True)
        return h, dpre, dlearned


def make(name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, scale: float = 2.0) -> Case:
    """Return a case of random numbers; the same ones each time."""
    formula = activation(*formulas()[name]).formula
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    pre = normal(rows, *([2] if formula.gated else []), width).mul_(scale)
    learned = {  # numbers that the dtype has, so that plain torch, which keeps them in it, begins with the same ones
        each: torch.full((width if p.share == "channel" else 1,), p.init, device=device).to(dtype).float()
        for each, p in formula.learned.items()
    }
    return Case(name, pre, normal(rows, width), learned)


# ------------------------------------------------------------------------------------------------------------ correctness


def error(computed: Tensor, exact: Tensor) -> float:
    """Return the norm of the error over the norm of what is right."""
    return ((computed.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def check(case: Case) -> dict[str, Any]:
    """Compare one case with float64, beside the error of plain torch in the tensors' own dtype."""
    h, dpre, dlearned = case.double()
    values = list(case.learned.values())
    ours = case.function.forward(case.pre, values)
    ours_dpre, again, ours_dlearned = case.function.backward(case.pre, case.dh, values, with_h=True)
    alone, _, repeated = case.function.backward(case.pre, case.dh, values)
    pre = case.pre.clone().requires_grad_()
    learned = {name: value.to(pre.dtype).requires_grad_() for name, value in case.learned.items()}
    eager = case.eager(pre, **learned)
    eager_dpre = torch.autograd.grad(eager, pre, case.dh)[0]
    return {
        "formula": case.name,
        "dtype": str(pre.dtype).removeprefix("torch."),
        "shape": list(pre.shape),
        "h": error(ours, h),
        "h_eager": error(eager, h),
        "dpre": error(ours_dpre, dpre),
        "dpre_eager": error(eager_dpre, dpre),
        "learned": max((error(a, b) for a, b in zip(ours_dlearned, dlearned, strict=True)), default=0.0),
        "not_finite": sum(int((~each.isfinite()).sum()) for each in (ours, ours_dpre, *ours_dlearned)),
        # The same numbers from both kernels of backward and from forward, but for how the compiler fuses products and sums.
        "kernels_differ": max(error(again, ours.double()), error(alone, ours_dpre.double())),
        "repeats": all(torch.equal(a, b) for a, b in zip(ours_dlearned, repeated, strict=True)),
        "told": told(case, ours),
    }


def told(case: Case, h: Tensor) -> dict[str, float]:
    """Return how far the kernel with statistics is off: its h from the plain kernel's, and its figures from float64's."""
    values = list(case.learned.values())
    same, seen = case.function.forward_with_statistics(case.pre, values)
    exact = reference.statistics(
        case.function.compiled, case.pre.double(), same.double(), [value.double() for value in values]
    )
    sums = (seen.sums.double() - exact.sums).abs() / exact.sums.abs().clamp_min(1e-3 * exact.elements)
    units = (seen.active.double() - exact.active).abs().sum() / exact.elements if exact.elements else exact.active.sum()
    return {"h": error(same, h.double()), "figures": max(float(sums.max()), float(units))}


def check_extremes(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Count what NaN, infinite and very large pre-activations make of h and of its gradient, beside float64."""
    case = make(name, 8, 1024, dtype, device)
    for column, value in enumerate((math.nan, 1e4, -1e4, 100.0, -100.0, 1e-20, 0.0)):
        case.pre[..., column] = value
    h, dpre, _ = case.double()
    values = list(case.learned.values())
    got = case.function.forward(case.pre, values), case.function.backward(case.pre, case.dh, values)[0]
    largest = torch.finfo(dtype).max
    kept = all(got[0][..., 0].isnan().flatten().tolist())
    lost = sum(int((~a.isfinite() & (b.abs() < largest)).sum()) for a, b in zip(got, (h, dpre), strict=True))
    return {"formula": name, "dtype": str(dtype).removeprefix("torch."), "nan_kept": kept, "finite_lost": lost}


def check_far(name: str, device: torch.device) -> dict[str, Any]:
    """Compare the first and the last rows of tensors of more than 2**31 elements."""
    width = 8192
    parts = 2 if activation(*formulas()[name]).formula.gated else 1
    case = make(name, 2**31 // (width * parts) + 64, width, torch.bfloat16, device)
    values = list(case.learned.values())
    h = case.function.forward(case.pre, values)
    dpre = case.function.backward(case.pre, case.dh, values)[0]
    worst = 0.0
    for rows in (slice(0, 32), slice(-32, None)):
        exact_h, exact_dpre, _ = dataclasses.replace(case, pre=case.pre[rows], dh=case.dh[rows]).double()
        worst = max(worst, error(h[rows], exact_h), error(dpre[rows], exact_dpre))
    return {"formula": name, "elements": case.pre.numel(), "error": worst}


# ------------------------------------------------------------------------------------------------------------------ times


def seconds_of(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the seconds of one call, from so many in a row."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def interleaved(methods: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time every method in every round; return its seconds: median, least, most."""
    for call in methods.values():
        seconds_of(call, CALLS, device)
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, call in methods.items():
            found[name].append(seconds_of(call, CALLS, device))
    return {name: [statistics.median(each), min(each), max(each)] for name, each in found.items()}


def liger(name: str) -> Callable[..., Tensor] | None:
    """Return Liger-Kernel's function, where it is installed and has one; its GEGLU is the one with tanh."""
    if name not in ("swiglu", "geglu") or importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return (LigerSiLUMulFunction if name == "swiglu" else LigerGELUMulFunction).apply


def measure(case: Case, rounds: int, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Time forward and backward of all methods, and count what each saves for backward."""
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    saved: dict[str, int] = {}
    moved = case.pre.nbytes + case.dh.nbytes  # forward; backward moves the pre-activations once more
    one, other = torch.empty(moved // 2, dtype=torch.uint8, device=device), None
    other = torch.empty_like(one)
    forward["copy"] = backward["copy"] = lambda: other.copy_(one)

    def add(name: str, function: Callable[..., Tensor], pre: list[Tensor], learned: dict[str, Tensor]) -> None:
        inputs = [each.detach().clone().requires_grad_() for each in pre]
        learned = {key: value.clone().requires_grad_() for key, value in learned.items()}
        function(*inputs, **learned)  # compiled, and its caches filled, outside of what is counted and timed
        h, saved[name] = saved_bytes(lambda: function(*inputs, **learned))
        wanted = [*inputs, *learned.values()]

        def without_gradient() -> None:
            with torch.no_grad():
                function(*inputs, **learned)

        forward[name] = without_gradient
        backward[name] = lambda: torch.autograd.grad(h, wanted, case.dh, retain_graph=True)

    add("triton", case.function, [case.pre], case.learned)
    low = {
        key: value.to(case.pre.dtype) for key, value in case.learned.items()
    }  # in fp32 they would make all of it fp32
    add("eager", case.eager, [case.pre], low)
    if compiled:
        torch._dynamo.reset()
        add("torch.compile", torch.compile(case.eager, dynamic=False), [case.pre], low)
    if (theirs := liger(case.name)) is not None:
        add("liger", theirs, list(case.pre.unbind(-2)), {})
    return {
        "formula": case.name,
        "rows": case.dh.shape[0],
        "d_ff": case.dh.shape[1],
        "forward_bytes": moved,
        "backward_bytes": moved + case.pre.nbytes,
        "copy_bytes": 2 * one.nbytes,
        "forward": interleaved(forward, rounds, device),
        "backward": interleaved(backward, rounds, device),
        "saved_bytes": saved,
    }


def saved_bytes(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Return what `call` returns and the bytes that it keeps for backward, a storage counted once, inputs too."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return result, sum(storages.values())


def measure_tiles(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Time forward and backward at other widths of a tile."""
    case, before = make(name, *SHAPES[0], torch.bfloat16, device), triton_backend.TILE
    values, methods = list(case.learned.values()), {}

    def at(tile: int, call: Callable[..., object], *arguments: Any) -> Callable[[], None]:
        def run() -> None:
            triton_backend.TILE = tile
            call(*arguments)

        return run

    for tile in (512, 1024, 2048, 4096):
        methods[f"forward {tile}"] = at(tile, case.function.forward, case.pre, values)
        methods[f"backward {tile}"] = at(tile, case.function.backward, case.pre, case.dh, values)
    try:
        return {"formula": name, "seconds": interleaved(methods, rounds, device)}
    finally:
        triton_backend.TILE = before


# -------------------------------------------------------------------------------------------------------------- the page


def page(record: dict[str, Any]) -> str:
    """Return a record as Markdown."""
    lines = [f"# The Triton kernels on {record['device']}", ""]
    lines += [f"Made by `bench/gpu.sh` with torch {record['torch']} and Triton {record['triton']}.", ""]
    lines += [
        "## Errors",
        "",
        "Norm of the error over the norm of the float64 result, and in brackets plain torch in the same dtype.",
        "",
        "Told: how far the forward kernel that tells of itself is off, its h from the other's, and its worst figure.",
        "",
        "| formula | dtype | shape | h | gradient of pre | of learned | not finite | sums repeat | told |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["checks"]:
        lines.append(
            f"| {row['formula']} | {row['dtype']} | {' x '.join(map(str, row['shape']))} "
            f"| {row['h']:.2g} ({row['h_eager']:.2g}) | {row['dpre']:.2g} ({row['dpre_eager']:.2g}) "
            f"| {row['learned']:.2g} | {row['not_finite']} | {row['repeats']} "
            f"| {row['told']['h']:.2g}, {row['told']['figures']:.2g} |"
        )
    lines += [
        "",
        "| formula | dtype | a NaN stays | numbers that are finite in float64 and not here |",
        "|---|---|---|---|",
    ]
    for row in record["extremes"]:
        lines.append(f"| {row['formula']} | {row['dtype']} | {row['nan_kept']} | {row['finite_lost']} |")
    lines += ["", "| formula | elements of pre | error in the first and last rows |", "|---|---|---|"]
    lines += [f"| {row['formula']} | {row['elements']:,} | {row['error']:.2g} |" for row in record["far"]]
    lines += [
        "",
        "## Times",
        "",
        "Median of interleaved rounds (least to most). The share is of the bandwidth that a copy of as many bytes as forward",
        "moves reached in the same rounds; bytes are those that must move, for every method. Saved: kept for backward, inputs",
        "too.",
        "",
        "| formula | tokens x d_ff | pass | method | µs | share of a copy's bandwidth | saved, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["times"]:
        for direction in ("forward", "backward"):
            copy = row["copy_bytes"] / row[direction]["copy"][0]
            for method, (median, least, most) in row[direction].items():
                moved = row["copy_bytes"] if method == "copy" else row[f"{direction}_bytes"]
                saved = f"{row['saved_bytes'][method] / 2**20:.0f}" if method in row["saved_bytes"] else ""
                lines.append(
                    f"| {row['formula']} | {row['rows']} x {row['d_ff']} | {direction} | {method} | {median * 1e6:.0f} "
                    f"({least * 1e6:.0f} to {most * 1e6:.0f}) | {moved / median / copy:.0%} | {saved} |"
                )
    lines += ["", "## RMSNorm and rotation", "", "Times of plain PyTorch over ours, and our error over its.", ""]
    lines += [fused.HEAD, *map(fused.line, record["fused"])]
    if record["tiles"]:
        lines += ["", "## Columns of a tile", "", "| formula | pass and columns | µs |", "|---|---|---|"]
    for row in record["tiles"]:
        for method, (median, least, most) in row["seconds"].items():
            lines.append(
                f"| {row['formula']} | {method} | {median * 1e6:.0f} ({least * 1e6:.0f} to {most * 1e6:.0f}) |"
            )
    lines += ["", "## Left out", "", "; ".join(record["left_out"]) or "Nothing.", ""]
    return "\n".join(lines)


def verdict(record: dict[str, Any]) -> list[str]:
    """Return a sentence for each check that failed.

    An error may be 1.1 times that of plain torch, or that of the one rounding at the store; in fp32 of 8 on the way to it.
    """
    rounding = {"bfloat16": 1.01 * 2.0**-8, "float16": 1.01 * 2.0**-11, "float32": 8 * 2.0**-24}
    failed = []
    for row in record["checks"]:
        where = f"{row['formula']} in {row['dtype']}, {row['shape']}"
        for what in ("h", "dpre"):
            eager = row[f"{what}_eager"]
            if not row[what] <= max(1.1 * eager, rounding[row["dtype"]]):
                failed.append(
                    f"{where}: the error of {what} is {row[what]:.2g}, plain torch's {row[f'{what}_eager']:.2g}"
                )
        # What rounds a sum or turns a slope over a threshold: small, where anything wrong is large.
        if not row["told"]["h"] <= rounding[row["dtype"]] or not row["told"]["figures"] < 0.02:
            failed.append(f"{where}: the kernel with statistics is off: {row['told']}")
        if row["not_finite"] or not row["repeats"]:
            failed.append(f"{where}: {row['not_finite']} numbers are not finite, sums repeat: {row['repeats']}")
    failed += [
        f"{r['formula']} in {r['dtype']}: a NaN became a number" for r in record["extremes"] if not r["nan_kept"]
    ]
    failed += [
        f"{r['formula']} in {r['dtype']}: {r['finite_lost']} finite numbers were lost"
        for r in record["extremes"]
        if r["finite_lost"]
    ]
    failed += [
        f"{r['formula']} beyond 2**31 elements: error {r['error']:.2g}" for r in record["far"] if not r["error"] < 0.01
    ]
    failed += [
        f"{r['operation']} in {r['dtype']}: {r['error']:.2f} times the error of plain PyTorch"
        for r in record["fused"]
        if not r["error"] <= 1.1
    ]
    return failed


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="after so many nothing new is begun")
    parser.add_argument("--formulas", nargs="+", default=list(formulas()), choices=list(formulas()), metavar="NAME")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes most of the time"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny tensors in fp32 only, to see that it runs")
    return parser.parse_args(given)


def collect(
    options: argparse.Namespace, device: torch.device, minutes: Minutes
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield (section, row) as they are measured."""
    dtypes = [torch.float32] if options.tiny else [torch.bfloat16, torch.float16, torch.float32]
    for name in options.formulas:
        for dtype in dtypes:
            if minutes.allow(f"check of {name}, {dtype}"):
                yield (
                    "checks",
                    check(make(name, 2 if options.tiny else 512, 48 if options.tiny else 5632, dtype, device)),
                )
                yield "extremes", check_extremes(name, dtype, device)
        for width in ODD_WIDTHS[:2] if options.tiny else ODD_WIDTHS:
            if minutes.allow(f"check of {name}, width {width}"):
                yield "checks", check(make(name, 3 if options.tiny else 33, width, dtypes[0], device))
    for name in () if options.tiny else ("silu", "swiglu", "prelu"):
        if name in options.formulas and minutes.allow(f"check of {name} beyond 2**31 elements"):
            yield "far", check_far(name, device)
            torch.cuda.empty_cache()
    rounds = 1 if options.tiny else ROUNDS
    for case in fused.cases(device.type)[: 1 if options.tiny else None]:
        for dtype in dtypes[:1] if options.tiny else (torch.bfloat16, torch.float32):
            if minutes.allow(f"{case[0]}, {dtype}"):
                yield "fused", fused.compare(*case, dtype, rounds)
    for rows, width in [(2, 48)] if options.tiny else SHAPES:
        compiled = not options.no_compile and (rows, width) == SHAPES[0]  # it takes ten times as long as all else
        if not compiled:
            minutes.left_out.append(f"torch.compile, {rows} x {width}")
        for name in options.formulas:
            if minutes.allow(f"times of {name}, {rows} x {width}"):
                yield "times", measure(make(name, rows, width, dtypes[0], device), rounds, device, compiled)
    for name in () if options.tiny else ("swiglu", "gelu"):
        if name in options.formulas and minutes.allow(f"tiles of {name}"):
            yield "tiles", measure_tiles(name, device, rounds)


def main(given: list[str] | None = None) -> int:
    import triton

    options = arguments(given)
    if not torch.cuda.is_available() and not (options.tiny and runtime.interpreted()):
        raise SystemExit("no GPU is visible to torch; without one only TRITON_INTERPRET=1 ... --tiny runs")
    device = torch.device("cpu" if runtime.interpreted() else "cuda")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the interpreter"
    record: dict[str, Any] = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    record |= {section: [] for section in ("checks", "extremes", "far", "fused", "times", "tiles")}
    minutes = Minutes(60 * options.minutes)
    record["left_out"] = minutes.left_out
    path = options.results / f"{name.lower().removeprefix('nvidia ').replace(' ', '-')}-elementwise.json"
    for section, row in collect(options, device, minutes):
        record[section].append(row)
        print(section, row.get("formula") or row["operation"], f"{time.monotonic() - minutes.began:.0f} s", flush=True)
        path.write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )  # each time: a run that is cut off keeps it
    path.with_suffix(".md").write_text(page(record), encoding="utf-8")
    failed = verdict(record)
    print("\n".join(failed) or "every check passed")
    print(f"written: {path} and {path.with_suffix('.md').name}; left out: {len(minutes.left_out)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
