"""Which cases of a long parametrization `make test` runs; `make test-all` runs all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Return the parameters of a test; all but the chosen ones are marked slow."""
    cases = list(cases)
    assert chosen
    assert set(chosen) <= set(cases)
    parameters = {case: case if isinstance(case, tuple) else (case,) for case in cases}
    return [
        pytest.param(*values, marks=() if case in chosen else pytest.mark.slow) for case, values in parameters.items()
    ]
