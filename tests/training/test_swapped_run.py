"""A run that goes on with another arm: it starts as the untouched one, ends with the new arm, and its losses are shown."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch

from kernels.common.errors import UserError
from model import swap
from model.export import export
from model.weights import CheckpointReader
from tests.selection import quick
from tests.training.tiny import overrides

# A learned parameter in both arms, of the same name.
FORMULA, PARAMETERS = "silu(b*gate)*up", "{b: {init: 1.0, share: channel}}"
OLD = {"ffn": "custom", "ffn__formula": FORMULA, "ffn__parameters": PARAMETERS, "steps": 6, "run": "A", "save_every": 0}
NEW = ["ffn=custom", "ffn.name=soft", "ffn.formula=relu(gate)*up + 0.01*b*gate*up", "ffn.parameters={b: {init: 2.0}}"]
LENGTH = ["steps=8", "swap.steps=4", "eval_every=2", "telemetry_every=2", "eval_tokens=512"]


@pytest.fixture(scope="module")
def runs(corpus, no_group, tmp_path_factory):
    """A folder of runs with the run A of a formula, and the function that trains with overrides in it."""
    folder = tmp_path_factory.mktemp("swapped")

    def train(arguments: list[str]) -> str:
        result = no_group.run("command", module="train", arguments=arguments)
        assert result[0]["status"] == 0, result
        return result[0]["out"]

    train(overrides(corpus, folder, **OLD))
    return folder, train


@pytest.fixture
def swapped(runs, monkeypatch):
    """A function that runs the command, with its trainings in the warm process."""
    folder, train = runs

    def start(command: list[str]) -> int:
        train(command[2:])
        return 0

    def command(*arguments: str) -> Path:
        monkeypatch.setattr(swap, "_train", start)
        assert swap.main([f"runs={folder}", "run=A", *arguments]) == 0
        return folder

    return command


def lines(run: Path, kind: str) -> list[dict]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def reader(run: Path, step: int) -> CheckpointReader:
    return CheckpointReader(run / "checkpoints" / f"step_{step:08d}")


def test_a_swap_starts_as_the_untouched_run_and_ends_with_the_new_arm(swapped, capsys, tmp_path):
    folder = swapped("ffn=reglu", "swap.run=swap", *LENGTH)
    out = capsys.readouterr().out
    run, control = folder / "swap", folder / "swap-control"
    first, untouched = (lines(each, "train") for each in (run, control))
    # The same function of the same text, in another order of operations; then the functions part.
    assert first[0]["loss"] == pytest.approx(untouched[0]["loss"], rel=1e-6)
    assert first[0]["grad_norm"] == pytest.approx(untouched[0]["grad_norm"], rel=1e-5)
    assert abs(first[-1]["loss"] - untouched[-1]["loss"]) > 1e-4
    assert [line["scheduled.t"] for line in first] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert not any("scheduled.t" in line for line in untouched)
    zeros = {line["step"]: line["zeros"] for line in lines(run, "telemetry")}
    assert max(zeros[4]) == 0
    assert min(zeros[8]) > 0.2
    for shown in ("step", "zeros of h", "without the swap", "difference", "training loss of the first step"):
        assert shown in out
    last = next(line.split() for line in reversed(out.splitlines()) if line.split()[:2] == ["8", "1.00"])
    losses = [lines(each, "eval")[-2]["loss"] for each in (run, control)]
    assert last[3:] == [*(f"{loss:.4f}" for loss in losses), f"{losses[0] - losses[1]:+.4f}"]
    export(run, tmp_path / "hf")
    layers = json.loads((tmp_path / "hf" / "config.json").read_text())["ffn"]
    assert [(layer["formula"], layer["parameters"]) for layer in layers] == [("relu(gate) * up", {})] * 2


def test_weights_and_moments_come_along_and_what_is_new_starts_anew(swapped, runs):
    folder = swapped(*NEW, "swap.train=false", *LENGTH)
    old, new = reader(folder / "A", 6), reader(folder / "A-swap-soft", 0)
    assert new.state["optimizer_steps"] == old.state["optimizer_steps"] == 6
    assert new.state["skipped_samples"] == [[0, 48]]  # the text goes on where A has ended
    assert new.state["corpus_hash"] == old.state["corpus_hash"]
    origins = {name.replace("learned.b", "learned.b_old"): name for name in old.shapes()}
    for name, origin in origins.items():
        for key in ("", "exp_avg", "exp_avg_sq"):
            assert torch.equal(new.tensor(name, key), old.tensor(origin, key)), name
    added = {f"layers.{layer}.ffn.learned.b" for layer in (0, 1)}
    assert new.shapes().keys() == {*origins, *added}
    assert all(new.tensor(name).tolist() == [2.0] and not new.states(name) for name in added)
    assert lines(folder / "A-swap-soft", "event")[0]["event"] == "swapped"
    _, train = runs
    train(["run=A-swap-soft", f"runs={folder}", "steps=8"])  # as the printed command
    trained = reader(folder / "A-swap-soft", 8)
    assert trained.state["optimizer_steps"] == 14
    assert trained.tensor("layers.0.ffn.learned.b") != 2.0


@pytest.mark.parametrize(
    ("before", "after"),
    quick([("normuon", "normuon"), ("muon", "adamw"), ("adamw", "muon")], ("normuon", "normuon"), ("adamw", "muon")),
)
def test_the_optimizer_goes_on_if_it_is_the_same_one(corpus, runs, monkeypatch, before, after):
    folder, train = runs
    name = f"{before}-{after}"
    train(overrides(corpus, folder, run=name, optim=before, optim__lr=0.01, steps=2, save_every=0, telemetry_every=0))
    monkeypatch.setattr(swap, "_train", lambda command: int(not train(command[2:])))
    common = [f"optim={after}", "optim.lr=0.01", "optim.beta2=0.95", "steps=2", "swap.control=false"]
    assert swap.main([f"run={name}", f"runs={folder}", "ffn=bilinear", "swap.run=" + name + "-to", *common]) == 0
    old, start = reader(folder / name, 2), reader(folder / f"{name}-to", 0)
    matrix = "layers.0.ffn.up"
    assert start.state["optimizer_steps"] == (2 if before == after else 0)
    assert start.states(matrix) == (old.states(matrix) if before == after else ())
    for key, values in start.row_states(matrix).items():
        assert torch.equal(values, old.row_states(matrix)[key])
    assert bool(start.row_states(matrix)) == (after == before == "normuon")
    assert reader(folder / f"{name}-to", 2).state["optimizer_steps"] == (4 if before == after else 2)


def test_single_layers_may_be_swapped(swapped):
    folder = swapped("ffn.per_layer.0=reglu", "swap.run=one", "swap.train=false", "swap.control=false", "steps=4")
    shapes = reader(folder / "one", 0).shapes()
    assert {name for name in shapes if "learned" in name} == {f"layers.{layer}.ffn.learned.b" for layer in (0, 1)}
    text = (folder / "one" / "config.yaml").read_text()
    assert "(1 - t)*(silu(b*gate)*up) + t*(relu(gate) * up)" in text
    assert f"formula: {FORMULA}" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["ffn=relu2"],
            "A has custom, a gated arm, and ffn=relu2 is ungated: with other matrices it cannot start from the",
        ),
        (["ffn=relu2"], "choose one of bilinear, double_swiglu"),
        (["steps=9"], "name the new arm: ffn=reglu"),
        ([f"ffn.formula={FORMULA}"], "A has ffn=custom already: name another arm"),
        (
            ["ffn=reglu", "model.n_layers=3"],
            "model.n_layers is that of A, whose weights and text are gone on with: leave it out",
        ),
        (["ffn=reglu", "steps=3", "swap.steps=4"], "swap.steps=4 is more than the 3 steps of the run"),
        (["ffn=reglu", "step=5"], "A has no checkpoint of step 5: there are 6"),
        (["ffn=reglu", "swap.stepz=5"], "unknown key 'swap.stepz'"),
    ],
)
def test_what_cannot_be_swapped_is_refused(runs, arguments, sentence):
    folder, _ = runs
    before = sorted(folder.iterdir())
    with pytest.raises(UserError) as caught:
        swap.main([f"runs={folder}", "run=A", *arguments])
    assert sentence in str(caught.value)
    assert sorted(folder.iterdir()) == before


def test_the_same_command_goes_on_and_another_needs_another_name(swapped, capsys):
    arguments = ["ffn=geglu", "swap.train=false", *LENGTH]
    folder = swapped(*arguments)
    written = (folder / "A-swap-geglu" / "run_id").read_text()
    assert f"deepspeed train.py run=A-swap-geglu runs={folder} steps=8 eval_every=2" in capsys.readouterr().out
    swapped(*arguments)
    assert (folder / "A-swap-geglu" / "run_id").read_text() == written
    with pytest.raises(
        UserError, match=r"holds a run with other settings \(ffn.parameters.t.steps: 4 -> 3\): .*swap.run=NAME"
    ):
        swapped(*(each.replace("swap.steps=4", "swap.steps=3") for each in arguments))


def test_a_signal_stops_the_training_that_saves_and_then_the_command():
    child = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill(os.getppid(), signal.SIGINT)
sys.exit(signal.sigwait([signal.SIGTERM]) != signal.SIGTERM)
"""
    before = signal.getsignal(signal.SIGINT)
    assert swap._train([sys.executable, "-c", child]) == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert swap._train([sys.executable, "-c", "raise SystemExit(3)"]) == 3
