"""A plan run to its end: sweeps, seeds, what is recorded, and that stopping and starting again loses and repeats nothing."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ablation import slurm
from ablation.command import environment_of
from ablation.outcomes import DIVERGED, FAILED, FINISHED, STOPPED, WAITING, read_metrics, read_outcome
from ablation.run import Runner, main
from kernels.common.errors import ExitStatus, TryAgain, UserError
from launch.local import launcher
from tests.ablation.made import plan_of, write_run
from tests.training.tiny import PATIENCE, ROOT, TINY, Result, command, environment, shared_corpus

ARMS = ("linear", "swiglu")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """The command line of a tiny plan: 2 arms x 2 seeds."""
    folder = shared_corpus(tmp_path_factory)
    tiny = {k: v for k, v in TINY.items() if k != "steps"} | {"tokens": 12 * 8 * 32, "eval_tokens": 512}
    data = ["data=text", f"data.path={folder / 'corpus'}", f"data.prepared={folder / 'prepared'}"]
    plan = ["ablation=smoke", "ablation.sizes={tiny: model=nano}", "ablation.tile=1", "ablation.seeds=[0,1]"]
    plan.append("ablation.rates=[1]")
    return [*plan, *data, *(f"{key}={value}" for key, value in tiny.items())]


def run(words: list[str], folder: Path, *more: str) -> Result:
    return command(sys.executable, "-m", "ablation.run", *words, f"folder={folder}", *more)


@pytest.fixture(scope="module")
def done(words, tmp_path_factory) -> tuple[Path, Result]:
    """The plan trained to its end: by the command itself, but each run in a process that has torch imported already."""
    folder, printed = tmp_path_factory.mktemp("ablations"), io.StringIO()

    def train(runner: Runner, arguments: list[str], name: str, variables: dict[str, str]) -> int:
        ended = command(*arguments, **dict(variables.items() - os.environ.items()))
        (runner.folder / "logs" / f"{name}.log").write_text(ended.out + ended.err)
        return ended.status

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(Runner, "_run_logged", train)
        patch.setenv("COLUMNS", "200")
        status = main([*words, f"folder={folder}", "yes=true", "jobs=1"])
    return folder / "smoke", Result(status, printed.getvalue(), "")


def runs_of(folder: Path) -> dict[str, float]:
    return {path.name: read_outcome(path).loss for path in sorted((folder / "runs").iterdir())}


def test_every_run_of_a_plan_ends_and_is_reported(done):
    folder, result = done
    assert result.status == 0, result.err + result.out
    found = runs_of(folder)
    assert found.keys() == {f"tiny-{arm}-lr0.01-seed{seed}" for arm in ARMS for seed in (0, 1)}
    assert "4 runs: 2 arms x 1 size(s) x 2 seeds, equal in parameters" in result.out
    assert "4 runs have ended" in result.out
    assert f"python -m ablation.status {folder}   shows the runs as they train" in result.out
    assert "no verdict: a verdict needs 3 seeds, ablation.seeds has 2" in result.out
    for name, loss in found.items():
        assert f"{name}  finished, {loss:.4f} nats per token" in result.out


def test_runs_of_a_seed_trained_on_the_same_data_in_the_same_order(done):
    folder, _ = done
    hashes: dict[str, set[str]] = {}
    for path in (folder / "runs").iterdir():
        seed = path.name.rpartition("-")[2]
        hashes.setdefault(seed, set()).add(json.loads((path / "summary.json").read_text())["data_order_hash"])
    assert {seed: len(found) for seed, found in hashes.items()} == {"seed0": 1, "seed1": 1}
    assert len(set.union(*hashes.values())) == 2


def test_the_seeds_follow_at_the_vertex_of_the_sweep(monkeypatch, tmp_path):
    plan = plan_of("ablation=smoke", "ablation.rates=[0.5,1,2]", "ablation.rate_extensions=2", "ablation.seeds=[0,1]",
                   "ablation.rate_seeds=[8,9]")  # fmt: skip
    [size], arms = plan.arms, {"linear": 3e-3, "swiglu": 1.5e-3}
    trained = []

    def train(_, planned, __) -> int:
        trained.append(planned.name)
        write_run(
            plan, planned, tmp_path, 3.0 + math.log2(planned.lr / arms[planned.arm]) ** 2 / 10 + planned.seed / 100
        )
        return 0

    monkeypatch.setattr(Runner, "_train_in_process", train)
    console = Console(file=io.StringIO(), width=200)
    assert Runner(plan, tmp_path, 1, 0, console).run_all() == 0
    swept = {f"{size}-{arm}-lr{lr:g}-seed{seed}" for arm in arms for lr in (2e-3, 4e-3, 8e-3) for seed in (8, 9)}
    swept |= {f"{size}-swiglu-lr0.001-seed{seed}" for seed in (8, 9)}  # the vertex was below the lowest rate
    assert set(trained[:-4]) == swept
    assert trained[-4:] == [f"{size}-{arm}-lr{lr:g}-seed{seed}" for seed in (0, 1) for arm, lr in arms.items()]
    assert f"sweep  {trained[0]}  finished, " in console.file.getvalue()
    assert f"{len(trained)} runs have ended in {tmp_path}, 0 of them diverged" in console.file.getvalue()


def test_a_sweep_is_one_task_of_slurm_whatever_its_seeds(monkeypatch, tmp_path):
    plan = plan_of("ablation=smoke", "ablation.rates=[0.5,1,2]", "ablation.seeds=[0,1]", "ablation.rate_seeds=[8,9]")
    [size], trained = plan.arms, []

    def train(_, planned, __) -> int:
        trained.append(planned.name)
        write_run(plan, planned, tmp_path, 3.0 + math.log2(planned.lr / 3e-3) ** 2)
        return 0

    monkeypatch.setattr(Runner, "_train_in_process", train)
    tasks = {"sweep": f"{size}-linear-lr*-seed*", "seeds": f"{size}-linear-lr*-seed1"}
    for stage, task in tasks.items():
        assert task in slurm._open_tasks(plan, tmp_path)[stage]
        assert Runner(plan, tmp_path, 1, 0, Console(file=io.StringIO())).run_task(task) == 0
        assert task not in slurm._open_tasks(plan, tmp_path)[stage]
    *swept, final = trained
    assert len(swept) == 3 * 2
    assert all(fnmatch.fnmatchcase(name, tasks["sweep"]) for name in swept)
    assert final == f"{size}-linear-lr0.003-seed1"
    with pytest.raises(TryAgain, match="the sweep of swiglu at nano has not ended"):  # it may be queued again
        Runner(plan, tmp_path, 1, 0, Console(file=io.StringIO())).run_task(f"{size}-swiglu-lr*-seed0")
    failed = tmp_path / "runs" / f"{size}-swiglu-lr0.002-seed8"
    failed.mkdir(parents=True)
    (failed / "summary.json").write_text('{"status": "failed"}')
    with pytest.raises(UserError, match=r"the sweep of swiglu at nano has not ended: .*-seed8 is failed") as caught:
        Runner(plan, tmp_path, 1, 0, Console(file=io.StringIO())).run_task(f"{size}-swiglu-lr*-seed0")
    assert caught.value.status == ExitStatus.REFUSED


def test_again_it_runs_nothing(done, words):
    folder, _ = done
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    result = run(words, folder.parent, "yes=true")
    assert result.status == 0
    assert "4 of them have ended already" in result.out
    assert "finished," not in result.out
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")} == before


def test_another_plan_in_the_same_folder_is_refused_by_what_differs(done, in_process, words):
    folder, _ = done
    result = in_process(main, *words, "optim.beta2=0.9", f"folder={folder.parent}", "yes=true")
    assert result.status == 2
    assert f"{folder} holds the runs of another plan (it differs in arms.tiny.linear.optim.beta2" in result.err
    result = in_process(main, *words, "ablation.smallest_effect=0.5", f"folder={folder.parent}", "yes=true")
    assert "(it differs in plan.smallest_effect)" in result.err


@pytest.mark.slow
def test_a_stopped_plan_goes_on_and_ends_as_if_nothing_had_happened(done, words, tmp_path):
    arguments = [sys.executable, "-m", "ablation.run", *words, f"folder={tmp_path}", "yes=true"]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:  # the first run has ended, the second one begins
        if "finished," in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(PATIENCE) == 1
    assert "stopped; the same command continues from here" in rest
    result = run(words, tmp_path, "yes=true", "jobs=2")
    assert result.status == 0, result.err + result.out
    assert runs_of(tmp_path / "smoke") == runs_of(done[0])  # bit for bit


def test_nobody_to_ask_and_other_bad_input(in_process, words, tmp_path):
    for more, sentence in (
        ([], "there is no terminal to ask for confirmation: add yes=true"),
        (["yes=maybe"], "yes=maybe: expected true or false"),
        (["jobs=0"], "jobs=0: expected a whole number of at least 1"),
        (["ablation.budget=params"], "unknown budget 'params'"),
    ):
        result = in_process(main, *words, f"folder={tmp_path}", *more)
        assert (result.status, sentence in result.err) == (2, True), result.err
    swept = in_process(
        main, *words, f"folder={tmp_path}", "ablation.rates=[1,2]"
    )  # a plan is shown before the question
    assert "8 runs: 2 arms x 1 size(s) x (2 learning rates with seed 1000 + 2 seeds), equal in parameters" in swept.out
    assert list(tmp_path.iterdir()) == []


def test_runs_that_cannot_begin_are_told_of_with_their_logs(in_process, monkeypatch, words, tmp_path):
    refusal = "import sys; sys.stderr.write('error: there is no corpus\\n'); sys.exit(2)"
    monkeypatch.setattr("ablation.run.train_command", lambda *_: [sys.executable, "-S", "-c", refusal])
    result = in_process(main, *words, f"folder={tmp_path}", "yes=true", "jobs=2")
    assert result.status == 1
    folder, names = tmp_path / "smoke", [f"tiny-{arm}-lr0.01-seed{seed}" for arm in ARMS for seed in (0, 1)]
    for name in names:
        assert f"final  {name}  failed: see {folder / 'logs' / name}.log\n" in result.out
        assert (folder / "logs" / f"{name}.log").read_text() == "error: there is no corpus\n"
        assert read_outcome(folder / "runs" / name).state == STOPPED
    assert f"0 runs have ended in {folder}, 0 of them diverged" in result.out


def test_a_run_that_another_runner_began_in_the_same_moment_is_waited_for(monkeypatch, tmp_path):
    plan = plan_of("ablation=smoke", "ablation.rates=[1]", "ablation.seeds=[0,1]")
    [planned, *_] = plan.final_runs("nano", "linear", 4e-3)
    folder, begun, trains = tmp_path / "smoke", [], iter([False, True, True, False])

    def refused(*_) -> list[str]:
        begun.append(planned)
        return [sys.executable, "-c", "raise SystemExit(2)"]

    def is_running(_) -> bool:
        found = next(trains)
        if begun and not found:
            write_run(plan, planned, folder, 3.0)  # the other one's has ended
        return found

    monkeypatch.setattr("ablation.run.train_command", refused)
    monkeypatch.setattr("ablation.run.is_running", is_running)
    (folder / "logs").mkdir(parents=True)
    runner = Runner(plan, folder, 1, 0, Console(file=io.StringIO()))
    runner._train_one(planned)
    assert (begun, next(trains, "asked to the end"), runner.console.file.getvalue()) == (
        [planned],
        "asked to the end",
        "",
    )


# ------------------------------------------------------------------------------------------------- how a run stands


def test_how_a_run_stands_is_read_off_its_folder(done, tmp_path):
    folder, _ = done
    path = tmp_path / "run"
    assert read_outcome(path).state == WAITING
    shutil.copytree(next((folder / "runs").iterdir()), path)
    whole = read_outcome(path)
    assert (whole.state, whole.step) == (FINISHED, 12)
    assert whole.loss == json.loads((path / "summary.json").read_text())["final_eval_loss"]
    summary = json.loads((path / "summary.json").read_text())

    def with_summary(**changes) -> str:
        (path / "summary.json").write_text(json.dumps(summary | changes))
        return read_outcome(path).state

    assert with_summary(status="failed") == FAILED
    assert with_summary(status="stopped") == STOPPED
    assert with_summary(final_eval_loss=float("nan")) == DIVERGED
    (path / "summary.json").unlink()
    assert read_outcome(path).state == STOPPED  # killed
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "event", "step": 12, "event": "diverged"}\n{"kind": "tr')
    assert read_outcome(path).state == DIVERGED
    assert read_metrics(path)[1] == 1  # the half line


def test_runs_at_a_time_have_gpus_of_their_own_or_share_the_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    gpus = [environment_of(place, jobs=3, ranks=2)["CUDA_VISIBLE_DEVICES"] for place in range(3)]
    assert gpus == ["2,3", "5,7", "2,3"]  # the third shares
    assert environment_of(0, jobs=1, ranks=1)["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr("pathlib.Path.glob", lambda *_: iter(()))
    assert environment_of(1, jobs=2, ranks=2)["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in environment_of(0, jobs=1, ranks=1)
    assert launcher(1) == [sys.executable]
    assert launcher(2)[-1] == "--nproc-per-node=2"


@pytest.mark.slow
def test_a_plan_that_is_killed_again_and_again_ends_as_in_peace(words, tmp_path):
    overridden = [word for word in words if not word.startswith(("ablation=", "precision="))]
    done = command(
        sys.executable, "-m", "bench.faults", "campaign=plans", "cases=3", f"folder={tmp_path / 'faults'}", *overridden
    )
    assert done.status == 0, done.out + done.err
    assert "4 runs, 0 identities: all the same" in done.out  # these runs have no logger
