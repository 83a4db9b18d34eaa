"""`until=decided`: seeds are added, look by look, to the arms without a verdict, and to no others."""

from __future__ import annotations

import io
import math
import random
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from ablation import slurm
from ablation.growth import continue_plan
from ablation.manifest import write_manifest
from ablation.outcomes import WAITING
from ablation.plan import Plan, PlannedRun, counts_of_looks, possible_seeds
from ablation.results import read_results
from ablation.run import Runner
from ablation.statistics import Verdict
from ablation.status import Watcher
from kernels.common.errors import UserError
from tests.ablation.made import losses, plan_of, write_run

WORDS = ["ablation=glu_variants", "ablation.arms=[relu,gelu,swiglu]", "tokens=600000", "ablation.seeds=[0,1,2]",
         "ablation.until=decided"]  # fmt: skip


def noisy(planned: PlannedRun) -> float:
    """Swiglu is far ahead; how gelu differs takes some seeds to see."""
    scatter = random.Random(f"{planned.arm} {planned.seed}").uniform(-0.02, 0.02) if planned.arm == "gelu" else 0.0
    return losses({"swiglu": -0.3, "gelu": 0.03}, noise=0.002)(planned) + scatter


def run(plan: Plan, folder: Path, monkeypatch, rule=noisy) -> list[str]:
    """Run a plan as `python -m ablation.run` does; return the names of the runs, in the order in which they were trained."""
    trained = []

    def train(_, planned, __) -> int:
        trained.append(planned.name)
        write_run(plan, planned, folder, rule(planned))
        return 0

    monkeypatch.setattr(Runner, "_train_in_process", train)
    monkeypatch.setattr(Runner, "_measure_baselines", lambda *_: None)
    continued = continue_plan(plan, folder)
    write_manifest(continued.plan, folder, continued.amendment)
    assert Runner(continued.plan, folder, 1, 0, Console(file=io.StringIO())).run_all() == 0
    return trained


def seeds_of(folder: Path) -> dict[str, list[int]]:
    results = read_results(folder)
    return {arm: [r.planned.seed for r in results.final_runs("nano", arm)] for arm in results.arms("nano")}


def test_seeds_are_added_until_every_arm_is_decided(monkeypatch, tmp_path):
    plan = plan_of(*WORDS, "ablation.looks=[3,5,7,9,11]")
    trained = run(plan, tmp_path, monkeypatch)
    results, ran = read_results(tmp_path), seeds_of(tmp_path)
    assert {c.arm: c.verdict for c in results.comparisons("nano")} == {"gelu": Verdict.WORSE, "swiglu": Verdict.BETTER}
    assert ran["relu"] == ran["gelu"] == list(range(len(ran["gelu"])))
    assert len(ran["gelu"]) in (5, 7, 9)
    assert len(ran["swiglu"]) <= len(ran["gelu"])
    assert [c.seeds for c in results.comparisons("nano")] == [len(ran["gelu"]), len(ran["swiglu"])]
    assert run(plan, tmp_path, monkeypatch) == []
    assert results.notes == ()
    assert len(trained) == 3 * 3 * 2 + sum(map(len, ran.values()))


def test_no_seed_is_added_past_the_last_look(monkeypatch, tmp_path):
    plan = plan_of(*WORDS)
    assert counts_of_looks(plan.config) == (3, 4, 5, 6)
    to_and_fro = lambda planned: (  # noqa: E731
        3.0 + 0.05 * (-1) ** planned.seed * (planned.arm != "relu") + math.log2(planned.lr / 4e-3) ** 2
    )
    run(plan, tmp_path, monkeypatch, to_and_fro)
    assert seeds_of(tmp_path) == {arm: list(range(6)) for arm in ("relu", "gelu", "swiglu")}
    assert {c.verdict for c in read_results(tmp_path).comparisons("nano")} == {Verdict.UNDECIDED}


def test_further_seeds_follow_those_of_the_plan_and_are_none_of_the_sweep():
    plan = plan_of(*WORDS[:3], "ablation.seeds=[7,3,8]", "ablation.until=decided", "ablation.rate_seeds=[10,11]")
    assert possible_seeds(plan.config) == [7, 3, 8, 9, 12, 13]
    assert possible_seeds(plan_of(*WORDS, "ablation.looks=[3,4]").config) == [0, 1, 2, 3]
    assert possible_seeds(plan_of(*WORDS, "ablation.until=complete", "ablation.looks=[3,9]").config) == [0, 1, 2]


