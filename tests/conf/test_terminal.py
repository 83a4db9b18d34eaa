"""What a terminal is sent: no control sequence of a text reaches it, in a line, a table or a panel."""

from __future__ import annotations

import io

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from conf.terminal import SafeConsole
from kernels.common import commands

HOSTILE = "a\x1b[2J\x1b]0;title\x9b31m\u202eb"


def table() -> Table:
    rows = Table(title=HOSTILE)
    rows.add_column(HOSTILE)
    rows.add_row(HOSTILE)
    return rows


@pytest.mark.parametrize("part", [HOSTILE, Text(HOSTILE), table(), Panel(HOSTILE, title=HOSTILE)], ids=type)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_control_sequence_is_shown_and_does_nothing(part, terminal):
    out = io.StringIO()
    SafeConsole(
        file=out, force_terminal=terminal, width=200, color_system="standard", markup=False, highlight=False
    ).print(part)
    assert "\x1b[2J" not in out.getvalue()
    assert not {"\x9b", "\u202e", "\x1b]"} & {
        out.getvalue()[i : i + n] for n in (1, 2) for i in range(len(out.getvalue()))
    }
    assert r"a\x1b[2J\x1b]0;title\x9b31m\u202eb" in out.getvalue()


def test_styles_of_the_console_itself_still_work():
    out = io.StringIO()
    SafeConsole(file=out, force_terminal=True, color_system="standard").print("[bold]x[/]")
    assert out.getvalue() == "\x1b[1mx\x1b[0m\n"


def test_an_error_is_printed_without_control_sequences(capsys):
    commands._print_once(f"unknown key {HOSTILE}")
    assert capsys.readouterr().err == "error: unknown key a\\x1b[2J\\x1b]0;title\\x9b31m\\u202eb\n"
