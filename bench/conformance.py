"""How far every arm errs from the truth, beside plain torch: `python -m bench.conformance`.

    out=bench/results/conformance.md   where the report goes          seed=N    the inputs' seed (default: a new one each run)
    arms=NAME,...                      some arms only                 rows=256  rows of 1024 pre-activations
    large=1                            more than 2^31 elements too (in 9 GiB of memory)

Exit status 1, and a list on standard error, if an error is more than 1.1 times that of plain torch in the same dtype, or an
edge case fails. What the figures are stands in the report itself.
"""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.formulas import formulas
from kernels.common.commands import run_command
from kernels.common.errors import unknown
from kernels.common.files import atomic_write
from kernels.common.options import read_options

CAP = 1.1
LARGE_GIB = 9
DRAWS = 16  # of a formula with learned parameters
WIDTHS = (1, 7, 8, 127, 5632)
_HEAD = """# Conformance of the kernels

Written by `python -m bench.conformance` with seed {seed}. {machine}.

Each figure compares a result with the same formula in float64, differentiated by autograd, on the same inputs:
{rows} x 1024 pre-activations from N(0, 2²), a gradient of h from N(0, 1), and learned parameters, all rounded to the dtype
first (where gate and up came out equal, up was moved: the derivative of a maximum is a convention there).

- *error* is the root mean square of (result - exact) over the root mean square of the exact values.
- *plain torch* is the error of the formula written out in torch operations in that dtype (F.silu, F.gelu, ... where torch
  has one).
- *ratio* is the first over the second; 1.00 where both are exact, 0 where plain torch gives NaN and the backend does not. At
  most {cap} is allowed, for h and for every gradient.
- *max* is the largest |result - exact| / max(|exact|, RMS), in units of the dtype's eps (2^-23 fp32, 2^-7 bf16).
- A learned parameter's gradient is one number, the sum over all elements, and a ratio of two single errors is noise: such a
  formula is drawn {draws} times, with seeds that follow each other, and its figures are taken over all draws together.
"""
_EDGES = """
## Edge cases

NaN: comes out as NaN. inf: comes out as NaN, as inf, or as the formula's limit. 1e4: finite, h and gradients, wherever the
exact value is a number of the dtype, for |pre-activation| up to 10,000. widths {widths}, non-contiguous and zero-stride
inputs: the same numbers as in a contiguous tensor of width 5632, up to twice the column *max* above, or one eps.
empty: 0 rows and 0 columns.
"""


_RANDOM = -1  # a new seed each time
_DEFAULTS = {"out": "bench/results/conformance.md", "seed": _RANDOM, "arms": "", "rows": 256, "large": 0}


