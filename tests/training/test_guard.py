"""What is not finite is not kept: checkpoints, the runs that cannot go on, and how they go on before the fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conf.load import load
from conf.schema import Config
from data.batches import BatchStream, open_dataset, sample_hash
from data.prepare import prepare
from data.ranges import SampleRanges
from model.health import damage
from model.manifest import file_hash, write_manifest
from model.weights import FORMAT, CheckpointReader, checkpoints, step_of
from tests.training.tiny import overrides
from training import guard


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def events(run: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == event]


@pytest.fixture
def train(no_group):
    """A function that runs train.py and returns its status and output."""

    def run(arguments: list[str], fault: str | None = None) -> dict:
        return no_group.run("command", module="train", arguments=arguments, fault=fault)[0]

    return run


@pytest.mark.parametrize(("zero", "precision"), [("0", "fp32"), ("1", "fp32"), ("2", "bf16"), ("3", "fp32")])
def test_no_rank_saves_what_is_not_finite_on_one(corpus, two_ranks, tmp_path, zero, precision):
    arguments = overrides(corpus, zero=zero, precision=precision)
    # Of the embedding each rank stores a part, under stage 0 rank 0 all of it.
    steps = [["train", 1], ["save", tmp_path], ["set", "embedding.weight", "exp_avg", 0, float("-inf")], ["train", 0]]
    steps += [["save", tmp_path], ["set", "embedding.weight", "", 0, float("nan")], ["save", tmp_path]]
    for rank in two_ranks.run("script", arguments=arguments, steps=steps):
        assert rank["refused"] == [
            ["", False],
            ["rank 0 holds inf in embedding.weight (exp_avg)", True],
            ["rank 0 holds NaN in embedding.weight", True],
        ]
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]


def test_a_run_that_holds_a_nan_ends_and_says_how_to_go_on(train, corpus, tmp_path):
    arguments = overrides(corpus, tmp_path, run="a", steps=10, save_every=2, eval_every=0, keep_last=2)
    result = train(arguments, "NaN in a moment after step 5")
    assert result["status"] == 3, result
    way = "resume_from=step_00000004 guard.skip_samples=32:"
    assert "error: the run has diverged: rank 0 holds NaN in layers.1.ffn.down after step 6; " in result["err"]
    assert f"to go on before it and leave its samples out: {way}" in result["err"]
    run = tmp_path / "a"
    assert "the checkpoint of step 6 was not written: rank 0 holds NaN in layers.1.ffn.down" in result["out"]
    assert names(run) == ["step_00000002", "step_00000004"]
    assert [line["step"] for line in events(run, "save_refused")] == [6]
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    words = result["err"].strip().rpartition("samples out: ")[2].split()
    result = train([*arguments, *words])
    assert result["status"] == 0, result
    last = CheckpointReader(run / "checkpoints" / "step_00000010").state
    (left_out,) = last["skipped_samples"]
    assert left_out[0] == 32
    # The samples are those of the stream in order, without those left out.
    config = load(arguments)
    stream = BatchStream(open_dataset(prepare(config.data, config.tokenizer)), config.sequence_length, config.data_seed)
    samples = [*range(32), *range(left_out[1], left_out[1] + 48)]
    rows = np.concatenate([stream.samples(number, 1) for number in samples])
    assert last["batches_hash"] == sample_hash(0, rows)


def test_a_nan_in_a_weight_is_named_once_the_limit_is_reached(train, corpus, tmp_path):
    arguments = overrides(corpus, tmp_path, run="a", save_every=4, eval_every=0, guard__skip_limit=3)
    result = train(arguments, "NaN in a weight after step 5")
    assert result["status"] == 3, result
    culprit = "the first was step 6, in which rank 0 holds NaN in layers.1.ffn.down; to go on before it"
    assert f"the gradients of 3 steps in a row were not finite; {culprit}" in result["err"], result["err"]
    assert result["err"].strip().endswith("resume_from=step_00000004 guard.skip_samples=32:64")
    assert names(tmp_path / "a") == ["step_00000004"]  # step 8 was refused
    skipped = events(tmp_path / "a", "skipped_step")
    assert [line["step"] for line in skipped] == [6, 7, 8]
    assert all(line["grad_norm"] != line["grad_norm"] for line in skipped)  # NaN, and not infinite


@pytest.mark.parametrize("zero", ["0", "1"])
def test_a_run_that_stops_on_a_skipped_step_saves(train, corpus, tmp_path, zero):
    arguments = overrides(corpus, tmp_path, run="a", steps=6, save_every=4, eval_every=0, zero=zero)
    result = train(arguments, "SIGTERM and an infinite gradient in step 5")
    assert (result["status"], "step 5 was skipped: its gradient is not finite" in result["out"]) == (0, True), result
    assert "SIGTERM: stopped after step 5; the same command resumes the run" in result["out"]
    run = tmp_path / "a"
    assert names(run) == ["step_00000004", "step_00000005"]
    before, stopped = (CheckpointReader(run / "checkpoints" / name) for name in names(run))
    assert (before.state["optimizer_steps"], stopped.state["optimizer_steps"]) == (4, 4)
    assert all(stopped.tensor(name).equal(before.tensor(name)) for name in before.shapes())
    result = train(arguments)
    assert (result["status"], "after step 5 of 6" in result["out"]) == (0, True), result


def test_a_run_that_stops_while_a_weight_is_not_finite_saves_nothing(train, corpus, tmp_path):
    arguments = overrides(corpus, tmp_path, run="a", steps=8, save_every=4, eval_every=0)
    result = train(arguments, "NaN in a weight after step 5, and SIGTERM in step 6")
    assert (result["status"], "rank 0 holds NaN in layers.1.ffn.down" in result["err"]) == (3, True), result
    assert names(tmp_path / "a") == ["step_00000004"]


def test_a_run_without_a_gradient_ends(train, corpus, tmp_path):
    """Weights so large that squares overflow: RMSNorm makes zeros of them, the loss is finite and stays what it is."""
    arguments = overrides(corpus, tmp_path, run="a", save_every=1, eval_every=0, guard__skip_limit=3)
    result = train(arguments, "weights scaled by 1e8 after step 5")
    assert result["status"] == 3, result
    assert "the run has diverged: its gradient stays zero: activations are so large that their squares" in result["err"]
    run = tmp_path / "a"
    (first,) = events(run, "zero_gradient")
    assert result["out"].count(f"the gradient of step {first['step']} is zero") == 1
    assert [line["reason"] for line in events(run, "save_refused")] == ["rank 0 has a gradient of zero"] * 2
    assert max(map(step_of, checkpoints(run / "checkpoints"))) == first["step"] - 1


@pytest.mark.parametrize(
    ("recorded", "in_memory", "step", "printed"),
    [
        ([], [], 3, "16:24"),
        ([], [(16, 64)], 3, "16:72"),  # left out by a rewind to step 2, then one more step
        ([(4, 8)], [(4, 8), (30, 40), (90, 99)], 4, "20:46,90:99"),
        ([(4, 8)], [(4, 8), (20, 40)], 2, "20:40"),
        ([(4, 8)], [(4, 8)], 2, ""),
    ],
)
def test_the_way_on_repeats_what_the_checkpoint_does_not_record(
    monkeypatch, tmp_path, recorded, in_memory, step, printed
):
    path = tmp_path / "step_00000002"
    path.mkdir()
    (path / "state.json").write_text(json.dumps({"format": FORMAT, "step": 2, "skipped_samples": recorded}))
    (path / "index.json").write_text("{}")
    monkeypatch.setattr(guard, "dist", SimpleNamespace(get_rank=lambda: 0, broadcast_object_list=lambda *_, **__: None))
    stream, recorder = SimpleNamespace(skipped=SampleRanges.of(in_memory)), SimpleNamespace(step=step)
    arguments: Any = (Config(), None, stream, recorder, tmp_path, 8, lambda: None)
    sentence = str(guard.Guard(*arguments).diverged("it spikes"))
    assert sentence.endswith("resume_from=step_00000002" + (f" guard.skip_samples={printed}" if printed else ""))
    # Typed, they leave out what was left out in memory and what was trained on since.
    typed = SampleRanges.of(recorded).extended(SampleRanges.parse(printed or None), 16)
    trained = {int(number) for number in stream.skipped.numbers(np.arange(16, 8 * step))}
    left_out = {number for first, end in typed.ranges for number in range(first, end)}
    assert left_out == trained | {number for first, end in in_memory for number in range(first, end)}


def test_going_back_sets_later_checkpoints_aside_and_happens_once(train, corpus, tmp_path):
    arguments = overrides(corpus, tmp_path, run="a", steps=6, save_every=2, eval_every=0, keep_last=9)
    assert train(arguments)["status"] == 0
    run, back = tmp_path / "a", [*arguments, "resume_from=step_2", "guard.skip_samples=20:24,16:17"]
    for wrong, sentence in (
        ("resume_from=step_3", "names no checkpoint in"),
        ("resume_from=step_x", "choose from step_00000002, step_00000004, step_00000006"),
        ("guard.skip_samples=17:", "is no range of samples: write A:B"),
        ("guard.skip_samples=9:8", "9:8 holds no sample"),
        ("guard.skip_samples=15:17", "samples below 16 have been trained on already"),
    ):
        result = train([*back, wrong])
        assert (result["status"], sentence in result["err"]) == (2, True), result
    result = train(back)
    assert result["status"] == 0, result
    assert "later ones are now called step_00000006.set_aside, step_00000004.set_aside" in result["out"]
    assert names(run)[:4] == ["step_00000002", "step_00000004", "step_00000004.set_aside", "step_00000006"]
    state = CheckpointReader(run / "checkpoints" / "step_00000006").state
    assert (state["skipped_samples"], state["course"]) == ([[16, 17], [20, 24]], "step_2 20:24,16:17")
    assert "there is nothing to do" in train(back)["out"]
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    (run / "summary.json").unlink()
    result = train(back)
    assert "after step 4 of 6" in result["out"]
    assert CheckpointReader(run / "checkpoints" / "step_00000006").state["batches_hash"] == state["batches_hash"]


def test_a_run_that_went_back_goes_on_once_that_checkpoint_is_pruned(train, corpus, tmp_path):
    arguments = overrides(corpus, tmp_path, run="a", steps=8, save_every=2, eval_every=0, keep_last=2)
    assert train([*arguments, "steps=4"])["status"] == 0
    run, back = tmp_path / "a", [*arguments, "resume_from=step_2", "guard.skip_samples=20:24"]
    result = train(back, "SIGTERM in step 5")
    assert (result["status"], "stopped after step 7" in result["out"]) == (0, True), result
    assert names(run) == ["step_00000004.set_aside", "step_00000006", "step_00000007"]
    result = train(back)
    assert (result["status"], "after step 7 of 8" in result["out"]) == (0, True), result
    state = CheckpointReader(run / "checkpoints" / "step_00000008").state
    assert (state["skipped_samples"], state["course"]) == ([[20, 24]], "step_2 20:24")
    # Whoever goes on with the run by its name does not go back again, and what was left out stays left out.
    result = train(["run=a", f"runs={tmp_path}", "steps=9", "guard.skip_samples=100:101"])
    assert (result["status"], "after step 8 of 9" in result["out"]) == (0, True), result
    state = CheckpointReader(run / "checkpoints" / "step_00000009").state
    assert (state["skipped_samples"], state["course"]) == ([[20, 24], [100, 101]], "step_2 20:24")
    other = train([*arguments, "resume_from=step_2", "guard.skip_samples=20:25"])
    assert (other["status"], "resume_from=step_2 names no checkpoint in" in other["err"]) == (2, True), other


def test_a_checkpoint_that_is_not_there_is_refused_before_the_corpus_is_prepared(train, corpus, tmp_path):
    prepared = tmp_path / "prepared"
    result = train(overrides(corpus, tmp_path, data__prepared=prepared, resume_from="step_3", run="a", steps=6))
    assert (result["status"], "names no checkpoint in" in result["err"]) == (2, True), result
    assert not prepared.exists()


def test_a_poisoned_checkpoint_of_an_older_version_is_passed_over(trained, tmp_path):
    source, path = trained(2, "1").end, tmp_path / "step_00000010"
    shutil.copytree(source, path)
    reader = CheckpointReader(path)
    name = path / "rank_00001.safetensors"
    content = bytearray(name.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    begin, _ = header["layers.1.ffn.down.exp_avg"]["data_offsets"]
    at = 8 + int.from_bytes(content[:8], "little") + begin + 4
    content[at : at + 4] = np.float32("nan").tobytes()
    name.write_bytes(content)
    files = {each.name: {"bytes": each.stat().st_size, "blake2b": file_hash(each)} for each in path.iterdir()}
    files.pop("manifest.json")
    write_manifest(path, reader.state, files)
    assert damage(path) == "rank_00001.safetensors holds NaN in layers.1.ffn.down (exp_avg)"
    assert damage(source) == ""
