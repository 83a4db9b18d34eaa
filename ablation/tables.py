"""The tables of the report that compare arms, and the cells of all of its tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ablation.efficiency import efficiency
from ablation.multipliers import multipliers, series
from ablation.rank_agreement import RankAgreement, agreements
from ablation.results import Results
from ablation.sketch import HIGH, LOW, REACH, Sketch, sketch
from ablation.statistics import Comparison, Verdict
from ablation.ttest import POWER

_MODELS = {"unigram": "token frequencies", "bigram": "bigram (Kneser-Ney)", "xz": "xz -9"}


def is_missing(value: Any) -> bool:
    """Return whether a value is None or not finite."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


@dataclasses.dataclass(frozen=True)
class IntervalBar:
    """A difference and its interval as positions on a small drawing, in pixels."""

    label: str
    zero: float  # the baseline
    low: float
    high: float
    difference: float


@dataclasses.dataclass(frozen=True)
class TableCell:
    """A cell of a table."""

    text: str = ""
    sort_value: Any = None  # None: sorted by its text
    css: str = ""
    code: bool = False
    bar: IntervalBar | None = None
    sketch: Sketch | None = None
    below: str = ""  # a second line


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row of a table."""

    cells: Sequence[TableCell]
    css: str = ""


@dataclasses.dataclass(frozen=True)
class PageTable:
    """A table whose columns can be sorted."""

    heads: Sequence[str]
    rows: Sequence[TableRow]
    caption: str = ""
    note: str = ""  # a second paragraph of it
    css: str = ""

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(head, class) of each column; the class is the first one of its first cell."""
        cells = self.rows[0].cells if self.rows else [TableCell()] * len(self.heads)
        return [(head, cell.css.partition(" ")[0]) for head, cell in zip(self.heads, cells, strict=True)]


def number_cell(value: Any, form: str = ".4f") -> TableCell:
    """Return a cell that is sorted by its exact number."""
    return TableCell("–", "") if is_missing(value) else TableCell(format(value, form), repr(value))


def text_cell(value: Any) -> TableCell:
    """Return a cell of text, aligned to the left."""
    return TableCell(str(value), css="text")


def row_css(results: Results, arm: str) -> str:
    """Return the class of an arm's row."""
    return "baseline" if arm == results.baseline else ""


def _by_difference(results: Results, size: str) -> list[tuple[str, Comparison | None]]:
    """Return a size's arms with their comparisons, the baseline first, then by difference."""
    comparisons = {c.arm: c for c in results.comparisons(size)}
    order = [results.baseline, *sorted(comparisons, key=lambda arm: comparisons[arm].difference)]
    arms = sorted(results.arms(size), key=lambda arm: order.index(arm) if arm in order else len(order))
    return [(arm, comparisons.get(arm)) for arm in arms]


def arms_table(results: Results, size: str) -> PageTable:
    """Return what is known of a size's arms: what they are, the verdict and the difference behind it."""
    arms, values, baseline, metric = (
        _by_difference(results, size),
        results.values(size),
        results.baseline,
        results.metric,
    )
    ends = [end for _, c in arms if c for end in (*c.interval, c.difference) if math.isfinite(end)]
    scale = (min([0.0, *ends]), max([0.0, *ends]))
    rows = []
    for arm, c in arms:
        finite = [value for value in values[arm].values() if math.isfinite(value)]
        learned = results.manifest.learned(size, arm)
        cells = [
            TableCell(arm, arm, "text", below=str(learned.get("ffn.formula") or "")),
            TableCell("", "", sketch=sketch(learned)),
            *_verdict_cells(c, scale),
            number_cell(sum(finite) / len(finite) if finite else math.nan),
            number_cell(len(values[arm]), "d"),
        ]
        rows.append(TableRow(cells, row_css(results, arm)))
    of_losses = metric.of_text
    heads = (
        "arm", "h, slope", "verdict", "95% interval", f"minus {baseline}, {metric.short}",
        "mean loss" if of_losses else "mean", "seeds",
    )  # fmt: skip
    what = f"final held-out loss in {metric.unit}" if of_losses else f"{metric.name} in {metric.unit}"
    side = "above 0, right" if metric.higher_is_better else "below 0, left"
    caption = (
        f"{size}: {what}, where {metric.better} is better. The difference is the arm's {'loss' if of_losses else 'value'} "
        f"minus {baseline}'s, seed by seed: {side} of the line, the arm is better."
    )
    note = (
        f"The small plot: h (solid) and its slope (dashed) over x, or over gate where up is 1, from -{REACH:g} to {REACH:g}; "
        f"upwards from {LOW:g} to {HIGH:g}, with lines at 0."
    )
    return PageTable(heads, rows, caption, note, "cards")


