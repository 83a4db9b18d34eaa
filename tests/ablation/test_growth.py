"""Plans that grow: what may be added, what the manifest says of it, and what the verdicts of a grown plan rest on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ablation.growth import continue_plan
from ablation.manifest import read_manifest, write_manifest
from ablation.plan import Plan
from ablation.results import Results, expected_runs, read_results
from ablation.run import main
from ablation.statistics import Verdict
from kernels.common.errors import UserError
from tests.ablation.made import all_planned, losses, make, plan_of, write_run

RULE = losses({"swiglu": -0.05}, noise=0.001)


def words(**keys: str) -> list[str]:
    keys = {"arms": "[relu,swiglu]", "seeds": "[0,1,2]"} | keys
    return ["ablation=glu_variants", "tokens=600000", *(f"ablation.{key}={value}" for key, value in keys.items())]


def grow(folder: Path, rule=RULE, **keys: str) -> Results:
    """Let the plan of a folder grow as `python -m ablation.run` does, and let its new runs end."""
    continued = continue_plan(plan_of(*words(**keys)), folder)
    write_manifest(continued.plan, folder, continued.amendment)
    while new := [run for run in expected_runs(read_results(folder)) if not (folder / "runs" / run.name).exists()]:
        for planned in new:
            write_run(continued.plan, planned, folder, rule(planned))
    return read_results(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    return make(plan_of(*words()), tmp_path, RULE)


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs").iterdir()}


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}


@pytest.mark.parametrize(
    ("keys", "added", "runs"),
    [
        ({"arms": "[relu,swiglu,gelu]"}, {"arms": ["gelu"]}, 3 * 2 + 3),
        ({"seeds": "[0,1,2,3]"}, {"seeds": [3]}, 2),
        ({"sizes": "{nano: model=nano, deep: model=nano model.n_layers=6}"}, {"sizes": ["deep"]}, 2 * (3 * 2 + 3)),
        ({"rates": "[0.25,0.5,1,2]"}, {"rates": [0.25]}, 2 * 2),
        ({"rate_seeds": "[1000,1001,1002]"}, {"rate_seeds": [1002]}, 2 * 3),
        (
            {"seeds": "[0,1,2,3,4]", "arms": "[relu,swiglu,gelu]"},
            {"seeds": [3, 4], "arms": ["gelu"]},
            2 * 2 + 3 * 2 + 5,
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_what_is_added_is_trained_and_nothing_else(folder, keys, added, runs):
    before, already = stamps(folder), names(folder)
    hash_before = read_manifest(folder).hash
    results = grow(folder, **keys)
    assert len(names(folder) - already) == runs
    assert stamps(folder).items() >= before.items()
    assert results.notes == ()
    [amendment] = results.manifest.amendments
    assert amendment["added"] == added
    assert amendment["seen"] == {"nano": {"swiglu": [3, "better"]}}
    assert amendment["date"].startswith("20")
    assert amendment["date"].endswith("+00:00")
    assert results.manifest.begun_as == hash_before != results.manifest.hash


def test_the_runs_of_a_grown_plan_keep_the_tags_of_its_beginning(folder):
    began = plan_of(*words())
    grown = continue_plan(plan_of(*words(seeds="[0,1,2,3]")), folder).plan
    run = grown.final_runs("nano", "swiglu", 4e-3)[-1]
    assert run.seed == 3
    assert f"plan:{began.hash}" in " ".join(grown.overrides(run, "runs"))
    assert f"plan:{grown.hash}" not in " ".join(grown.overrides(run, "runs"))


def test_a_plan_that_is_the_same_adds_nothing(folder):
    same = continue_plan(plan_of(*words()), folder)
    assert (same.amendment, same.notes, same.narrower) == (None, [], False)
    other_question = plan_of(*words(question="another?"))
    assert continue_plan(other_question, folder).amendment is None


def test_an_earlier_command_leaves_what_was_added_alone(folder):
    grow(folder, seeds="[0,1,2,3]", arms="[relu,swiglu,gelu]")
    manifest = (folder / "manifest.json").read_text()
    continued = continue_plan(plan_of(*words()), folder)
    assert continued.narrower
    assert continued.notes == [f"{folder} has the arm gelu, the seed 3 too; this command leaves them alone"]
    assert (folder / "manifest.json").read_text() == manifest


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"arms": "[relu,gelu]"},
            r"has the arm swiglu, and a plan can grow but not shrink: repeat them in ablation\.arms",
        ),
        ({"seeds": "[0,1,5]"}, r"has the seed 2, and a plan can grow but not shrink: repeat them in ablation\.seeds"),
        ({"smallest_effect": "0.02"}, r"another plan \(it differs in plan\.smallest_effect\)"),
        ({"rates": "[0.5,1]"}, r"has the learning rate 2 too, which its learning rates are chosen by: repeat them"),
        ({"rates": "[0.5,1]", "seeds": "[0,1,2,3]"}, r"has the learning rate 2 too"),
        ({"metric": "mfu"}, r"another plan \(it differs in plan\.metric\)"),
        ({"reserve": "0.5"}, r"another plan \(it differs in plan\.reserve\)"),
        (
            {"arms": "{relu: ffn=relu, swiglu: ffn=geglu, other: ffn=gelu}"},
            r"\(it differs in arms\.nano\.swiglu\.ffn\.formula",
        ),
    ],
)
def test_what_changes_or_shrinks_is_refused(folder, keys, message):
    with pytest.raises(UserError, match=message):
        continue_plan(plan_of(*words(**keys)), folder)


def test_the_command_says_what_it_adds_and_what_had_been_seen(folder, in_process):
    result = in_process(main, *words(seeds="[0,1,2,3]"), f"folder={folder.parent}")
    assert f"this adds to the plan of {folder}: the seed 3\n" in result.out
    assert "nano: seen so far: swiglu better after 3 seeds\n" in result.out
    assert read_manifest(folder).amendments == ()  # nobody confirmed it


def test_added_seeds_are_paid_for_with_what_is_left(folder):
    first = read_results(folder).comparisons("nano")[0]
    looks = read_manifest(folder).looks
    assert (looks.counts, looks.planned, looks.reserve) == ((3,), 3, 0.1)
    assert first.p == pytest.approx(first.p_holm)
    results = grow(folder, seeds="[0,1,2,3,4]")
    looks = results.manifest.looks
    assert (looks.counts, looks.planned) == ((3, 5), 3)
    assert looks.level(0.05, 5) == pytest.approx(0.0059, abs=1e-4)
    assert results.comparisons("nano")[0].verdict is Verdict.BETTER
    results = grow(folder, seeds="[0,1,2,3,4,5,6,7]")
    assert (results.manifest.looks.counts, results.manifest.looks.planned) == ((3, 5, 8), 3)
    assert len(results.manifest.amendments) == 2


def test_seeds_that_are_added_before_a_verdict_was_made_cost_nothing(tmp_path):
    plan = plan_of(*words())
    some = [run for run in all_planned(plan, RULE) if run.stage == "sweep" or run.seed < 2]
    results = grow(make(plan, tmp_path, RULE, some), seeds="[0,1,2,3,4]")
    assert (results.manifest.looks.counts, results.manifest.looks.planned) == ((5,), 5)
    assert results.manifest.amendments[0]["seen"] == {"nano": {"swiglu": [2, "undecided"]}}


def test_planned_looks_are_kept_when_their_seeds_are_added(tmp_path):
    folder = make(plan_of(*words(looks="[3,6]")), tmp_path, RULE)
    results = grow(folder, looks="[3,6]", seeds="[0,1,2,3,4,5]")
    assert (results.manifest.looks.counts, results.manifest.looks.planned) == ((3, 6), 6)
    later = grow(folder, looks="[3,6,9]", seeds="[0,1,2,3,4,5]")
    assert (later.manifest.looks.counts, later.manifest.looks.planned) == ((3, 6, 9), 6)
    assert later.manifest.amendments[-1]["added"] == {"looks": [[3, 6], [3, 6, 9]]}


def test_added_rates_leave_the_seeds_where_they_ran_and_widen_their_intervals(tmp_path):
    shifted = lambda planned: RULE(planned) + (planned.stage == "sweep") * 0.01 * (planned.lr < 1.5e-3)  # noqa: E731
    folder = make(plan_of(*words()), tmp_path, shifted)
    before = read_results(folder)
    rates = {arm: before.best_lr("nano", arm) for arm in ("relu", "swiglu")}
    results = grow(folder, shifted, rates="[0.125,0.25,0.5,1,2]")
    assert {arm: results.best_lr("nano", arm) for arm in rates} == rates
    manifest = read_manifest(folder)
    assert {arm: manifest.chosen["nano", arm].lr for arm in rates} == rates
    swept = results.sweep("nano", "swiglu")
    assert set(results.sweep_losses("nano", "swiglu")) == {5e-4, 1e-3, 2e-3, 4e-3, 8e-3}
    assert swept.best_lr == rates["swiglu"]
    vertex = swept.best_lr / 2**swept.distance
    assert swept.loss == pytest.approx(swept.rise * math.log2(swept.best_lr / vertex) ** 2 + swept.at(vertex).loss)
    assert results.notes == ()


@pytest.mark.parametrize("what", ["begun_as", "chosen", "amendments"])
def test_a_changed_record_of_growth_is_refused(folder, what):
    grow(folder, seeds="[0,1,2,3]")
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["growth"][what] = "x" * 16 if what == "begun_as" else {"nano": {}} if what == "chosen" else []
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="changed after the runs began: growth"):
        read_results(folder)


def test_a_folder_of_an_earlier_version_has_nothing_left_for_added_seeds(tmp_path):
    folder = make(plan_of(*words(reserve="0.0")), tmp_path, losses({"swiglu": -0.0005}, noise=0.02))
    results = grow(folder, losses({"swiglu": -0.05}, noise=0.001), reserve="0.0", seeds="[0,1,2,3,4]")
    [found] = results.comparisons("nano")
    assert found.verdict is Verdict.UNDECIDED
    assert found.reason == "its earlier verdicts spent the whole error probability (ablation.reserve=0)"


def test_a_grown_plan_is_a_plan_like_others(folder):
    results = grow(folder, seeds="[0,1,2,3]", arms="[relu,swiglu,gelu]")
    plan: Plan = continue_plan(plan_of(*words(seeds="[0,1,2,3]", arms="[relu,swiglu,gelu]")), folder).plan
    assert plan.hash == results.manifest.hash
    assert plan.begun_as == results.manifest.begun_as
    write_manifest(plan, folder)
    assert read_manifest(folder).amendments == results.manifest.amendments
