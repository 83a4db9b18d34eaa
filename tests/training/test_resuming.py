"""A run that is resumed with another length or in another dtype says so; with another length it does not warm up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.faults.corruptions import fit_manifest
from kernels.common.json_files import read_object
from tests.training.tiny import overrides
from training.resume import dtype_change

SETTINGS = {"save_every": 2, "eval_every": 0, "optim__lr": 0.01, "schedule__warmup": 0.5, "schedule__final": 0}


@pytest.fixture
def train(corpus, no_group, tmp_path):
    """A function that trains with overrides, and returns what was printed."""

    def run(fault: str | None = None, **changes) -> str:
        arguments = overrides(corpus, tmp_path, **(SETTINGS | changes))
        result = no_group.run("command", module="train", arguments=arguments, fault=fault)
        assert result[0]["status"] == 0, result
        return result[0]["out"]

    return run


def rates(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["lr"] for line in lines if line["kind"] == "train"]


def test_an_extended_run_prints_both_rates_and_does_not_warm_up_again(train, tmp_path):
    train(run="cosine", steps=4)
    out = train(run="cosine", steps=12)  # whose warm-up would have 6 steps
    sentence = (
        "warning: the length was changed from 4 to 12 steps: the learning rate was 0 at step 4 and is 0.00794 at step 5"
    )
    assert sentence in out, out
    assert rates(tmp_path / "cosine")[4] == pytest.approx(0.00794, abs=1e-5)
    assert "the length was changed" not in train(run="cosine", steps=12)


def test_wsd_that_is_extended_before_its_decay_goes_on_at_the_plateau(train, tmp_path):
    settings = {"run": "wsd", "schedule": "wsd", "schedule__decay": 0}
    train(steps=4, **settings)
    for state in (tmp_path / "wsd" / "checkpoints").glob("*/state.json"):  # as checkpoints were that stored no length
        content = json.loads(state.read_text())
        state.write_text(json.dumps({k: v for k, v in content.items() if k not in ("steps", "warmup_steps")}))
        fit_manifest(state.parent)
    out = train(steps=20, **settings)
    assert (
        "\nthe length was changed from 4 to 20 steps: the learning rate was 0.01 at step 4 and is 0.01 at step 5\n"
        in out
    )
    assert rates(tmp_path / "wsd")[2:] == pytest.approx([0.01] * 18)


def test_another_dtype_is_warned_of(train, tmp_path):
    settings = {"run": "auto", "precision": "auto"}
    train("bf16 instructions", steps=2, zero=1, **settings)
    out = train("bf16 instructions", steps=4, zero=0, **settings)
    warning = (
        "warning: the run was trained in bf16 up to step 2 and goes on in fp32: precision=auto follows the machine"
    )
    assert warning in out, out
    stored = [read_object(tmp_path / "auto" / "checkpoints" / f"step_{n:08d}" / "state.json") for n in (2, 4)]
    assert [state["dtype"] for state in stored] == ["bf16", "fp32"]
    assert "the run was trained in" not in train("bf16 instructions", steps=5, zero=0, **settings)
    assert dtype_change(stored[1], torch.bfloat16).startswith(
        "the run was trained in fp32 up to step 4 and goes on in bf16"
    )
    del stored[1]["dtype"]  # as checkpoints were that stored none
    assert dtype_change(stored[1], torch.bfloat16) == ""
