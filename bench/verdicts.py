"""Simulate plans whose arms are equally good, and count false verdicts: `python -m bench.verdicts`.

    plans=1000      simulated per row
    arms=8          of each plan, the baseline included
    sizes=1         of each plan
    seed=0          of the simulation
    results=FILE    judge the runs of a results.csv instead, with and without what missed learning rates cost
    baseline=relu   of that file

Each arm has an optimal learning rate of its own, up to half a factor of two off the middle of the sweep, and a curvature there
as measured for the arms of `bench/results/glu_variants`. A run's loss scatters around its parabola; a part of that is its
seed's, the same for all arms and rates. Sweeps, extensions, learning rates and comparisons are those of the product.

    grid              the seeds run at the best of the learning rates tried, by one seed, as up to version 0.2
    vertex            they run at the vertex of the parabola through the sweep of two seeds
    vertex, regrets   and what missed learning rates cost is part of the intervals: the product

The product adjusts p-values over all arms and sizes, the others over the arms of each size, as version 0.2 did.

In a second table some arms scatter more than others: by factors with a standard deviation of 0.8 in the logarithm (`spread`),
or one arm, at random, by a factor of 10. The scatter from which the cost of missed learning rates follows is

    pooled            over all arms
    per arm           estimated for each: the product

Two more tables leave learning rates out: arms run at their best ones. In one, verdicts are made after 5 and after 10 seeds, or
after each from 5 to 10:

    not paid for      each time as if it were the only one
    planned           paid for, `ablation.looks` names them
    5, then more      5 were planned, and the plan grew: paid for from the reserve
    each, 5 to 10     `until=decided`

In the other, arms differ on each of so many held-out documents by an amount of their own, on average over all text by nothing:

    this text         any verdict counts
    other text        one that is said to hold for other text

`false` is the fraction of plans with any false verdict, `blocked` that of comparisons without a verdict, `found` how often an
arm that is better by 0.1 nats is called better, `width` the median half of the 95% intervals, in nats.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ablation.learning_rates import Noise, SweepResult, arm_noises, next_learning_rate, sweep_result
from ablation.looks import Looks
from ablation.statistics import Comparison, Pair, Verdict, compare, pairs_with
from ablation.text_scatter import TextScatter
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.options import read_options

# Nats lost at a factor of 2 from the best learning rate: `rate_rise` of bench/results/glu_variants/comparisons.csv.
CURVATURES = (0.025, 0.058, 0.171, 0.193, 0.049, 0.064, 0.030, 0.060, 0.123, 0.049, 0.063, 0.054, 0.070, 0.069)
DEVIATION = 0.03  # of an arm's loss over seeds, nats
OF_DOCUMENTS = (
    0.034  # of what an arm finds harder about a document than others: that of two arms over 31 files is 0.048
)
LOSS, CEILING, SMALLEST_EFFECT, EFFECT = 5.0, math.log(4096), 0.01, 0.1
_RATES, _EXTENSIONS = (0.5, 1.0, 2.0), 2


@dataclasses.dataclass(frozen=True)
class Method:
    """How learning rates are chosen and compared."""

    name: str
    sweep_seeds: int = 0  # 0: arms run at their best learning rates
    vertex: bool = True
    product: bool = True  # with what missed learning rates cost in the intervals, and all sizes in one family
    pooled: bool = False  # what they cost follows from a scatter that is pooled over all arms
    spread: float = 0.0  # standard deviation of the logarithm of an arm's own scatter
    outlier: float = 1.0  # factor on the own scatter of one arm, any
    checked: tuple[int, ...] = ()  # numbers of seeds after which verdicts are made; (): all
    looks: Looks | None = None  # None: each time as if it were the only one
    documents: int = 0  # held out; 0: the text is not simulated
    over_text: bool = False  # verdicts that hold for other text count, and no others


GRID = Method("grid", 1, vertex=False, product=False)
VERTEX = Method("vertex", 2, vertex=True, product=False)
FULL = Method("vertex, regrets", 2)
UNEQUAL = tuple(
    Method(f"{name}, {scatter}", 2, pooled=pooled, spread=spread, outlier=outlier)
    for scatter, spread, outlier in (("spread", 0.8, 1.0), ("one x10", 0.0, 10.0))
    for name, pooled in (("pooled", True), ("per arm", False))
)
_TEN = tuple(range(10))
LOOKED = (
    Method("not paid for", checked=(5, 10)),
    Method("planned", checked=(5, 10), looks=Looks(_TEN, (5, 10), 10, 0.1)),
    Method("5, then more", checked=(5, 10), looks=Looks(_TEN, (5, 10), 5, 0.1)),
    Method("each, 5 to 10", checked=(*_TEN[5:], 10), looks=Looks(_TEN, (5, 6, 7, 8, 9, 10), 10, 0.1)),
)
TEXTS = tuple(
    Method(f"{name}, {documents}", documents=documents, over_text=over_text)
    for documents in (30, 300)
    for name, over_text in (("this text", False), ("other text", True))
)


class SimulatedPlan:
    """Arms with parabolas of their own, whose runs can be drawn.

    Args:
        correlation: of two arms' losses over seeds.
        better: nats by which arm1 is better than the others.
        method: of which `spread` and `outlier` are used.
    """

    def __init__(
        self, chance: np.random.Generator, arms: int, correlation: float, better: float = 0.0, method: Method = FULL
    ) -> None:
        self.chance = chance
        self.arms = [f"arm{i}" for i in range(arms)]
        self._curvature = dict(zip(self.arms, chance.choice(CURVATURES, arms), strict=True))
        self._best = dict(zip(self.arms, chance.uniform(-0.5, 0.5, arms), strict=True))  # log2 of the learning rate
        self._better = {"arm1": better}
        self._shared, own = DEVIATION * math.sqrt(correlation), DEVIATION * math.sqrt(1 - correlation)
        factors = np.exp(method.spread * chance.normal(size=arms)) if method.spread else np.ones(arms)
        if method.outlier != 1.0:
            factors[chance.integers(arms)] *= method.outlier
        self._own = dict(zip(self.arms, own * factors, strict=True))
        self._of_seeds: dict[int, float] = {}
        self._of_documents: dict[str, np.ndarray] = {}

    def run(self, arm: str, lr: float, seed: int) -> float:
        """Return the final loss of a run."""
        of_seed = self._of_seeds.setdefault(seed, self.chance.normal(0.0, self._shared))
        missed = self._curvature[arm] * (math.log2(lr) - self._best[arm]) ** 2
        own = self.chance.normal(0.0, self._own[arm]) + (self._of_documents[arm].mean() if self._of_documents else 0.0)
        return LOSS - self._better.get(arm, 0.0) + missed + of_seed + own

    def pairs(self, method: Method, seeds: int) -> list[Pair]:
        """Return the pairs with arm0, as `ablation.results` makes them."""
        if method.documents:
            shape = (len(self.arms), method.documents)
            self._of_documents = dict(zip(self.arms, self.chance.normal(0.0, OF_DOCUMENTS, shape), strict=True))
        if not method.sweep_seeds:
            losses = {arm: {s: self.run(arm, 2.0 ** self._best[arm], s) for s in range(seeds)} for arm in self.arms}
            return pairs_with("arm0", losses, CEILING, texts=self._texts())
        swept = {arm: self._sweep(arm, method) for arm in self.arms}
        losses = {arm: {seed: self.run(arm, swept[arm][1].best_lr, seed) for seed in range(seeds)} for arm in self.arms}
        blocked = {arm: f"at the {found.edge}" for arm, (_, found) in swept.items() if found.edge}
        noises = arm_noises({arm: table for arm, (table, _) in swept.items()}, losses)
        if method.pooled:
            squares = [noise.deviation**2 * noise.freedom for noise in noises.values()]
            freedom = sum(noise.freedom for noise in noises.values())
            noises = dict.fromkeys(noises, Noise(math.sqrt(sum(squares) / freedom), freedom))
        regrets = {arm: found.regret(noises[arm]) for arm, (_, found) in swept.items() if not found.edge}
        return pairs_with("arm0", losses, CEILING, blocked, regrets if method.product else {})

    def _texts(self) -> dict[str, TextScatter]:
        base = self._of_documents.get("arm0")
        return {
            arm: TextScatter(len(own), float((own - base).std(ddof=1)) / math.sqrt(len(own)), len(own) - 1)
            for arm, own in self._of_documents.items()
        }

    def _sweep(self, arm: str, method: Method) -> tuple[Mapping[float, Mapping[int, float]], SweepResult]:
        losses: dict[float, dict[int, float]] = {}
        rates, extensions = list(_RATES), 0
        while True:
            for lr in rates:
                losses[lr] = {1000 + i: self.run(arm, lr, 1000 + i) for i in range(method.sweep_seeds)}
            result = sweep_result(losses, method.vertex)
            if not result.edge or extensions == _EXTENSIONS:
                return losses, result
            rates, extensions = [next_learning_rate(losses, result.best_lr, result.edge)], extensions + 1


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table."""

    method: Method
    seeds: int
    correlation: float
    false: float  # fraction of plans with any false verdict
    blocked: float  # fraction of comparisons
    found: float  # fraction of plans in which the better arm is called better
    width: float  # median half width of the 95% intervals, nats