def _verdict_cells(c: Comparison | None, scale: tuple[float, float]) -> list[TableCell]:
    if c is None:
        return [TableCell("baseline", "", "text baseline-word"), *(TableCell("", "") for _ in range(2))]
    css = c.verdict.value.replace(" ", "-")
    ends = [number_cell(end, "+.4f").text for end in c.interval]
    return [
        TableCell(c.verdict.value, list(Verdict).index(c.verdict), f"text {css}"),
        TableCell(sort_value=number_cell(c.difference).sort_value, css=css, bar=_bar(c, scale)),
        dataclasses.replace(number_cell(c.difference, "+.4f"), below=f"{ends[0]} to {ends[1]}"),
    ]


def baselines_table(results: Results) -> PageTable | None:
    """Return the losses of the models that are no neural networks; None where none is known."""
    rows = []
    for size in results.sizes:
        means = filter(math.isfinite, results.mean_losses(size).values())  # an arm with a diverged seed has none
        best = min(means, default=math.nan)
        for name, loss in results.baselines(size).items():
            cells = [text_cell(size), text_cell(_MODELS[name]), number_cell(loss), number_cell(best - loss, "+.4f")]
            rows.append(TableRow(cells))
    heads = ("size", "model", "loss", "best arm less it")
    caption = (
        "What is no neural network, on the same held-out text: token frequencies and a bigram model of as many training "
        "tokens, and compression of the text by itself; nats per token."
    )
    return PageTable(heads, rows, caption) if rows else None


def reported_table(results: Results) -> PageTable | None:
    """Return what others reported beside what the plan found; None where it names no values."""
    reported = results.manifest.plan.reported or {}
    values, base = reported.get("values") or {}, results.baseline
    if not values:
        return None
    found = {size: {c.arm: c for c in results.comparisons(size)} for size in results.sizes}
    rows = []
    for arm, value in values.items():
        theirs = value - values[base] if base in values and arm != base else math.nan
        cells = [text_cell(arm), number_cell(value, "g"), number_cell(theirs, "+.3f")]
        for size in results.sizes:
            c = found[size].get(arm)
            difference = number_cell(c.difference if c else math.nan, "+.4f")
            cells += [difference, text_cell(c.verdict.value if c else "baseline" if arm == base else "not in the plan")]
        rows.append(TableRow(cells))
    here = [head for size in results.sizes for head in (f"here, {size}", "verdict")]
    heads = ("arm", f"they report, {reported.get('unit', '')}".rstrip(", "), f"minus {base}", *here)
    caption = f"They report, we find. {reported['source']}. {reported.get('note', '')}".rstrip()
    return PageTable(heads, rows, caption)


def tests_table(results: Results, size: str) -> PageTable:
    """Return the tests behind the verdicts of a size."""
    heads = (
        "arm", "from", "to", "from, all arms", "to, all arms", "regret", "p", "p (Holm)", "p, equivalent", "detectable",
        "seeds needed",
    )  # fmt: skip
    rows = [
        TableRow([text_cell(arm), *_test_cells(c)], row_css(results, arm)) for arm, c in _by_difference(results, size)
    ]
    effect = results.manifest.plan.smallest_effect
    caption = (
        f"{size}: the 95% interval of the difference in {results.metric.unit}, by itself and for all arms and sizes together "
        "(Bonferroni); what missed learning rates add to its standard error; the p-value of no difference, alone and among "
        f"all (Holm), and that of a difference of {effect:g} or more (Holm); the smallest difference that {POWER:.0%} of such "
        f"plans would find, and the seeds that would find {effect:g}."
    )
    return PageTable(heads, rows, caption)


def _test_cells(c: Comparison | None) -> list[TableCell]:
    if c is None:
        return [TableCell("", "") for _ in range(10)]
    ends = [number_cell(end, "+.4f") for end in (*c.interval, *c.adjusted)]
    p = [number_cell(value, ".2g") for value in (c.p, c.p_holm, c.p_equivalent)]
    return [*ends, number_cell(c.regret), *p, number_cell(c.detectable), number_cell(c.needed, ".0f")]


def text_table(results: Results, size: str) -> PageTable | None:
    """Return over what the differences of a size's arms hold: other seeds, other text, both; None if that is not known."""
    known = [(arm, c, c.text) for arm, c in _by_difference(results, size) if c is not None and c.text is not None]
    if not known:
        return None
    heads = ("arm", "verdict", "from, seeds", "to, seeds", "from, documents", "to, documents", "from, both", "to, both",
             "p, both (Holm)", "holds for")  # fmt: skip
    rows = []
    for arm, c, text in known:
        ends = [number_cell(end, "+.4f") for end in (*c.interval, *text.interval, *text.both)]
        holds = ("other seeds and text" if text.holds else "other seeds, on this text") if c.decided else "–"
        cells = [text_cell(arm), text_cell(c.verdict.value), *ends, number_cell(text.p_holm, ".2g"), text_cell(holds)]
        rows.append(TableRow(cells))
    caption = (
        f"{size}: 95% intervals of the difference in {results.metric.unit}: over seeds and learning rates for this text, over "
        f"its {known[0][2].scatter.documents} {known[0][2].scatter.unit} for these seeds, and over both."
    )
    return PageTable(heads, rows, caption)


