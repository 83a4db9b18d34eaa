"""Reading a plan's folder: numbers as the runs wrote them, and runs of anything else refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from scipy import stats

from ablation.growth import continue_plan
from ablation.learning_rates import arm_noises
from ablation.manifest import hashes_of, keep_earlier_rules, read_manifest, write_manifest
from ablation.plan import Plan
from ablation.report import page
from ablation.results import expected_runs, provenance_lines, read_results
from ablation.statistics import Verdict
from ablation.ttest import holm
from kernels.common.errors import UserError
from kernels.common.json_files import digest
from tests.ablation.made import VOCABULARY, all_planned, losses, make, plan_of, write_run

RULE = losses({"gelu": -0.002, "swiglu": -0.05}, noise=0.002)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of("ablation=glu_variants", "ablation.arms=[relu,gelu,swiglu]", "tokens=600000")


def change(path: Path, **values) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values), encoding="utf-8")


def test_losses_are_those_that_the_runs_wrote(plan, whole):
    results = read_results(whole)
    assert results.notes == ()
    assert len(results.runs) == 3 * (3 * 2 + 5)
    assert results.losses("nano") == {
        arm: {
            planned.seed: RULE(planned)
            for planned in all_planned(plan, RULE)
            if planned.stage == "final" and planned.arm == arm
        }
        for arm in ("relu", "gelu", "swiglu")
    }
    assert results.best_lr("nano", "swiglu") == 4e-3
    assert results.ceiling("nano") == math.log(VOCABULARY)
    verdicts = {c.arm: c.verdict for c in results.comparisons("nano")}
    assert verdicts["swiglu"] is Verdict.BETTER
    assert verdicts["gelu"] is not Verdict.BETTER


def test_a_manifest_separates_shared_from_differing_values(plan, whole):
    manifest = read_manifest(whole)
    assert set(manifest.arms["nano"]["relu"]) == set(manifest.arms["nano"]["swiglu"])
    assert set(manifest.arms["nano"]["relu"]) >= {"ffn.name", "ffn.formula", "model.d_ff"}
    assert all(not name.startswith(("data.", "optim.", "schedule.")) for name in manifest.arms["nano"]["relu"])
    assert manifest.learned("nano", "swiglu") == json.loads(json.dumps(plan.arms["nano"]["swiglu"].learned))
    assert manifest.hash == plan.hash


def test_a_manifest_has_the_provenance_of_every_start(plan, copy):
    before = read_manifest(copy)
    write_manifest(plan, copy)
    sessions = json.loads((copy / "manifest.json").read_text())["provenance"]
    assert len(sessions) == 2
    assert all({"date", "commit", "dirty", "machine", "versions", "command"} <= session.keys() for session in sessions)
    assert read_manifest(copy) == before  # it is not a part of what is compared


def test_where_the_runs_come_from(copy):
    assert provenance_lines(read_results(copy)) == []
    paths = sorted((copy / "runs").glob("*/summary.json"))
    for number, path in enumerate(paths):
        content = {"commit": "b" * 40 if number else "a" * 40, "dirty": not number, "date": str(number), "host": "h"}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": content}))
    one, others, warning = provenance_lines(read_results(copy))
    assert one.startswith("1 run(s): commit aaaaaaaaaaaa with uncommitted changes; 0; h; ")
    assert others.startswith(f"{len(paths) - 1} run(s): commit bbbbbbbbbbbb; 1; h; ")
    assert warning == "The runs were trained by different commits of the code"
    assert f"<li>{warning}</li>" in page(read_results(copy), [])


TAMPERED = {  # what: (path in the manifest, another value, name in the message)
    "width": (("arms", "nano", "swiglu", "model.d_ff"), 640, "model.d_ff"),
    "seed": (("plan", "seeds"), [0, 1, 2, 3, 7], "seeds"),
    "data": (("shared", "data.held_out"), 0.1, "data.held_out"),
    "schedule": (("shared", "schedule.warmup"), 0.1, "schedule.warmup"),
    "init": (("shared", "model.init_std"), 0.01, "model.init_std"),
    "budget": (("plan", "budget"), "flops", "budget"),
    "arm": (("arms", "nano", "swiglu", "ffn.formula"), "gelu(gate) * up", "ffn.formula"),
    "learning rate": (("shared", "optim.lr"), 0.002, "optim.lr"),
    "hash": (("hash",), "0123456789abcdef", "hash"),
    "metric": (("plan", "metric"), "bits_per_byte", "metric"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_changed_manifest_is_refused_by_the_name_of_the_field(plan, copy, what):
    (*places, last), value, name = TAMPERED[what]
    path = copy / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    inner = content
    for place in places:
        inner = inner[place]
    assert inner[last] != value
    inner[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    for refused in (lambda: read_results(copy), lambda: continue_plan(plan, copy)):
        with pytest.raises(UserError, match=rf"changed after the runs began: [\w.]*{name}$"):
            refused()


OF_RUNS = [what for what in TAMPERED if what not in ("budget", "metric", "hash", "seed")]


@pytest.mark.parametrize("what", OF_RUNS)
def test_a_manifest_with_forged_hashes_does_not_match_its_runs(copy, what):
    (part, *rest), value, name = TAMPERED[what]
    path = copy / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    inner = content[part]
    for place in rest[:-1]:
        inner = inner[place]
    inner[rest[-1]] = value
    content["hashes"][".".join((part, *rest))] = digest(value, 4)
    merged = {size: {a: content["shared"] | v for a, v in arms.items()} for size, arms in content["arms"].items()}
    content["hash"] = digest({"plan": content["plan"], "arms": merged})
    path.write_text(json.dumps(content), encoding="utf-8")
    if what == "learning rate":  # the plan's rates are factors of it, so its runs are missing
        assert "have not started" in " ".join(read_results(copy).notes)
        return
    with pytest.raises(UserError, match=rf"not a run of the plan glu_variants: {name} is"):
        read_results(copy)


def test_another_plan_in_the_same_folder_is_refused(copy):
    other = plan_of("ablation=glu_variants", "ablation.arms=[relu,gelu,swiglu]", "tokens=600000", "optim.beta2=0.95")
    with pytest.raises(UserError, match=r"runs of another plan \(it differs in arms.nano.gelu.optim.beta2"):
        continue_plan(other, copy)


def test_a_run_of_another_plan_is_refused(copy):
    run = next((copy / "runs").glob("nano-swiglu-*-seed0"))
    shutil.copytree(run, copy / "runs" / "nano-tanh-lr0.004-seed0")
    with pytest.raises(UserError, match=r"nano-tanh-lr0\.004-seed0 is not a run of the plan glu_variants"):
        read_results(copy)


def test_runs_of_one_seed_trained_on_the_same_data(copy):
    run = next((copy / "runs").glob("nano-swiglu-*-seed3"))
    change(run / "summary.json", data_order_hash="f" * 16)
    with pytest.raises(
        UserError, match=rf"{run.name} trained on other data than nano-gelu-.*-seed3: data_order_hash f{{16}}"
    ):
        read_results(copy)


def test_missing_and_half_written_runs_are_noted_and_the_others_count(copy):
    shutil.rmtree(copy / "runs" / "nano-gelu-lr0.004-seed2")
    half = copy / "runs" / "nano-swiglu-lr0.004-seed1"
    (half / "summary.json").unlink()
    (half / "metrics.jsonl").write_bytes((half / "metrics.jsonl").read_bytes()[:-20])
    results = read_results(copy)
    assert "1 run(s) have not started: nano-gelu-lr0.004-seed2" in results.notes
    assert f"{half.name}: 1 broken line(s) of metrics.jsonl were skipped" in results.notes
    assert any(note.startswith(f"{half.name} is stopped at step ") for note in results.notes)
    assert {c.arm: c.seeds for c in results.comparisons("nano")} == {"gelu": 4, "swiglu": 4}


def test_a_diverged_run_counts_as_an_untrained_model(plan, tmp_path):
    rule = lambda planned: math.nan if (planned.arm, planned.seed) == ("swiglu", 2) else RULE(planned)  # noqa: E731
    results = read_results(make(plan, tmp_path, rule))
    found = {c.arm: c for c in results.comparisons("nano")}
    assert found["swiglu"].diverged == 1
    assert found["swiglu"].difference > 0
    assert found["swiglu"].verdict is not Verdict.BETTER
    assert "nano-swiglu-lr0.004-seed2 diverged" in results.notes


def test_a_folder_of_an_earlier_version_keeps_its_sweep_and_its_text(tmp_path):
    words = ["ablation=glu_variants", "ablation.arms=[relu,swiglu]", "tokens=600000"]
    earlier = ["ablation.rate_seeds=[7]", "ablation.rate_choice=best", "ablation.held_out_files=0"]
    before = plan_of(*words, *earlier)
    folder = make(before, tmp_path, RULE)
    written = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["plan"]
    assert written["rate_seed"] == 7
    assert {"rate_seeds", "rate_choice", "held_out_files"}.isdisjoint(written)
    new = plan_of(*words).config
    kept = keep_earlier_rules(new, words, folder)
    assert (kept.rate_seeds, kept.rate_choice, kept.held_out_files) == ([7], "best", 0)
    continue_plan(plan_of(*words, *earlier), folder)
    typed = [*words, "ablation.rate_seeds=[8]"]
    assert keep_earlier_rules(plan_of(*typed).config, typed, folder).rate_seeds == [8]
    for place in (tmp_path / "none", make(plan_of(*words), tmp_path / "new", RULE, [])):
        assert keep_earlier_rules(new, words, place) == new


def test_a_best_rate_at_the_edge_blocks_the_verdict(plan, tmp_path):
    rule = losses({"swiglu": -0.05}, best=4.0)
    results = read_results(make(plan, tmp_path, rule))
    assert {c.verdict for c in results.comparisons("nano")} == {Verdict.BLOCKED}
    assert "its best learning rate, 0.008, is the highest that was tried" in results.comparisons("nano")[0].reason


def test_what_missed_learning_rates_cost_is_part_of_every_comparison(whole):
    results = read_results(whole)
    noises, regrets = results.noises("nano"), results.regrets("nano")
    sweeps = {arm: results.sweep_losses("nano", arm) for arm in results.arms("nano")}
    assert noises == arm_noises(sweeps, results.losses("nano"))
    assert all(noise.deviation > 0 for noise in noises.values())
    assert regrets == {arm: results.sweep("nano", arm).regret(noises[arm]) for arm in results.arms("nano")}
    for c in results.comparisons("nano"):
        assert c.regret == math.hypot(regrets[c.arm], regrets["relu"]) > 0
        assert c.p > stats.ttest_rel(*(list(results.losses("nano")[arm].values()) for arm in (c.arm, "relu"))).pvalue


def test_arms_and_sizes_are_one_family(tmp_path):
    sizes = "ablation.sizes={small: model=nano, deep: model=nano model.n_layers=6}"
    plan = plan_of("ablation=glu_variants", "ablation.arms=[relu,gelu,swiglu]", sizes, "tokens=600000")
    results = read_results(make(plan, tmp_path, losses({"swiglu": -0.05}, noise=0.002)))
    found = [c for size in results.sizes for c in results.comparisons(size)]
    assert [c.arm for c in found] == ["gelu", "swiglu"] * 2
    assert [c.p_holm for c in found] == holm([c.p for c in found])


def test_an_undetermined_regret_blocks_the_verdict(plan, tmp_path):
    """The best of the tried rates, beside one that diverged: how far the optimum lies away is not known."""
    plan = plan_of("ablation=glu_variants", "ablation.arms=[relu,swiglu]", "tokens=600000", "ablation.rate_choice=best")
    rule = lambda p: math.nan if p.arm == "swiglu" and p.lr > 5e-3 else RULE(p)  # noqa: E731
    [found] = read_results(make(plan, tmp_path, rule)).comparisons("nano")
    assert found.verdict is Verdict.BLOCKED
    assert found.reason == "how much its learning rate, 0.004, misses the best one is not determined"


def test_before_the_sweeps_end_there_is_nothing_to_compare(plan, tmp_path):
    planned_runs = [planned for planned in all_planned(plan, RULE) if planned.stage == "sweep"][:-1]
    results = read_results(make(plan, tmp_path, RULE, planned_runs))
    assert len(list(expected_runs(results))) == 3 * 3 * 2 + 2 * 5
    assert all(math.isnan(c.difference) for c in results.comparisons("nano"))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("plan", "seeds"), 3), (("plan", "seeds"), ["0"]), (("plan", "rates"), [0]), (("plan", "question"), None),
        (("plan", "rate_seeds"), []), (("plan", "rate_choice"), "worst"),
        (("plan", "tile"), "8"), (("plan", "baseline"), "gone"), (("arms",), {}), (("arms", "nano", "<b>"), {}),
        (("shared", "optim.lr"), "x"), (("shared", "optim.lr"), 10**400), (("arms", "nano", "gelu", "model.d_ff"), [8]),
        (("cost", "nano", "gelu", "mismatch"), None), (("cost", "nano", "gelu", "tokens"), 0.5), (("cost", "nano"), {}),
    ],
)  # fmt: skip
def test_a_manifest_of_impossible_values_is_refused_whatever_its_hashes(copy, place, value):
    path = copy / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    inner = content
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    content["hash"], content["hashes"] = hashes_of({part: content[part] for part in ("plan", "shared", "arms")})
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="is not the manifest of a plan"):
        read_manifest(copy)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        read_results(tmp_path)
    (tmp_path / "manifest.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(UserError, match="is not the manifest of a plan"):
        read_results(tmp_path)


def test_a_run_may_be_written_again(plan, copy):
    planned = next(
        planned for planned in all_planned(plan, RULE) if planned.stage == "final" and planned.arm == "swiglu"
    )
    write_run(plan, planned, copy, 2.5)
    assert read_results(copy).losses("nano")["swiglu"][planned.seed] == 2.5


def test_a_size_that_has_not_begun_counts_in_the_family(tmp_path):
    sizes = "ablation.sizes={nano: model=nano, deep: model=nano model.n_layers=6}"
    plan = plan_of("ablation=glu_variants", "ablation.arms=[relu,swiglu]", "tokens=600000", sizes)
    rule = losses({"swiglu": -0.05})
    both = read_results(make(plan, tmp_path / "both", rule)).comparisons("nano")
    nano = [planned for planned in all_planned(plan, rule) if planned.size == "nano"]
    results = read_results(make(plan, tmp_path / "nano", rule, nano))
    assert results.comparisons("deep") == []
    assert results.comparisons("nano")[0].p_holm == pytest.approx(2 * both[0].p)
