"""The examples in the docstrings of the library run as they are printed."""

from __future__ import annotations

import doctest
import sys

import pytest

import kernels

EXAMPLES = ["FormulaMLP", "activation", "linear_cross_entropy", "patch", "rms_norm", "rotate", "unpatch"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name, monkeypatch):
    if name in ("patch", "unpatch"):
        pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "formula_ffn", kernels)  # whether it is installed or not
    thing = getattr(kernels, name)
    names = {each: getattr(kernels, each) for each in kernels.__all__}
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(thing, name, globs=names) if test.examples]
    assert tests, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        assert runner.run(test).failed == 0
