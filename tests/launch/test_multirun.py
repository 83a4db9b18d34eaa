"""Sweeps of one command: which runs they are, that each has its own folder, and what is refused."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kernels.common.errors import UserError
from launch.multirun import expand, multirun
from tests.training.tiny import ROOT, command, environment, overrides, shared_corpus


def test_values_are_gone_through_in_order():
    assert expand(["ffn=relu,swiglu", "seed=0,1", "steps=3"]) == [
        [f"ffn={arm}", f"seed={seed}", "steps=3"] for arm in ("relu", "swiglu") for seed in (0, 1)
    ]
    assert expand(["seed=range(0,3)"]) == [["seed=0"], ["seed=1"], ["seed=2"]]
    formulas = ["ffn=custom", "ffn.formula='max(x, 0)','x*atan(x)'"]
    assert [run[1] for run in expand(formulas)] == ["ffn.formula='max(x, 0)'", "ffn.formula='x*atan(x)'"]
    assert expand(["prompts=[a,b]", "ffn=relu,gelu"])[0] == ["prompts=[a,b]", "ffn=relu"]


@pytest.mark.parametrize(
    ("swept", "values"),
    [
        ("tokens=1e6,2M", ["1e6", "2M"]),
        ("tokens=choice(1e6, 2M)", ["1e6", "2M"]),
        ("ffn=glob(re*)", ["reglu", "reglu2", "relu", "relu2"]),
        ("ffn=glob([re*,gelu],exclude=reglu*)", ["gelu", "relu", "relu2"]),
        ("ffn.per_layer={0: relu2},{last: gelu}", ["{0: relu2}", "{last: gelu}"]),
        ("prompts=['a,b'],[c]", ["['a,b']", "[c]"]),
    ],
)
def test_values_are_read_as_for_a_single_run(swept, values):
    assert [run[0].partition("=")[2] for run in expand([swept, "eval_every=3"])] == values


def test_a_formula_needs_no_quotes_beside_a_sweep():
    formulas = ["ffn=custom", "ffn.formula=max(x, 0),x*atan(x)", "seed=0,1"]
    assert [run[1] for run in expand(formulas)] == ["ffn.formula=max(x, 0)"] * 2 + ["ffn.formula=x*atan(x)"] * 2


def test_runs_that_learn_the_same_get_folders_of_their_own():
    assert [run[-1] for run in expand(["zero=1,2", "seed=0,1"])] == [
        f"run=nano-swiglu-seed{seed}-zero{stage}" for stage in (1, 2) for seed in (0, 1)
    ]
    assert expand(["runs=a,b"]) == [["runs=a"], ["runs=b"]]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["ffn=relu"], "--multirun needs several comma-separated values of a key"),
        (["ffn=relu,rellu"], "unknown"),
        (["ffn=relu,gelu", "run=mine"], "would train several runs in one folder: leave run=NAME out"),
        (["prompts=[a", "ffn=relu,gelu"], "cannot parse 'prompts=[a'"),
        (["zero=1,1"], "would train the same run twice"),
        (["optim.lr=interval(0,1)"], "optim.lr=interval(0,1) is a continuous range"),
        (["optim.lr=glob(*)"], "glob(...) selects choices of a group"),
        (["ffn=glob(z*)"], "ffn=glob(z*) matches no choice"),
        (["hydra/sweeper=optuna", "seed=0,1"], "Hydra composes the configuration, but its run folders, sweepers"),
    ],
)
def test_bad_input_is_one_sentence(words, why):
    with pytest.raises(UserError, match=re.escape(why)):
        expand(words)


def test_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="--multirun starts its runs itself"):
        multirun(["ffn=relu,gelu"])


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return overrides(shared_corpus(tmp_path_factory), tmp_path_factory.mktemp("runs"), steps=3, ffn="relu,gelu")


def folder_of(words: list[str]) -> Path:
    return Path(next(word for word in words if word.startswith("runs=")).partition("=")[2])


def test_every_run_is_trained_and_one_that_fails_does_not_stop_the_next(words, monkeypatch, capsys):
    """Its runs begin with torch imported; the next test starts the command and its runs as they are."""

    def train(arguments: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda: command(*arguments, **env).status)

    (folder_of(words) / expand_names(words)[0]).write_text("in the way")
    monkeypatch.setattr("launch.multirun.subprocess", SimpleNamespace(Popen=train))
    status, result = multirun(words), capsys.readouterr()
    assert status == 1
    assert re.findall(r"^run (\d of 2): ", result.out, re.MULTILINE) == ["1 of 2", "2 of 2"]
    assert re.search(r"^failed: .*ffn=relu", result.err, re.MULTILINE)
    [summary] = folder_of(words).glob("*/summary.json")
    assert json.loads(summary.read_text())["status"] == "finished"


def expand_names(words: list[str]) -> list[str]:
    from conf.load import load

    return [str(load(run).run) for run in expand(words)]


def test_a_stopped_sweep_saves_and_starts_no_more(words, tmp_path):
    long = [word for word in words if not word.startswith(("runs=", "steps="))] + [f"runs={tmp_path}", "steps=100000"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "train.py", "-m", *long], cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True
    )
    for line in process.stdout:
        if line.startswith("step   "):
            break
    process.send_signal(signal.SIGHUP)  # the terminal is lost; its other signals are handled alike
    out, err = process.communicate()
    assert process.returncode == 1, err
    assert "stopped; the same command resumes here" in out
    assert [json.loads(path.read_text())["status"] for path in tmp_path.glob("*/summary.json")] == ["stopped"]
    assert "run 2 of 2" not in out
