"""The short form of `python -m bench.fuzz`, and that it notices what it looks for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import pytest

from bench.fuzz import campaign as campaigns
from bench.fuzz.__main__ import CAMPAIGNS, main, prepare
from bench.fuzz.campaign import Campaign, fuzz, input_of
from kernels.common.errors import UserError

INPUTS = {
    "formulas": 400,
    "overrides": 120,
    "indexes": 60,
    "manifests": 30,
    "tokenizers": 120,
    "metrics": 20,
    "html": 30,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Campaigns by name, each prepared once."""
    made: dict[str, Campaign] = {}

    def of(name: str) -> Campaign:
        if name not in made:
            made[name] = prepare(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("parts", [3, pytest.param(1, marks=pytest.mark.slow)])  # a third of them is the first of all
def test_what_is_read_is_accepted_or_refused(name, parts, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = INPUTS[name] // parts
    result = fuzz(name, prepared(name), range(inputs), seed=1, seconds=campaigns.STOP_SECONDS)
    assert not result.failures
    assert result.accepted
    assert result.accepted + result.refused == inputs


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_a_function_of_the_seed(name, prepared):
    one, again, other = (repr(input_of(name, prepared(name), seed, 3)) for seed in (5, 5, 6))
    assert one == again != other


def test_inputs_do_not_depend_on_when_and_where_they_are_made(prepared, tmp_path):
    again = prepare("manifests", tmp_path)
    for number in range(40):
        one, other = (input_of("manifests", made, 0, number) for made in (prepared("manifests"), again))
        assert one == other


def test_every_campaign_has_a_short_form():
    assert INPUTS.keys() == CAMPAIGNS.keys()


def _read(given: int) -> None:
    """Fail in as many ways as there are numbers."""
    if given == 0:
        raise RecursionError("deep")
    if given == 1:
        raise UserError("no")
    if given == 2:
        raise UserError("")
    if given == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if given == 4:
        os._exit(0)
    if given == 5:
        bytearray(2 * campaigns.MEMORY)
    if given == 6:
        subprocess.run(["true"], check=True)
    if given == 7:
        raise BaseException("a panic")
    while given == 8:
        time.process_time()


def test_what_is_looked_for_is_found(monkeypatch):
    monkeypatch.setattr(campaigns, "STOP_SECONDS", 0.05)
    result = fuzz("none", Campaign(lambda draw: draw.randrange(10), _read, (UserError,)), range(60), seed=0)
    given = [input_of("none", Campaign(lambda draw: draw.randrange(10), _read, ()), 0, number) for number in range(60)]
    assert set(given) == set(range(10))
    expected = {0: "RecursionError", 2: "an empty sentence", 3: "SIGSEGV", 4: "status 0", 5: "MemoryError",
                6: "subprocess.Popen", 7: "BaseException", 8: "_TimeOut"}  # fmt: skip
    found: dict[int, Any] = {int(failure.split(":")[0]): failure for failure in result.failures}
    assert found.keys() == {number for number, what in enumerate(given) if what in expected}
    assert all(expected[given[number]] in failure for number, failure in found.items())
    assert (result.refused, result.accepted) == (sum(what in (1, 2) for what in given), given.count(9))


def test_more_time_than_allowed_is_a_failure():
    slow = Campaign(lambda draw: draw.random(), lambda _: sum(range(100_000)), (UserError,))
    assert len(fuzz("none", slow, range(3), seed=0, seconds=-1.0).failures) == 3


def test_the_command_reads_the_inputs_that_are_asked_for(capfd):
    assert main(["campaign=formulas", "inputs=3", "first=7", "seed=2"]) == 0
    assert capfd.readouterr().out.startswith("formulas: 3 inputs, seed 2: ")
    with pytest.raises(UserError, match="indexes"):
        main(["campaign=indices"])
