"""A plan's grid: every state of a run, learning rates past an edge, the time left, and that reading disturbs no run."""

from __future__ import annotations

import fcntl
import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from ablation import status
from ablation.outcomes import DIVERGED, FAILED, FINISHED, RUNNING, STOPPED, WAITING
from ablation.plan import Plan, PlannedRun
from ablation.status import Watcher, main, show, watch
from kernels.common.errors import UserError
from tests.ablation.made import all_planned, losses, make, plan_of, write_run

RULE = losses({"swiglu": -0.05}, noise=0.002)
WALL_SECONDS = 60.0  # of every run of `made`
EIGHT = ("relu", "gelu", "silu", "glu", "bilinear", "reglu", "geglu", "swiglu")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of("ablation=glu_variants", "tokens=600000")


def unfinished(folder: Path, name: str, lines: int, **summary) -> Path:
    """Make a run one that has written so many lines and this summary, and return its folder."""
    run = folder / "runs" / name
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(metrics[:lines]), encoding="utf-8")
    (run / "summary.json").unlink()
    if summary:
        (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return run


def printed(folder: Path, capsys) -> dict[str, list[str]]:
    """Return the words of each printed line by its first word."""
    assert main([str(folder), "once=true"]) == 0
    out = capsys.readouterr().out
    return {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}


def test_a_cell_shows_the_state_of_its_run(plan, copy, capsys):
    shutil.rmtree(copy / "runs" / "nano-gelu-lr0.004-seed0")
    unfinished(copy, "nano-gelu-lr0.004-seed1", 10)
    unfinished(copy, "nano-gelu-lr0.004-seed2", 10, status="failed")
    write_run(plan, PlannedRun("final", "nano", "gelu", 4e-3, 3), copy, math.nan)
    run = unfinished(copy, "nano-gelu-lr0.004-seed4", 10)
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = printed(copy, capsys)
        grid = Watcher(copy).snapshot()
    [running] = [state for state in grid.runs if state.planned.name == run.name]
    assert found["gelu"][3:] == [".", "stop", "fail", "div", f"{math.floor(100 * running.done)}%"]
    assert found["nano"] == ["0.002", "0.004", "0.008", "s0", "s1", "s2", "s3", "s4"]
    rule = {
        (planned.arm, planned.stage, planned.lr, planned.seed): f"{RULE(planned):.4f}"
        for planned in all_planned(plan, RULE)
    }
    swept = [RULE(PlannedRun("sweep", "nano", "relu", lr, seed)) for lr in (2e-3, 4e-3, 8e-3) for seed in (1000, 1001)]
    assert found["relu"][:3] == [f"{sum(swept[i : i + 2]) / 2:.4f}" for i in (0, 2, 4)]  # the mean of two seeds
    assert found["relu"][3:] == [rule["relu", "final", 4e-3, seed] for seed in range(5)]
    states = (WAITING, STOPPED, FAILED, DIVERGED, RUNNING, FINISHED)
    assert [grid.count(state) for state in states] == [1, 1, 1, 1, 1, 83]
    assert " ".join(found["88"]).startswith(
        "runs: 83 finished, 1 diverged, 1 running, 1 stopped, 1 failed, 1 waiting; "
    )
    assert found["failed:"] == ["see", f"{copy / 'logs'}/nano-gelu-lr0.004-seed2.log"]


def test_tokens_per_second_and_time_left_follow_from_finished_and_running_runs(copy):
    for seed in (0, 1):
        shutil.rmtree(copy / "runs" / f"nano-relu-lr0.004-seed{seed}")
    half = [unfinished(copy, f"nano-relu-lr0.004-seed{seed}", 17) for seed in (2, 3)]
    speeds = [json.loads((run / "metrics.jsonl").read_text().splitlines()[15])["tokens_per_second"] for run in half]
    idle = Watcher(copy).snapshot()
    assert idle.tokens_per_second == 0
    with open(half[0] / ".lock", "w") as one, open(half[1] / ".lock", "w") as other:
        for lock in (one, other):
            fcntl.flock(lock, fcntl.LOCK_EX)
        grid = Watcher(copy).snapshot()
    assert [state.done for state in grid.runs if state.outcome.state == RUNNING] == [0.5, 0.5]
    assert grid.tokens_per_second == pytest.approx(sum(speeds))
    # Arms have the FLOPs of the baseline within 1%, so 2 whole runs and 2 halves take 3 times as long as one.
    assert idle.seconds_left == pytest.approx(3 * WALL_SECONDS, rel=0.02)
    assert grid.seconds_left == pytest.approx(3 * WALL_SECONDS / 2, rel=0.02)


def test_before_a_run_has_finished_the_speed_is_that_of_those_that_run(plan, tmp_path):
    planned_runs = all_planned(plan, RULE)[:1]
    folder = make(plan, tmp_path, RULE, planned_runs)
    run = unfinished(folder, planned_runs[0].name, 17)
    assert math.isnan(Watcher(folder).snapshot().seconds_left)
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        grid = Watcher(folder).snapshot()
    tokens = plan.arms["nano"]["relu"].batch.tokens
    assert grid.seconds_left == pytest.approx(87.5 * tokens / grid.tokens_per_second, rel=0.02)


def test_rates_past_an_edge_have_a_column_and_arms_that_diverged_everywhere_no_seeds(plan, tmp_path, capsys):
    rule = lambda planned: math.nan if planned.arm == "glu" else RULE(planned)  # noqa: E731
    folder = make(plan, tmp_path, rule)
    write_run(plan, PlannedRun("sweep", "nano", "swiglu", 1.6e-2, 1000), folder, 2.5)
    write_run(plan, PlannedRun("sweep", "nano", "swiglu", 1.6e-2, 1001), folder, 2.6)
    found = printed(folder, capsys)
    assert found["nano"][:4] == ["0.002", "0.004", "0.008", "0.016"]
    assert found["swiglu"][3] == "2.5500"
    assert len(found["relu"]) == 8
    assert found["glu"] == ["div"] * 3
    grid = Watcher(folder).snapshot()
    assert grid.done
    assert len(grid.runs) == 7 * (3 * 2 + 5) + 3 * 2 + 2
    assert grid.count(DIVERGED) == 3 * 2


def test_a_rate_shows_the_seed_that_needs_attention(copy, capsys):
    name = "nano-gelu-lr0.002-seed1001"
    for lines, kept, cell in ((10, {"status": "failed"}, "fail"), (10, {}, "stop")):
        shutil.copytree(copy / "runs" / name, copy / "kept")
        unfinished(copy, name, lines, **kept)
        assert printed(copy, capsys)["gelu"][0] == cell
        shutil.rmtree(copy / "runs" / name)
        (copy / "kept").rename(copy / "runs" / name)
    run = unfinished(copy, name, 17)
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert printed(copy, capsys)["gelu"][0] == "75%"  # a whole run and a half


def test_before_anything_has_run_every_run_waits(plan, tmp_path, capsys):
    found = printed(make(plan, tmp_path, RULE, []), capsys)
    assert all(found[arm] == ["."] * 8 for arm in EIGHT)
    assert " ".join(found["88"]) == "runs: 88 waiting; the time left is known once a run has logged a speed"


@pytest.mark.parametrize(
    "words",
    [
        ["ablation=glu_variants", "ablation.arms=[relu,gelu,silu,smooth_relu2,swiglu_clamped,reglu,geglu,swiglu]"],
        ["ablation=learning_rate"],
        ["ablation=glu_variants", "ablation.seeds=[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14]"],
    ],
)
def test_it_fits_80_columns(words, tmp_path):
    plan = plan_of(*words, "tokens=600000")
    grid = Watcher(make(plan, tmp_path, RULE)).snapshot()
    console = Console(file=io.StringIO(), width=80)
    for part in show(grid, 80)[1:]:
        console.print(part)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.split()[0] in plan.arms["nano"]]
    numbers = [word for _, *row in rows for word in row]
    assert len(numbers) == len(plan.arms["nano"]) * (len(plan.config.rates) + len(plan.config.seeds))
    assert all(re.fullmatch(r"\d\.\d{3,4}", word) for word in numbers)  # nothing is cut or wrapped


