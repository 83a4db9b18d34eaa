"""Options of small commands: what is read of which type, and what is refused in which words."""

from __future__ import annotations

import pytest

from kernels.common.errors import UserError
from kernels.common.options import read_options

DEFAULTS = {"run": "", "step": -1, "temperature": 0.8, "yes": False}


def test_an_option_becomes_of_its_defaults_type():
    read = read_options(["run=a=b", "step=7", "temperature=1", "yes=true"], DEFAULTS)
    assert read == {"run": "a=b", "step": 7, "temperature": 1.0, "yes": True}
    assert isinstance(read["temperature"], float)
    assert read_options([], DEFAULTS) == DEFAULTS


def test_the_last_of_two_wins():
    assert read_options(["step=1", "step=2"], DEFAULTS)["step"] == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["stp=1"], "unknown option 'stp': did you mean 'step'? choose from run, step, temperature, yes"),
        (["run"], "unknown option 'run'"),
        (["step=1.5"], "step=1.5: expected a whole number of at least 0"),
        (["step=-1"], "step=-1: expected a whole number of at least 0"),
        (["temperature=nan"], "temperature=nan: expected a number of at least 0"),
        (["temperature=inf"], "temperature=inf: expected a number of at least 0"),
        (["yes=1"], "yes=1: expected true or false"),
        (["step=1"], "say which run: run=NAME"),
    ],
)
def test_what_is_refused(words, sentence):
    with pytest.raises(UserError) as caught:
        read_options(words, DEFAULTS, needs={"run": "which run: run=NAME"})
    assert str(caught.value).startswith(sentence)


def test_an_option_has_a_least_value_of_its_own():
    assert read_options(["step=2"], DEFAULTS, {"step": 2})["step"] == 2
    with pytest.raises(UserError, match="step=1: expected a whole number of at least 2"):
        read_options(["step=1"], DEFAULTS, {"step": 2})