def test_on_a_cluster_the_same_command_submits_them(monkeypatch, tmp_path):
    plan = plan_of(*WORDS, "ablation.looks=[3,9]")
    some = plan_of(*WORDS[:-1], "ablation.looks=[3,9]")
    run(some, tmp_path / "some", monkeypatch)
    assert slurm._open_tasks(some, tmp_path / "some") == {"sweep": [], "seeds": []}
    continued = continue_plan(plan, tmp_path / "some")
    assert continued.amendment["added"] == {"until": ["complete", "decided"]}
    write_manifest(continued.plan, tmp_path / "some", continued.amendment)
    tasks = slurm._open_tasks(continued.plan, tmp_path / "some")["seeds"]
    undecided = [c.arm for c in read_results(tmp_path / "some").comparisons("nano") if c.verdict is Verdict.UNDECIDED]
    assert "gelu" in undecided
    assert set(tasks) == {f"nano-{arm}-lr*-seed{seed}" for arm in ("relu", *undecided) for seed in range(3, 9)}
    assert Runner(continued.plan, tmp_path / "some", 1, 0, Console(file=io.StringIO())).run_task(tasks[0]) == 0
    assert tasks[0] not in slurm._open_tasks(continued.plan, tmp_path / "some")["seeds"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("looks=5", r"ablation\.looks=5 is no list"),
        ("looks=[5,3]", r"ablation\.looks=\[5, 3\] must be numbers of seeds, ascending, from 2 on"),
        ("looks=[]", r"must be numbers of seeds"),
        ("looks=[1,3]", r"must be numbers of seeds"),
        ("looks=[3.5]", r"must be numbers of seeds"),
        ("until=bored", r"unknown ablation\.until 'bored'"),
        ("spending=all", r"unknown ablation\.spending 'all'"),
        ("reserve=1", r"ablation\.reserve=1\.0 must be a fraction"),
        ("reserve=-0.1", r"ablation\.reserve=-0\.1 must be a fraction"),
    ],
)
def test_what_no_plan_can_be_is_refused(key, message):
    with pytest.raises(UserError, match=message):
        plan_of(*WORDS, f"ablation.{key}")


def test_looks_that_no_seed_reaches_are_refused():
    with pytest.raises(UserError, match=r"begins after 4 seeds, and the plan has 3: no verdict would be made"):
        plan_of(*WORDS, "ablation.until=complete", "ablation.looks=[4,5]")


def test_status_shows_the_seeds_that_are_added_and_those_to_come(monkeypatch, tmp_path):
    plan = plan_of(*WORDS, "ablation.looks=[3,5,7,9,11]")
    trained = run(plan, tmp_path, monkeypatch)
    grid = Watcher(tmp_path).snapshot()
    assert grid.done
    assert {state.planned.name for state in grid.runs} == set(trained)
    last = max(seeds_of(tmp_path)["gelu"])
    for arm in ("relu", "gelu"):
        for seed in (last, last - 1):
            [folder] = tmp_path.glob(f"runs/nano-{arm}-lr*-seed{seed}")
            shutil.rmtree(folder)
    waiting = [state.planned for state in Watcher(tmp_path).snapshot().runs if state.outcome.state == WAITING]
    assert {(planned.arm, planned.seed) for planned in waiting} == {
        (arm, seed) for arm in ("relu", "gelu") for seed in (last, last - 1)
    }


def test_looks_without_a_seed_that_was_added_are_refused(monkeypatch, tmp_path):
    run(plan_of(*WORDS, "ablation.looks=[3,5,7,9,11]"), tmp_path, monkeypatch)
    for word in ("ablation.until=complete", "ablation.looks=[3,4]"):
        words = [*WORDS, "ablation.looks=[3,5,7,9,11]", word]
        with pytest.raises(UserError, match=r"has runs of seeds? [\d, and]+, which no look of this command compares"):
            continue_plan(plan_of(*words), tmp_path)
