"""Interval arithmetic: functions from intervals that contain the arguments to an interval that contains every value."""

from __future__ import annotations

import math
from collections.abc import Callable

Interval = tuple[float, float]

NEXT_TO_ZERO = 1e-30  # stands for the smallest positive number


def exp(value: float) -> float:
    """Return e**value, infinite where it overflows."""
    return math.exp(value) if value < 700 else math.inf


def log(value: float) -> float:
    """Return the natural logarithm, minus infinity at and below 0."""
    return math.log(value) if value > 0 else -math.inf


def rising(function: Callable[[float], float]) -> Callable[[Interval], Interval]:
    """Return the interval function of a non-decreasing function, which maps the ends."""
    return lambda a: (function(a[0]), function(a[1]))


def absolute(a: Interval) -> Interval:
    """Return an interval of |a|."""
    low, high = a
    return (0.0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))


def dips(a: Interval) -> Interval:
    """Return an interval of silu and of both gelus, whose minima all lie above -0.2785."""
    return -0.2785 if a[0] < 0 else 0.0, max(a[1], 0.0)


def add(a: Interval, b: Interval) -> Interval:
    """Return an interval of a + b."""
    return a[0] + b[0], a[1] + b[1]


def subtract(a: Interval, b: Interval) -> Interval:
    """Return an interval of a - b."""
    return a[0] - b[1], a[1] - b[0]


def negate(a: Interval) -> Interval:
    """Return an interval of -a."""
    return -a[1], -a[0]


def multiply(a: Interval, b: Interval) -> Interval:
    """Return an interval of a * b, where 0 times infinity is 0."""
    products = [0.0 if x == 0 or y == 0 else x * y for x in a for y in b]
    return min(products), max(products)


def divide(a: Interval, b: Interval) -> Interval:
    """Return an interval of a / b; b does not hold 0."""
    return multiply(a, (1 / b[1], 1 / b[0]))


def power(base: Interval, exponent: int) -> Interval:
    """Return an interval of base**exponent; with a negative exponent the base must not contain 0."""
    if exponent < 0:
        return power((1 / base[1], 1 / base[0]), -exponent)
    try:
        ends = [float(end) ** exponent for end in base]
    except OverflowError:
        ends = [-math.inf if exponent % 2 and base[0] < 0 else 0.0, math.inf]
    if exponent % 2 == 0 and base[0] <= 0 <= base[1]:
        ends.append(0.0)
    return min(ends), max(ends)
