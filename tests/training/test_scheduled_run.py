"""A run whose formula has a scheduled parameter: its value is a function of the step, in training and after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from kernels import activation
from model.export import export
from model.generate import load_run
from model.weights import CheckpointReader
from tests.training.tiny import overrides

FORMULA = "(1 - t)*silu(gate)*up + t*relu(b*gate)*up"
RAMP = "{t: {schedule: linear, from: 0, to: 1, start: 2, steps: 8}, b: {init: 1.0}}"
ARM = {"ffn": "custom", "ffn__formula": FORMULA, "ffn__parameters": RAMP}
EXPECTED = [0, 0, 0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 1, 1]  # after 0, 1, ... 12 steps


@pytest.fixture(scope="module")
def finished(corpus, no_group, tmp_path_factory):
    """A run of 12 steps with checkpoints after 4, 8 and 12, and the function that trains in a folder of runs."""
    folder = tmp_path_factory.mktemp("scheduled")

    def train(runs: Path, **changes) -> str:
        settings = ARM | {"run": "t", "keep_last": 9, "telemetry_every": 5} | changes
        result = no_group.run("command", module="train", arguments=overrides(corpus, runs, **settings))
        assert result[0]["status"] == 0, result
        return result[0]["out"]

    train(folder)
    return folder / "t", train


def lines(run: Path, kind: str) -> list[dict]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def test_a_step_is_taken_with_the_value_after_the_steps_before_it(finished):
    run, _ = finished
    assert [line["scheduled.t"] for line in lines(run, "train")] == EXPECTED[:12]
    assert [(line["step"], line["scheduled.t"]) for line in lines(run, "eval")] == [
        (s, EXPECTED[s]) for s in (4, 8, 12)
    ]
    zeros = {line["step"]: max(line["zeros"]) for line in lines(run, "telemetry")}
    assert zeros == {5: 0, 10: 0}  # the last steps with some of SiLU left


def test_it_is_neither_a_parameter_nor_saved(finished):
    run, _ = finished
    names = CheckpointReader(run / "checkpoints" / "step_00000012").shapes()
    assert [name for name in names if "learned" in name] == ["layers.0.ffn.learned.b", "layers.1.ffn.learned.b"]
    assert json.loads((run / "summary.json").read_text())["parameters"] == sum(
        torch.Size(shape).numel() for shape in names.values()
    )


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(finished, tmp_path, step):
    run, train = finished
    shutil.copytree(run, tmp_path / "t")
    for later in range(step + 4, 16, 4):
        shutil.rmtree(tmp_path / "t" / "checkpoints" / f"step_{later:08d}")
    assert f"after step {step} of 12" in train(tmp_path)
    ends = [CheckpointReader(each / "checkpoints" / "step_00000012") for each in (run, tmp_path / "t")]
    for name in ends[0].shapes():
        for key in ("", "exp_avg", "exp_avg_sq"):
            assert torch.equal(*(reader.tensor(name, key) for reader in ends)), name
    for kind in ("train", "eval"):
        again = [(line["step"], line["loss"], line["scheduled.t"]) for line in lines(tmp_path / "t", kind)]
        assert again == [(line["step"], line["loss"], line["scheduled.t"]) for line in lines(run, kind)]


def test_a_schedule_over_the_whole_run_says_so_where_its_length_changes(finished, tmp_path):
    _, train = finished
    whole = {"ffn__parameters": "{t: {schedule: linear, from: 0, to: 1}, b: {init: 1.0}}", "save_every": 2}
    train(tmp_path, steps=4, **whole)
    shutil.rmtree(tmp_path / "t" / "checkpoints" / "step_00000004")
    out = train(tmp_path, steps=8, **whole)
    assert "warning: the scheduled parameter t was 0.5 after step 2 and is 0.25 now" in out
    assert [line["scheduled.t"] for line in lines(tmp_path / "t", "train")] == [0, 0.25, *(s / 8 for s in range(2, 8))]


@pytest.mark.parametrize("step", [4, 12])
def test_a_checkpoint_is_loaded_and_exported_with_the_value_at_its_step(finished, tmp_path, step):
    run, _ = finished
    model, _, _ = load_run(run, step)
    layer = model.layers[0].ffn
    assert layer.scheduled == {"t": EXPECTED[step]}
    x = torch.randn(3, 33, generator=torch.Generator().manual_seed(0))
    learned = {"b": {"init": 1.0, "share": "layer"}}
    between, at_end = (FORMULA, {"t": 0.25, **learned}), ("relu(b * gate) * up", learned)
    f = activation(*(between if step == 4 else at_end))
    pre = torch.einsum("gfd,nd->ngf", layer.up, x)
    torch.testing.assert_close(layer(x), f(pre, b=layer.learned["b"]) @ layer.down.T, rtol=1e-5, atol=1e-6)
    export(run, tmp_path / "hf", step)
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())["ffn"][0]
    assert (exported["formula"], exported["parameters"]) == (between if step == 4 else at_end)
