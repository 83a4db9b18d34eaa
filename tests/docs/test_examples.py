"""The scripts of examples/ run as they are shown, and print what their docstrings promise."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT
from tests.training.tiny import environment


def output_of(script: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def rows(output: str) -> dict[str, list[float]]:
    """Return the numbers of each line of the table of the first example."""
    found = re.findall(r"^(.{28})((?:\s+[0-9.]+){4})$", output, flags=re.MULTILINE)
    return {name.strip(): [float(number) for number in numbers.split()] for name, numbers in found}


def check_table(output: str) -> dict[str, list[float]]:
    table = rows(output)
    assert list(table) == ["as Transformers builds it", "its own activation, fused", "gate*atan(gate) * up"]
    plain, fused, other = table.values()
    assert fused[0] == pytest.approx(plain[0], rel=1e-5)  # fp32: sums in another order
    assert other[0] != plain[0]
    assert fused[2] < plain[2], "the fused model keeps no less for backward"
    return table


@pytest.mark.slow
def test_a_formula_in_a_transformers_model():
    check_table(output_of("formula_in_transformers.py", "--steps=1"))


@pytest.mark.slow
def test_a_formula_in_a_transformers_model_learns():
    for first, last, *_ in check_table(output_of("formula_in_transformers.py")).values():
        assert last < 0.8 * first


@pytest.mark.slow
def test_from_a_question_to_a_verdict(tmp_path):
    output = output_of("question_to_verdict.py", str(tmp_path))
    assert re.search(r"^At tiny, over 3 seeds, in nats per token: .*mine.*\.$", output, flags=re.MULTILINE)
    assert (tmp_path / "smoke" / "report" / "report.html").is_file()
    assert "not the activations" in output
