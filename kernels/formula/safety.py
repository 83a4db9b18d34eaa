"""Numerical checks of programs: overflow where the true value is moderate, lost NaNs, a wrong `from_output`.

Forward and derivative run in 32-bit arithmetic on grids up to |pre-activation| = 10,000. Where a result is not finite, the
true value is computed with 30 digits; if that is moderate, the formula is refused. A value can be lost in a narrow band only,
so there are two grids: a coarse one, and a fine one, on which 64-bit arithmetic picks the points that 30 digits then decide.
Domains are checked before (`domains.py`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .domains import LEARNED_REACH, REACH
from .functions import REGISTRY, implementation
from .grammar import EPSILON, Formula, FormulaError, Node
from .parameters import SMALLEST_IN_FP32
from .program import Program, run

COARSE = (0.0, *(s * m for m in (1e-3, 0.7, 5.0, 20.0, 100.0, 1e3, REACH) for s in (1, -1)))
OVERFLOWS = 3e38  # about the largest number of 32-bit arithmetic
_LARGEST_EXPONENT = 2 * REACH  # of exp with 30 digits; what is larger is infinite
_MODERATE = 1e30  # on the fine grid, which also meets the bands next to the largest number


def check_overflow(formula: Formula, programs: Mapping[str, Program]) -> None:
    """Refuse programs that return inf or NaN in 32-bit arithmetic where the true value is below 3e38 in size.

    Args:
        programs: by their description in the message: {"the formula": ..., "its derivative": ...}.

    Raises:
        FormulaError: with the point and the first operation that overflows.
    """
    for axes, moderate in ((_coarse, OVERFLOWS), (fine_points, _MODERATE)):
        points = axes(len(formula.pre_activations))
        inputs = dict(zip(formula.pre_activations, points, strict=True))
        for parameters in parameters_of(formula, (0.0, LEARNED_REACH / 5, -LEARNED_REACH / 5)):
            values: dict[str, Any] = {**inputs, **parameters, "dh": np.float32(1.0)}
            for description, program in programs.items():
                _check_points(formula, description, program, values, moderate)


def parameters_of(formula: Formula, offsets: Sequence[float] = (0.0,)) -> Iterator[dict[str, np.float32]]:
    """Yield values of the learned parameters, `offsets` from initial ones, and of scheduled ones, at ends and middles."""
    for offset, place in itertools.product(
        offsets if formula.learned else (0.0,), (0.0, 1.0, 0.5) if formula.scheduled else (0.0,)
    ):
        values = {name: p.init + offset for name, p in formula.learned.items()}
        values |= {name: (1 - place) * p.first + place * p.last for name, p in formula.scheduled.items()}
        yield {name: np.float32(value) for name, value in values.items()}


def _check_points(
    formula: Formula, description: str, program: Program, values: Mapping[str, Any], moderate: float
) -> None:
    """Refuse a program that is not finite at one of the points, where its true value is below `moderate` in size."""
    with np.errstate(all="ignore"):
        results = run(program, NUMPY, values)
        lost = {name: np.flatnonzero(~np.isfinite(result)) for name, result in results.items()}
        if moderate < OVERFLOWS and any(index.size for index in lost.values()):
            wide = {key: np.asarray(value, np.float64) for key, value in values.items()}
            truths = run(program, NUMPY | {"number": np.float64}, wide)
            lost = {name: index[np.abs(_at(truths[name], index)) < moderate][:8] for name, index in lost.items()}
    exact: dict[int, dict[str, Any]] = {}  # all outputs of a point are computed at once
    for name, indices in lost.items():
        for index in map(int, indices):
            at = {key: float(_at(value, index)) for key, value in values.items()}
            if index not in exact:
                exact[index] = run(program, exact_operations(), at)
            truth = exact[index][name]
            if abs(truth) < moderate:
                where = ", ".join(f"{key} = {at[key]:g}" for key in (*formula.pre_activations, *formula.tensors))
                raise FormulaError(
                    f"{description} gives {_at(results[name], index)} in 32-bit arithmetic at {where}, where it is "
                    f"{float(truth):g}: {advice([program])}",
                    formula.text,
                    first_overflow(formula, at),
                )


def check_numbers(formula: Formula, program: Program) -> None:
    """Refuse a program that computes with a number that 32-bit arithmetic does not have.

    A factor of 1e-46 is 0 there, and one of 1e-40 has five digits; 1e39 as a term makes everything infinite. What such a
    number is compared with, or bounded by, is as it should be, and so is what it is added to if it is small.

    Raises:
        FormulaError: with the number, and its place if the formula has it as it is.
    """
    for line in program.lines:
        for number in (abs(argument) for argument in line.arguments if not isinstance(argument, str)):
            large = number > OVERFLOWS and line.operation not in _ORDER
            small = 0 < number < SMALLEST_IN_FP32 and line.operation not in (*_ORDER, "add", "sub")
            if large or small:
                limit = "whose largest is 3.4e38" if large else "which has all digits of a number from 1.2e-38 on"
                raise FormulaError(
                    f"the kernels would compute with the number {number:g} in 32-bit arithmetic, {limit}",
                    formula.text,
                    _place_of(number, formula),
                )


_ORDER = ("gt", "ge", "max", "min", "select", "keep_nan")  # operations that return an operand as it is, or compare


def _place_of(number: float, formula: Formula) -> int:
    """Return where a formula has a number, itself or as a fixed parameter; 0 where it was made of others."""
    values = (
        (node.value if node.kind == "number" else formula.fixed.get(str(node.value)), node.place)
        for node in formula.tree.walk()
    )
    return next((place for value, place in values if isinstance(value, float) and abs(value) == number), 0)


def _at(values: Any, index: Any) -> Any:
    """Return the values of a program at points; a value may be one number for all."""
    return values[index] if np.ndim(values) else np.broadcast_to(values, np.shape(index))


def advice(programs: Iterable[Program]) -> str:
    """Return what to write instead of a formula that overflows."""
    lines = [line for program in programs for line in program.lines]
    numbers = [abs(argument) for line in lines for argument in line.arguments if not isinstance(argument, str)]
    if numbers and max(numbers) > OVERFLOWS:
        return f"the number {max(numbers):g} is beyond it, for its largest is 3.4e38"
    return "write it without numbers that overflow on the way, for instance with sigmoid, tanh or softplus"


@functools.cache
def _coarse(dimensions: int) -> np.ndarray:
    """Return points (dimensions, n): every combination of a few values."""
    return np.array(list(itertools.product(COARSE, repeat=dimensions)), dtype=np.float32).T


@functools.cache
def fine_points(dimensions: int) -> np.ndarray:
    """Return points (dimensions, n): 3,000 values of one pre-activation, with a few values of the other one."""
    size = np.geomspace(1e-3, REACH, 1500)
    dense = np.concatenate([-size, size]).astype(np.float32)
    if dimensions == 1:
        return dense[None]
    others = np.array([*COARSE, 1.0, -1.0, 50.0, -50.0], dtype=np.float32)
    lines = np.stack([np.tile(dense, len(others)), np.repeat(others, len(dense))])
    return np.concatenate([lines, lines[::-1]], axis=1)


def check_from_output(formula: Formula, forward: Program, backward: Program, from_output: Program) -> None:
    """Refuse a `from_output` that differs from the derivative on the grid, in 64-bit arithmetic.

    Raises:
        FormulaError: with the point where it differs.
    """
    x = np.concatenate([np.linspace(-10, 10, 401), np.array(COARSE)])
    with np.errstate(all="ignore"):
        (h,) = run(forward, NUMPY, {"x": x}).values()
        (slope,) = run(backward, NUMPY, {"x": x, "dh": np.float64(1)}).values()
        (claimed,) = run(from_output, NUMPY, {from_output.inputs[0]: h, "dh": np.float64(1)}).values()
        claimed, slope = np.broadcast_to(claimed, x.shape), np.broadcast_to(slope, x.shape)
        wrong = ~(np.abs(claimed - slope) <= 1e-5 * (1 + np.abs(slope)))
    if wrong.any():
        index = int(np.flatnonzero(wrong)[0])
        difference = f"at x = {x[index]:g} it gives {claimed[index]:g}, and the derivative is {slope[index]:g}"
        assert formula.from_output is not None
        raise FormulaError(
            f"from_output is not the derivative of {formula.text}: {difference}", formula.from_output[0], 0
        )


def loses_nan(formula: Formula, forward: Program) -> list[str]:
    """Return the pre-activations whose NaN the program would lose, as where(x > 0, 1, 0) does.

    Reductions have the value 1: a NaN of another channel arrives through them, but that of the own one may be lost.
    """
    lost = []
    for name in formula.pre_activations:
        for other, parameters in itertools.product((1.0, -1.0), parameters_of(formula)):
            values: dict[str, Any] = {each: np.float32(other) for each in formula.pre_activations}
            values |= parameters | {name: np.float32("nan")}
            values = dict.fromkeys(forward.inputs, np.float32(1)) | values
            with np.errstate(all="ignore"):
                if not np.isnan(run(forward, NUMPY, values)["h"]):
                    lost.append(name)
                    break
    return lost


def first_overflow(formula: Formula, at: Mapping[str, Any]) -> int:
    """Return the place of the first operation that is not finite at a point; 0 if only the derivative overflows.

    Args:
        at: a number for each symbol, or one for each channel of a row.
    """

    def value(node: Node) -> tuple[Any, int | None]:
        if node.kind == "number":
            return np.float32(node.value), None
        if node.kind == "symbol":
            return np.float32({**formula.fixed, **at}[str(node.value)]), None
        parts = [value(argument) for argument in node.arguments]
        place = next((place for _, place in parts if place is not None), None)
        functions = _REDUCTIONS if node.kind == "reduce" else _TREE
        name = str(node.value) if node.kind in ("call", "reduce") else node.kind
        result = functions[name](*(part for part, _ in parts))
        return result, node.place if place is None and not np.isfinite(result).all() else place

    with np.errstate(all="ignore"):
        return value(formula.tree)[1] or 0


NUMPY: dict[str, Callable[..., Any]] = {
    "number": np.float32,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "gt": np.greater,
    "ge": np.greater_equal,
    "select": np.where,
    "keep_nan": lambda value, source: np.where(np.isnan(source), source, value),
    **{name: implementation(f.numpy, np) for name, f in REGISTRY.items() if f.numpy is not None},
}
_TREE = NUMPY | {  # by the names of the grammar
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "**": np.power,
    "negate": np.negative,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
    "where": np.where,
}


_REDUCTIONS: dict[str, Callable[..., Any]] = {  # by the names of the grammar
    "mean": np.mean,
    "sum": np.sum,
    "max": np.max,
    "min": np.min,
    "rms": lambda e, epsilon=0.0: np.sqrt(np.mean(e * e) + epsilon),
    "std": lambda e, epsilon=0.0: np.sqrt(np.var(e) + epsilon),
    "norm": lambda e, epsilon=EPSILON: e / np.sqrt(np.mean(e * e) + epsilon),
}


@functools.cache
def exact_operations() -> dict[str, Callable[..., Any]]:
    """Return the operations of a program on numbers with 30 digits."""
    from mpmath import MPContext

    mpmath = MPContext()  # of our own: the module's precision belongs to the user's code, and its threads
    mpmath.dps = 30
    real = _Real(mpmath)
    return {
        "number": mpmath.mpf,
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: mpmath.mpf(a) * b,
        "div": lambda a, b: mpmath.mpf(a) / b if b else mpmath.nan,
        "neg": lambda a: -a,
        "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b,
        "select": lambda condition, a, b: a if condition else b,
        "keep_nan": lambda a, _: a,
        **{name: implementation(f.mpmath, real) for name, f in REGISTRY.items() if f.mpmath is not None},
    }


class _Real:
    """mpmath with functions of real numbers: NaN outside of their domain, and an answer for arguments of any size."""

    def __init__(self, mpmath: Any) -> None:
        self.mpmath = mpmath

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mpmath, name)

    def exp(self, a: Any) -> Any:
        return self.inf if a > _LARGEST_EXPONENT else self.mpmath.exp(max(a, -_LARGEST_EXPONENT))

    def expm1(self, a: Any) -> Any:
        return self.exp(a) if a > 100 else self.mpmath.expm1(max(a, -_LARGEST_EXPONENT))

    def sech(self, a: Any) -> Any:
        return self.mpmath.sech(min(abs(a), _LARGEST_EXPONENT))

    def tanh(self, a: Any) -> Any:
        return self.mpmath.tanh(max(min(a, 1e3), -1e3))

    def erf(self, a: Any) -> Any:
        return self.mpmath.erf(max(min(a, 1e3), -1e3))

    def ncdf(self, a: Any) -> Any:
        return self.mpmath.ncdf(max(min(a, 1e3), -1e3))

    def sin(self, a: Any) -> Any:  # of a huge number any value is as good, between -1 and 1
        return self.mpmath.sin(a) if abs(a) < 1e300 else self.mpf(0.5)

    def cos(self, a: Any) -> Any:
        return self.mpmath.cos(a) if abs(a) < 1e300 else self.mpf(0.5)

    def sqrt(self, a: Any) -> Any:
        return self.mpmath.sqrt(a) if a >= 0 else self.nan

    def log(self, a: Any) -> Any:
        return self.mpmath.log(a) if a > 0 else (self.nan if a else -self.inf)

    def log1p(self, a: Any) -> Any:
        return self.mpmath.log1p(a) if a > -1 else self.nan
