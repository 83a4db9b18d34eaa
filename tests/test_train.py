"""The command line, end to end: the result is the same under any launcher and after any interruption."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch

from model.weights import MOMENTS, CheckpointReader, checkpoints
from tests.training.started import Started, launched, members
from tests.training.tiny import (
    PATIENCE,
    ROOT,
    Result,
    command,
    contents,
    environment,
    newest_intact,
    overrides,
    shared_corpus,
)

TRAIN = ROOT / "train.py"
STEPS = 60
FP32 = 1e-5  # sums in another order, as in training/test_parity.py


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """The corpus that all tests of training use."""
    return shared_corpus(tmp_path_factory)


COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++", "ninja", "nvcc")


def watched(folder: Path, work: bool) -> dict[str, str]:
    """Return an environment in which every compiler call is logged to `calls`; if `work`, `cc` works."""
    folder.mkdir()
    for name in COMPILERS:
        real = shutil.which(name)
        then = f'exec "{real}" "$@"' if work and name == "cc" and real else "exit 1"
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{folder}/calls"\n{then}\n')
        (folder / name).chmod(0o755)
    places = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "XDG_CACHE_HOME": str(folder / "cache")}
    return {"PATH": f"{folder}{os.pathsep}{environment()['PATH']}", **places}


@pytest.fixture(scope="session")
def compilers(tmp_path_factory) -> dict[str, str]:
    """An environment in which compiler calls are logged."""
    return watched(tmp_path_factory.mktemp("watched") / "bin", work=True)


def arguments_of(corpus: Path, runs: Path, name: str, **changes) -> list[str]:
    settings = {"steps": STEPS, "save_every": 4, "eval_every": 20, "run": name} | changes
    # Prepared here, whichever tests have used the corpus before: the first run builds the tokenizer's library too.
    settings = {"data__prepared": runs / "prepared"} | settings
    return [str(TRAIN), *overrides(corpus, runs, **settings)]


def metrics(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run, "train")]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def final(run: Path) -> CheckpointReader:
    path, damaged = newest_intact(run / "checkpoints")
    assert damaged == []
    assert path.name == f"step_{STEPS:08d}"
    return CheckpointReader(path)


def assert_same_run(run: Path, other: Path) -> None:
    """Assert that two runs ended the same, bit for bit."""
    for key in ("status", "final_eval_loss", "bits_per_byte", "data_order_hash", "config_hash", "steps", "tokens"):
        assert summary(run)[key] == summary(other)[key], key
    assert losses(run) == losses(other)
    first, second = final(run), final(other)
    assert first.shapes() == second.shapes()
    for name, key in itertools.product(first.shapes(), ("", *MOMENTS)):
        assert torch.equal(first.tensor(name, key), second.tensor(name, key)), (name, key)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """The folder of all runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def uninterrupted(corpus, runs, compilers) -> tuple[Path, Result]:
    """An uninterrupted run by plain python."""
    result = command(sys.executable, *arguments_of(corpus, runs, "uninterrupted"), **compilers)
    assert result.status == 0, result.err
    return runs / "uninterrupted", result


@pytest.mark.usefixtures("uninterrupted", "stopped")
def test_only_the_kernels_of_the_model_are_built(compilers):
    calls = Path(compilers["TORCH_EXTENSIONS_DIR"]).with_name("calls").read_text().splitlines()
    ours = [line for line in calls if line == "cc --version" or "/formula-ffn/kernels/" in line]
    # Activation, activation with telemetry, norm, rotary, cross-entropy, the tokenizer's: one of three ranks built each.
    assert sum("/formula-ffn/kernels/" in line for line in ours) == 6
    # On import, DeepSpeed probes for a library by compiling one small file; a failure counts as its absence.
    assert [line for line in calls if line not in ours and "/test.c" not in line] == []
    assert not list(Path(compilers["TORCH_EXTENSIONS_DIR"]).rglob("*.so"))


