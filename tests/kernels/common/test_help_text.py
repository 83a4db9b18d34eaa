"""The text of `--help` at the width of a terminal."""

from __future__ import annotations

from kernels.common.usage import fit

TEXT = """
Do it to a corpus of any size, in parallel: `python -m room.do to=FOLDER`.

    to=FOLDER   where it goes, which may be a folder that
                exists already
    room.a_key_with_a_long_name=1  its meaning
    python -m room.do 'what is typed is never broken over lines'

short   lines
stay    as they are
"""


def test_what_fits_stays():
    assert fit(TEXT, 120) == TEXT.strip("\n")


def test_sentences_flow_and_meanings_keep_their_column():
    assert fit(TEXT, 44).splitlines() == [
        "Do it to a corpus of any size, in parallel:",
        "`python -m room.do to=FOLDER`.",
        "",
        "    to=FOLDER    where it goes, which may be",
        "                 a folder that exists",
        "                 already",
        "    room.a_key_with_a_long_name=1",
        "                 its meaning",
        "    python -m room.do 'what is typed is never broken over lines'",
        "",
        "short   lines",
        "stay    as they are",
    ]


def test_the_width_is_that_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    assert max(map(len, fit("word " * 100).splitlines())) == 49
