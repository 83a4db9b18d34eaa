"""Run folders, checkpoints and plans that version 0.1 wrote (commit 82f280c) go on under this one.

`v0_1/` holds a run of 12 steps in fp32 as a kill after step 10 leaves it (the checkpoint of step 8 is its newest), the metrics
that it wrote when nobody killed it, its corpus, and a plan of four runs that have ended.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.training import tiny

HERE, ROOT = Path(__file__).parent / "v0_1", Path(__file__).resolve().parents[2]
TINY = (
    "data=text data.path=corpus model.d_model=16 model.n_layers=2 model.n_heads=2 model.d_ff=24 tokenizer.vocab_size=384 "
    "sequence_length=32 global_batch_size=8 eval_every=4 save_every=4 sample_tokens=4 prompts=['ab'] optim.lr=0.01 "
    "schedule.warmup=0.2 precision=fp32 logger=none telemetry_every=5 data.workers=1 data.held_out=0.1 ffn=prelu steps=12 "
    "keep_last=3 run=tiny"
)
PLAN = [
    "ablation=smoke",
    "ablation.name=tiny",
    "ablation.arms=[relu, swiglu]",
    "ablation.baseline=relu",
    "ablation.sizes={tiny: model.d_model=16}",
    "ablation.rates=[1.0]",
    "ablation.seeds=[0,1]",
    "ablation.common=[data=text, data.path=corpus, model.n_layers=1, model.n_heads=2, model.d_ff_gated=64, "
    "tokenizer.vocab_size=384, sequence_length=32, global_batch_size=8, steps=8, eval_every=4, save_every=0, "
    "sample_tokens=4, precision=fp32, logger=none, telemetry_every=4, data.workers=1, data.held_out=0.1, optim.lr=0.01]",
    "yes=true",
]


@pytest.fixture
def folder(tmp_path):
    """A working folder in which everything lies where version 0.1 had it."""
    for name, place in {
        "corpus": "corpus",
        "prepared_corpus": "prepared",
        "run": "runs/tiny",
        "plan": "ablations/tiny",
    }.items():
        shutil.copytree(HERE / name, tmp_path / place)
    (tmp_path / "ablations/tiny/plan_runs").rename(tmp_path / "ablations/tiny/runs")
    return tmp_path


def command(folder: Path, *arguments: str) -> str:
    """Run a script or a module of the repository in `folder`, and return what it printed."""
    done = tiny.command(sys.executable, *arguments, cwd=folder)
    assert done.status == 0, done.out + done.err
    return done.out


def losses(path: Path, kind: str, after: int) -> dict[int, float]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == kind and line["step"] > after}


def test_a_run_goes_on_from_its_checkpoint(folder):
    said = command(folder, str(ROOT / "train.py"), *TINY.split())
    assert (
        said.count("is of an earlier version: it does not tell its run and its settings, so they were not checked") == 1
    )
    found, expected = folder / "runs/tiny/metrics.jsonl", HERE / "expected_metrics.jsonl"
    for kind, steps in (("train", [9, 10, 11, 12]), ("eval", [12])):
        before, now = losses(expected, kind, 8), losses(found, kind, 8)
        assert list(now) == steps
        # fp32 sums in another order on another CPU; a lost moment or a swapped shard is off by more than 1e-3
        assert now == pytest.approx(before, rel=1e-5)
    events = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
    assert [event["step"] for event in events if event.get("event") == "resumed"] == [8]


@pytest.mark.slow
def test_a_plan_that_ended_is_not_trained_again_and_its_report_is_made(folder):
    runs = folder / "ablations/tiny/runs"
    before = {path: path.read_bytes() for path in runs.rglob("*.json*")}
    said = command(folder, "-m", "ablation.run", *PLAN)
    assert {path: path.read_bytes() for path in runs.rglob("*.json*")} == before
    assert "4 runs have ended" in said
    command(folder, "-m", "ablation.report", "ablations/tiny")
    loss = json.loads((runs / "tiny-swiglu-lr0.01-seed0/summary.json").read_text())["final_eval_loss"]
    assert f"{loss:.4f}" in (folder / "ablations/tiny/report/report.html").read_text(encoding="utf-8")