def main(argv: list[str]) -> int:
    options = read_options(argv, _DEFAULTS, {"rows": 1})
    # What is learned for each channel has no fixed size; tests/kernels covers it.
    arms = {name: arm for name, arm in formulas().items() if name != "prelu_channel"}
    for name in filter(None, options["arms"].split(",")):
        if name not in arms:
            raise unknown("arm", name, arms)
    wanted = options["arms"].split(",") if options["arms"] else list(arms)
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # pages of 2 MiB: with those of 4 KiB, large=1 waits for little else
    seed, rows = options["seed"], options["rows"]
    if seed == _RANDOM:
        seed = secrets.randbelow(1 << 31)
    lines, failures = report({name: arms[name] for name in wanted}, seed, rows)
    lines += ["", "## More than 2^31 elements", ""]
    if options["large"]:
        said = large()
        failures += [said] if "FAILED" in said else []
        lines.append(said)
    else:
        lines.append("Not run (large=1 runs it).")
    lines += ["", f"{len(failures)} failures." if failures else "Nothing failed.", *(f"- {f}" for f in failures)]
    Path(options["out"]).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options["out"]) as file:
        file.write("\n".join(lines) + "\n")
    print(f"seed {seed}; written to {options['out']}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One arm in one dtype with its inputs, the truth, and what plain torch makes of it."""

    function: Callable[..., Any]
    plain: Callable[..., Any]
    pre: Any
    dh: Any
    learned: dict[str, Any]

    def of(self, f: Callable[..., Any], dtype: Any = None, pre: Any = None, dh: Any = None) -> dict[str, Any]:
        """Return h and all gradients as `f` computes them, in float64: {"h": ..., "dx": ..., ...}."""
        import torch

        pre = self.pre if pre is None else pre
        dh = self.dh[: pre.shape[0], : pre.shape[-1]] if dh is None else dh
        cast = (lambda t: t.to(dtype)) if dtype else (lambda t: t)
        leaf = cast(pre).detach().requires_grad_()
        learned = {name: cast(value).detach().requires_grad_() for name, value in self.learned.items()}
        h = f(leaf, **learned)
        given = (
            torch.autograd.grad(h, [leaf, *learned.values()], cast(dh), allow_unused=True) if h.requires_grad else None
        )
        gradients = given or [None] * (1 + len(learned))
        dpre = torch.zeros_like(leaf) if gradients[0] is None else gradients[0]
        gated = leaf.ndim == 3
        split = {"dgate": dpre[:, 0], "dup": dpre[:, 1]} if gated else {"dx": dpre}
        split |= {f"d{name}": value for name, value in zip(learned, gradients[1:], strict=True)}
        return {"h": h.detach().double(), **{name: value.double() for name, value in split.items()}}


def case_of(
    formula: str, parameters: dict[str, Any], backend: str, dtype: Any, seed: int, rows: int, device: str
) -> Case:
    """Draw the inputs of one arm."""
    import torch

    from kernels import activation
    from kernels.activations.eager import plain

    function = activation(formula, parameters, backend)
    generator = torch.Generator().manual_seed(seed)
    pre = 2 * torch.randn((rows, 2, 1024) if function.formula.gated else (rows, 1024), generator=generator)
    pre = pre.to(dtype)
    if function.formula.gated:
        pre[:, 1] += (pre[:, 0] == pre[:, 1]).to(dtype)
    dh = torch.randn((rows, 1024), generator=generator).to(dtype)
    # Plain code keeps a parameter in the dtype of the model; the kernels take the same number.
    learned = {n: torch.full((1,), p.init).to(dtype).float() for n, p in function.formula.learned.items()}
    learned = {name: value.to(device) for name, value in learned.items()}
    return Case(function, plain(function.formula), pre.to(device), dh.to(device), learned)


def error(result: Any, exact: Any, eps: float) -> tuple[float, float]:
    """Return (root mean square error over the exact values' root mean square, largest error in eps)."""
    rms = float(exact.square().mean().sqrt())
    if rms == 0:
        return (0.0, 0.0) if not result.any() else (math.inf, math.inf)
    difference = (result - exact).abs()
    return float(difference.square().mean().sqrt()) / rms, float((difference / exact.abs().clamp(min=rms)).max()) / eps


def together(draws: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return each result of several draws as one vector."""
    import torch

    found = list(draws)
    return {of: torch.cat([each[of].reshape(-1) for each in found]) for of in found[0]}


def report(arms: dict[str, tuple[str, dict[str, Any]]], seed: int, rows: int) -> tuple[list[str], list[str]]:
    """Measure; return the report's lines and the failures."""
    import torch

    from bench.train import machine

    lines = _HEAD.format(seed=seed, rows=rows, cap=CAP, draws=DRAWS, machine=machine()).splitlines()
    head = "| arm | dtype | backend | of | error | plain torch | ratio | max | plain max |"
    lines += ["", "## Errors", "", head, "|---|---|---|---|---|---|---|---|---|"]
    edges, failures, worst = [], [], 0.0
    for name, (formula, parameters) in arms.items():
        for dtype in (torch.float32, torch.bfloat16):
            for backend, device in backends():
                kind = "fp32" if dtype == torch.float32 else "bf16"
                case = case_of(formula, parameters, backend, dtype, seed, rows, device)
                cases = [case] + [
                    case_of(formula, parameters, backend, dtype, seed + i, rows, device)
                    for i in range(1, DRAWS if case.learned else 1)
                ]
                exact = together(each.of(each.plain, torch.float64) for each in cases)
                written = together(each.of(each.plain, dtype) for each in cases)
                eps = torch.finfo(dtype).eps
                for of, ours in together(each.of(each.function) for each in cases).items():
                    (mine, most), (theirs, their_most) = error(ours, exact[of], eps), error(written[of], exact[of], eps)
                    ratio = mine / theirs if theirs else (1.0 if mine == 0 else math.inf)
                    if math.isnan(theirs) and math.isfinite(mine):
                        ratio = 0.0  # plain torch has no number there
                    failed = not ratio <= CAP
                    worst = max(worst, ratio)
                    mark = " **over**" if failed else ""
                    lines.append(
                        f"| {name} | {kind} | {backend} | {of} | {mine:.3g} | {theirs:.3g} | {ratio:.3f}{mark} "
                        f"| {most:.2f} | {their_most:.2f} |"
                    )
                    if failed:
                        figures = f"error {mine:.4g}, plain torch {theirs:.4g}, ratio {ratio:.3f}"
                        failures.append(f"{name} {kind} {backend} {of}: {figures}")
                found = dict(edge_cases(case, dtype))
                edges.append(f"| {name} | {kind} | {backend} | {' | '.join(found.values())} |")
                failures += [
                    f"{name} {kind} {backend}, {check}: {said}" for check, said in found.items() if said != "ok"
                ]
    lines += ["", f"The largest ratio is {worst:.3f}."]
    lines += _EDGES.format(widths=", ".join(map(str, WIDTHS))).splitlines()
    columns = ("NaN", "inf", "1e4", "widths", "strides", "empty")
    lines += ["", f"| arm | dtype | backend | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|", *edges]
    return lines, failures


def backends() -> list[tuple[str, str]]:
    """Return (backend, device) of all that this machine can run."""
    import torch

    from kernels import BACKENDS

    found = [("reference", "cpu"), ("c", "cpu")]
    return found + ([("triton", "cuda")] if "triton" in BACKENDS and torch.cuda.is_available() else [])


def edge_cases(case: Case, dtype: Any) -> Iterator[tuple[str, str]]:
    """Yield (check, "ok" or what failed)."""
    import itertools

    import torch

    gated, device = case.pre.ndim == 3, case.pre.device
    arrange = lambda values: torch.tensor(values, dtype=torch.float64, device=device)  # noqa: E731

    def points(values: tuple[float, ...]) -> Any:
        table = arrange(list(itertools.product(values, repeat=2 if gated else 1)))
        return table.T[None].contiguous() if gated else table.T.contiguous()

    learned = case.learned
    nan, inf = math.nan, math.inf
    pre = points((nan, 1.0, -1.0))
    pre = pre[:, :, pre.isnan().any(1)[0]] if gated else pre[:, pre.isnan()[0]]
    yield "NaN", "ok" if case.function(pre.to(dtype), **learned).isnan().all() else "a NaN vanished"
    pre = points((inf, -inf, 1.0, -1.0))
    h = case.function(pre.to(dtype), **learned).double()
    limit = case.plain(pre.clamp(-1e15, 1e15), **learned)
    fine = ~h.isfinite() | ((h - limit).abs() <= 1e-2 * limit.abs().clamp(min=1))
    yield "inf", "ok" if fine.all() else f"{h[~fine][0]} for {limit[~fine][0]}"
    steps = tuple(
        s * m for m in (1e-30, 1e-3, 0.5, 3.0, 20.0, 44.0, 88.0, 89.0, 104.0, 300.0, 1e3, 1e4) for s in (1, -1)
    )
    pre = points(steps).to(dtype)
    ones = torch.ones_like(pre[:, 0] if gated else pre)
    found, exact = case.of(case.function, pre=pre, dh=ones), case.of(case.plain, torch.float64, pre=pre, dh=ones)
    bad = [of for of in found if not (found[of].isfinite() | (exact[of].abs() > 0.99 * torch.finfo(dtype).max)).all()]
    yield "1e4", "ok" if not bad else f"not finite: {', '.join(bad)}"

    # Two results that err by so much from the truth differ by twice that at most; and by a rounding where they err by nothing.
    truth, eps = case.of(case.plain, torch.float64), torch.finfo(dtype).eps
    sizes = {of: float(value.square().mean().sqrt()) or 1.0 for of, value in truth.items()}
    limits = {of: max(1.0, 2 * error(value, truth[of], eps)[1]) for of, value in case.of(case.function).items()}

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        elements = [of for of in one if one[of].numel() == one["h"].numel()]  # sums have another order of their own
        return all(
            ((one[of] - other[of]).abs() <= limits[of] * eps * other[of].abs().clamp(min=sizes[of])).all()
            for of in elements
        )

    wide = torch.cat([case.pre[:4]] * 6, -1)[..., : WIDTHS[-1]].contiguous()
    dh = torch.cat([case.dh[:4]] * 6, -1)[..., : WIDTHS[-1]].contiguous()
    whole = case.of(case.function, pre=wide, dh=dh)
    wrong = []
    for width in WIDTHS:
        cut = case.of(case.function, pre=wide[..., :width].contiguous(), dh=dh[:, :width].contiguous())
        if not same(cut, {of: v if v.numel() == 1 else v[:, :width] for of, v in whole.items()}):
            wrong.append(str(width))
    yield "widths", "ok" if not wrong else f"other numbers at width {', '.join(wrong)}"
    spread = torch.full((*wide.shape[:-1], 2 * wide.shape[-1]), nan, dtype=dtype, device=device)
    spread[..., ::2] = wide
    fine = same(case.of(case.function, pre=spread[..., ::2], dh=dh.t().contiguous().t()), whole)
    one = wide[:1].expand(wide.shape)
    flat = torch.ones(1, dtype=dtype, device=device).expand(dh.shape)
    fine &= same(case.of(case.function, pre=one, dh=flat), case.of(case.function, pre=one.clone(), dh=flat.clone()))
    yield "strides", "ok" if fine else "other numbers"
    shapes = [wide[:0], wide[..., :0]]
    fine = all(case.of(case.function, pre=p, dh=dh[: p.shape[0], : p.shape[-1]])["h"].numel() == 0 for p in shapes)
    yield "empty", "ok" if fine else "a shape that is not empty"


def large() -> str:
    """Check 2^31 + 8 elements in bf16, forward and backward, as one row and as 136 rows with a learned parameter."""
    import psutil
    import torch

    from kernels import activation

    size, chunk = (1 << 31) + 8, 1 << 20
    if psutil.virtual_memory().available < LARGE_GIB * 2**30:
        return f"Not run: it needs {LARGE_GIB} GiB of memory."
    # 127 different pieces over and over: an index that wraps, by any power of two, finds other numbers.
    table = torch.randn((127, chunk), generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    pre, wrong = torch.empty(size, dtype=torch.bfloat16), []
    pieces = [(number % len(table), slice(start, start + chunk)) for number, start in enumerate(range(0, size, chunk))]
    for number, piece in pieces:
        pre[piece] = table[number, : pre[piece].numel()]
    prelu = activation("where(x > 0, x, slope*x)", {"slope": {"init": 0.5, "share": "layer"}}, "c")
    for function, slope, rows in ((activation("relu(x)", backend="c"), 0.0, 1), (prelu, 0.5, 136)):
        learned, view = [torch.full((1,), slope)] * len(function.formula.learned), pre.view(rows, -1)
        exact = torch.nn.functional.leaky_relu(table, slope)
        assert exact[pieces[-1][0], :8].any(), "the last elements would show nothing"
        # The gradient of h is x: that of x is h again, and memory holds two tensors, never three.
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
