"""Metrics other than the loss: which way is better, where their values come from, and what their verdicts rest on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ablation.manifest import read_manifest
from ablation.metrics import LOSS, metric_of
from ablation.report import page
from ablation.results import read_results
from ablation.statistics import Pair, Verdict, compare
from ablation.verdict import sentences
from kernels.common.errors import UserError
from tests.ablation.made import losses, make, plan_of

WORDS = ["ablation=glu_variants", "ablation.arms=[relu,gelu,swiglu]", "tokens=600000"]
RULE = losses({"swiglu": -0.05, "gelu": 0.04}, noise=0.001)


@pytest.mark.parametrize(
    ("name", "higher"),
    [
        ("final_eval_loss", False),
        ("bits_per_byte", False),
        ("tokens_per_second", True),
        ("mfu", True),
        ("arc_easy:acc", True),
        ("wikitext:word_perplexity", False),
        ("pile_10k:bits_per_byte", False),
    ],
)
def test_which_way_is_better(name, higher):
    metric = metric_of(name)
    assert (metric.name, metric.higher_is_better) == (name, higher)


@pytest.mark.parametrize("name", ["loss", "acc", "", "arc_easy:", "a:b:c", "memory_gib"])
def test_an_unknown_metric_is_refused(name):
    with pytest.raises(UserError, match=r"unknown ablation\.metric"):
        metric_of(name)


def test_where_higher_is_better_the_verdicts_turn_round():
    base = dict(enumerate([0.30, 0.31, 0.29, 0.30, 0.32]))
    better, worse = ({seed: value + d for seed, value in base.items()} for d in (0.05, -0.05))
    pairs = [Pair("up", better, base, 0.0), Pair("down", worse, base, 0.0)]
    found = {c.arm: c.verdict for c in compare(pairs, 0.01, metric=metric_of("arc_easy:acc"))}
    assert found == {"up": Verdict.BETTER, "down": Verdict.WORSE}
    pairs = [Pair(pair.arm, pair.own, pair.base) for pair in pairs]
    assert {c.arm: c.verdict for c in compare(pairs, 0.01, metric=LOSS)} == {
        "up": Verdict.WORSE,
        "down": Verdict.BETTER,
    }
    diverged = Pair("up", better | {2: math.nan}, base, 0.0)
    [found] = compare([diverged], 0.01, metric=metric_of("arc_easy:acc"))
    assert found.difference == pytest.approx((4 * 0.05 - 0.29) / 5)
    assert found.verdict is not Verdict.BETTER


def test_bits_per_byte_are_the_loss_in_another_unit(tmp_path):
    by_loss = read_results(make(plan_of(*WORDS), tmp_path / "loss", RULE))
    plan = plan_of(*WORDS, "ablation.metric=bits_per_byte", "ablation.smallest_effect=0.004")
    by_bits = read_results(make(plan, tmp_path / "bits", RULE))
    for one, other in zip(by_loss.comparisons("nano"), by_bits.comparisons("nano"), strict=True):
        assert (one.arm, one.verdict) == (other.arm, other.verdict)
        assert other.difference == pytest.approx(one.difference / 2.5)
        assert other.regret == pytest.approx(one.regret / 2.5)
        assert other.p_holm == pytest.approx(one.p_holm)
        assert other.text.both == pytest.approx([end / 2.5 for end in one.text.both])
    assert sentences(by_bits)[0].startswith("At nano, over 5 seeds, in bits per byte: better than relu: swiglu by 0.0")


def test_throughput_is_compared_by_its_own_values(tmp_path):
    def figures(planned):
        return {"tokens_per_second": {"relu": 1000.0, "swiglu": 900.0, "gelu": 1100.0}[planned.arm] + planned.seed}

    plan = plan_of(*WORDS, "ablation.metric=tokens_per_second", "ablation.smallest_effect=10")
    results = read_results(make(plan, tmp_path, RULE, figures=figures))
    found = {c.arm: (c.difference, c.verdict) for c in results.comparisons("nano")}
    assert found == {"gelu": (100.0, Verdict.BETTER), "swiglu": (-100.0, Verdict.WORSE)}
    assert all(c.regret == 0.0 and c.text is None for c in results.comparisons("nano"))
    assert (
        "in tokens per second: better than relu: gelu by 100.0000; worse than relu: swiglu by 100"
        in sentences(results)[0]
    )
    text = page(results, [])
    assert "judged by\ntokens_per_second in tokens per second, higher is better" in text
    assert "tokens_per_second in tokens per second, where higher is better" in text
    assert "above 0, right of the line" in text
    assert "Learning rates were chosen by the held-out loss" in text


def test_where_higher_is_better_the_headline_turns_round_too(tmp_path):
    sizes = "ablation.sizes={small: model=nano, deep: model=nano model.n_layers=6}"
    plan = plan_of(*WORDS, sizes, "ablation.metric=tokens_per_second", "ablation.smallest_effect=10")
    speeds = {"relu": 1000.0, "swiglu": 900.0, "gelu": 1100.0}
    folder = make(plan, tmp_path, RULE, figures=lambda run: {"tokens_per_second": speeds[run.arm] + run.seed})
    assert sentences(read_results(folder))[0] == "At every size, better than relu: gelu; worse than relu: swiglu."


def evaluate(run: Path, task: str, value: float, **changes) -> None:
    """Leave a result of the harness in a run's folder, as `model.evaluate` does."""
    steps = json.loads((run / "summary.json").read_text())["steps"]
    content = {
        "step": steps,
        "limit": None,
        "results": {task: {"alias": task, "acc,none": value, "acc_stderr,none": 0.01}},
    }
    (run / "evaluations").mkdir(exist_ok=True)
    path = run / "evaluations" / f"{len(list((run / 'evaluations').iterdir()))}.json"
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def test_a_downstream_task_is_compared_by_what_the_harness_found(tmp_path):
    plan = plan_of(*WORDS, "ablation.metric=arc_easy:acc")
    folder = make(plan, tmp_path, RULE)
    assert read_results(folder).comparisons("nano") == []  # nothing is evaluated yet
    for path in (folder / "runs").iterdir():
        [_, arm, _, seed] = path.name.split("-")
        value = 0.3 + 0.01 * int(seed[4:] if len(seed) == 5 else 0) + 0.2 * (arm == "swiglu")
        evaluate(path, "arc_easy", 0.9, limit=100)  # of the first examples alone
        evaluate(path, "arc_easy", 0.9, step=1)
        evaluate(path, "arc_easy", value)
        evaluate(path, "hellaswag", 0.9)
        (path / "evaluations" / "damaged.json").write_text("{")
    for path in (folder / "runs").glob("*-gelu-*-seed1"):
        for file in (path / "evaluations").iterdir():
            file.unlink()
    found = {c.arm: c for c in read_results(folder).comparisons("nano")}
    assert found["swiglu"].verdict is Verdict.BETTER
    assert found["swiglu"].difference == pytest.approx(0.2)
    assert (found["gelu"].seeds, found["gelu"].withheld) == (4, True)
    assert read_manifest(folder).plan.metric == "arc_easy:acc"


