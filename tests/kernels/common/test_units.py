"""Numbers and durations as a person reads them."""

from __future__ import annotations

import math

import pytest

from kernels.common.units import duration, human


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.4, "999"), (999.6, "1k"), (1234, "1.23k"), (2_621_440, "2.62M"), (15.3e9, "15.3G")],
)
def test_human(number, text):
    assert human(number) == text
    assert human(-number) == ("0" if number == 0 else f"-{text}")


def test_human_has_no_largest_number():
    assert human(4.2e19) == "42E"
    assert human(6e21) == "6e+03E"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (4.21, "4.2s"),
        (59.94, "59.9s"),
        (59.96, "1m 00s"),
        (200, "3m 20s"),
        (3599.6, "1h 00m"),
        (7500, "2h 05m"),
        (48 * 3600, "48h 00m"),
        (48 * 3600 + 60, "2.0 days"),
        (360000, "4.2 days"),
        (1e9, "11,574.1 days"),
        (math.inf, "unknown"),
        (math.nan, "unknown"),
        (10**30, "unknown"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
