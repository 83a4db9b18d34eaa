"""The verdict sentence: it follows from the comparison, and no arm is called better without a verdict."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest

from ablation.plan import PlannedRun
from ablation.results import baselines_path, read_results
from ablation.statistics import Verdict
from ablation.verdict import sentences
from tests.ablation.made import all_planned, losses, make, plan_of

OTHER_TEXT = "This holds for other text of its kind too (over 60 documents)."
TEXT = re.escape(OTHER_TEXT)
ARMS = "ablation.arms=[relu,gelu,silu,swiglu]"


@pytest.fixture(scope="module")
def plan():
    return plan_of("ablation=glu_variants", ARMS, "tokens=600000")


def test_better_worse_and_equivalent(plan, tmp_path):
    rule = losses({"swiglu": -0.05, "gelu": 0.04}, noise=0.001)
    results = read_results(make(plan, tmp_path, rule))
    found = {c.arm: abs(c.difference) for c in results.comparisons("nano")}
    assert sentences(results) == [
        f"At nano, over 5 seeds, in nats per token: better than relu: swiglu by {found['swiglu']:.4f}; "
        f"worse than relu: gelu by {found['gelu']:.4f}; equivalent to relu within 0.01: silu. {OTHER_TEXT}"
    ]


def test_a_difference_that_is_smaller_than_asked_for_is_said_so(tmp_path):
    plan = plan_of("ablation=glu_variants", ARMS, "tokens=600000", "ablation.smallest_effect=0.08")
    (sentence,) = sentences(read_results(make(plan, tmp_path, losses({"swiglu": -0.05, "gelu": 0.2}, noise=0.001))))
    assert re.search(r"better than relu: swiglu by 0\.0\d+ \(less than the 0\.08 asked for\); ", sentence)
    assert re.search(rf"worse than relu: gelu by [\d.]+; equivalent to relu within 0\.08: silu\. {TEXT}$", sentence)


def test_the_largest_difference_comes_first(plan, tmp_path):
    rule = losses({"silu": -0.03, "gelu": -0.02, "swiglu": -0.05}, noise=0.001)
    (sentence,) = sentences(read_results(make(plan, tmp_path, rule)))
    assert re.search(rf"better than relu: swiglu by [\d.]+, silu by [\d.]+ and gelu by [\d.]+\. {TEXT}$", sentence)


def test_it_says_which_verdicts_are_shown_for_this_text_alone(plan, tmp_path):
    folder = make(plan, tmp_path, losses({"swiglu": -0.05, "gelu": 0.04}, noise=0.001))

    def scatter(arm: str) -> None:
        """Let the differences of an arm scatter over documents, whose losses keep their mean."""
        for path in folder.glob(f"runs/*-{arm}-*/documents.json"):
            content = json.loads(path.read_text())
            added = [tokens * (-1) ** number for number, tokens in enumerate(content["tokens"])]
            excess = sum(added) / sum(content["tokens"])
            content["nats"] = [
                nats + more - excess * tokens
                for nats, more, tokens in zip(content["nats"], added, content["tokens"], strict=True)
            ]
            path.write_text(json.dumps(content))

    scatter("gelu")
    assert sentences(read_results(folder))[0].endswith(
        "This holds for other text of its kind too (over 60 documents), except for gelu."
    )
    for arm in ("swiglu", "silu"):
        scatter(arm)
    assert sentences(read_results(folder))[0].endswith(
        "This is shown for these 60 held-out documents only, not for other text."
    )
    for path in folder.glob("runs/*-swiglu-*/documents.json"):
        path.unlink()
    assert read_results(folder).comparisons("nano")[-1].text is None
    for path in folder.glob("runs/*/documents.json"):
        path.write_text("damaged")
    assert sentences(read_results(folder))[0].endswith("equivalent to relu within 0.01: silu.")


def test_arms_that_do_not_beat_a_bigram_model_are_named(plan, tmp_path):
    folder = make(plan, tmp_path, losses({"swiglu": -0.5, "gelu": 0.4}, noise=0.001))
    measured = {"held_out": "the text", "unigram": 6.0, "bigram": 3.2, "xz": None, "tokens": 1, "bytes_per_token": 3.0}
    path = baselines_path(folder, "nano")
    path.parent.mkdir()

    def end(**changes) -> str:
        path.write_text(json.dumps(measured | changes))
        return sentences(read_results(folder))[0].split(") ")[-1].split("documents). ")[-1]

    assert end() == "gelu does not beat a bigram model of as many tokens (3.200)."
    assert end(bigram=2.9) == "relu, gelu and silu do not beat a bigram model of as many tokens (2.900)."
    assert end(bigram=1.5) == "No arm beats a bigram model of as many tokens (1.500)."
    assert read_results(folder).baselines("nano") == {"unigram": 6.0, "bigram": 1.5}
    for damaged in ({"bigram": 9.0}, {"bigram": "3.2"}, {"held_out": "another text"}):
        assert "bigram" not in end(**damaged)
    path.write_text("[]")
    assert read_results(folder).baselines("nano") == {}


def test_no_winner_without_a_verdict(plan, tmp_path):
    for name, rule in {
        "noisy": losses({"swiglu": -0.05}, noise=0.05),  # undecided
        "edge": losses({"swiglu": -0.5}, best=4.0),  # blocked
        "alike": losses({}, noise=0.001),  # equivalent
    }.items():
        results = read_results(make(plan, tmp_path / name, rule))
        assert all(c.verdict not in (Verdict.BETTER, Verdict.WORSE) for c in results.comparisons("nano"))
        (sentence,) = sentences(results)
        assert "in nats per token: no arm is shown to be better than relu; " in sentence
        assert not re.search(r"(better|worse) than relu:", sentence)
        assert all(c.arm in sentence for c in results.comparisons("nano"))
    edge = "its best learning rate, 0.008, is the highest that was tried"
    (sentence,) = sentences(read_results(tmp_path / "edge" / "glu_variants"))
    assert "no verdict: " in sentence
    assert edge in sentence


def test_missing_seeds_are_counted(plan, tmp_path):
    folder = make(plan, tmp_path, losses({"swiglu": -0.05}, noise=0.001))
    shutil.rmtree(folder / "runs" / "nano-swiglu-lr0.004-seed3")
    (sentence,) = sentences(read_results(folder))
    withheld = re.escape("swiglu (4 seeds) (withheld until 5 seeds have ended: 4 have)")
    assert re.search(rf"over 5 seeds, in nats per token: no arm is .*; undecided: {withheld}\.", sentence)
    shutil.rmtree(folder / "runs" / "nano-relu-lr0.004-seed3")
    (sentence,) = sentences(read_results(folder))
    assert sentence == (
        "At nano, over 4 of 5 seeds, in nats per token: no arm is shown to be better than relu; undecided: swiglu, gelu and "
        "silu (withheld until 5 seeds have ended: 4 have)."
    )
    change = {"looks": [4, 5], "reserve": 0.0}
    planned = plan_of("ablation=glu_variants", ARMS, "tokens=600000", *(f"ablation.{k}={v}" for k, v in change.items()))
    rewritten = make(planned, folder.parent / "looks", losses({"swiglu": -0.05}, noise=0.001))
    shutil.rmtree(rewritten / "runs" / "nano-relu-lr0.004-seed3")
    (sentence,) = sentences(read_results(rewritten))
    assert "over 4 of 5 seeds, in nats per token: better than relu: swiglu by " in sentence


def test_the_reason_of_a_withheld_verdict_is_not_given_for_others(plan, tmp_path):
    noisy = losses({"swiglu": -0.05, "gelu": 0.01}, noise=0.001)
    wild = lambda p: noisy(p) + 0.3 * (-1) ** p.seed * (p.arm == "gelu")  # noqa: E731
    mixed = make(plan, tmp_path / "mixed", wild)
    shutil.rmtree(mixed / "runs" / "nano-swiglu-lr0.004-seed3")
    (sentence,) = sentences(read_results(mixed))
    assert re.search(r"undecided: gelu, swiglu \(4 seeds\)", sentence)
    assert "withheld" not in sentence


def test_a_diverged_seed_is_counted(plan, tmp_path):
    rule = losses({"swiglu": -0.05}, noise=0.001)
    results = read_results(
        make(
            plan, tmp_path, lambda planned: math.nan if (planned.arm, planned.seed) == ("swiglu", 2) else rule(planned)
        )
    )
    assert "1 of 5 seeds diverged" in sentences(results)[0]


def test_before_there_is_anything_to_compare(plan, tmp_path):
    rule = losses({})
    planned_runs = [planned for planned in all_planned(plan, rule) if planned.stage == "sweep"]
    expected = ["At nano, nothing is known yet: no arm shares a seed with relu."]
    assert sentences(read_results(make(plan, tmp_path, rule, planned_runs))) == expected
    one = [
        *planned_runs,
        next(planned for planned in all_planned(plan, rule) if (planned.stage, planned.arm) == ("final", "relu")),
    ]
    assert sentences(read_results(make(plan, tmp_path / "one", rule, one))) == expected


def test_every_size_has_its_sentence(tmp_path):
    sizes = "ablation.sizes={small: model=nano, deep: model=nano model.n_layers=6}"
    plan = plan_of("ablation=glu_variants", "ablation.arms=[relu,swiglu]", sizes, "tokens=600000")
    results = read_results(make(plan, tmp_path, losses({"swiglu": -0.05}, noise=0.001)))
    assert [sentence.split(",")[0] for sentence in sentences(results)] == ["At every size", "At small", "At deep"]
    assert sentences(results)[0] == "At every size, better than relu: swiglu."
    sizes_differ = losses({}, noise=0.001)
    only_small = make(
        plan, tmp_path / "b", lambda run: sizes_differ(run) - 0.05 * (run.size == "small") * (run.arm == "swiglu")
    )
    assert sentences(read_results(only_small))[0] == "No arm is shown to be better, or worse, than relu at every size."


def test_seeds_beyond_the_planned_ones_are_counted(tmp_path):
    plan = plan_of("ablation=glu_variants", ARMS, "tokens=600000", "ablation.seeds=[0,1,2]", "ablation.until=decided")
    rule = losses({"swiglu": -0.3}, noise=0.0003)
    more = [PlannedRun("final", "nano", arm, 4e-3, 3) for arm in ("relu", "gelu")]
    (sentence,) = sentences(read_results(make(plan, tmp_path, rule, [*all_planned(plan, rule), *more])))
    assert sentence.startswith("At nano, over 4 seeds, in nats per token: better than relu: swiglu (3 seeds) by ")
