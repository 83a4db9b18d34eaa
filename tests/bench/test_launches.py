"""What a training step launches, against the committed counts: a regression shows as a changed number."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from bench.launches import PRESETS, RESULTS, as_json, count_micro_batch, traced_gpu
from conf.load import load
from kernels.tensors import on_gpu
from tests.selection import quick
from tests.training.tiny import PATIENCE, ROOT, environment

pytest.importorskip("triton")
COMMITTED = json.loads((RESULTS / "launches.json").read_text(encoding="utf-8"))


# The smallest preset launches all that the others do, in fewer layers.
@pytest.mark.parametrize("preset", quick(list(PRESETS), "llama_60m"))
def test_a_micro_batch_launches_what_is_committed(preset):
    """Where another number is meant, `python -m bench.launches` writes it."""
    counts = as_json(count_micro_batch(load([f"model={preset}", "precision=bf16"])))
    assert counts == COMMITTED[preset]["micro_batch"]
    assert counts["synchronisations"] == 0


@pytest.mark.parametrize("preset", quick(list(PRESETS), "llama_60m"))
def test_deepspeed_and_the_optimizer_add_what_is_committed(preset):
    command = [sys.executable, "-m", "bench.launches", f"model={preset}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["optimizer"] == COMMITTED[preset]["optimizer"]


def test_what_is_recorded():
    with traced_gpu() as recorder:
        a = torch.empty(4, 8, device="meta")
        (a @ a.t()).add_(1).view(2, 8)
        assert on_gpu(a)
    counts = recorder.counts
    assert counts.launches["GEMM"] == 1
    assert counts.bytes["GEMM"] == 4 * (32 + 32 + 16)
    assert counts.names["other: add_"] == 1
    assert not on_gpu(a)


def test_a_wait_of_the_host_is_counted():
    with traced_gpu() as recorder:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert recorder.counts.synchronisations == 2
