"""Compare the error of every arm's kernels with that of plain torch: `python -m bench.conformance`.

    arms=a,b                           only these arms
    rows=256                           rows of 1024 pre-activations
    seed=N                             of the inputs; default: a new one
    large=1                            also more than 2^31 elements (needs 9 GiB of memory)
    out=bench/results/conformance.md   the report

Exits with status 1, and prints the failures to standard error, if an error exceeds 1.1 times that of plain torch in the same
dtype or an edge case fails. The report defines its figures. The edge cases are those of `bench/edge_cases.py`.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bench.formulas import formulas
from bench.records import claim_record
from kernels.common.commands import run_command
from kernels.common.errors import unknown
from kernels.common.files import atomic_write
from kernels.common.options import read_options

# torch is imported in functions: `main` sets an environment variable that it reads when it is imported.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.edge_cases import Draw

CAP = 1.1
LARGE_GIB = 9
DRAWS = 16  # of a formula with learned parameters
_HEAD = """# Conformance of the kernels

Written by `python -m bench.conformance` with seed {seed}. {machine}.

Each figure compares a result with the same formula in float64, differentiated by autograd, on the same inputs:
{rows} x 1024 pre-activations from N(0, 2²), a gradient of h from N(0, 1), and learned parameters, all rounded to the dtype
first (where gate and up came out equal, up was moved: the derivative of a maximum is a convention there).

- *error* is the root mean square of (result - exact) divided by the root mean square of the exact values.
- *plain torch* is the error of the formula written out in torch operations in that dtype (F.silu, F.gelu, ... where torch
  has one).
- *ratio* is the first divided by the second; 1.00 where both are exact, 0 where plain torch returns NaN and the backend does
  not. At most {cap} is allowed, for h and for every gradient.
- *max* is the largest |result - exact| / max(|exact|, RMS), in units of the dtype's eps (2^-23 fp32, 2^-7 bf16).
- A learned parameter's gradient is one number, the sum over all elements, and a ratio of two single errors is noise: such a
  formula is drawn {draws} times, with consecutive seeds, and its figures are taken over all draws together.
"""
_EDGES = """
## Edge cases

NaN: returns NaN. inf: returns NaN, inf, or the limit of the formula. 1e4: h and gradients are finite wherever the exact
value is a number of the dtype, for |pre-activation| up to 10,000. widths {widths}, non-contiguous and zero-stride
inputs: the same numbers as in a contiguous tensor of width 5632, up to twice the column *max* above, or one eps.
empty: 0 rows and 0 columns. Of a formula that reduces over d_ff, rows of other widths are other rows: each, but for width 1, is
held to float64, up to 32 roundings more of the parts of a gradient, which may cancel.
"""
_RANDOM = -1  # a new seed each time
_DEFAULTS = {"out": "bench/results/conformance.md", "seed": _RANDOM, "arms": "", "rows": 256, "large": 0}


def main(argv: list[str]) -> int:
    options = read_options(argv, _DEFAULTS, {"rows": 1})
    claim_record(options["out"], argv)
    # A parameter learned per channel has no fixed size; tests/kernels covers it.
    arms = {name: arm for name, arm in formulas().items() if name != "prelu_channel"}
    for name in filter(None, options["arms"].split(",")):
        if name not in arms:
            raise unknown("arm", name, arms)
    chosen = options["arms"].split(",") if options["arms"] else list(arms)
    # 2 MiB pages: with 4 KiB pages, large=1 mostly waits for page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    seed, rows = options["seed"], options["rows"]
    if seed == _RANDOM:
        seed = secrets.randbelow(1 << 31)
    lines, failures = report({name: arms[name] for name in chosen}, seed, rows)
    lines += ["", "## More than 2^31 elements", ""]
    if options["large"]:
        outcome = large()
        if "FAILED" in outcome:
            failures.append(outcome)
        lines.append(outcome)
    else:
        lines.append("Not run (large=1 runs it).")
    lines += ["", f"{len(failures)} failures." if failures else "Nothing failed.", *(f"- {f}" for f in failures)]
    with atomic_write(options["out"]) as file:
        file.write("\n".join(lines) + "\n")
    print(f"seed {seed}; written to {options['out']}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def report(arms: dict[str, tuple[str, dict[str, Any]]], seed: int, rows: int) -> tuple[list[str], list[str]]:
    """Measure; return the report's lines and the failures."""
    import torch

    from bench.edge_cases import WIDTHS, draw, edge_cases
    from bench.train import machine

    lines = _HEAD.format(seed=seed, rows=rows, cap=CAP, draws=DRAWS, machine=machine()).splitlines()
    head = "| arm | dtype | backend | result | error | plain torch | ratio | max | plain max |"
    lines += ["", "## Errors", "", head, "|---|---|---|---|---|---|---|---|---|"]
    edges, failures, worst = [], [], 0.0
    for name, (formula, parameters) in arms.items():
        for dtype, dtype_name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            for backend, device in backends():
                arm = f"{name} | {dtype_name} | {backend}"
                draws = [draw(formula, parameters, backend, dtype, seed, rows, device)]
                if draws[0].learned:
                    more = range(seed + 1, seed + DRAWS)
                    draws += [draw(formula, parameters, backend, dtype, other, rows, device) for other in more]
                for result, mine, theirs, ratio in _errors(draws, dtype):
                    failed = not ratio <= CAP
                    worst = max(worst, ratio)
                    mark = " **over**" if failed else ""
                    lines.append(
                        f"| {arm} | {result} | {mine[0]:.3g} | {theirs[0]:.3g} | {ratio:.3f}{mark} "
                        f"| {mine[1]:.2f} | {theirs[1]:.2f} |"
                    )
                    if failed:
                        figures = f"error {mine[0]:.4g}, plain torch {theirs[0]:.4g}, ratio {ratio:.3f}"
                        failures.append(f"{name} {dtype_name} {backend} {result}: {figures}")
                outcomes = dict(edge_cases(draws[0], dtype))
                edges.append(f"| {arm} | {' | '.join(outcomes.values())} |")
                for check, outcome in outcomes.items():
                    if outcome != "ok":
                        failures.append(f"{name} {dtype_name} {backend}, {check}: {outcome}")
    lines += ["", f"The largest ratio is {worst:.3f}."]
    lines += _EDGES.format(widths=", ".join(map(str, WIDTHS))).splitlines()
    columns = ("NaN", "inf", "1e4", "widths", "strides", "empty")
    lines += ["", f"| arm | dtype | backend | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|", *edges]
    return lines, failures


