"""Draws of an arm's inputs, and its edge cases: NaN, inf, large numbers, odd widths, strides, empty tensors.

`bench/conformance.py` writes the report of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import activation
from kernels.activations import Activation
from kernels.activations.eager import plain

WIDTHS = (1, 7, 8, 127, 5632)
_ROUNDINGS = 32  # of either part of a gradient through reductions: its operations, and the levels of its sums
_MAGNITUDES = (1e-30, 1e-3, 0.5, 3.0, 20.0, 44.0, 88.0, 89.0, 104.0, 300.0, 1e3, 1e4)


@dataclasses.dataclass(frozen=True)
class Draw:
    """One arm on one backend with random inputs, and the same formula in plain torch."""

    function: Activation
    plain: Callable[..., Tensor]
    pre: Tensor  # (rows, 1024), or (rows, 2, 1024) if gated
    dh: Tensor  # (rows, 1024)
    learned: dict[str, Tensor]  # fp32

    @property
    def reduces(self) -> bool:
        return self.function.formula.reduces

    @property
    def gated(self) -> bool:
        return self.pre.ndim == 3

    def results(
        self,
        f: Callable[..., Tensor],
        dtype: torch.dtype | None = None,
        pre: Tensor | None = None,
        dh: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return h and all gradients as `f` computes them, in float64: {"h": ..., "dx": ..., ...}.

        Args:
            dtype: cast all inputs to it first; None: as they are.
            pre, dh: other inputs than those of the draw.
        """

        def cast(tensor: Tensor) -> Tensor:
            return tensor if dtype is None else tensor.to(dtype)

        pre = self.pre if pre is None else pre
        dh = self.dh[: pre.shape[0], : pre.shape[-1]] if dh is None else dh
        leaf = cast(pre).detach().requires_grad_()
        learned = {name: cast(value).detach().requires_grad_() for name, value in self.learned.items()}
        leaves = [leaf, *learned.values()]
        h = f(leaf, **learned)
        gradients: list[Tensor | None] = [None for _ in leaves]
        if h.requires_grad:
            gradients = list(torch.autograd.grad(h, leaves, cast(dh), allow_unused=True))
        dpre = torch.zeros_like(leaf) if gradients[0] is None else gradients[0]
        results = {"h": h.detach()}
        if leaf.ndim == 3:
            results |= {"dgate": dpre[:, 0], "dup": dpre[:, 1]}
        else:
            results["dx"] = dpre
        for name, gradient in zip(learned, gradients[1:], strict=True):
            assert gradient is not None, f"h does not depend on {name}"
            results[f"d{name}"] = gradient
        return {name: value.double() for name, value in results.items()}


def draw(
    formula: str, parameters: dict[str, Any], backend: str, dtype: torch.dtype, seed: int, rows: int, device: str
) -> Draw:
    """Draw the inputs of one arm."""
    function = activation(formula, parameters, backend)
    gated = function.formula.gated
    generator = torch.Generator().manual_seed(seed)
    pre = 2 * torch.randn((rows, 2, 1024) if gated else (rows, 1024), generator=generator)
    pre = pre.to(dtype)
    if gated:
        pre[:, 1] += (pre[:, 0] == pre[:, 1]).to(dtype)
    dh = torch.randn((rows, 1024), generator=generator).to(dtype)
    # Plain code keeps a parameter in the dtype of the model; the kernels take the same number.
    learned = {name: torch.full((1,), p.init).to(dtype).float() for name, p in function.formula.learned.items()}
    learned = {name: value.to(device) for name, value in learned.items()}
    return Draw(function, plain(function.formula), pre.to(device), dh.to(device), learned)


def error(result: Tensor, exact: Tensor, eps: float) -> tuple[float, float]:
    """Return (root mean square of the error / root mean square of the exact values, largest error in eps)."""
    rms = float(exact.square().mean().sqrt())
    if rms == 0:
        return (0.0, 0.0) if not result.any() else (math.inf, math.inf)
    difference = (result - exact).abs()
    return float(difference.square().mean().sqrt()) / rms, float((difference / exact.abs().clamp(min=rms)).max()) / eps


