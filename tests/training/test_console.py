"""Console output: lines of steps that fit, from rank 0 alone."""

from __future__ import annotations

import types

import pytest
from rich.console import Console as RichConsole

from training import console
from training.console import Console, RecentSpeed

RECORD = {"loss": 2.5, "lr": 3e-4, "grad_norm": 0.5, "tokens_per_second": 12_300, "mfu": 0.421, "memory_gib": 1}


def test_a_line_per_step_with_every_figure(capsys):
    console = Console()
    console.start(0, 30)
    console.step(7, RECORD)
    line = capsys.readouterr().out
    assert line.startswith("step  7/30 ( 23%)  loss 2.5000  lr 3.00e-04  grad norm 0.500  12.3k tok/s  MFU 42.1%  ETA ")
    assert line.count("\n") == 1


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 100])
@pytest.mark.parametrize("steps", [30, 123_456])
def test_a_line_fits_the_terminal(capsys, width, steps):
    console = Console()
    console.out = RichConsole(force_terminal=True, width=width, color_system=None)
    console.start(0, steps)
    console.stop()  # the bar's own codes
    capsys.readouterr()
    console.step(7, RECORD)
    line = capsys.readouterr().out.rstrip("\n")
    assert "\n" not in line
    assert len(line) <= max(width, 40)
    assert "loss 2.5000" in line
    if width >= 80:
        assert "12.3k tok/s  MFU 42.1%" in line


def test_a_sentence_is_wrapped_between_words_on_a_terminal_and_a_command_is_not(capsys):
    console = Console()
    console.print("one two " * 20)
    assert capsys.readouterr().out.count("\n") == 1
    console.out = RichConsole(force_terminal=True, width=30, color_system=None)
    console.print("one two " * 20)
    assert all(len(line.rstrip()) <= 30 and line.strip() for line in capsys.readouterr().out.splitlines())
    console.print("one two " * 20, wrap=False)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_file_gets_a_line_every_few_seconds_the_first_and_the_last(capsys, clock):
    console = Console()
    console.start(0, 100, seconds=5.0)
    for step in range(1, 101):
        clock.now += 0.4
        console.step(step, RECORD)
        console.advance(step)
    printed = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert printed == [1, 14, 27, 40, 53, 66, 79, 92, 100]


@pytest.fixture
def clock(set_time):
    """The time, set by the test."""
    clock = types.SimpleNamespace(now=1000.0)
    set_time(console, monotonic=lambda: clock.now)
    return clock


def test_the_time_left_is_that_of_the_last_minute(clock):
    speed = RecentSpeed(40)
    assert speed.seconds_left(1000) is None
    clock.now += 30.0  # the first step compiles
    speed.mark(41)
    assert speed.seconds_left(1000) == pytest.approx(30 * 959)
    for step in range(42, 140):
        clock.now += 1.0
        speed.mark(step)
        assert speed.seconds_left(1000) == pytest.approx(1000 - step)
    for step in range(140, 172):
        clock.now += 2.0
        speed.mark(step)
    assert speed.seconds_left(1000) == pytest.approx(2 * (1000 - 171))


def test_an_implausible_utilization_is_unknown(capsys):
    console = Console()
    console.start(0, 30)
    console.step(7, RECORD | {"mfu": None})
    assert "  MFU unknown  " in capsys.readouterr().out


def test_text_in_brackets_is_shown_as_it_is(capsys):
    Console().warn("[/a] W&B [bold] is off")
    assert capsys.readouterr().out == "warning: [/a] W&B [bold] is off\n"


def test_other_ranks_are_silent(capsys):
    console = Console(enabled=False)
    console.start(0, 3)
    console.print("x")
    console.warn("x")
    console.step(1, RECORD)
    console.stop()
    assert capsys.readouterr() == ("", "")