def verdicts(plans: Sequence[SimulatedPlan], method: Method, seeds: int) -> list[list[Comparison]]:
    """Return the comparisons of a plan, given as a simulated plan per size, each time that verdicts are made."""
    families = [plan.pairs(method, seeds) for plan in plans]
    if method.product:
        families = [[pair for of_size in families for pair in of_size]]
    return [
        [
            comparison
            for family in families
            for comparison in compare([_first(p, count) for p in family], SMALLEST_EFFECT, looks=method.looks)
        ]
        for count in method.checked or (seeds,)
    ]


def _first(pair: Pair, count: int) -> Pair:
    """Return a pair with its first seeds alone."""
    own, base = ({seed: side[seed] for seed in range(count)} for side in (pair.own, pair.base))
    return dataclasses.replace(pair, own=own, base=base)


def _is(comparison: Comparison, method: Method, *wanted: Verdict) -> bool:
    holds = comparison.text is not None and comparison.text.holds
    return comparison.verdict in wanted and (holds or not method.over_text)


def simulate(method: Method, seeds: int, correlation: float, plans: int, arms: int, sizes: int, seed: int) -> Row:
    """Simulate plans of equal arms, and as many in which one is better at one size."""
    false, found, widths, blocked = 0, 0, [], 0
    for number in range(plans):
        chance = np.random.default_rng([seed, number])
        looks = verdicts([SimulatedPlan(chance, arms, correlation, 0.0, method) for _ in range(sizes)], method, seeds)
        false += any(_is(c, method, Verdict.BETTER, Verdict.WORSE) for comparisons in looks for c in comparisons)
        blocked += sum(c.verdict is Verdict.BLOCKED for c in looks[-1])
        for c in looks[-1]:
            low, high = c.text.both if c.text and method.over_text else c.interval
            widths.append((high - low) / 2)
        better = [EFFECT, *[0.0] * (sizes - 1)]
        looks = verdicts([SimulatedPlan(chance, arms, correlation, nats, method) for nats in better], method, seeds)
        found += any(_is(comparisons[0], method, Verdict.BETTER) for comparisons in looks)
    counts = false / plans, blocked / (plans * (arms - 1) * sizes), found / plans
    return Row(method, seeds, correlation, *counts, statistics.median(widths))