def test_it_trains_without_a_compiler(uninterrupted, corpus, runs, tmp_path):
    arguments = arguments_of(corpus, runs, "no-compiler", steps=3, eval_every=0, save_every=0)
    result = command(sys.executable, *arguments, **watched(tmp_path / "bin", work=False))
    assert result.status == 0, result.err
    sentence = "warning: no C kernels, slower plain PyTorch computes instead: "
    assert result.out.count(sentence) == 1
    # The activation rounds differently; after three steps.
    assert losses(runs / "no-compiler")[0] == pytest.approx(losses(uninterrupted[0])[0], rel=FP32)


def test_a_line_per_step_and_the_end_are_printed(uninterrupted):
    run, result = uninterrupted
    steps = [line for line in result.out.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1].split("/")[0]) for line in steps] == list(range(1, STEPS + 1))
    assert "finished in" in result.out
    assert f"python -m model.generate run=uninterrupted runs={run.parent} prompt=ab" in result.out
    assert "another arm" not in result.out  # model.d_ff was typed, which fits this one


def test_the_run_folder_is_complete(uninterrupted):
    run, _ = uninterrupted
    expected = {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "samples.txt", "tokenizer"}
    assert expected <= {path.name for path in run.iterdir()}
    train, evaluated = metrics(run, "train"), metrics(run, "eval")
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in train] == [256 * step for step in range(1, STEPS + 1)]
    assert [line["step"] for line in evaluated] == [20, 40, 60]
    figures = {"kind", "step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "memory_gib"}
    assert all(line.keys() == figures for line in train)
    assert all({"loss", "bits_per_byte", "perplexity"} <= line.keys() for line in evaluated)
    events = [line["event"] for line in metrics(run, "event")]
    assert events[:2] == ["started", "first_step"]
    assert events.count("saved") == STEPS / 4
    ended = summary(run)
    keys = "status final_eval_loss bits_per_byte parameters ffn_parameters flops_per_token data_order_hash config_hash"
    assert {*keys.split(), "tokens", "wall_seconds"} <= ended.keys()
    assert [session["command"] for session in json.loads((run / "provenance.json").read_text())] == [
        ended["provenance"]["command"]
    ]
    assert ended["status"] == "finished"
    assert ended["final_eval_loss"] == evaluated[-1]["loss"]
    assert ended["tokens"] == 256 * STEPS
    weights = final(run).shapes()
    sizes = {name: torch.Size(shape).numel() for name, shape in weights.items() if not name.endswith(("avg", "avg_sq"))}
    assert ended["parameters"] == sum(sizes.values())
    assert ended["ffn_parameters"] == sum(size for name, size in sizes.items() if ".ffn." in name)
    assert losses(run)[-1] < losses(run)[0] - 0.5  # it learns


def test_checkpoints_kept_are_the_last_two_and_the_best(uninterrupted):
    run, _ = uninterrupted
    evaluated = {line["step"]: line["loss"] for line in metrics(run, "eval")}
    best = min(evaluated, key=evaluated.__getitem__)
    kept = {int(path.name.removeprefix("step_")) for path in checkpoints(run / "checkpoints")}
    assert kept == {STEPS, STEPS - 4, best}
    assert not list((run / "checkpoints").glob(".*"))


def test_a_finished_run_is_not_changed(uninterrupted, corpus):
    run, _ = uninterrupted
    before = contents(run)
    result = command(sys.executable, *arguments_of(corpus, run.parent, "uninterrupted"))
    assert (result.status, result.err) == (0, "")
    assert f"has finished its {STEPS} steps: there is nothing to do" in result.out
    assert contents(run) == before


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_resumes_as_if_nothing_had_happened(uninterrupted, corpus, runs, number):
    name = signal.Signals(number).name
    arguments = arguments_of(corpus, runs, name)
    started = Started(sys.executable, *arguments)
    started.until("step  9/60")  # the checkpoint of step 4 is on disk before that of step 8 is started
    started.process.send_signal(number)
    result = started.end()
    run = runs / name
    if number == signal.SIGKILL:
        assert result.status == -number
        assert not (run / "summary.json").exists()
    else:
        assert result.status == 0, result.err
        done = summary(run)["steps"]
        assert summary(run)["status"] == "stopped"
        assert 9 <= done < STEPS
        assert f"{name}: stopped after step {done}; the same command resumes the run" in result.out
        newest, _ = newest_intact(run / "checkpoints")
        assert newest.name == f"step_{done:08d}"
        assert metrics(run, "train")[-1]["step"] == done
    result = command(sys.executable, *arguments)
    assert result.status == 0, result.err
    assert "resuming " in result.out
    assert_same_run(run, uninterrupted[0])
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, STEPS + 1))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    every = [line["step"] for line in lines if line.get("event") != "saved"]  # a save completes during later steps
    assert every == sorted(every)


