"""bench.optimizers: refused options, and (slow) its quick form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import optimizers
from conf.optimizers import OPTIMIZERS
from kernels.common.errors import UserError

ROOT = Path(__file__).parents[2]


def test_every_optimizer_is_measured():
    assert set(optimizers.OPTIMIZERS) == set(OPTIMIZERS)


@pytest.mark.parametrize("argument", ["models=nanno", "steps=2", "quick=yes"])
def test_bad_input_is_refused(argument):
    with pytest.raises(UserError):
        optimizers.main([argument])


@pytest.mark.slow
def test_the_quick_form_runs(tmp_path):
    out = tmp_path / "optimizers.md"
    arguments = ["quick=true", "steps=3", f"out={out}"]
    subprocess.run([sys.executable, "-m", "bench.optimizers", *arguments], cwd=ROOT, check=True, timeout=600)
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| nano")]
    assert [row[3] for row in rows] == [*optimizers.OPTIMIZERS] * 2
    assert all(float(row[4]) > 0 for row in rows)
    assert all(0 < float(row[6].rstrip("%")) < 100 for row in rows if row[3] != "adamw")
