"""The first minutes on one GPU: `bash bench/gpu.sh`.

Requires torch with CUDA, Triton, NumPy, SymPy and PyYAML, and no other dependency of this project. Liger-Kernel is timed too
where it is installed. What tells most comes first: three formulas checked; ten steps of `llama_1b` with their MFU, memory and
parts; the choices of attention and of the loss's chunks, and products in FP8; eight layers of `llama3_8b`; a run that is
stopped and goes on, where DeepSpeed and the rest are installed; then every formula checked and timed. When the minutes are
used up, nothing new starts, and the page lists what was left out. A part that fails is listed, and the next one runs. With
TRITON_INTERPRET=1 and --tiny the script runs without a GPU, to show that it works; such times mean nothing.

`bench/gpu_step.py` has the steps, `bench/gpu_page.py` the page and the list of failed checks.
"""

from __future__ import annotations

import argparse  # not `read_options`, which has no options with several values (--formulas swiglu gelu)
import dataclasses
import importlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import fused, gpu_resume, gpu_step
from bench.formulas import formulas
from bench.gpu_page import failures, page
from bench.gpu_precision import fp8_products
from bench.gpu_timing import interleaved
from kernels import activation
from kernels.activations import Activation, reference, triton_backend
from kernels.activations.eager import plain
from kernels.triton import runtime

RESULTS = Path(__file__).parent / "results"
SHAPES = ((8192, 5632), (16384, 2816), (32768, 8192))  # tokens, d_ff
ODD_WIDTHS = (1, 7, 8, 127, 1030, 5624)
ROUNDS = 15  # each round times every method once


@dataclasses.dataclass
class Minutes:
    """The time budget of the run, and what was left out because of it."""

    seconds: float
    began: float = dataclasses.field(default_factory=time.monotonic)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def allow(self, what: str) -> bool:
        """Return whether time is left; record `what` as left out if none is."""
        if time.monotonic() - self.began < self.seconds:
            return True
        self.left_out.append(what)
        return False