@pytest.fixture
def aborting(tmp_path) -> dict[str, str]:
    """An environment in which interpreter shutdown changes the status, as aborts in threads of process groups did."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\natexit.register(os._exit, 134)\n")
    assert command(sys.executable, "-c", "", PYTHONPATH=str(tmp_path)).status == 134
    return {"PYTHONPATH": os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))}


def test_an_error_of_the_program_is_a_traceback_and_status_1(aborting, tmp_path):
    with (tmp_path / "sitecustomize.py").open("a") as file:
        file.write("import conf.load\nconf.load.load = lambda argv: {}[argv[0]]\n")
    result = command(sys.executable, "train.py", "steps=3", **aborting)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("Traceback")
    assert result.err.endswith("KeyError: 'steps=3'\n")


@pytest.mark.slow
def test_interpreter_shutdown_does_not_change_the_status(uninterrupted, corpus, runs, aborting):
    arguments = arguments_of(corpus, runs, uninterrupted[0].name)
    assert command(sys.executable, *arguments, **aborting).status == 0
    assert command(sys.executable, *arguments, "steps=no", **aborting).status == 2
    arguments = arguments_of(corpus, runs, "stopped-aborting", save_every=0)
    started = Started(sys.executable, *arguments, **aborting)
    started.until("step  6/60")
    started.process.send_signal(signal.SIGTERM)
    assert started.end().status == 0


def test_an_evaluation_that_a_stop_prevented_is_made_after_resuming(corpus, runs):
    arguments = arguments_of(corpus, runs, "made-up", steps=30, eval_every=1, save_every=0)
    started = Started(sys.executable, *arguments)
    started.until("step  6/30")
    started.process.send_signal(signal.SIGTERM)
    assert started.end().status == 0
    run = runs / "made-up"
    done = summary(run)["steps"]
    assert [line["step"] for line in metrics(run, "eval")] == list(range(1, done))
    assert command(sys.executable, *arguments).status == 0
    assert [line["step"] for line in metrics(run, "eval")] == list(range(1, 31))


def test_killed_between_its_last_checkpoint_and_its_summary(uninterrupted, corpus):
    run, _ = uninterrupted
    before, ended = contents(run), summary(run)
    (run / "summary.json").unlink()
    result = command(sys.executable, *arguments_of(corpus, run.parent, "uninterrupted"))
    assert result.status == 0, result.err
    of_this_session = ("wall_seconds", "provenance")
    assert {key: value for key, value in summary(run).items() if key not in of_this_session} == {
        key: value for key, value in ended.items() if key not in of_this_session
    }
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, STEPS + 1))
    assert [line["step"] for line in metrics(run, "eval")] == [20, 40, 60]  # the evaluation of step 60 is not repeated
    for name, data in before.items():  # for later tests
        (run / name).write_bytes(data)


@pytest.fixture(scope="session")
def stopped(corpus, runs, compilers) -> tuple[Path, Result, Result]:
    """A run by the deepspeed launcher, which SIGTERM ends, that torchrun resumes; with the result of either session."""
    arguments = arguments_of(corpus, runs, "stopped", zero=2)
    result = stop_launcher("deepspeed", "SIGTERM", arguments, runs / "stopped", compilers)
    resumed = command(*launched("torchrun"), *arguments, **compilers)
    assert resumed.status == 0, resumed.out + resumed.err
    return runs / "stopped", result, resumed


def stop_launcher(launcher: str, how: str, arguments: list[str], run: Path, variables: dict[str, str]) -> Result:
    """Stop a run under a launcher in its middle. Assert that it has saved what it had, and that no process is left."""
    started = Started(*launched(launcher), *arguments, **variables)
    started.until("step  6/60")
    family = list(members(started))
    if how == "SIGTERM":  # kills `deepspeed` at once; nothing is forwarded, but the ranks detect that it has ended
        started.process.send_signal(signal.SIGTERM)
    else:  # a terminal sends Ctrl-C to every process
        os.killpg(started.process.pid, signal.SIGINT)
    result = started.end()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE)
    assert alive == []
    here = [p for p in psutil.process_iter(["cmdline"]) if f"run={run.name}" in " ".join(p.info["cmdline"] or ())]
    assert here == []
    assert summary(run)["status"] == "stopped", result.out + result.err
    assert newest_intact(run / "checkpoints")[0].name == f"step_{summary(run)['steps']:08d}"
    return result


def assert_close(a: list[float], b: list[float]) -> None:
    # Rounding differs from the first step on, and 60 steps amplify it: bound the first 10 tightly.
    assert a[:10] == pytest.approx(b[:10], rel=FP32)
    assert a == pytest.approx(b, rel=1e-3)


def test_stopped_under_deepspeed_and_resumed_under_torchrun_it_trains_the_same(uninterrupted, stopped):
    run, first, second = stopped
    assert_close(losses(run), losses(uninterrupted[0]))
    assert summary(run)["data_order_hash"] == summary(uninterrupted[0])["data_order_hash"]
    assert summary(run)["final_eval_loss"] == pytest.approx(summary(uninterrupted[0])["final_eval_loss"], rel=1e-3)
    # Only one rank prints.
    steps = [line for line in (first.out + second.out).splitlines() if line.startswith("step ")]
    assert len(steps) == len(set(steps)) == STEPS
    assert (first.out.count("finished in"), second.out.count("finished in")) == (0, 1)
    for result in (first, second):
        assert "Warning" not in result.out + result.err, result.out + result.err


@pytest.mark.slow  # the test above stops one of them
@pytest.mark.parametrize(("launcher", "how"), [("deepspeed", "Ctrl-C"), ("torchrun", "SIGTERM")])
def test_a_stopped_launcher_leaves_a_checkpoint_and_no_process(corpus, runs, launcher, how):
    name = f"{how}-{launcher}"
    stop_launcher(launcher, how, arguments_of(corpus, runs, name, zero=2), runs / name, {})


@pytest.mark.slow
def test_two_ranks_that_were_stopped_end_as_two_that_were_not(stopped, corpus, runs):
    whole = command(*launched("deepspeed"), *arguments_of(corpus, runs, "whole", zero=2))
    assert whole.status == 0, whole.out + whole.err
    assert "Warning" not in whole.out + whole.err, whole.out + whole.err
    assert_same_run(stopped[0], runs / "whole")


@pytest.mark.slow  # tests/training/test_parallel.py resumes from and under every parallelism, without a launcher
def test_a_run_of_tensor_ranks_resumes_as_one_process(corpus, runs):
    """Without conversion: the same command with other parallelism settings. Where none is typed, they are the run's."""
    width = {"model__d_ff": 44, "optim__eps": 1e-4}
    one = command(sys.executable, *arguments_of(corpus, runs, "one-process", **width))
    assert one.status == 0, one.out + one.err
    parallel = {"zero": 3, "parallel__tensor": 2, "parallel__sequence": "true"}
    started = Started(*launched("torchrun"), *arguments_of(corpus, runs, "tensor-ranks", **width, **parallel))
    started.until("step  6/60")
    started.process.send_signal(signal.SIGTERM)
    result = started.end()
    run = runs / "tensor-ranks"
    assert summary(run)["status"] == "stopped", result.out + result.err
    assert "tensor 2 with sequence x data 1" in result.out
    refused = command(sys.executable, *arguments_of(corpus, runs, "tensor-ranks", **width))
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "or set parallel.tensor=1" in refused.err
    single = {"zero": 1, "parallel__tensor": 1, "parallel__sequence": "false"}
    result = command(sys.executable, *arguments_of(corpus, runs, "tensor-ranks", **width, **single))
    assert result.status == 0, result.out + result.err
    assert_close(losses(run), losses(runs / "one-process"))
    for key in (
        "status",
        "parameters",
        "ffn_parameters",
        "flops_per_token",
        "data_order_hash",
        "config_hash",
        "tokens",
    ):
        assert summary(run)[key] == summary(runs / "one-process")[key], key
    resumed = next(line for line in metrics(run, "event") if line["event"] == "resumed")
    assert (resumed["world_size"], resumed["step"]) == (1, max(6, resumed["step"]))