def _errors(draws: list[Draw], dtype: torch.dtype) -> list[tuple[str, tuple[float, float], tuple[float, float], float]]:
    """Return (result, our `error`, that of plain torch, their ratio) for h and every gradient."""
    import torch

    from bench.edge_cases import error

    exact = _concatenated(each.results(each.plain, torch.float64) for each in draws)
    plain = _concatenated(each.results(each.plain, dtype) for each in draws)
    eps = torch.finfo(dtype).eps
    rows = []
    for result, ours in _concatenated(each.results(each.function) for each in draws).items():
        mine, theirs = error(ours, exact[result], eps), error(plain[result], exact[result], eps)
        if theirs[0]:
            ratio = mine[0] / theirs[0]
        else:
            ratio = 1.0 if mine[0] == 0 else math.inf
        if math.isnan(theirs[0]) and math.isfinite(mine[0]):
            ratio = 0.0  # plain torch returns NaN there
        rows.append((result, mine, theirs, ratio))
    return rows


def _concatenated(draws: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return each result of several draws as one vector."""
    import torch

    results = list(draws)
    return {name: torch.cat([each[name].reshape(-1) for each in results]) for name in results[0]}


def backends() -> list[tuple[str, str]]:
    """Return (backend, device) of all that this machine can run."""
    import torch

    from kernels import BACKENDS

    pairs = [("reference", "cpu"), ("c", "cpu")]
    if "triton" in BACKENDS and torch.cuda.is_available():
        pairs.append(("triton", "cuda"))
    return pairs


def large() -> str:
    """Check 2^31 + 8 elements in bf16, forward and backward, as one row and as 136 rows with a learned parameter."""
    import psutil
    import torch

    from kernels import activation

    size, chunk = (1 << 31) + 8, 1 << 20
    if psutil.virtual_memory().available < LARGE_GIB * 2**30:
        return f"Not run: it needs {LARGE_GIB} GiB of memory."
    # 127 different pieces, repeated: an index that wraps around, at any power of two, reads other numbers.
    table = torch.randn((127, chunk), generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    pre = torch.empty(size, dtype=torch.bfloat16)
    wrong = []
    pieces = [(number % len(table), slice(start, start + chunk)) for number, start in enumerate(range(0, size, chunk))]
    for number, piece in pieces:
        pre[piece] = table[number, : pre[piece].numel()]
    prelu = activation("where(x > 0, x, slope*x)", {"slope": {"init": 0.5, "share": "layer"}}, "c")
    for function, slope, rows in ((activation("relu(x)", backend="c"), 0.0, 1), (prelu, 0.5, 136)):
        learned = [torch.full((1,), slope) for _ in function.formula.learned]
        view = pre.view(rows, -1)
        exact = torch.nn.functional.leaky_relu(table, slope)
        assert exact[pieces[-1][0], :8].any(), "the last elements are all zero, and so show nothing"
        # With x as the gradient of h, the gradient of x is h again: two tensors are in memory, never three.
        for what in ("h", "the gradient"):
            result = function.forward(view, learned) if what == "h" else function.backward(view, view, learned)[0]
            result = result.view(-1)
            for number, piece in pieces:
                if not torch.equal(result[piece], exact[number, : result[piece].numel()]):
                    wrong.append(f"{what} from element {piece.start:,} of {rows} rows")
            del result
    what = f"{size:,} bf16 elements through the C backend, ReLU of one row and PReLU of 136"
    return f"FAILED: {what}: {'; '.join(wrong)}" if wrong else f"{what}, forward and backward: every element is right."


if __name__ == "__main__":
    run_command(main, __doc__)
