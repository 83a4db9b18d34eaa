"""An imported run resumes: under every stage, a checkpoint without moments is one whose moments are zero."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from model.health import damage
from model.weights import CheckpointReader, save_weights
from tests.training.tiny import overrides

FROM_FOLDER = ("model.", "tokenizer.")  # set by the folder, not by the command


@pytest.fixture(scope="module")
def begun(corpus, one_rank, tmp_path_factory) -> tuple[Path, Path]:
    """The initial weights in two checkpoints of step 1: with moments, and without."""
    folder = tmp_path_factory.mktemp("begun")
    steps = [["poison", "norm.weight", 0, float("nan")], ["save", str(folder / "full")]]
    one_rank.run("script", arguments=overrides(corpus, zero=1), steps=steps)
    full = folder / "full" / "step_00000001"
    reader = CheckpointReader(full)
    names = [name for name in reader.shapes() if not name.endswith(("exp_avg", "exp_avg_sq"))]
    tensors = ((name, reader.tensor(name)) for name in names)
    save_weights(folder / "bare" / "step_00000001", tensors, {**reader.state, "optimizer_steps": 0})
    return full, folder / "bare" / "step_00000001"


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_a_checkpoint_of_weights_alone_starts_with_zero_moments(corpus, begun, ranks, zero):
    arguments = overrides(corpus, zero=zero)
    full, bare = begun
    assert not any(name.endswith("exp_avg") for name in CheckpointReader(bare).shapes())
    assert damage(bare) == ""
    # Train first, so that stale moments would show.
    steps = [["train", 2], *(step for path in (full, bare) for step in (["load", str(path)], ["train", 3]))]
    losses = ranks.run("script", arguments=arguments, steps=steps)[0]["losses"]
    assert losses[5:8] == losses[2:5]
    assert len(set(losses[2:5])) == 3


def test_an_exported_run_is_imported_and_resumes(corpus, no_group, tmp_path):
    def run(module: str, *arguments: str) -> str:
        result = no_group.run("command", module=module, arguments=list(arguments))[0]
        assert result["status"] == 0, result["err"]
        return result["out"]

    runs = tmp_path / "runs"
    run("train", *overrides(corpus, runs, run="first", ffn="swish", steps=4, optim__lr=0.02))
    run("model.export", "run=first", f"runs={runs}", f"to={tmp_path / 'hf'}")
    arguments = overrides(corpus, runs, run="second", steps=4, optim__lr=1e-12)
    arguments = [argument for argument in arguments if not argument.startswith(FROM_FOLDER)]
    output = run("model.import_hf", f"from={tmp_path / 'hf'}", *arguments)
    command = shlex.split(output.splitlines()[-1])[2:]
    assert "resuming " in run("train", *command)
    first, second = (json.loads((runs / name / "summary.json").read_text()) for name in ("first", "second"))
    # The second run learns almost nothing, so its held-out loss is that of the exported weights.
    assert second["final_eval_loss"] == pytest.approx(first["final_eval_loss"], rel=1e-6)
    events = [json.loads(line) for line in (runs / "second" / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in events if line["kind"] == "event"][:2] == ["imported", "resumed"]
    assert events[0]["from"] == str(tmp_path / "hf")


def test_a_full_disk_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.weights.write_tensors", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_weights(tmp_path / "step_00000000", [("norm.weight", torch.ones(3))], {"step": 0})
    assert list(tmp_path.iterdir()) == []