@dataclasses.dataclass(frozen=True)
class Workload:
    """A formula with pre-activations (rows, d_ff) or (rows, 2, d_ff), the gradient of h, and learned parameters."""

    name: str
    pre: Tensor
    dh: Tensor
    learned: dict[str, Tensor]

    @property
    def function(self) -> Activation:
        """The formula on the Triton backend."""
        return activation(*formulas()[self.name], "triton")

    def eager(self, pre: Tensor, **learned: Tensor) -> Tensor:
        """Return h, computed by plain torch operations in the dtype of `pre`."""
        return plain(self.function.formula)(pre, **learned)

    def double(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return h, the gradient of pre and those of the learned parameters in float64."""
        exact = activation(*formulas()[self.name], "reference")
        learned = [value.double() for value in self.learned.values()]
        dpre, h, dlearned = exact.backward(self.pre.double(), self.dh.double(), learned, with_h=True)
        assert h is not None  # as asked
        return h, dpre, dlearned


def make(name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, scale: float = 2.0) -> Workload:
    """Return a workload of random numbers, the same on every call."""
    formula = activation(*formulas()[name]).formula
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    pre = normal(rows, *([2] if formula.gated else []), width).mul_(scale)
    # Rounded to the dtype, because plain torch keeps them in it: both sides start from the same values.
    learned = {
        symbol: torch.full((width if p.share == "channel" else 1,), p.init, device=device).to(dtype).float()
        for symbol, p in formula.learned.items()
    }
    return Workload(name, pre, normal(rows, width), learned)


# ------------------------------------------------------------------------------------------------------------ correctness


def dtype_name(dtype: torch.dtype) -> str:
    """Return bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def error(computed: Tensor, exact: Tensor) -> float:
    """Return the norm of the error divided by the norm of the exact result."""
    return ((computed.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def check(workload: Workload) -> dict[str, Any]:
    """Return the errors of one workload against float64, and those of plain torch in the dtype of the tensors."""
    h, dpre, dlearned = workload.double()
    values = list(workload.learned.values())
    ours = workload.function.forward(workload.pre, values)
    ours_dpre, recomputed, ours_dlearned = workload.function.backward(workload.pre, workload.dh, values, with_h=True)
    assert recomputed is not None  # as asked
    dpre_alone, _, repeated = workload.function.backward(workload.pre, workload.dh, values)
    pre = workload.pre.clone().requires_grad_()
    learned = {name: value.to(pre.dtype).requires_grad_() for name, value in workload.learned.items()}
    eager = workload.eager(pre, **learned)
    eager_dpre = torch.autograd.grad(eager, pre, workload.dh)[0]
    return {
        "formula": workload.name,
        "dtype": dtype_name(pre.dtype),
        "shape": list(pre.shape),
        "h": error(ours, h),
        "h_eager": error(eager, h),
        "dpre": error(ours_dpre, dpre),
        "dpre_eager": error(eager_dpre, dpre),
        "learned": max((error(a, b) for a, b in zip(ours_dlearned, dlearned, strict=True)), default=0.0),
        "not_finite": sum(int((~result.isfinite()).sum()) for result in (ours, ours_dpre, *ours_dlearned)),
        # Forward and both backward kernels agree, up to how the compiler contracts multiplications and additions.
        "kernels_differ": max(error(recomputed, ours.double()), error(dpre_alone, ours_dpre.double())),
        "repeats": all(torch.equal(a, b) for a, b in zip(ours_dlearned, repeated, strict=True)),
        "telemetry": check_telemetry(workload, ours),
    }


def check_telemetry(workload: Workload, h: Tensor) -> dict[str, float]:
    """Return the errors of the forward kernel with telemetry: of its h against that of forward, and of its statistics."""
    values = list(workload.learned.values())
    telemetry_h, stats = workload.function.forward_with_stats(workload.pre, values)
    exact = reference.stats_of(
        workload.function.compiled, workload.pre.double(), telemetry_h.double(), [value.double() for value in values]
    )
    sums = (stats.sums.double() - exact.sums).abs() / exact.sums.abs().clamp_min(1e-3 * exact.elements)
    units = (
        (stats.active.double() - exact.active).abs().sum() / exact.elements if exact.elements else exact.active.sum()
    )
    return {"h": error(telemetry_h, h.double()), "statistics": max(float(sums.max()), float(units))}


def check_extremes(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return whether NaN propagates, and how many results overflow although their float64 value fits the dtype."""
    workload = make(name, 8, 1024, dtype, device)
    for column, value in enumerate((math.nan, 1e4, -1e4, 100.0, -100.0, 1e-20, 0.0)):
        workload.pre[..., column] = value
    h, dpre, _ = workload.double()
    values = list(workload.learned.values())
    ours_h = workload.function.forward(workload.pre, values)
    ours_dpre = workload.function.backward(workload.pre, workload.dh, values)[0]
    largest = torch.finfo(dtype).max
    nan_kept = all(ours_h[..., 0].isnan().flatten().tolist())
    lost = sum(
        int((~ours.isfinite() & (exact.abs() < largest)).sum()) for ours, exact in ((ours_h, h), (ours_dpre, dpre))
    )
    return {"formula": name, "dtype": dtype_name(dtype), "nan_kept": nan_kept, "finite_lost": lost}


def check_large(name: str, device: torch.device) -> dict[str, Any]:
    """Return the error of the first and the last rows of a tensor of more than 2**31 elements."""
    width = 8192
    parts = 2 if activation(*formulas()[name]).formula.gated else 1
    workload = make(name, 2**31 // (width * parts) + 64, width, torch.bfloat16, device)
    values = list(workload.learned.values())
    h = workload.function.forward(workload.pre, values)
    dpre = workload.function.backward(workload.pre, workload.dh, values)[0]
    worst = 0.0
    for rows in (slice(0, 32), slice(-32, None)):
        exact_h, exact_dpre, _ = dataclasses.replace(workload, pre=workload.pre[rows], dh=workload.dh[rows]).double()
        worst = max(worst, error(h[rows], exact_h), error(dpre[rows], exact_dpre))
    return {"formula": name, "elements": workload.pre.numel(), "error": worst}


# ------------------------------------------------------------------------------------------------------------------ times


def liger(name: str) -> Callable[..., Tensor] | None:
    """Return Liger-Kernel's function, or None where it is not installed or has none; its GEGLU is the tanh approximation."""
    if name not in ("swiglu", "geglu") or importlib.util.find_spec("liger_kernel") is None:
        return None
    # By name: Liger-Kernel is no dependency of this project, so that a type checker does not find it.
    if name == "swiglu":
        return importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply
    return importlib.import_module("liger_kernel.ops.geglu").LigerGELUMulFunction.apply


def measure(workload: Workload, rounds: int, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Return the times of forward and backward by every method, and the bytes that each saves for backward."""
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    saved: dict[str, int] = {}
    moved = workload.pre.nbytes + workload.dh.nbytes  # by forward; backward moves the pre-activations once more
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    forward["copy"] = backward["copy"] = lambda: target.copy_(source)

    def add(name: str, function: Callable[..., Tensor], pre: list[Tensor], learned: dict[str, Tensor]) -> None:
        inputs = [tensor.detach().clone().requires_grad_() for tensor in pre]
        learned = {key: value.clone().requires_grad_() for key, value in learned.items()}
        function(*inputs, **learned)  # compiles and fills caches before anything is counted or timed
        h, saved[name] = saved_bytes(lambda: function(*inputs, **learned))
        leaves = [*inputs, *learned.values()]

        def without_gradient() -> None:
            with torch.no_grad():
                function(*inputs, **learned)

        forward[name] = without_gradient
        backward[name] = lambda: torch.autograd.grad(h, leaves, workload.dh, retain_graph=True)

    add("triton", workload.function, [workload.pre], workload.learned)
    # fp32 parameters would promote all of plain torch's arithmetic to fp32.
    low_precision = {key: value.to(workload.pre.dtype) for key, value in workload.learned.items()}
    add("eager", workload.eager, [workload.pre], low_precision)
    if compiled:
        torch._dynamo.reset()
        add("torch.compile", torch.compile(workload.eager, dynamic=False), [workload.pre], low_precision)
    if (theirs := liger(workload.name)) is not None:
        add("liger", theirs, list(workload.pre.unbind(-2)), {})
    return {
        "formula": workload.name,
        "rows": workload.dh.shape[0],
        "d_ff": workload.dh.shape[1],
        "forward_bytes": moved,
        "backward_bytes": moved + workload.pre.nbytes,
        "copy_bytes": 2 * source.nbytes,
        "forward": interleaved(forward, rounds, device),
        "backward": interleaved(backward, rounds, device),
        "saved_bytes": saved,
    }


def saved_bytes(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Return the result of `call` and the bytes that it keeps for backward: every storage once, inputs included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return result, sum(storages.values())


def measure_tiles(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the times of forward and backward at several tile widths."""
    workload, before = make(name, *SHAPES[0], torch.bfloat16, device), triton_backend.TILE
    values, methods = list(workload.learned.values()), {}

    def at(tile: int, call: Callable[..., object], *arguments: Any) -> Callable[[], None]:
        def run() -> None:
            triton_backend.TILE = tile
            call(*arguments)

        return run

    for tile in (512, 1024, 2048, 4096):
        methods[f"forward {tile}"] = at(tile, workload.function.forward, workload.pre, values)
        methods[f"backward {tile}"] = at(tile, workload.function.backward, workload.pre, workload.dh, values)
    try:
        return {"formula": name, "seconds": interleaved(methods, rounds, device)}
    finally:
        triton_backend.TILE = before


# ---------------------------------------------------------------------------------------------------------- the command


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; None: that of the process."""
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget: nothing new starts after it")
    parser.add_argument("--formulas", nargs="+", default=list(formulas()), choices=list(formulas()), metavar="NAME")
    parser.add_argument("--results", type=Path, default=RESULTS, help="output folder")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile, which takes most of the time")
    parser.add_argument("--tiny", action="store_true", help="tiny fp32 tensors only, to show that the script runs")
    return parser.parse_args(argv)


Rows = Iterator[tuple[str, dict[str, Any]]]


def listed(section: str, row: dict[str, Any], part: Callable[..., Any], *arguments: Any) -> Rows:
    """Yield (section, row) for the rows of a part, which ends in `row` with the reason if it fails."""
    for each in gpu_step.attempted(row, part, *arguments):
        yield section, each


def collect(options: argparse.Namespace, device: torch.device, minutes: Minutes) -> Rows:
    """Yield (section of the record, row) for every check and timing. What fails becomes a row that says so."""
    dtypes = [torch.float32] if options.tiny else [torch.bfloat16, torch.float16, torch.float32]
    rows, width = (2, 48) if options.tiny else (512, 5632)
    for name in ("swiglu", "relu2", "gelu"):
        if name in options.formulas and not options.tiny and minutes.allow(f"first check of {name}"):
            yield from checked(name, rows, width, dtypes[0], device)
    yield from whole_steps(options, device, dtypes[0], minutes)
    for name in options.formulas:
        for dtype in dtypes:
            if minutes.allow(f"check of {name}, {dtype}"):
                yield from checked(name, rows, width, dtype, device)
                row = {"formula": name, "dtype": dtype_name(dtype)}
                yield from listed("extremes", row, check_extremes, name, dtype, device)
        for width_now in ODD_WIDTHS[:2] if options.tiny else ODD_WIDTHS:
            if minutes.allow(f"check of {name}, width {width_now}"):
                yield from checked(name, 3 if options.tiny else 33, width_now, dtypes[0], device)
    for name in () if options.tiny else ("silu", "swiglu", "prelu"):
        if name in options.formulas and minutes.allow(f"check of {name} beyond 2**31 elements"):
            yield from listed("large", {"formula": name}, check_large, name, device)
            gpu_step.free_memory(device)
    rounds = 1 if options.tiny else ROUNDS
    yield from listed("fused", {"operation": "all"}, fused_operations, options, device, rounds, minutes)
    for shape in [(2, 48)] if options.tiny else SHAPES:
        compiled = not options.no_compile and shape == SHAPES[0]  # takes ten times as long as everything else
        if not compiled:
            minutes.left_out.append("torch.compile, {} x {}".format(*shape))
        for name in options.formulas:
            if minutes.allow("times of {}, {} x {}".format(name, *shape)):
                yield from timed(name, *shape, dtypes[0], device, rounds, compiled)
    for name in () if options.tiny else ("swiglu", "gelu"):
        if name in options.formulas and minutes.allow(f"tiles of {name}"):
            yield from listed("tiles", {"formula": name}, measure_tiles, name, device, rounds)


def checked(name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Rows:
    """Yield the errors of a formula at one size."""
    row = {"formula": name, "dtype": dtype_name(dtype), "shape": [rows, width]}
    yield from listed("checks", row, lambda: check(make(name, rows, width, dtype, device)))


def timed(
    name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, rounds: int, compiled: bool
) -> Rows:
    """Yield the times of a formula at one size."""
    row = {"formula": name, "rows": rows, "d_ff": width}
    yield from listed("times", row, lambda: measure(make(name, rows, width, dtype, device), rounds, device, compiled))


def fused_operations(
    options: argparse.Namespace, device: torch.device, rounds: int, minutes: Minutes
) -> Iterator[dict[str, Any]]:
    """Yield the times and errors of RMSNorm and the rotary embedding."""
    for operation in fused.operations(device.type)[: 1 if options.tiny else None]:
        for dtype in (torch.float32,) if options.tiny else (torch.bfloat16, torch.float32):
            if minutes.allow(f"{operation.name}, {dtype}"):
                row = {"operation": operation.name, "dtype": dtype_name(dtype)}
                yield from gpu_step.attempted(row, fused.compare, operation, dtype, rounds)


def whole_steps(options: argparse.Namespace, device: torch.device, dtype: torch.dtype, minutes: Minutes) -> Rows:
    """Yield training steps, and the choices within them."""
    rounds = 1 if options.tiny else ROUNDS
    for model in (gpu_step.TINY,) if options.tiny else gpu_step.MODELS:
        if minutes.allow(f"steps of {model.name}"):
            yield from listed("steps", {"model": model.name}, gpu_step.train, model, device, dtype)
        parts = (("attention", gpu_step.attention_choices), ("loss", gpu_step.loss_chunks), ("products", fp8_products))
        for section, choices in parts:
            if minutes.allow(f"choices of {section}, {model.name}"):
                row = {"model": model.name, "method": section}
                yield from listed(section, row, choices, model, device, dtype, rounds)
        gpu_step.free_memory(device)
    if options.tiny or gpu_resume.missing():
        minutes.left_out.append(f"stop and resume (not installed: {', '.join(gpu_resume.missing()) or 'nothing'})")
    elif minutes.allow("stop and resume"):
        yield from listed("resume", {"model": "nano", "method": "stop and resume"}, gpu_resume.resumed)


def main(argv: list[str] | None = None) -> int:
    import triton

    options = arguments(argv)
    if not torch.cuda.is_available() and not (options.tiny and runtime.interpreted()):
        raise SystemExit("torch finds no GPU; without one, run TRITON_INTERPRET=1 bash bench/gpu.sh --tiny")
    device = torch.device("cpu" if runtime.interpreted() else "cuda")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the interpreter"
    record: dict[str, Any] = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    sections = (
        "steps",
        "attention",
        "loss",
        "products",
        "resume",
        "checks",
        "extremes",
        "large",
        "fused",
        "times",
        "tiles",
    )
    record |= {section: [] for section in sections}
    minutes = Minutes(60 * options.minutes)
    record["left_out"] = minutes.left_out
    path = options.results / f"{name.lower().removeprefix('nvidia ').replace(' ', '-')}-elementwise.json"
    options.results.mkdir(parents=True, exist_ok=True)
    for section, row in collect(options, device, minutes):
        record[section].append(row)
        what = row.get("formula") or row.get("operation") or f"{row['model']}, {row.get('method', 'training')}"
        print(section, what, f"{time.monotonic() - minutes.began:.0f} s", flush=True)
        # After every row, so that an interrupted run keeps its results.
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(record), encoding="utf-8")
    failed = failures(record)
    print("\n".join(failed) or "all checks passed")
    print(f"written: {path} and {path.with_suffix('.md').name}; left out: {len(minutes.left_out)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
