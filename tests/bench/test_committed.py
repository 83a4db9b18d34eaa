"""The tables and pages of `bench/results/glu_variants` and `optimizer_by_arm` agree with the losses in `results.csv`."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from pathlib import Path

import pytest

from ablation.learning_rates import arm_noises, sweep_result
from ablation.looks import Looks
from ablation.multipliers import multipliers, series
from ablation.rank_agreement import agreements
from ablation.report import comparison_rows
from ablation.results import Results, read_results
from ablation.statistics import Comparison, Verdict, compare, pairs_with
from bench.verdicts import judge
from conf.ablation_schema import AblationConfig
from tests.training.tiny import ROOT

FOLDER = ROOT / "bench" / "results" / "glu_variants"
BY_OPTIMIZER = ROOT / "bench" / "results" / "optimizer_by_arm"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def rows(name: str, folder: Path = FOLDER) -> list[dict[str, str]]:
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def recomputed(size: str) -> dict[str, Comparison]:
    losses: dict[str, dict[int, float]] = {}
    for row in rows("results.csv"):
        if (row["size"], row["stage"]) == (size, "final"):
            losses.setdefault(row["arm"], {})[int(row["seed"])] = float(row["final_eval_loss"])
    assert {len(of_arm) for of_arm in losses.values()} == {5}
    return {c.arm: c for c in compare(pairs_with("relu", losses, math.log(4096)), 0.01)}


@pytest.mark.parametrize("size", ["nano", "small"])
def test_verdicts_follow_from_the_losses(size):
    expected = recomputed(size)
    committed = [row for row in rows("comparisons.csv") if row["size"] == size]
    assert len(committed) == len(expected) == 7
    for row in committed:
        c = expected[row["arm"]]
        assert row["verdict"].replace("underpowered", "undecided") == c.verdict.value  # the word of version 0.2
        figures = (c.difference, *c.interval, c.p, c.p_holm, c.detectable)
        names = ("difference", "interval_low", "interval_high", "p", "p_holm", "detectable")
        assert [float(row[name]) for name in names] == pytest.approx(figures, rel=1e-9)


@pytest.mark.parametrize("size", ["nano", "small"])
def test_the_page_agrees_with_the_tables(size):
    table = PAGE[PAGE.index(f"| {size} | verdict |") :].split("\n\n")[0].splitlines()[2:]
    committed = {row["arm"]: row for row in rows("comparisons.csv") if row["size"] == size}
    assert len(table) == len(committed)
    for line in table:
        arm, verdict, difference, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        assert verdict == committed[arm]["verdict"]
        on_page = [float(number) for number in re.findall(r"[-+][0-9.]+", difference)]
        exact = [float(committed[arm][name]) for name in ("difference", "interval_low", "interval_high")]
        assert on_page == pytest.approx(exact, abs=0.0005000001)  # three digits


def test_every_figure_of_the_page_exists():
    for name in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (FOLDER / name.partition("#")[0]).is_file(), name


@pytest.mark.parametrize(("plan", "baseline"), [("xielu_2024", "swiglu"), ("narang_2021", "relu")])
def test_the_verdicts_of_replications_follow_from_the_losses(plan, baseline):
    folder = ROOT / "bench" / "results" / "replications" / plan
    swept: dict[str, dict[float, dict[int, float]]] = {}
    losses: dict[str, dict[int, float]] = {}
    for row in rows("results.csv", folder):
        assert row["state"] == "finished"
        if row["stage"] == "sweep":
            of_seeds = swept.setdefault(row["arm"], {}).setdefault(float(row["learning_rate"]), {})
        else:
            of_seeds = losses.setdefault(row["arm"], {})
        of_seeds[int(row["seed"])] = float(row["final_eval_loss"])
    noises, sweeps = arm_noises(swept, losses), {arm: sweep_result(of_arm) for arm, of_arm in swept.items()}
    assert not any(sweep.edge for sweep in sweeps.values())
    regrets = {arm: sweep.regret(noises[arm]) for arm, sweep in sweeps.items()}
    seeds = tuple(sorted(losses[baseline]))
    looks = Looks(seeds, (len(seeds),), len(seeds), AblationConfig().reserve)
    expected = {c.arm: c for c in compare(pairs_with(baseline, losses, math.log(4096), {}, regrets), 0.01, looks=looks)}
    committed = rows("comparisons.csv", folder)
    assert {row["arm"] for row in committed} == expected.keys()
    for row in committed:
        c = expected[row["arm"]]
        assert row["verdict"] == c.verdict.value
        names = ("difference", "interval_low", "interval_high", "regret", "p_holm")
        assert [float(row[name]) for name in names] == pytest.approx(
            (c.difference, *c.interval, c.regret, c.p_holm), rel=1e-6
        )


@pytest.fixture(scope="module")
def by_optimizer() -> Results:
    return read_results(BY_OPTIMIZER)


@pytest.mark.parametrize("size", ["adamw", "muon", "adamw_4m"])
def test_the_tables_of_the_optimizers_are_those_of_the_runs(by_optimizer, size):
    committed = [row for row in rows("comparisons.csv", BY_OPTIMIZER) if row["size"] == size]
    for row, found in zip(committed, comparison_rows(by_optimizer, size), strict=True):
        numbers = {name for name, value in found.items() if isinstance(value, float)}
        finite = {name for name in numbers if math.isfinite(found[name])}
        assert {name for name in numbers if row[name]} == finite
        assert {name: float(row[name]) for name in finite} == pytest.approx({n: found[n] for n in finite}, rel=1e-6)
        texts = found.keys() - numbers
        assert {name: row[name] for name in texts} == {name: str(found[name]) for name in texts}


@pytest.mark.parametrize(("size", "heading"), [("adamw", "AdamW"), ("muon", "Muon"), ("adamw_4m", "AdamW, 4M tokens")])
def test_the_page_of_the_optimizers_is_that_of_the_runs(by_optimizer, size, heading):
    page = (BY_OPTIMIZER / "README.md").read_text(encoding="utf-8")
    losses = by_optimizer.losses(size)
    means = {arm: sum(of_arm.values()) / 5 for arm, of_arm in losses.items()}
    table = page[page.index(f"| {heading} | nats per token |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [arm.lower() for arm, *_ in cells] == sorted(means, key=means.__getitem__)
    compared = {c.arm: c for c in by_optimizer.comparisons(size)}
    for arm, loss, difference, p, verdict, text, rate in cells:
        assert float(loss) == pytest.approx(means[arm.lower()], abs=0.0005000001)
        assert float(rate) == by_optimizer.best_lr(size, arm.lower())
        if arm == "ReLU":
            continue
        c = compared[arm.lower()]
        assert verdict == c.verdict.value
        assert text == ("yes" if c.text and c.text.holds else "no")
        assert float(p) == pytest.approx(c.p_holm, rel=0.06)  # two digits
        on_page = [float(number) for number in re.findall(r"[-+][0-9.]+", difference)]
        assert on_page == pytest.approx([c.difference, *c.interval], abs=0.0005000001)


def test_the_first_results_of_the_readme_are_those_of_the_runs(by_optimizer):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    judged = {(size, c.arm): c for size, *_, c in judge(FOLDER / "results.csv", "relu")}
    assert not any(c.verdict is Verdict.BETTER for c in by_optimizer.comparisons("muon"))
    nano, small = (judged[size, "swiglu"] for size in ("nano", "small"))
    assert {nano.verdict, small.verdict} == {Verdict.BETTER}
    relu2, swiglu, gelu = (
        next(c for c in by_optimizer.comparisons("adamw") if c.arm == arm) for arm in ("relu2", "swiglu", "gelu")
    )
    longer = {c.arm: c for c in by_optimizer.comparisons("adamw_4m")}
    assert {arm for arm, c in longer.items() if c.verdict is Verdict.BETTER} == {"relu2", "gelu"}
    assert longer["swiglu"].verdict is Verdict.UNDECIDED
    for text in (
        f"{-nano.difference:.3f} nats per token better (3.3M parameters, 95%: {_positive(nano)})",
        f"{-small.difference:.3f} (5.1M, {_positive(small)})",
        f"ReLU² is better than ReLU by {-relu2.difference:.3f} nats per token (95%: {_positive(relu2)})",
        f"SwiGLU by {-swiglu.difference:.3f}, GELU by {-gelu.difference:.3f}; under Muon none is",
        f"under AdamW ReLU² by {-longer['relu2'].difference:.3f}, GELU by {-longer['gelu'].difference:.3f}, SwiGLU undecided",
    ):
        assert text in readme


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_ratios_of_the_readme_are_those_of_the_rounds(dtype):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [row] = [line for line in readme.splitlines() if f"(bench/LOG.md#in-{dtype}-beside-more-of-them" in line]
    speeds = json.loads((ROOT / "bench" / "results" / f"cpu-train-{dtype}.json").read_text())["tokens_per_second"]
    expected = []
    for name in ("transformers", "transformers compiled", "litgpt compiled", "torchtune"):
        ratios = [ours / other for ours, other in zip(speeds["ours"], speeds[name], strict=True)]
        expected.append((f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}"))
    assert re.findall(r"([0-9.]+)x(?: tokens per second)? \(([0-9.]+) to ([0-9.]+)\)", row) == expected


def test_the_first_answers_of_the_docs_are_those_of_the_runs():
    better: dict[str, dict[str, float]] = {"nano": {}, "small": {}}
    for size, *_, c in judge(FOLDER / "results.csv", "relu"):
        if c.verdict is Verdict.BETTER:
            better[size][c.arm] = -c.difference
    at_both = better["nano"].keys() & better["small"].keys()
    assert at_both == {"swiglu", "geglu"}
    assert (better["nano"].keys() - at_both, better["small"].keys() - at_both) == ({"bilinear"}, {"reglu"})
    ranges = [[f"{bound(better[size][arm] for arm in at_both):.2f}" for bound in (min, max)] for size in better]
    (low, high), (low_small, high_small) = ranges
    text = " ".join((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8").split())
    assert f"by {low} to {high} nats per token at the smaller and {low_small} to {high_small} at the larger" in text


def _positive(comparison: Comparison) -> str:
    low, high = comparison.interval
    return f"{-high:.3f} to {-low:.3f}"


def test_the_orders_and_the_multipliers_of_the_optimizers_are_those_of_the_runs(by_optimizer):
    page = (BY_OPTIMIZER / "README.md").read_text(encoding="utf-8")
    orders = agreements(by_optimizer)
    assert [(order.one, order.other) for order in orders] == [("adamw", "adamw_4m"), ("adamw", "muon")]
    text = " ".join(page.split())
    for order in orders:
        assert f"{order.tau:.2f} (95%: {order.interval[0]:.2f} to {order.interval[1]:.2f})" in text
    [lengths] = series(by_optimizer)
    worth = {arm: no_asymptote for arm, (no_asymptote, _) in multipliers(by_optimizer, lengths).items()}
    for arm, name in {"relu2": "relu2", "swiglu": "SwiGLU", "gelu": "GELU"}.items():
        low, high = worth[arm].interval
        assert f"{name} {worth[arm].factor:.2f} ({low:.2f} to {high:.2f})" in text
