"""Console output: numbers, durations, and a line per step from rank 0 alone."""

from __future__ import annotations

import pytest

from training.console import Console, duration, human


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
        (360000, "100h 00m"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_line_per_step_with_every_figure(capsys):
    console = Console()
    console.start(0, 30)
    console.step(
        7, 30, {"loss": 2.5, "lr": 3e-4, "grad_norm": 0.5, "tokens_per_second": 12_300, "mfu": 0.421, "memory_gib": 1}
    )
    line = capsys.readouterr().out
    assert line.startswith("step  7/30 ( 23%)  loss 2.5000  lr 3.00e-04  grad norm 0.500  12.3k tok/s  MFU 42.1%  ETA ")
    assert line.count("\n") == 1


def test_text_in_brackets_is_shown_as_it_is(capsys):
    Console().warn("[/a] W&B [bold] is off")
    assert capsys.readouterr().out == "warning: [/a] W&B [bold] is off\n"


def test_other_ranks_are_silent(capsys):
    console = Console(enabled=False)
    console.start(0, 3)
    console.print("x")
    console.warn("x")
    console.step(1, 3, {"loss": 1, "lr": 1, "grad_norm": 1, "tokens_per_second": 1, "mfu": 1})
    console.stop()
    assert capsys.readouterr() == ("", "")