@pytest.mark.parametrize(("task", "sign"), [("wikitext:word_perplexity", -1), ("cola:mcc", 1)])
def test_a_diverged_run_has_the_worst_value_of_any_and_none_is_cut_off_at_0(task, sign, tmp_path):
    """Perplexities have no ceiling, and a correlation may be negative."""
    plan = plan_of(*WORDS, f"ablation.metric={task}")
    diverges = lambda run: math.nan if (run.arm, run.seed) == ("swiglu", 2) else RULE(run)  # noqa: E731
    folder = make(plan, tmp_path, diverges)
    values = {"relu": 0.02, "gelu": -0.05, "swiglu": 0.05} if sign > 0 else {"relu": 30.0, "gelu": 40.0, "swiglu": 25.0}
    name, metric = task.split(":")
    for path in (folder / "runs").iterdir():
        steps = json.loads((path / "summary.json").read_text()).get("steps")
        (path / "evaluations").mkdir()
        results = {name: {f"{metric},none": values[path.name.split("-")[1]]}}
        content = {"step": steps, "limit": None, "results": results}
        (path / "evaluations" / "0.json").write_text(json.dumps(content), encoding="utf-8")
    found = {c.arm: c for c in read_results(folder).comparisons("nano")}
    assert found["gelu"].verdict is Verdict.WORSE
    assert found["gelu"].difference == pytest.approx(values["gelu"] - values["relu"])
    worst = min(0.0, *values.values()) if sign > 0 else max(values.values())
    expected = (4 * values["swiglu"] + worst) / 5 - values["relu"]
    assert found["swiglu"].difference == pytest.approx(expected)
    assert found["swiglu"].verdict is not Verdict.BETTER
