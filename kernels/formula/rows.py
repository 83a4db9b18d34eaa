"""Reductions over rows of NumPy arrays, and the check that formulas with reductions do not overflow in them.

As `safety.py` does for elementwise formulas: where a result is not finite in 32-bit arithmetic, the row is computed again with
64 bits, and then with 30 digits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from .domains import LEARNED_REACH, REACH
from .grammar import Formula, FormulaError
from .program import OPERATIONS, Program, run
from .reductions import COLUMN, Reductions, adjoints_of_row, reduce_row
from .safety import COARSE, NUMPY, OVERFLOWS, advice, exact_operations, fine_points, first_overflow, parameters_of

_CHANNELS = 32
_MOST_EXACT = 16  # rows that are computed with 30 digits


class Rows:
    """Rows of an array (..., channels), for `reduce_row`.

    Args:
        operations: those of a program.
        shape: of a number per channel.
    """

    def __init__(self, operations: Mapping[str, Callable[..., Any]], shape: tuple[int, ...]) -> None:
        self.operations, self.shape, self.width = operations, shape, shape[-1]

    def run(self, program: Program, values: Mapping[str, Any]) -> dict[str, Any]:
        return run(program, self.operations, values)

    def total(self, values: Any) -> Any:
        return np.broadcast_to(values, self.shape).sum(-1, keepdims=True)

    def top(self, values: Any) -> tuple[Any, Any]:
        values = np.broadcast_to(values, self.shape)
        index = values.argmax(-1, keepdims=True)  # the first NaN, if there is one
        return np.take_along_axis(values, index, -1), index

    def sqrt(self, value: Any) -> Any:
        return self.operations["sqrt"](value)

    def quotient_or_zero(self, above: Any, below: Any) -> Any:
        positive = np.asarray(below > 0, bool)
        return np.where(positive, above / np.where(positive, below, 1), 0 * above)


class _Points(NamedTuple):
    """Rows to check: `values` (pre-activations, rows, channels), and what a row is, for messages."""

    values: np.ndarray
    names: list[str]


def check_overflow_in_rows(formula: Formula, programs: Mapping[str, Program], reductions: Reductions) -> None:
    """Refuse a formula whose reductions, h or gradients are not finite in 32-bit arithmetic where the true value is below 3e38.

    Args:
        programs: by their description in the message.

    Raises:
        FormulaError: with the row, and the first operation that overflows.
    """
    points = _points(formula.pre_activations)
    for parameters in parameters_of(formula, (0.0, LEARNED_REACH / 5, -LEARNED_REACH / 5)):
        values = {**dict(zip(formula.pre_activations, points.values, strict=True)), **parameters}
        lost = _lost(_results(programs, reductions, values, NUMPY))
        if not lost.any():
            continue
        wide = {name: np.asarray(value, np.float64) for name, value in values.items()}
        huge = ~_moderate(_results(programs, reductions, wide, NUMPY | {"number": np.float64}))
        for row in np.flatnonzero((lost & ~huge).any(-1))[:_MOST_EXACT]:
            at = {name: value[row] if np.ndim(value) else value for name, value in values.items()}
            operations = _exact()
            exact = {name: np.vectorize(operations["number"], otypes=[object])(value) for name, value in at.items()}
            truths = _results(programs, reductions, exact, operations)
            for (kind, result), truth in zip(
                _results(programs, reductions, at, NUMPY).items(), truths.values(), strict=True
            ):
                bad = np.flatnonzero(~np.isfinite(result) & (abs(truth) < OVERFLOWS))
                if bad.size:
                    raise FormulaError(
                        f"{kind[0]} gives {result[bad[0]]} in 32-bit arithmetic in a token with {points.names[row]}, where it "
                        f"is {float(truth[bad[0]]):g}: {advice(programs.values())}",
                        formula.text,
                        first_overflow(formula, at),
                    )


def _results(
    programs: Mapping[str, Program],
    reductions: Reductions,
    values: Mapping[str, Any],
    operations: Mapping[str, Callable],
) -> dict[tuple[str, str], np.ndarray]:
    """Return every output of every program, and the reductions, each (..., channels), by the program's description and name."""
    shape = np.broadcast_shapes(*(np.shape(value) for value in values.values()))
    rows = Rows(operations, shape)
    one = operations["number"](1.0)
    with np.errstate(all="ignore"):
        found = {**values, "dh": one, COLUMN: np.arange(shape[-1], dtype=np.float32)}
        reduced = reduce_row(reductions, found, rows)
        found |= reduced
        found |= adjoints_of_row(reductions, found, rows)
        results = {("a reduction", name): value for name, value in reduced.items()}
        for description, program in programs.items():
            results |= {(description, name): value for name, value in rows.run(program, found).items()}
    return {key: np.broadcast_to(value, shape) for key, value in results.items()}


def _lost(results: Mapping[Any, np.ndarray]) -> np.ndarray:
    return np.any([~np.isfinite(result) for result in results.values()], axis=0)


def _moderate(results: Mapping[Any, np.ndarray]) -> np.ndarray:
    """Where every number might be below 3e38: NaN says nothing."""
    return np.all([~(np.abs(result) >= OVERFLOWS) for result in results.values()], axis=0)


@functools.cache
def _exact() -> dict[str, Callable[..., Any]]:
    """Return the operations of a program over arrays of numbers with 30 digits."""
    exact = exact_operations()
    number = exact["number"]
    return {name: np.frompyfunc(exact[name], count, 1) for name, count in OPERATIONS.items()} | {
        "number": lambda value: number(float(value))
    }


@functools.cache
def _points(names: tuple[str, ...]) -> _Points:
    """Return rows of one value, with one channel that differs, of a wide and a narrow spread, and a dense grid of values."""
    rows: list[tuple[np.ndarray, str]] = []  # (pre-activations, channels) each, and what it is
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / _CHANNELS) for i in range(_CHANNELS)])
    last = np.arange(_CHANNELS) == _CHANNELS - 1
    for values in itertools.product(COARSE, repeat=len(names)):
        where = ", ".join(f"{name} = {value:g}" for name, value in zip(names, values, strict=True))
        column = np.array(values)[:, None]
        rows.append((np.broadcast_to(column, (len(names), _CHANNELS)), f"{where} in every channel"))
        rows.append((column * last, f"{where} in one channel and 0 in the others"))
        for spread in (1e-3, 1.0, 100.0):
            rows.append((column + spread * normal, f"channels of a standard deviation {spread:g} around {where}"))
    dense = fine_points(len(names))
    dense = dense[:, : dense.shape[1] // _CHANNELS * _CHANNELS].reshape(len(names), -1, _CHANNELS)
    rows += [(dense[:, i], f"{names[0]} from {dense[0, i, 0]:g} to {dense[0, i, -1]:g}") for i in range(dense.shape[1])]
    stacked = np.stack([np.clip(row, -REACH, REACH) for row, _ in rows], axis=1)
    return _Points(stacked.astype(np.float32), [name for _, name in rows])
