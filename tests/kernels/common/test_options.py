"""Options of commands: types of values, and refusals."""

from __future__ import annotations

import pytest

from kernels.common.errors import UserError
from kernels.common.options import read_options, read_positional, split_options, whole_number

DEFAULTS = {"run": "", "step": -1, "temperature": 0.8, "yes": False}


def test_an_option_becomes_of_its_defaults_type():
    read = read_options(["run=a=b", "step=7", "temperature=1", "yes=true"], DEFAULTS)
    assert read == {"run": "a=b", "step": 7, "temperature": 1.0, "yes": True}
    assert isinstance(read["temperature"], float)
    assert read_options([], DEFAULTS) == DEFAULTS


def test_the_last_of_two_wins():
    assert read_options(["step=1", "step=2"], DEFAULTS)["step"] == 2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["stp=1"], "unknown option 'stp': did you mean 'step'? choose from run, step, temperature, yes"),
        (["run"], "run needs a value: run=VALUE"),
        (["--step"], "--step needs a value: step=VALUE"),
        (["folder"], "unexpected 'folder': write NAME=VALUE, with one of run, step, temperature, yes"),
        (["step=1.5"], "step=1.5: expected a whole number of at least 0"),
        (["step=-1"], "step=-1: expected a whole number of at least 0"),
        (["temperature=nan"], "temperature=nan: expected a number of at least 0"),
        (["temperature=inf"], "temperature=inf: expected a number of at least 0"),
        (["yes=1"], "yes=1: expected true or false"),
        (["step=1"], "missing run=NAME, the run"),
    ],
)
def test_what_is_refused(argv, sentence):
    with pytest.raises(UserError) as caught:
        read_options(argv, DEFAULTS, required={"run": "run=NAME, the run"})
    assert str(caught.value).startswith(sentence)


def test_a_command_without_options_says_so():
    for read in (read_options, read_positional):
        with pytest.raises(UserError, match=r"^unexpected 'stp=1': this command has no options$"):
            read(["stp=1"], {})


def test_an_option_has_a_least_value_of_its_own():
    assert read_options(["step=2"], DEFAULTS, {"step": 2})["step"] == 2
    with pytest.raises(UserError, match="step=1: expected a whole number of at least 2"):
        read_options(["step=1"], DEFAULTS, {"step": 2})


def test_positional_arguments_stand_beside_options():
    assert read_positional(["a", "step=1", "b"], DEFAULTS) == ({**DEFAULTS, "step": 1}, ["a", "b"])
    for wrong in ("stp=1", "--stp"):
        with pytest.raises(UserError, match=f"unknown option '{wrong.partition('=')[0]}'"):
            read_positional(["a", wrong], DEFAULTS)


def test_overrides_pass_through_in_order():
    assert split_options(["b=1", "step=2", "--multirun", "a=3"], DEFAULTS)[1] == ["b=1", "--multirun", "a=3"]


def test_a_flag_has_a_value_of_its_own():
    flags = {"run": "default"}
    assert split_options(["--run"], DEFAULTS, flags=flags)[0]["run"] == "default"
    assert split_options(["--run=x"], DEFAULTS, flags=flags)[0]["run"] == "x"
    assert split_options(["run=x"], DEFAULTS, flags=flags)[0]["run"] == "x"
    with pytest.raises(UserError, match="run needs a value"):
        split_options(["run"], DEFAULTS, flags=flags)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("4096", 4096), ("-1", -1), ("1_000", 1000), ("1e9", 10**9), ("1E9", 10**9), (".5e1", 5), ("10.0", 10)),
        *(("100k", 10**5), ("100K", 10**5), ("1.5m", 1_500_000), ("2B", 2 * 10**9), ("15t", 15 * 10**12)),
        *(("0.1B", 10**8), ("1.1T", 1_100_000_000_000), (" 3 ", 3)),
        *((text, None) for text in ("1.5", "1e-3", "0.5", "k", "", "1 k", "1kk", "1G", "abc", "null", "1,000", "0x10")),
    ],
)
def test_a_count_may_be_typed_in_thousands_to_trillions(text, number):
    assert whole_number(text) == number


def test_options_are_counts_too():
    assert read_options(["tokens=1.5k", "share=0.5"], {"tokens": 1, "share": 1.0}) == {"tokens": 1500, "share": 0.5}
