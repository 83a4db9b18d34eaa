"""bench.train and bench.telemetry: arithmetic, refused options, and (slow) one round on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import telemetry
from bench.train import CONTENDERS, _report, main
from kernels.common.errors import UserError

ROOT = Path(__file__).parents[2]


def test_ratios_are_taken_round_by_round() -> None:
    runs = {"ours": [100.0, 300.0, 200.0], "hf": [50.0, 100.0, 200.0], "hf+allocator": [100.0, 100.0, 100.0]}
    figures = _report(runs)
    assert figures["hf"] == {"median": 2.0, "range": [1.0, 3.0]}
    assert figures["hf+allocator"] == {"median": 2.0, "range": [1.0, 3.0]}


@pytest.mark.parametrize("arguments", [["steps=4"], ["rounds=x"], ["ffn=swigluu"]])
@pytest.mark.parametrize("command", [main, telemetry.main])
def test_bad_input_is_refused(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    with pytest.raises(UserError):
        command(arguments)


def test_the_cost_of_a_sample_is_that_of_its_step_and_the_next_beyond_two_others() -> None:
    # Steps 1 to 4 warm up; step 8, 12, 16 are sampled, and 9, 13 and 17 write the line.
    seconds = [9.0] * 4 + [1.25, 1.0, 1.0, 1.5] * 4
    assert telemetry.sample_cost(seconds) == 0.75


@pytest.mark.slow
def test_a_round_on_a_tiny_model(tmp_path: Path) -> None:
    corpus = tmp_path / "text"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"document {number}: " + "the quick brown fox jumps over the dog. " * 60)
    out = tmp_path / "figures.json"
    arguments = ["rounds=1", "steps=8", f"out={out}", "data=text", f"data.path={corpus}", f"data.prepared={tmp_path}"]
    arguments += [
        "tokenizer.vocab_size=320",
        "model.d_model=32",
        "model.n_layers=1",
        "model.n_heads=2",
        "model.d_ff=64",
    ]
    arguments += ["model.head_dim=16", "sequence_length=32", "global_batch_size=2", "tokens=1000"]
    subprocess.run([sys.executable, "-m", "bench.train", *arguments], cwd=ROOT, check=True, timeout=600)
    figures = json.loads(out.read_text())
    assert set(figures["tokens_per_second"]) == set(CONTENDERS)
    assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in figures["tokens_per_second"].values())
