"""The short form of `python -m bench.fuzz`, and that it notices what it looks for."""

from __future__ import annotations

import random
import time

import pytest

from bench import fuzz
from kernels.formula import FormulaError


@pytest.mark.parametrize(("campaign", "inputs"), [("formulas", 400), ("overrides", 40)])
def test_random_text_is_read_or_refused(campaign, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fuzz.fuzz(campaign, inputs, seed=1, seconds=fuzz._STOP_SECONDS)
    assert not result.failures
    assert result.accepted
    assert result.accepted + result.refused == inputs


def test_what_is_looked_for_is_found(monkeypatch):
    def check(given: int) -> None:
        if given == 0:
            raise RecursionError("deep")
        if given == 1:
            raise FormulaError("no", "x", 0)
        while given == 2:
            time.process_time()

    monkeypatch.setattr(fuzz, "_STOP_SECONDS", 0.01)
    monkeypatch.setitem(fuzz.CAMPAIGNS, "formulas", (lambda draw: draw.randrange(4), check, FormulaError))
    result = fuzz.fuzz("formulas", 40, seed=0)
    assert {failure.split()[3].rstrip(":") for failure in result.failures} == {"RecursionError", "_TimeOut"}
    assert result.refused
    assert result.accepted


def test_inputs_are_a_function_of_the_seed():
    for make, _, _ in fuzz.CAMPAIGNS.values():
        assert [make(random.Random(5)) for _ in range(2)] == [make(random.Random(5)) for _ in range(2)]
