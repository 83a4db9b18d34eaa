"""The tables and pages of `bench/results/glu_variants` and `optimizer_by_arm` agree with the losses in `results.csv`."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest

from ablation.rank_agreement import rank_agreement
from ablation.statistics import Comparison, compare, pairs_with
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


def test_the_page_of_the_optimizers_follows_from_its_losses():
    page = (BY_OPTIMIZER / "README.md").read_text(encoding="utf-8")
    losses: dict[str, dict[str, dict[int, float]]] = {"adamw": {}, "muon": {}}
    for row in rows("results.csv", BY_OPTIMIZER):
        if row["stage"] == "final":
            losses[row["size"]].setdefault(row["arm"], {})[int(row["seed"])] = float(row["final_eval_loss"])
    committed = {(row["size"], row["arm"]): row for row in rows("comparisons.csv", BY_OPTIMIZER)}
    for heading in ("AdamW", "Muon"):
        found = losses[heading.lower()]
        assert {len(of_arm) for of_arm in found.values()} == {3}
        means = {arm: sum(of_arm.values()) / 3 for arm, of_arm in found.items()}
        table = page[page.index(f"| {heading} | nats per token |") :].split("\n\n")[0].splitlines()[2:]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
        assert [arm.lower() for arm, *_ in cells] == sorted(means, key=means.__getitem__)
        for arm, loss, difference, *_ in cells:
            assert float(loss) == pytest.approx(means[arm.lower()], abs=0.0005000001)
            if arm != "ReLU":
                row = committed[heading.lower(), arm.lower()]
                exact = [float(row[name]) for name in ("difference", "interval_low", "interval_high")]
                assert [float(n) for n in re.findall(r"[-+][0-9.]+", difference)] == pytest.approx(
                    exact, abs=0.0005000001
                )
    order = rank_agreement(losses["adamw"], losses["muon"], "adamw", "muon")
    assert f"{order.tau:.2f} (95%: {order.interval[0]:.0f} to {order.interval[1]:.2f})" in page
    assert len(order.swapped) == 5