def rows(plans: int, arms: int, sizes: int, seed: int) -> Iterator[list[Row]]:
    """Yield the rows of each table."""

    def row(method: Method, seeds: int, correlation: float) -> Row:
        return simulate(method, seeds, correlation, plans, arms, sizes, seed)

    yield [row(method, seeds, r) for method in (GRID, VERTEX, FULL) for r in (0.06, 0.6) for seeds in (3, 5, 10)]
    yield [row(method, seeds, r) for method in UNEQUAL for r in (0.06, 0.6) for seeds in (3, 5, 10)]
    yield [row(method, 10, r) for method in LOOKED for r in (0.06, 0.6)]
    yield [row(method, seeds, 0.6) for method in TEXTS for seeds in (5, 10)]


def judge(path: Path, baseline: str) -> Iterator[tuple[str, SweepResult, float, Comparison, Comparison]]:
    """Yield (size, sweep, regret, comparison without and with regrets) per arm of a results.csv whose sweeps have one seed."""
    losses: dict[tuple[str, str], dict[str, dict[float, dict[int, float]]]] = {}  # by (size, stage), arm, rate and seed
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            of_arm = losses.setdefault((row["size"], row["stage"]), {}).setdefault(row["arm"], {})
            loss = float(row["final_eval_loss"] or "nan")
            of_arm.setdefault(float(row["learning_rate"]), {})[int(row["seed"])] = loss
    sizes = list(dict.fromkeys(size for size, _ in losses))
    finals = {size: {arm: next(iter(v.values())) for arm, v in losses[size, "final"].items()} for size in sizes}
    sweeps = {size: {arm: sweep_result(v, vertex=False) for arm, v in losses[size, "sweep"].items()} for size in sizes}
    noises = {size: arm_noises({}, finals[size]) for size in sizes}
    regrets = {size: {arm: found.regret(noises[size][arm]) for arm, found in sweeps[size].items()} for size in sizes}
    pairs = [(size, pair) for size in sizes for pair in pairs_with(baseline, finals[size], CEILING, {}, regrets[size])]
    # Version 0.2 adjusted p-values over the arms of a size.
    alone = [dataclasses.replace(pair, regret=0.0) for _, pair in pairs]
    of_sizes = [[pair for (of, _), pair in zip(pairs, alone, strict=True) if of == size] for size in sizes]
    before = [c for of_size in of_sizes for c in compare(of_size, SMALLEST_EFFECT)]
    for (size, pair), one, other in zip(pairs, before, compare([p for _, p in pairs], SMALLEST_EFFECT), strict=True):
        yield size, sweeps[size][pair.arm], regrets[size][pair.arm], one, other


