"""`make setup` keeps an environment that works, whatever the default Python is, and replaces one that does not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.training.tiny import ROOT

# Stands for an interpreter: `python -m venv` copies it, `-c` says whether it is usable, all else it only writes down.
INTERPRETER = """#!/bin/sh
echo "$0 $*" >> calls
case "$1" in
--version) echo "Python 3.12.9" ;;
-c) exit {status} ;;
esac
if [ "$2" = venv ]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python; fi
"""


def write_interpreter(path: Path, status: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(INTERPRETER.replace("{status}", str(status)))
    path.chmod(0o755)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("there", "status", "made", "says"),
    [
        (False, 0, 1, "setup: creating .venv with Python 3.12.9 and"),
        (True, 0, 0, "setup: bringing .venv, of Python 3.12.9, up to date"),
        (True, 1, 1, "setup: creating .venv with Python 3.12.9 and"),  # of an older Python, or without pip
    ],
)
def test_an_environment_that_works_is_kept(tmp_path, there, status, made, says):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    write_interpreter(tmp_path / "python")
    if there:
        write_interpreter(tmp_path / ".venv/bin/python", status)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    words = ["make", "setup", f"PYTHON={tmp_path / 'python'}"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(says)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum(" -m venv " in call for call in calls) == made
    assert calls[-1] == ".venv/bin/python -m launch.calm_launchers"
