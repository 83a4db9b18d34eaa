"""A run resumes under any number of ranks and any ZeRO stage, and a failed save leaves earlier checkpoints intact."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from conf.load import load
from conf.shape import shape_of
from launch.estimate.counts import checkpoint_bytes
from model.health import damage
from model.weights import MOMENTS, CheckpointReader, checkpoints, step_of
from tests.selection import quick
from tests.training.tiny import newest_intact, overrides
from training.checkpoint import prune

TOPOLOGIES = list(itertools.product(("0", "1", "2", "3"), (1, 2)))
FP32 = 1e-5  # sums in another order, as in test_parity.py


def after(results: list[dict], steps: int, which: int) -> list[float]:
    return results[0]["losses"][steps * which : steps * (which + 1)]


@pytest.mark.parametrize("sources", ["the two most different and itself", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("zero", "world"), TOPOLOGIES)
def test_a_run_resumes_from_every_topology_under_every_other(trained, one_rank, two_ranks, zero, world, sources):
    target = trained(world, zero)
    # The most different topology first, so that it is loaded into a new engine.
    every = sorted(TOPOLOGIES, key=lambda t: (t[1] == world, abs(int(t[0]) - int(zero)) != 3, t[0] == zero))
    sources = every if sources == "all" else [*every[:2], (zero, world)]
    steps = [step for z, w in sources for step in (["load", str(trained(w, z).middle)], ["train", 3])]
    results = (one_rank if world == 1 else two_ranks).run("script", arguments=target.arguments, steps=steps)
    for number, (z, w) in enumerate(sources):
        uninterrupted = trained(w, z).losses[5:8]
        if (z, w) == (zero, world):
            assert after(results, 3, number) == uninterrupted
        else:
            assert after(results, 3, number) == pytest.approx(uninterrupted, rel=FP32), f"stage {z}, {w} rank(s)"


CASES = [("1", "bf16", 2), ("3", "bf16", 2), ("offload", "fp32", 2), ("2", "bf16", 2), ("1", "bf16", 1)]


# The slow ones are parts of the first.
@pytest.mark.parametrize(("zero", "precision", "accumulation"), quick(CASES, *CASES[:3]))
def test_the_same_topology_resumes_bit_for_bit(trained, two_ranks, tmp_path, zero, precision, accumulation):
    run = trained(2, zero, precision, accumulation)
    steps = [["load", str(run.middle)], ["train", 5], ["save", str(tmp_path)]]
    results = two_ranks.run("script", arguments=run.arguments, steps=steps)
    assert results[0]["losses"] == run.losses[5:]
    assert results[0]["norms"] == run.norms[5:]
    assert same_tensors(run.end, tmp_path / run.end.name)


def same_tensors(a: Path, b: Path) -> bool:
    """Return whether two checkpoints hold the same weights and moments, bit for bit."""
    first, second = CheckpointReader(a), CheckpointReader(b)
    assert first.shapes() == second.shapes()
    keys = ("", *MOMENTS)
    return all(
        torch.equal(first.tensor(name, key), second.tensor(name, key)) for name in first.shapes() for key in keys
    )


def test_sizes_that_two_ranks_do_not_divide_are_covered(trained):
    reader = CheckpointReader(trained(1, "0").end)
    odd = [name for name in reader.shapes() if reader.tensor(name).numel() % 2]
    assert {"norm.weight", "layers.0.ffn.down"} <= set(odd)


@pytest.mark.parametrize("optim", ["adamw", "muon", "normuon"])
def test_a_checkpoint_has_the_size_that_is_counted(corpus, one_rank, tmp_path, optim):
    arguments = overrides(corpus, optim=optim)
    one_rank.run("script", arguments=arguments, steps=[["train", 1], ["save", tmp_path]])
    with safe_open(tmp_path / "step_00000001" / "rank_00000.safetensors", framework="pt") as file:
        sizes = {name: 4 * math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    per_row = sum(size for name, size in sizes.items() if name.endswith(".row_variance"))
    assert bool(per_row) == (optim == "normuon")
    config = load(arguments)
    assert sum(sizes.values()) - per_row == checkpoint_bytes(shape_of(config), config.optim.name)


def test_a_failing_save_leaves_earlier_checkpoints_and_training_alone(trained, two_ranks, tmp_path):
    run = trained(2, "2")
    faults = [("tensors on a full disk", 0), ("tensors on a full disk", 1)]
    faults += [("manifest on a full disk", 0), ("rename refused", 0)]
    results = two_ranks.run("failing_save", arguments=run.arguments, folder=str(tmp_path / "ck"), faults=faults)
    for (failure, left), other in zip(results[0][:-1], results[1][:-1], strict=True):
        assert "the disk is full; free some space" in failure
        assert other == [failure, left]  # every rank returns the failure, whichever rank had it
        assert left == ["step_00000001"]
    losses, left = results[0][-1]
    assert losses == run.losses[:6]
    assert left == ["step_00000001", "step_00000006"]
    assert [damage(path) for path in checkpoints(tmp_path / "ck")] == ["", ""]


def test_a_checkpoint_before_the_first_applied_step(trained, two_ranks, tmp_path):
    for zero in ("0", "1", "2", "3"):
        arguments = trained(2, zero).arguments
        folder = tmp_path / zero
        poison = ["poison", "norm.weight", 0, float("nan")]
        steps = [poison, ["save", str(folder)], ["load", str(folder / "step_00000001")], ["train", 1]]
        results = two_ranks.run("script", arguments=arguments, steps=steps)
        reader = CheckpointReader(folder / "step_00000001")
        assert reader.state["optimizer_steps"] == 0
        assert not reader.tensor("head.weight", "exp_avg").any()
        assert results[0]["applied"] == [False, True]


@pytest.fixture
def saved(trained, tmp_path) -> Path:
    """A folder with the checkpoints of steps 5 and 10."""
    run = trained(1, "1")
    for path in (run.middle, run.end):
        shutil.copytree(path, tmp_path / "checkpoints" / path.name)
    return tmp_path / "checkpoints"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["rank_00000.safetensors", "index.json", "state.json", "manifest.json"])
def test_one_wrong_bit_anywhere_is_detected_and_the_older_checkpoint_used(saved, file):
    newest = saved / "step_00000010"
    # In the manifest, every kind of byte: names, sizes, hashes and JSON syntax.
    size = (newest / file).stat().st_size
    places = range(0, size, 7) if file == "manifest.json" else (0, size // 2, size - 1)
    for at in places:
        flip(newest / file, at)
        path, sentences = newest_intact(saved)
        text = (newest / file).read_bytes()[max(0, at - 20) : at + 20]
        assert path in (saved / "step_00000005", newest), text
        if path == newest:  # white space, or the format number, which is not read
            assert file == "manifest.json", at
        else:
            assert len(sentences) == 1
            assert str(newest) in sentences[0]
            assert file in sentences[0] or file == "manifest.json"
        flip(newest / file, at)
    assert newest_intact(saved) == (newest, [])


def test_a_missing_or_short_file_is_detected(saved):
    newest = saved / "step_00000010"
    content = (newest / "rank_00000.safetensors").read_bytes()
    (newest / "rank_00000.safetensors").write_bytes(content[:-1])
    assert f"has {len(content) - 1} bytes, not {len(content)}" in damage(newest)
    (newest / "rank_00000.safetensors").unlink()
    assert damage(newest) == "rank_00000.safetensors is missing"
    (newest / "manifest.json").unlink()
    assert damage(newest) == "manifest.json is missing or unreadable"
    shutil.rmtree(saved / "step_00000005")
    path, sentences = newest_intact(saved)
    assert path is None
    assert len(sentences) == 1


def test_a_missing_or_short_file_of_another_rank_is_detected_and_the_older_checkpoint_used(trained, tmp_path):
    run = trained(2, "2")
    for path in (run.middle, run.end):
        shutil.copytree(path, tmp_path / path.name)
    newest, shard = tmp_path / run.end.name, tmp_path / run.end.name / "rank_00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    wrong = f"rank_00001.safetensors has {len(content) // 2} bytes, not {len(content)}"
    assert newest_intact(tmp_path) == (
        tmp_path / run.middle.name,
        [f"checkpoint {newest} is damaged and was skipped: {wrong}"],
    )
    shard.unlink()
    path, sentences = newest_intact(tmp_path)
    assert path == tmp_path / run.middle.name
    assert sentences == [f"checkpoint {newest} is damaged and was skipped: rank_00001.safetensors is missing"]


def test_leftovers_of_interrupted_saves_are_ignored_and_removed(trained, one_rank, saved):
    (saved / ".step_00000020.123.tmp").mkdir()
    (saved / ".step_00000020.123.tmp" / "rank_00000.safetensors").write_bytes(b"half")
    (saved / ".step_00000001.old").mkdir()
    assert newest_intact(saved) == (saved / "step_00000010", [])
    assert [path.name for path in checkpoints(saved)] == ["step_00000010", "step_00000005"]
    steps = [["load", str(saved / "step_00000010")], ["train", 1], ["save", str(saved)]]
    one_rank.run("script", arguments=trained(1, "1").arguments, steps=steps)
    assert sorted(path.name for path in saved.iterdir()) == ["step_00000005", "step_00000010", "step_00000011"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(trained, one_rank, saved):
    flip(saved / "step_00000010" / "rank_00000.safetensors", 100_000)
    steps = [["load", str(saved / "step_00000005")], ["train", 5], ["save", str(saved)]]
    one_rank.run("script", arguments=trained(1, "1").arguments, steps=steps)
    assert newest_intact(saved) == (saved / "step_00000010", [])
    assert same_tensors(saved / "step_00000010", trained(1, "1").end)


def all_healthy(_: Path) -> str:
    return ""


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step, loss in enumerate((None, 3.0, 1.0, None, 2.0, 2.5), start=1):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / "state.json").write_text(json.dumps({"eval_loss": loss}))
    prune(tmp_path, 2, all_healthy)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["6", "5", "3"]
    prune(tmp_path, 1, all_healthy)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "6"]


def test_prune_counts_healthy_checkpoints(tmp_path):
    damaged = {9, 12}
    for step in (3, 6, 8, 9, 12):
        (tmp_path / f"step_{step:08d}").mkdir()

    def problem(path: Path) -> str:
        return "damaged" if step_of(path) in damaged else ""

    prune(tmp_path, 2, problem)
    assert kept_steps(tmp_path) == [
        6,
        8,
        9,
        12,
    ]  # damaged ones go when they are older than the healthy ones that are kept
    (tmp_path / "step_00000015").mkdir()
    (tmp_path / "step_00000018").mkdir()
    prune(tmp_path, 2, problem)
    assert kept_steps(tmp_path) == [15, 18]
    damaged.add(18)
    prune(tmp_path, 2, problem)
    assert kept_steps(tmp_path) == [15, 18]


def evaluated_run(run: Path, evaluations: list[tuple[int, int, float]], saved: range) -> Path:
    """Write a run folder with these (step, held-out tokens, loss), and empty checkpoints; return their folder."""
    lines = [
        {"kind": "eval", "step": step, "loss": loss, "held_out_tokens": tokens} for step, tokens, loss in evaluations
    ]
    for step in saved:
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "eval", "st')
    return run / "checkpoints"


def kept_steps(folder: Path) -> list[int]:
    return sorted(step_of(path) for path in checkpoints(folder))


def test_the_best_checkpoint_is_that_of_the_periodic_evaluation(tmp_path):
    # The last step is evaluated on all held-out text too, where every loss would be lower.
    losses = [(5, 128, 3.0), (10, 128, 2.0), (15, 128, float("nan")), (20, 128, 2.5), (20, 999, 1.0)]
    folder = evaluated_run(tmp_path, losses, range(5, 21, 5))
    prune(folder, 1, all_healthy)
    assert kept_steps(folder) == [10, 20]


def test_losses_on_other_numbers_of_tokens_do_not_compete(tmp_path):
    folder = evaluated_run(tmp_path, [(5, 128, 2.0), (10, 128, 3.0), (15, 256, 2.8), (20, 256, 2.9)], range(5, 26, 5))
    prune(folder, 1, all_healthy)
    assert kept_steps(folder) == [5, 15, 25]