def _print_judged(path: Path, baseline: str) -> None:
    heads = ("size", "arm", "rate", "vertex", "regret", "seeds alone", "p", "with regrets", "p")
    table = Table(*heads, box=None)
    for size, sweep, regret, one, other in judge(path, baseline):
        texts = [f"{sweep.best_lr:g}", f"{sweep.best_lr / 2**sweep.distance:.3g}", f"{regret:.3f}"]
        for c in (one, other):
            texts += [f"{c.difference:+.3f} ({c.interval[0]:+.3f} to {c.interval[1]:+.3f})", f"{c.p_holm:.2g}"]
        table.add_row(size, one.arm, *texts)
    Console(file=sys.stdout, highlight=False, width=120).print(table)


def main(argv: list[str]) -> None:
    defaults = {"plans": 1000, "arms": 8, "sizes": 1, "seed": 0, "results": "", "baseline": "relu"}
    options = read_options(argv, defaults, {"plans": 1, "arms": 2, "sizes": 1})
    if options["results"]:
        if not Path(options["results"]).is_file():
            raise UserError(f"there is no file {options['results']}")
        _print_judged(Path(options["results"]), options["baseline"])
        return
    heads = ("method", "correlation", "seeds", "false", "blocked", "found", "width")
    for of_table in rows(*(options[name] for name in ("plans", "arms", "sizes", "seed"))):
        table = Table(*heads, box=None)
        for row in of_table:
            shares = (f"{share:.1%}" for share in (row.false, row.blocked, row.found))
            table.add_row(row.method.name, f"{row.correlation:g}", f"{row.seeds}", *shares, f"{row.width:.4f}")
        Console(file=sys.stdout, highlight=False).print(table)


if __name__ == "__main__":
    run_command(main, __doc__)