def test_a_run_that_diverges_fails(corpus, runs):
    # A learning rate that overflows the weights: no later step has a finite gradient.
    arguments = arguments_of(corpus, runs, "diverged", optim__lr="1e38", schedule__warmup=0, eval_every=0, save_every=0)
    result = command(sys.executable, *arguments)
    run = runs / "diverged"
    assert result.status == 3
    assert "error: the run has diverged: the gradients of 20 steps in a row were not finite" in result.err
    assert "Traceback" not in result.err
    assert summary(run)["status"] == "failed"
    assert summary(run)["final_eval_loss"] is None
    skipped = [line["step"] for line in metrics(run, "event") if line["event"] == "skipped_step"]
    assert len(skipped) == 20
    assert result.out.count("was skipped: its gradient is not finite") == 20
    assert not list(checkpoints(run / "checkpoints"))


@pytest.mark.slow  # tests/bench/test_disks.py has one rank on such a disk
def test_a_last_save_that_fails_fails_the_run_on_every_rank(uninterrupted, corpus, runs):
    # No file may exceed 200 KiB: a checkpoint would, metrics do not.
    name = "too-large"
    arguments = arguments_of(corpus, runs, name, zero=1, steps=10, save_every=4, eval_every=0)
    result = command("bash", "-c", 'ulimit -f 200; exec "$@"', "bash", *launched("torchrun"), *arguments)
    run = runs / name
    assert result.status == 1
    assert result.out.count("the checkpoint of step 4 could not be saved: ") == 1
    assert result.out.count("the checkpoint of step 10 could not be saved: ") == 1
    assert "File too large" in result.out
    assert "loop.py" not in result.err  # no traceback: torchrun reports the ranks' status, but they raised nothing
    assert losses(run)[:2] == pytest.approx(
        losses(uninterrupted[0])[:2], rel=0.05
    )  # it trained: the learning rates differ, the initial weights do not
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, 11))
    assert (summary(run)["status"], summary(run)["final_eval_loss"]) == ("failed", None)
    assert list((run / "checkpoints").iterdir()) == []
    # With disk space again, the same command completes the run.
    result = command(sys.executable, *arguments)
    assert result.status == 0, result.err
    assert summary(run)["status"] == "finished"


def test_a_generated_text_is_a_function_of_the_seed(uninterrupted):
    run, _ = uninterrupted
    arguments = [sys.executable, "-m", "model.generate", f"run={run}", "prompt=ab", "tokens=6"]
    first, second = command(*arguments), command(*arguments)
    assert first == second
    assert first.status == 0
    assert first.out.startswith("ab")


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ("run=nowhere", "error: there is no run 'nowhere' in "),
        ("temprature=1", "error: unknown option 'temprature': did you mean 'temperature'?"),
        ("step=59", "has no checkpoint of step 59: there are "),
    ],
)
def test_generation_refuses_in_one_sentence(uninterrupted, option, error):
    run, _ = uninterrupted
    result = command(sys.executable, "-m", "model.generate", "run=uninterrupted", f"runs={run.parent}", option)
    assert (result.status, result.out) == (2, "")
    assert error in result.err
    assert result.err.count("\n") == 1
