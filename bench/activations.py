"""Compare the speed of the activations on a CPU with eager PyTorch and torch.compile: `python -m bench.activations`.

    arms=a,b                            only these arms
    shapes=1024x5632,4096x2816          rows x d_ff
    dtypes=bf16,fp32                    of the tensors
    rounds=15                           of the timings, in which each contender takes a turn
    compile=1                           0 leaves torch.compile out
    out=bench/results/cpu-activations   two files: .json and .md

Contenders run in one process, in turn, under the allocator settings of `train.py`. A ratio is taken per round: the time of the
contender divided by ours. "copy" is our fraction of the bandwidth of a copy in the same rounds. The copy moves the bytes that a
fused kernel must move: in bf16, forward 4 per element ungated and 6 gated, backward 6 and 10. torch.compile compiles the
forward without gradients and the training graph as separate functions.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bench.records import claim_record
from kernels.common.commands import run_command
from kernels.common.errors import UserError, unknown
from kernels.common.files import atomic_write
from kernels.common.options import read_options

ARMS = ("relu", "relu2", "silu", "gelu", "gelu_tanh", "swiglu", "geglu", "reglu", "xielu", "situ_glu")
_DEFAULTS = {
    "arms": ",".join(ARMS),
    "shapes": "1024x5632,4096x2816",
    "dtypes": "bf16,fp32",
    "rounds": 15,
    "compile": 1,
    "out": "bench/results/cpu-activations",
}
_WARM_UP = 3


def main(argv: list[str]) -> None:
    if argv == ["--build-one"]:  # a child process: builds the kernels whose sources it reads from standard input
        _build_one()
        return
    if argv[:1] == ["--measure"]:  # a child process, with settings that Inductor and the allocator read when they start
        _measure(json.loads(argv[1]))
        return
    options = read_options(argv, _DEFAULTS, {"rounds": 1})
    claim_record(options["out"] + ".md", argv)
    plan = _plan(options)
    build = _build_times()
    print(
        f"cold build of {build['kernels']} formulas: {build['parallel']:.1f} s in parallel, {build['singly']:.1f} s one by one"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    command = [sys.executable, "-m", "bench.activations", "--measure", json.dumps(plan)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    rows = []
    assert child.stdout is not None
    for line in child.stdout:
        rows.append(json.loads(line))
        print(_line(rows[-1]), flush=True)
    if child.wait():
        raise UserError("the measurement failed: see its output above")
    from bench.train import machine

    result = {"machine": machine(), "plan": plan, "build_seconds": build, "rows": rows}
    with atomic_write(options["out"] + ".json") as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    with atomic_write(options["out"] + ".md") as file:
        file.write(_markdown(result))
    print(f"written to {options['out']}.json and .md")


def _plan(options: dict[str, Any]) -> dict[str, Any]:
    """Return the checked options as lists and numbers.

    Raises:
        UserError: an unknown arm or dtype, or an invalid shape.
    """
    from bench.formulas import formulas

    arms, dtypes = options["arms"].split(","), options["dtypes"].split(",")
    for name in arms:
        if name not in formulas():
            raise unknown("arm", name, formulas())
    for name in dtypes:
        if name not in ("bf16", "fp32"):
            raise unknown("dtype", name, ("bf16", "fp32"))
    if options["compile"] not in (0, 1):
        raise UserError(f"compile={options['compile']}: expected 0 or 1")
    shapes = [shape.split("x") for shape in options["shapes"].split(",")]
    if not all(len(shape) == 2 and all(part.isdigit() and int(part) for part in shape) for shape in shapes):
        raise UserError(f"shapes={options['shapes']}: write rows x d_ff, such as 1024x5632,4096x2816")
    sizes = [[int(part) for part in shape] for shape in shapes]
    rounds, compiled = options["rounds"], options["compile"] == 1
    return {"arms": arms, "dtypes": dtypes, "shapes": sizes, "rounds": rounds, "compile": compiled}


# ------------------------------------------------------------------------------------------------------------- measuring


def _measure(plan: dict[str, Any]) -> None:
    """Print one line of JSON for each arm, shape and dtype."""
    from training.machine import keep_freed_memory

    keep_freed_memory()
    for rows, width in plan["shapes"]:
        for dtype in plan["dtypes"]:
            for arm in plan["arms"]:
                figures = _measure_arm(arm, rows, width, dtype, plan["rounds"], plan["compile"])
                print(json.dumps(figures), flush=True)


def _measure_arm(arm: str, rows: int, width: int, dtype_name: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """Return the times of forward and backward of one arm, and the ratios of the contenders."""
    import torch

    from bench.formulas import formulas
    from kernels import activation
    from kernels.activations.eager import plain
    from kernels.activations.properties import bytes_moved

    torch._dynamo.reset()  # the limit on recompilations is for each arm
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name]
    ours = activation(*formulas()[arm])
    eager, formula = plain(ours.formula), ours.formula
    pre = torch.randn((rows, 2, width) if formula.gated else (rows, width)).to(dtype).requires_grad_()
    dh = torch.randn(rows, width).to(dtype)
    learned_fp32 = {n: torch.full((1,), p.init, requires_grad=True) for n, p in formula.learned.items()}
    learned_low = {n: value.detach().to(dtype).requires_grad_() for n, value in learned_fp32.items()}
    contenders: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
        "ours": (ours, ours, learned_fp32),
        "eager": (eager, eager, learned_low),
    }
    if compiled:

        def training(pre: Any, **learned: Any) -> Any:  # another function, so that torch.compile gives it its own graph
            return eager(pre, **learned)

        compiled_forward, compiled_training = (torch.compile(f, dynamic=False) for f in (eager, training))
        contenders["compile"] = (compiled_forward, compiled_training, learned_low)

    def forward(f: Callable[..., Any], learned: dict[str, Any]) -> Callable[[], Any]:
        return lambda: f(pre, **learned)

    def backward(f: Callable[..., Any], learned: dict[str, Any]) -> Callable[[], Any]:
        h = f(pre, **learned)
        return lambda: torch.autograd.grad(h, [pre, *learned.values()], dh, retain_graph=True)

    moved = bytes_moved(formula, dtype.itemsize)
    result: dict[str, Any] = {"arm": arm, "rows": rows, "d_ff": width, "dtype": dtype_name}
    for name, make in (("forward", forward), ("backward", backward)):
        calls = {key: make(f if name == "forward" else g, learned) for key, (f, g, learned) in contenders.items()}
        size = rows * width * moved[name] // 2
        source = torch.ones(size, dtype=torch.uint8)
        target = torch.empty_like(source)
        calls["copy"] = lambda target=target, source=source: target.copy_(source)
        with torch.set_grad_enabled(name == "backward"):
            result[name] = _compare(calls, rounds)
    return result


def _compare(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Run the contenders in turn; return medians in ms, and the ratio of each one's time to ours (median and range)."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + _WARM_UP):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= _WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    figures: dict[str, Any] = {f"{name}_ms": 1e3 * statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        if name != "ours":
            ratios = [other / ours for ours, other in zip(seconds["ours"], times, strict=True)]
            figures[name] = {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    return figures  # the ratio of "copy" is our fraction of its bandwidth: both move the same bytes


# -------------------------------------------------------------------------------------------------------------- building


def _build_times() -> dict[str, Any]:
    """Return the seconds to compile all formulas of the catalogue without a cache, on all cores and one by one."""
    from bench.formulas import formulas
    from kernels import parse
    from kernels.activations import c_backend
    from kernels.formula.compiled import compile_formula

    sources = [c_backend.source_of(compile_formula(parse(*arm))) for arm in formulas().values()]
    workers = len(os.sched_getaffinity(0))
    return {
        "kernels": len(sources),
        "cores": workers,
        "parallel": _build(sources, workers),
        "singly": _build(sources, 1),
    }


def _build(sources: list[str], workers: int) -> float:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "bench.activations", "--build-one"]
        job = json.dumps({"sources": sources, "workers": workers})
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        done = subprocess.run(command, input=job, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"the kernels could not be built:\n{done.stderr[-2000:]}")
    return float(done.stdout)


def _build_one() -> None:
    from concurrent.futures import ThreadPoolExecutor

    from kernels.c import toolchain

    job = json.load(sys.stdin)
    start = time.perf_counter()
    with ThreadPoolExecutor(job["workers"]) as pool:
        list(pool.map(toolchain.build, job["sources"]))
    print(time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------------------- reporting


def _line(row: dict[str, Any]) -> str:
    columns = [f"{row['rows']}x{row['d_ff']} {row['dtype']} {row['arm']:<10}"]
    for name in ("forward", "backward"):
        part = row[name]
        others = "  ".join(f"{key} {part[key]['median']:.2f}x" for key in ("eager", "compile") if key in part)
        columns.append(f"{name} {part['ours_ms']:.2f} ms  {others}  copy {part['copy']['median']:.0%}")
    return " | ".join(columns)


def _markdown(result: dict[str, Any]) -> str:
    build, arms = result["build_seconds"], result["plan"]["arms"]
    chosen = "" if tuple(arms) == ARMS else f" arms={','.join(arms)}"
    lines = [
        "# Activations on a CPU",
        "",
        f"Written by `python -m bench.activations{chosen}`.",
        f"{result['machine']}; {result['plan']['rounds']} interleaved rounds.",
        "Ratios: the contender's time divided by ours, the median over the rounds and the range. Copy: our fraction of the",
        "bandwidth of a copy of the bytes that a fused kernel must move.",
        "",
        f"Cold build of the {build['kernels']} formulas of the catalogue: {build['parallel']:.1f} s on {build['cores']} cores, "
        f"{build['singly']:.1f} s one by one.",
    ]

    def ratio(part: dict[str, Any], key: str, percent: bool = False) -> str:
        if key not in part:
            return "-"
        values = (part[key]["median"], *part[key]["range"])
        median, low, high = (f"{value:.0%}" if percent else f"{value:.2f}" for value in values)
        return f"{median} ({low} to {high})"

    for name in ("forward", "backward"):
        lines += [
            "",
            f"## {name.capitalize()}",
            "",
            "| arm | shape | dtype | ours, ms | eager | torch.compile | copy |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        for row in result["rows"]:
            part, shape = row[name], f"{row['rows']}x{row['d_ff']}"
            figures = f"{part['ours_ms']:.2f} | {ratio(part, 'eager')} | {ratio(part, 'compile')} | {ratio(part, 'copy', True)}"
            lines.append(f"| {row['arm']} | {shape} | {row['dtype']} | {figures} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main, __doc__)
