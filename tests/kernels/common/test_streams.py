"""A console that is gone ends no program, and no file takes its place."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kernels.common.streams import LossyStream
from tests.training.tiny import ROOT

PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from kernels.common.streams import outlive_console
outlive_console()
kept = open(sys.argv[2], "w")
for number in range(3):
    print("to standard output", flush=True)
    print("to standard error", file=sys.stderr)
try:
    os.write(1, b"as a library does")
except OSError:
    pass
print(kept.fileno(), sys.stdout.isatty(), file=kept)
"""


@pytest.mark.parametrize("console", [">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full 2>&1", "| true", "2>&1 | true"])
def test_a_program_goes_on_without_its_console(tmp_path, console):
    (tmp_path / "program.py").write_text(PROGRAM)
    words = f"'{sys.executable}' '{tmp_path}/program.py' '{ROOT}' '{tmp_path}/kept' {console}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words}"], capture_output=True, text=True)
    number, terminal = (tmp_path / "kept").read_text().split()
    assert (done.returncode, terminal) == (0, "False"), done.stderr
    assert int(number) > 2
    assert "Error" not in done.stderr


def test_a_stream_that_recovers_is_written_again():
    class Fails:
        closed = False

        def __init__(self) -> None:
            self.texts = []

        def write(self, text: str) -> None:
            if text == "lost":
                raise OSError(28, "No space left on device")
            self.texts.append(text)

    stream = LossyStream(Fails())
    assert [stream.write(text) for text in ("one", "lost", "two")] == [3, 4, 3]
    assert (stream.texts, stream.closed) == (["one", "two"], False)