def edge_cases(case: Draw, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """Yield (check, "ok" or what failed)."""
    yield "NaN", _nan(case, dtype)
    yield "inf", _inf(case, dtype)
    yield "1e4", _large_values(case, dtype)
    yield from _layouts(case, dtype)


def _points(case: Draw, values: tuple[float, ...]) -> Tensor:
    """Return every value, or every pair (gate, up) of values, as one row of pre-activations in float64."""
    points = list(itertools.product(values, repeat=2 if case.gated else 1))
    table = torch.tensor(points, dtype=torch.float64, device=case.pre.device)
    return table.T[None].contiguous() if case.gated else table.T.contiguous()


def _nan(case: Draw, dtype: torch.dtype) -> str:
    pre = _points(case, (math.nan, 1.0, -1.0))
    pre = pre[:, :, pre.isnan().any(1)[0]] if case.gated else pre[:, pre.isnan()[0]]
    return "ok" if case.function(pre.to(dtype), **case.learned).isnan().all() else "a NaN vanished"


def _inf(case: Draw, dtype: torch.dtype) -> str:
    pre = _points(case, (math.inf, -math.inf, 1.0, -1.0))
    h = case.function(pre.to(dtype), **case.learned).double()
    limit = case.plain(pre.clamp(-1e15, 1e15), **case.learned)
    right = ~h.isfinite() | ((h - limit).abs() <= 1e-2 * limit.abs().clamp(min=1))
    return "ok" if right.all() else f"{h[~right][0]} for {limit[~right][0]}"


def _large_values(case: Draw, dtype: torch.dtype) -> str:
    pre = _points(case, tuple(sign * magnitude for magnitude in _MAGNITUDES for sign in (1, -1))).to(dtype)
    ones = torch.ones_like(pre[:, 0] if case.gated else pre)
    ours = case.results(case.function, pre=pre, dh=ones)
    exact = case.results(case.plain, torch.float64, pre=pre, dh=ones)
    largest = torch.finfo(dtype).max
    bad = [name for name in ours if not (ours[name].isfinite() | (exact[name].abs() > 0.99 * largest)).all()]
    return "ok" if not bad else f"not finite: {', '.join(bad)}"


def _layouts(case: Draw, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """Yield the checks of widths, strides and empty tensors, against a contiguous tensor of the largest width."""
    # Two results that are off by at most so much differ by at most twice that; exact results differ by at most one rounding.
    exact, eps = case.results(case.plain, torch.float64), torch.finfo(dtype).eps
    sizes = {name: float(value.square().mean().sqrt()) or 1.0 for name, value in exact.items()}
    limits = {
        name: max(1.0, 2 * error(value, exact[name], eps)[1]) for name, value in case.results(case.function).items()
    }

    def same(results: dict[str, Tensor], expected: dict[str, Tensor], cancels: dict[str, Tensor] | None = None) -> bool:
        # Without the sums over all elements, whose order of summation depends on the layout.
        elementwise = [name for name in results if results[name].numel() == results["h"].numel()]
        return all(
            (
                (results[name] - expected[name]).abs()
                <= limits[name] * eps * expected[name].abs().clamp(min=sizes[name])
                + (_ROUNDINGS * 2.0**-24 * (cancels[name].abs() + expected[name].abs()) if cancels else 0.0)
            ).all()
            for name in elementwise
        )

    def compute(pre: Tensor, dh: Tensor) -> dict[str, Tensor]:
        return case.results(case.function, pre=pre, dh=dh)

    wide = torch.cat([case.pre[:4]] * 6, -1)[..., : WIDTHS[-1]].contiguous()
    dh = torch.cat([case.dh[:4]] * 6, -1)[..., : WIDTHS[-1]].contiguous()
    expected = compute(wide, dh)
    wrong = []
    for width in WIDTHS[case.reduces :]:  # of one channel, what a norm computes cancels altogether
        pre, gradient = wide[..., :width].contiguous(), dh[:, :width].contiguous()
        right, cancels = {name: v if v.numel() == 1 else v[:, :width] for name, v in expected.items()}, None
        if case.reduces:  # a narrower row is another row: what comes through h and through reductions may cancel
            right = case.results(case.plain, torch.float64, pre=pre, dh=gradient)
            cancels = case.results(plain(case.function.formula, hold=True), torch.float64, pre=pre, dh=gradient)
        if not same(compute(pre, gradient), right, cancels):
            wrong.append(str(width))
    yield "widths", "ok" if not wrong else f"other numbers at width {', '.join(wrong)}"
    spread = torch.full((*wide.shape[:-1], 2 * wide.shape[-1]), math.nan, dtype=dtype, device=wide.device)
    spread[..., ::2] = wide
    fine = same(compute(spread[..., ::2], dh.t().contiguous().t()), expected)
    row = wide[:1].expand(wide.shape)  # strides of 0
    ones = torch.ones(1, dtype=dtype, device=dh.device).expand(dh.shape)
    fine &= same(compute(row, ones), compute(row.clone(), ones.clone()))
    yield "strides", "ok" if fine else "other numbers"
    empty = (wide[:0], wide[..., :0])
    fine = all(compute(pre, dh[: pre.shape[0], : pre.shape[-1]])["h"].numel() == 0 for pre in empty)
    yield "empty", "ok" if fine else "a shape that is not empty"
