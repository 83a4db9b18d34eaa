"""Interval arithmetic: functions from intervals that contain the arguments to an interval that contains every value.

Ends are rounded outwards, so an interval holds the exact values and those of an evaluation in 64-bit arithmetic, operation by
operation. Arithmetic that is exact stays exact: x * x begins at 0, and 1 - 1 is 0.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from fractions import Fraction

Ends = tuple[float, float]  # (low, high); infinite ends are no values


class Interval(Ends):
    """Numbers from `low` to `high`; `nonzero` says that 0 is not one of them, even where it is an end (exp(x) > 0)."""

    nonzero: bool

    def __new__(cls, low: float, high: float, nonzero: bool = False) -> Interval:
        made = super().__new__(cls, (low, high))
        made.nonzero = nonzero or low > 0 or high < 0
        return made


EVERYTHING = Interval(-math.inf, math.inf)
WIDEST = float(1 << 24)  # d_ff over all tensor ranks: channels are numbered in 32-bit arithmetic
_ULPS = 8  # bound on the error of a function of Python's `math`, and of the few operations around it


def excludes_zero(a: Ends) -> bool:
    """Return whether no value is 0."""
    return a[0] > 0 or a[1] < 0 or (isinstance(a, Interval) and a.nonzero)


def is_positive(a: Ends) -> bool:
    """Return whether every value is above 0."""
    return a[0] >= 0 and excludes_zero(a)


def exp(value: float) -> float:
    """Return e**value, infinite where it overflows."""
    return math.exp(value) if value < 709 else math.inf


def log(value: float) -> float:
    """Return the natural logarithm, minus infinity at and below 0."""
    return math.log(value) if value > 0 else -math.inf


def expm1(value: float) -> float:
    """Return e**value - 1, infinite where it overflows."""
    return math.expm1(value) if value < 709 else math.inf


def log1p(value: float) -> float:
    """Return log(1 + value), minus infinity at and below -1."""
    return math.log1p(value) if value > -1 else -math.inf


def rising(
    function: Callable[[float], float],
    within: Ends = (-math.inf, math.inf),
    through: Ends = (0.0, 0.0),
    nonzero: Callable[[Ends], bool] = excludes_zero,
) -> Callable[[Ends], Interval]:
    """Return the interval function of a non-decreasing function, which maps the ends.

    Args:
        within: bounds of all its values.
        through: a point (u, f(u)) whose value is exact: the rounding outwards does not cross it.
        nonzero: whether f of an interval cannot be 0; by default, where the argument cannot.
    """

    def at(value: float, outwards: float) -> float:
        result = function(value)
        if value == through[0]:
            return through[1]
        if math.isfinite(result):
            result += math.copysign(_ULPS * math.ulp(result), outwards)
        result = max(result, through[1]) if value > through[0] else min(result, through[1])
        return min(max(result, within[0]), within[1])

    return lambda a: Interval(_low(at(a[0], -1)), _high(at(a[1], 1)), nonzero(a))


def exactly_rising(
    function: Callable[[float], float], nonzero: Callable[[Ends], bool] = excludes_zero
) -> Callable[[Ends], Interval]:
    """Return the interval function of a non-decreasing function that does not round."""
    return lambda a: Interval(function(a[0]), function(a[1]), nonzero(a))


def absolute(a: Ends) -> Interval:
    """Return an interval of |a|."""
    low, high = a
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return Interval(least, max(abs(low), abs(high)), excludes_zero(a))


def dips(a: Ends) -> Interval:
    """Return an interval of silu and of both gelus, which have the sign of a; their minima all lie above -0.2785."""
    return Interval(-0.2785 if a[0] < 0 else 0.0, max(a[1], 0.0), excludes_zero(a))


def maximum(a: Ends, b: Ends) -> Interval:
    """Return an interval of max(a, b)."""
    nonzero = is_positive(a) or is_positive(b) or (excludes_zero(a) and excludes_zero(b))
    return Interval(max(a[0], b[0]), max(a[1], b[1]), nonzero)


def minimum(a: Ends, b: Ends) -> Interval:
    """Return an interval of min(a, b)."""
    return negate(maximum(negate(a), negate(b)))


def clip(a: Ends, low: Ends, high: Ends) -> Interval:
    """Return an interval of min(max(a, low), high), whose bounds may vary, and cross."""
    return minimum(maximum(a, low), high)


def either(a: Ends, b: Ends) -> Interval:
    """Return an interval of what is in one of two."""
    return Interval(min(a[0], b[0]), max(a[1], b[1]), excludes_zero(a) and excludes_zero(b))


def add(a: Ends, b: Ends) -> Interval:
    """Return an interval of a + b."""
    nonzero = min(a[0], b[0]) >= 0 or max(a[1], b[1]) <= 0
    ends = _rounded(operator.add, a[0], b[0])[0], _rounded(operator.add, a[1], b[1])[1]
    return Interval(*ends, nonzero and (excludes_zero(a) or excludes_zero(b)))


def subtract(a: Ends, b: Ends) -> Interval:
    """Return an interval of a - b."""
    return add(a, negate(b))


def negate(a: Ends) -> Interval:
    """Return an interval of -a."""
    return Interval(-a[1], -a[0], excludes_zero(a))


def multiply(a: Ends, b: Ends) -> Interval:
    """Return an interval of a * b, where 0 times infinity is 0: an infinite end is no value."""
    products = [(0.0, 0.0) if x == 0 or y == 0 else _rounded(operator.mul, x, y) for x in a for y in b]
    return Interval(
        min(low for low, _ in products), max(high for _, high in products), excludes_zero(a) and excludes_zero(b)
    )


def divide(a: Ends, b: Ends) -> Interval:
    """Return an interval of a / b; b excludes 0."""
    if b[0] < 0 < b[1] or b[0] == b[1] == 0:
        return Interval(*EVERYTHING, excludes_zero(a))
    zero = math.copysign(0.0, b[0] + b[1])  # the end 0 is approached from the side of the other end
    quotients = [_quotient(x, y or zero) for x in a for y in b]
    return Interval(min(low for low, _ in quotients), max(high for _, high in quotients), excludes_zero(a))


def power(base: Ends, exponent: int) -> Interval:
    """Return an interval of base**exponent; with a negative exponent the base excludes 0."""
    if exponent < 0:
        return divide((1.0, 1.0), power(base, -exponent))
    if exponent == 0:
        return Interval(1.0, 1.0)
    if exponent % 2 == 0:
        base = absolute(base)
    low, high = (_odd_power(end, exponent) for end in base)
    return Interval(low[0], high[1], excludes_zero(base))


def real_power(base: Ends, exponent: float) -> Interval:
    """Return an interval of base**exponent for a fractional exponent; the base is not negative, nor 0 if the exponent is."""
    if exponent < 0:
        return divide((1.0, 1.0), real_power(base, -exponent))
    return Interval(_rising_power(base[0], exponent)[0], _rising_power(base[1], exponent)[1], excludes_zero(base))


def varying_power(base: Ends, exponent: Ends) -> Interval:
    """Return an interval of base**exponent for a base above 0."""
    return EXP(multiply(rising(log, through=(1.0, 0.0))(base), exponent))


def reduction(name: str, a: Interval, epsilon: float) -> Interval:
    """Return an interval of a reduction (`grammar.REDUCTIONS`) over 1 to `WIDEST` channels."""
    size = absolute(a)
    if name == "sum":
        nonzero = a[0] >= 0 or a[1] <= 0  # terms of one sign do not cancel
        return Interval(min(a[0], a[0] * WIDEST), max(a[1], a[1] * WIDEST), nonzero and excludes_zero(a))
    if name == "mean":
        return Interval(a[0], a[1], (a[0] >= 0 or a[1] <= 0) and excludes_zero(a))
    if name in ("max", "min"):
        return a
    if name == "std":
        spread = multiply((0.5, 0.5), subtract((a[1], a[1]), (a[0], a[0])))
        return _root_mean_square(Interval(0.0, spread[1]), epsilon)
    if name == "rms":
        return _root_mean_square(size, epsilon)
    assert name == "norm"
    # |e| is at most rms(e) times the root of the width, which all other channels at 0 reach.
    largest = math.sqrt(WIDEST)
    quotient = divide(a, (_root_mean_square(Interval(0.0, 0.0), epsilon)[0], math.inf))
    return Interval(max(quotient[0], -largest), min(quotient[1], largest), a.nonzero)


def _root_mean_square(size: Interval, epsilon: float) -> Interval:
    return real_power(add(power(size, 2), Interval(epsilon, epsilon)), 0.5)


EXP = rising(exp, (0.0, math.inf), (0.0, 1.0), lambda _: True)
LARGEST = sys.float_info.max


def _low(value: float) -> float:
    """Return the value as a lower end: one that overflowed is at least the largest number."""
    return min(value, LARGEST)


def _high(value: float) -> float:
    return max(value, -LARGEST)


def _rounded(operation: Callable, x: float, y: float) -> Ends:
    """Return x + y, x * y or x / y, rounded down and up."""
    if not (math.isfinite(x) and math.isfinite(y)):
        result = operation(x, y)
        return _low(result), _high(result)
    exact = operation(Fraction(x), Fraction(y))
    try:
        nearest = float(exact)
    except OverflowError:
        return (LARGEST, math.inf) if exact > 0 else (-math.inf, -LARGEST)
    error = Fraction(nearest) - exact
    return (
        math.nextafter(nearest, -math.inf) if error > 0 else nearest,
        math.nextafter(nearest, math.inf) if error < 0 else nearest,
    )


def _quotient(x: float, y: float) -> Ends:
    """Return x / y, rounded down and up, where y may be a zero with a sign; 0 / 0 and infinity / infinity are 0."""
    if x == 0 or math.isinf(y):
        return 0.0, 0.0
    if y == 0:
        result = math.copysign(math.inf, x) * math.copysign(1.0, y)
        return _low(result), _high(result)
    return _rounded(operator.truediv, x, y)


def _odd_power(base: float, exponent: int) -> Ends:
    """Return base**exponent, rounded down and up, for an odd exponent or a base that is not negative."""
    low, high = _rising_power(abs(base), exponent)
    return (low, high) if base >= 0 else (-high, -low)


def _rising_power(base: float, exponent: float) -> Ends:
    """Return base**exponent of a base and an exponent that are not negative, rounded down and up."""
    if base in (0.0, 1.0) or math.isinf(base):
        return base, base
    if exponent == 2:
        return _rounded(operator.mul, base, base)
    try:
        nearest = math.pow(base, exponent)
    except OverflowError:
        return LARGEST, math.inf
    slack = _ULPS * math.ulp(nearest)
    low, high = max(nearest - slack, 0.0), nearest + slack
    return (max(low, 1.0), high) if base > 1 else (low, min(high, 1.0))