def scatter_table(results: Results, size: str) -> PageTable:
    """Return how the losses of a size's arms scatter over seeds."""
    heads = ("arm", "SD", "SD of differences", "correlation", "p, unpaired", "note")
    comparisons = _by_difference(results, size)
    base = next((c.scatter.base for _, c in comparisons if c), math.nan)
    rows = []
    for arm, c in comparisons:
        cells = [number_cell(base), *(TableCell("", "") for _ in range(3)), TableCell(css="text why")]
        if c is not None:
            numbers = [number_cell(c.scatter.own), number_cell(c.deviation), number_cell(c.scatter.correlation, ".2f")]
            notes = TableCell("; ".join(c.scatter.notes), css="text why")
            cells = [*numbers, number_cell(c.scatter.p_unpaired, ".2g"), notes]
        rows.append(TableRow([text_cell(arm), *cells], row_css(results, arm)))
    caption = (
        f"{size}: standard deviations over seeds of the losses and of their differences to {results.baseline}, the correlation "
        "of the two losses over seeds, and the p-value of Welch's test, which does not pair seeds."
    )
    return PageTable(heads, rows, caption)


def multiplier_tables(results: Results) -> list[PageTable]:
    """Return the compute multipliers of a plan's horizons and sizes, and before them how far the order of arms is the same."""
    order = agreements(results)
    tables = [_agreement_table(order)] if order else []
    heads = ("arm", "multiplier, E = 0", "from", "to", "multiplier, E fitted", "from", "to", "E", "note")
    for of in series(results):
        rows = []
        for arm, both in multipliers(results, of).items():
            cells = [number_cell(end, ".3f") for m in both for end in (m.factor, *m.interval)]
            reasons = TableCell("; ".join(dict.fromkeys(m.reason for m in both if m.reason)), css="text why")
            rows.append(TableRow([text_cell(arm), *cells, number_cell(both[1].asymptote, ".3f"), reasons]))
        caption = (
            f"{of.name}: how many times the arm's compute {results.baseline} needs for the same loss, between runs that were "
            "planned to end there, and its 95% interval over seeds, learning rates and documents. Loss falls with compute C as "
            "E + A C^-a, where E is 0, or what fits all arms best."
        )
        if rows:
            tables.append(PageTable(heads, rows, caption))
    return tables


def _agreement_table(found: list[RankAgreement]) -> PageTable:
    rows = []
    for agreement in found:
        swapped = ", ".join(f"{one} and {other}" for one, other in agreement.swapped) or "–"
        numbers = [number_cell(value, ".2f") for value in (agreement.tau, *agreement.interval)]
        names = [text_cell(agreement.one), text_cell(agreement.other)]
        rows.append(TableRow([*names, *numbers, TableCell(swapped, css="text why")]))
    caption = (
        "Whether the order of arms is the same at fewer tokens or in another size: Kendall's tau (1 the same, -1 the reverse), "
        "its 95% interval from resampled seeds, and the pairs that change places."
    )
    return PageTable(("at", "and at", "tau", "from", "to", "pairs that change places"), rows, caption)


def efficiency_table(results: Results, size: str) -> PageTable:
    """Return the losses of a size's arms at equal time and memory."""
    costs = efficiency(results, size)
    heads = ("arm", "loss at equal time", "loss at equal memory")
    rows = []
    for arm, _ in _by_difference(results, size):
        cost = costs.get(arm)
        values = (cost.loss_at_equal_time, cost.loss_at_equal_memory) if cost else (math.nan, math.nan)
        rows.append(TableRow([text_cell(arm), *map(number_cell, values)], row_css(results, arm)))
    caption = f"{size}: the arm's loss in the time of the fastest arm, and in the memory of {results.baseline}."
    return PageTable(heads, rows, caption)


def _bar(c: Comparison, scale: tuple[float, float]) -> IntervalBar | None:
    """Return the drawing of a difference, 160 pixels wide."""
    if not math.isfinite(c.difference):
        return None
    low, high = scale

    def x(value: float) -> float:
        return 6 + 148 * (value - low) / ((high - low) or 1.0)

    ends = [x(end if math.isfinite(end) else c.difference) for end in c.interval]
    return IntervalBar(f"{c.difference:+.4f}", x(0), ends[0], ends[1], x(c.difference))