def test_a_terminal_is_kept_up_to_date_until_every_run_has_ended(plan, copy, set_time):
    planned = next(planned for planned in all_planned(plan, RULE) if planned.stage == "final")
    unfinished(copy, planned.name, 10)
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        write_run(plan, planned, copy, 2.1234)

    set_time(status, sleep=pause)
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100, height=40)
    watch(Watcher(copy).snapshot, console)
    shown = console.file.getvalue()
    assert pauses == [2.0]
    assert shown.index("1 stopped") < shown.index("2.1234") < shown.index("88 runs: 88 finished;")


def test_of_a_terminal_that_is_too_low_the_counts_are_seen(copy):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100, height=8)
    watch(Watcher(copy).snapshot, console)
    assert "88 runs: 88 finished;" in console.file.getvalue()


def test_ctrl_c_ends_it_in_peace(copy, monkeypatch, set_time, capsys):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    unfinished(copy, "nano-gelu-lr0.004-seed1", 10)
    set_time(status, sleep=interrupt)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal
    assert main([str(copy)]) == 0
    assert "1 stopped" in capsys.readouterr().out


def test_runs_that_ended_are_read_once(copy, monkeypatch):
    watcher, read = Watcher(copy), []
    true_outcome = status.read_outcome
    monkeypatch.setattr(status, "read_outcome", lambda run: read.append(run.name) or true_outcome(run))
    unfinished(copy, "nano-gelu-lr0.004-seed1", 10)
    watcher.snapshot()
    assert len(read) == 88
    watcher.snapshot()
    assert read[88:] == ["nano-gelu-lr0.004-seed1"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{folder}"], "has no manifest.json: it is not a folder of `python -m ablation.run`"),
        (["once=true"], "expected the folder of one plan"),
        (["{folder}", "{folder}"], "expected the folder of one plan"),
        (["{folder}", "onse=true"], "unknown option 'onse': did you mean 'once'?"),
        (["{folder}", "once=1"], "once=1: expected true or false"),
    ],
)
def test_bad_input_is_refused(words, sentence, tmp_path):
    with pytest.raises(UserError, match=re.escape(sentence)):
        main([word.format(folder=tmp_path) for word in words])
