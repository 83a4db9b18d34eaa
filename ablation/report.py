"""Write the report of a plan: `python -m ablation.report ablations/glu_variants`.

    FOLDER         the folder of a plan, as `python -m ablation.run` leaves it; it may still be written to
    to=FOLDER      where the report goes; the plan's own `report/` if it is not said

Writes report.html (one file that needs no network), results.csv (a line for every run), comparisons.csv (a line for every arm
and size) and figures/ (SVG and PNG). Every number comes from the runs' own files, which are named beside it.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ablation.efficiency import Efficiency, efficiency
from ablation.figures import OF_LOSSES, PHENOMENA, Drawn, draw
from ablation.outcomes import ENDED
from ablation.results import Results, expected, read_results
from ablation.statistics import ALPHA, FEWEST_SEEDS, POWER, Comparison, Verdict
from ablation.verdict import sentences
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, say_why
from kernels.common.options import read_positional

_PAGE = Path(__file__).with_name("page.html")


def main(argv: list[str]) -> int:
    options, folders = read_positional(argv, {"to": ""})
    if len(folders) != 1:
        raise UserError("expected the folder of one plan: python -m ablation.report ablations/glu_variants")
    results = read_results(Path(folders[0]))
    to = Path(options["to"] or Path(folders[0]) / "report")
    write_report(results, to)
    for sentence in sentences(results):
        print(sentence)
    for note in results.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{to / 'report.html'}  {to / 'results.csv'}  {to / 'comparisons.csv'}  {to / 'figures'}/")
    return 0


def write_report(results: Results, to: Path) -> None:
    """Write all files of a report into a folder; each of them is whole or as it was before."""
    figures = draw(results)
    with say_why("write the report", to):
        (to / "figures").mkdir(parents=True, exist_ok=True)
        for drawn in figures:
            drawn.save(to / "figures")
        for name in {*OF_LOSSES, *(name for name, *_ in PHENOMENA)} - {drawn.name for drawn in figures}:
            for kind in ("svg", "png"):  # of a report before this one, which had something to show there
                (to / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
        _write_csv(to / "results.csv", [run_row(results, name) for name in results.runs])
        _write_csv(to / "comparisons.csv", [row for size in results.sizes for row in comparison_rows(results, size)])
        with atomic_write(to / "report.html") as file:
            file.write(page(results, figures))


# ------------------------------------------------------------------------------------------------------------------ csv


def run_row(results: Results, name: str) -> dict[str, Any]:
    """Return the line of a run in results.csv."""
    run = results.runs[name]
    planned, summary = run.planned, run.outcome.summary
    taken = ("bits_per_byte", "parameters", "ffn_parameters", "flops_per_token", "tokens", "steps", "wall_seconds")
    return {
        "run": name, "stage": planned.stage, "size": planned.size, "arm": planned.arm, "learning_rate": planned.rate,
        "seed": planned.seed, "state": run.outcome.state, "final_eval_loss": run.outcome.loss,
        **{key: summary.get(key) for key in taken},
        "tokens_per_second": run.tokens_per_second, "memory_gib": run.memory_gib,
        "data_order_hash": summary.get("data_order_hash"), "config_hash": summary.get("config_hash"),
        "plan": results.manifest.plan.name, "plan_hash": results.manifest.hash,
    }  # fmt: skip


def comparison_rows(results: Results, size: str) -> list[dict[str, Any]]:
    """Return the lines of a size's arms in comparisons.csv."""
    rows = []
    costs = efficiency(results, size)
    for c in results.comparisons(size):
        of_runs = [run.folder.name for run in results.finals(size, c.arm)]
        cost, swept = costs.get(c.arm), results.swept(size, c.arm)
        rows.append(
            {
                "size": size, "arm": c.arm, "baseline": results.baseline, "verdict": c.verdict.value, "reason": c.reason,
                "seeds": c.seeds, "diverged": c.diverged, "difference": c.difference, "deviation": c.deviation,
                "interval_low": c.interval[0], "interval_high": c.interval[1], "bootstrap_low": c.bootstrap[0],
                "bootstrap_high": c.bootstrap[1], "p": c.p, "p_holm": c.p_holm, "detectable": c.detectable,
                "learning_rate": results.best_rate(size, c.arm), "rate_rise": swept.rise if swept else math.nan,
                "mismatch": results.manifest.cost[size][c.arm]["mismatch"],
                "speed_up_flops": cost.per_flop.factor if cost else math.nan,
                "speed_up_seconds": cost.per_second.factor if cost else math.nan,
                "loss_at_equal_time": cost.loss_at_equal_time if cost else math.nan,
                "loss_at_equal_memory": cost.loss_at_equal_memory if cost else math.nan,
                "plan_hash": results.manifest.hash, "runs": " ".join(of_runs),
            }
        )  # fmt: skip
    return rows


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["run"], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if _missing(value) else value for key, value in row.items()})


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


# ----------------------------------------------------------------------------------------------------------------- page


def page(results: Results, figures: Sequence[Drawn]) -> str:
    """Return report.html."""
    plan, drawn = results.manifest.plan, {figure.name: figure for figure in figures}
    phenomena = [figure for name, figure in drawn.items() if name not in OF_LOSSES]
    sections = [
        (
            "verdicts",
            "Arms",
            [*(_arms(results, size) for size in results.sizes), *_figures(drawn, "verdicts", "sizes")],
        ),
        ("losses", "Losses over time and cost", _figures(drawn, "differences", "curves", "costs")),
        ("rates", "Learning rates", [*_figures(drawn, "learning_rates"), _rates(results)]),
        ("telemetry", "What happens inside", [_figure(figure) for figure in phenomena]),
        ("cost", "Cost", [_cost(results, size) for size in results.sizes]),
        ("fairness", "Fairness", [_fairness(results)]),
        ("open", "What was not settled", [_open(results)]),
        ("runs", "Runs", [_runs(results)]),
        ("plan", "The plan", [_plan(results)]),
    ]
    sections = [(anchor, title, parts) for anchor, title, parts in sections if any(parts)]
    links = " ".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in sections)
    body = [
        f"<h1>{escape(plan.question or plan.name)}</h1>",
        f'<p class="soft">plan <code>{escape(plan.name)}</code>, hash <code>{results.manifest.hash}</code>; arms equal in '
        f"{escape(plan.budget)}; judged by {escape(plan.metric)}, nats a token, less is better</p>",
        *(f'<p class="verdict">{escape(sentence)}</p>' for sentence in sentences(results)),
        _unfinished(results),
        f"<nav>{links}</nav>",
        *(
            f'<section id="{anchor}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'
            for anchor, title, parts in sections
        ),
    ]
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{plan.name}: {plan.question}"), body="\n".join(body)
    )


def _unfinished(results: Results) -> str:
    planned_runs = {planned.name for planned in expected(results)} | results.runs.keys()
    ended = sum(run.outcome.state in ENDED for run in results.runs.values())
    known = all(results.best_rate(*place) for place in _places(results))
    if ended == len(planned_runs) and known:
        return ""
    more = "" if known else ", and seeds follow where a sweep has not ended"
    return (
        f'<p class="unfinished">Provisional: {ended} of {len(planned_runs)} runs have ended{more}. '
        "What stands here may change when the others do.</p>"
    )


def _places(results: Results) -> Iterable[tuple[str, str]]:
    return ((size, arm) for size in results.sizes for arm in results.arms(size))


def _figures(drawn: dict[str, Drawn], *names: str) -> list[str]:
    return [_figure(drawn[name]) for name in names if name in drawn]


def _figure(figure: Drawn) -> str:
    return (
        f'<figure id="figure-{figure.name}"><h3>{escape(figure.title)}</h3>'
        f'<div class="wide drawing" tabindex="0">{figure.on_page()}</div></figure>'
    )


@dataclasses.dataclass(frozen=True)
class TableCell:
    """A cell of a table: what is shown, by what it is sorted, and its class."""

    shown: str  # HTML
    value: Any = None
    kind: str = ""


def _number(value: Any, form: str = ".4f") -> TableCell:
    return TableCell("–" if _missing(value) else format(value, form), "" if _missing(value) else repr(value))


def _text(value: Any, kind: str = "text") -> TableCell:
    return TableCell(escape(str(value)), None, kind)


def _table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[TableCell]]], caption: str = "") -> str:
    """Return a table whose columns sort; a row is (its class, its cells)."""
    rows = list(rows)
    kinds = [cell.kind.partition(" ")[0] for cell in rows[0][1]] if rows else [""] * len(heads)
    head = "".join(
        f'<th scope="col"{_attribute("class", kind)}><button>{escape(name)}</button></th>'
        for name, kind in zip(heads, kinds, strict=True)
    )
    lines = [
        f"<tr{_attribute('class', kind)}>"
        + "".join(
            f"<td{_attribute('class', cell.kind)}{_attribute('data-value', cell.value)}>{cell.shown}</td>"
            for cell in cells
        )
        + "</tr>"
        for kind, cells in rows
    ]
    told = f'<p class="soft">{escape(caption)}</p>' if caption else ""
    return (
        f'{told}<div class="wide" tabindex="0"><table{_attribute("aria-label", caption or None)}>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _attribute(name: str, value: Any) -> str:
    return "" if value is None or (name == "class" and not value) else f' {name}="{escape(str(value))}"'


def _arms(results: Results, size: str) -> str:
    comparisons = {c.arm: c for c in results.comparisons(size)}
    costs, losses = efficiency(results, size), results.losses(size)
    ends = [end for c in comparisons.values() for end in (*c.interval, c.difference) if math.isfinite(end)]
    scale = (min([0.0, *ends]), max([0.0, *ends]))
    heads = (
        "arm", "verdict", "95% interval", f"less {results.baseline}, nats", "from", "to", "p", "p (Holm)", "detectable",
        "mean loss", "seeds", "speed-up, FLOPs", "speed-up, seconds", "loss at equal time", "loss at equal memory",
    )  # fmt: skip
    rows = []
    first = [results.baseline, *sorted(comparisons, key=lambda arm: comparisons[arm].difference)]
    for arm in sorted(results.arms(size), key=lambda arm: first.index(arm) if arm in first else len(first)):
        finite = [loss for loss in losses[arm].values() if math.isfinite(loss)]
        mean = sum(finite) / len(finite) if finite else math.nan
        own = (_number(mean), _number(len(losses[arm]), "d"))
        cells = (_text(arm), *_compared(comparisons.get(arm), scale), *own, *_efficiency(costs.get(arm)))
        rows.append(("baseline" if arm == results.baseline else "", cells))
    return _table(heads, rows, f"{size}: final held-out loss, compared seed by seed with {results.baseline}")


def _compared(c: Comparison | None, scale: tuple[float, float]) -> tuple[TableCell, ...]:
    if c is None:
        return (TableCell("baseline", "", "text baseline-word"), *(TableCell("", "") for _ in range(7)))
    kind = c.verdict.value.replace(" ", "-")
    order = list(Verdict).index(c.verdict)
    return (
        TableCell(escape(c.verdict.value), str(order), f"text {kind}"),
        TableCell(_bar(c, scale), _number(c.difference).value, kind), _number(c.difference, "+.4f"),
        _number(c.interval[0], "+.4f"), _number(c.interval[1], "+.4f"),
        _number(c.p, ".2g"), _number(c.p_holm, ".2g"), _number(c.detectable),
    )  # fmt: skip


def _efficiency(cost: Efficiency | None) -> tuple[TableCell, ...]:
    if cost is None:
        return tuple(_number(math.nan) for _ in range(4))
    speeds = (
        TableCell(_number(s.factor, ".2f").shown + ("*" if s.extrapolated and not _missing(s.factor) else ""),
              _number(s.factor).value)
        for s in (cost.per_flop, cost.per_second)
    )  # fmt: skip
    return (*speeds, _number(cost.loss_at_equal_time), _number(cost.loss_at_equal_memory))


def _bar(c: Comparison, scale: tuple[float, float]) -> str:
    """Return a difference and its interval as a small drawing; the thin line stands at the baseline."""
    if not math.isfinite(c.difference):
        return ""
    width, (low, high) = 160, scale
    place = lambda x: 6 + (width - 12) * (x - low) / ((high - low) or 1.0)  # noqa: E731
    one, other = (place(end if math.isfinite(end) else c.difference) for end in c.interval)
    return (
        f'<svg class="bar" width="{width}" height="16" role="img" aria-label="{c.difference:+.4f}">'
        f'<line x1="{place(0):.1f}" x2="{place(0):.1f}" y1="1" y2="15"/>'
        f'<line class="interval" x1="{one:.1f}" x2="{other:.1f}" y1="8" y2="8" stroke-opacity="0.55"/>'
        f'<circle cx="{place(c.difference):.1f}" cy="8" r="3.5"/></svg>'
    )


def _rates(results: Results) -> str:
    heads = ("size", "arm", "best rate", "loss there", "lost at twice or half of it", "tried", "at an edge")
    rows = []
    for size, arm in _places(results):
        found, losses = results.swept(size, arm), results.rate_losses(size, arm)
        tried = ", ".join(
            f"{rate:g}" + ("" if math.isfinite(v) else " (diverged)") for rate, v in sorted(losses.items())
        )
        if found is not None:
            edge = f"the {found.edge}" if found.edge else "no"
            cells = (_number(found.best, "g"), _number(found.loss), _number(found.rise), _text(tried), _text(edge))
            rows.append(("", (_text(size), _text(arm), *cells)))
    if not rows:
        return ""
    return _table(heads, rows, f"The sweep, with seed {results.manifest.plan.rate_seed}, which no verdict rests on")


def _cost(results: Results, size: str) -> str:
    costs = efficiency(results, size)
    heads = ("arm", "tokens/s", "memory, GiB", "FLOPs a token", "saved for backward, bytes a token", "tokens a run")
    rows = []
    for arm in results.arms(size):
        of_plan, found = results.manifest.cost[size][arm], costs.get(arm)
        measured = (found.tokens_per_second, found.memory_gib) if found else (math.nan, math.nan)
        planned = (_number(of_plan[key], ",d") for key in ("flops_per_token", "saved_bytes_per_token", "tokens"))
        kind = "baseline" if arm == results.baseline else ""
        rows.append((kind, (_text(arm), _number(measured[0], ",.0f"), _number(measured[1], ".2f"), *planned)))
    return _table(heads, rows, f"{size}: speed is the median over the compared runs, as the machine was then")


def _fairness(results: Results) -> str:
    heads = ("size", "arm", "formula", "d_ff", "FFN parameters", "off by", "data and initial weights")
    rows = []
    orders = "the same for a seed" if results.runs else "–"
    for size, arm in _places(results):
        learned, cost = results.manifest.learned(size, arm), results.manifest.cost[size][arm]
        kind = "baseline" if arm == results.baseline else ""
        rows.append(
            (
                kind,
                (
                    _text(size), _text(arm), TableCell(f"<code>{escape(str(learned.get('ffn.formula')))}</code>", None, "text"),
                    _number(learned["model.d_ff"], "d"), _number(cost["ffn_parameters"], ",d"),
                    TableCell(f"{cost['mismatch']:+.2%}", repr(cost["mismatch"])), _text(orders),
                ),
            )
        )  # fmt: skip
    return _table(heads, rows) + (
        '<p class="soft">Runs of one seed took the same data in the same order: their hashes were compared when this page was '
        "made. Weights outside the FFN are a function of their name and the seed, so they are the same for all arms. "
        "What differs between arms is in the plan below.</p>"
    )


def _open(results: Results) -> str:
    items = []
    for size in results.sizes:
        for c in results.comparisons(size):
            if c.verdict in (Verdict.UNDERPOWERED, Verdict.BLOCKED, Verdict.NO_DIFFERENCE):
                items.append(f"{c.arm} at {size}: {c.verdict.value}: {c.reason}")
    items += results.notes
    if len(results.sizes) == 1:
        items.append("One size: whether any of this holds at another one was not asked")
    items += [
        f"A verdict takes {FEWEST_SEEDS} seeds; p-values are of paired t-tests, adjusted as in Holm 1979 so that a false "
        f"“better” or “worse” anywhere at a size has a chance below {ALPHA:.0%}; “detectable” would be found "
        f"with a probability of {POWER:.0%}",
        "Evaluations within a run may be on a part of the held-out text (eval_tokens), and curves are of those; final "
        "losses are on all of it, so that a curve need not end at the final loss",
        "Speed-ups and losses at equal time are read off curves within runs, whose learning rate still falls: they compare, "
        "and no verdict rests on them. * goes on past the baseline's last loss. A comparison at equal time is a plan with "
        "ablation.budget=wallclock",
        "The runs say nothing of longer training, other data or other recipes than those of the plan",
    ]
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _runs(results: Results) -> str:
    heads = ("run", "stage", "size", "arm", "learning rate", "seed", "state", "final loss", "bits a byte", "data order")
    rows = []
    for name, run in results.runs.items():
        planned, summary = run.planned, run.outcome.summary
        rows.append(
            (
                "",
                (
                    TableCell(f"<code>{escape(name)}</code>", name, "text"), _text(planned.stage),
                    _text(planned.size), _text(planned.arm),
                    _number(planned.rate, "g"), _number(planned.seed, "d"), _text(run.outcome.state),
                    _number(run.outcome.loss, ".6f"), _number(summary.get("bits_per_byte"), ".4f"),
                    _text(summary.get("data_order_hash") or "–"),
                ),
            )
        )  # fmt: skip
    return _table(
        heads, rows, "Folders below runs/ of the plan's folder; each has config.yaml, metrics.jsonl, summary.json"
    )


def _plan(results: Results) -> str:
    manifest = results.manifest
    of_plan = {name: value for name, value in dataclasses.asdict(manifest.plan).items() if value is not None}
    differs = [
        (
            "",
            (
                _text(size),
                _text(arm),
                TableCell(escape(", ".join(f"{key}={value}" for key, value in values.items())), None, "why"),
            ),
        )
        for size, arms in manifest.arms.items()
        for arm, values in arms.items()
    ]
    return (
        _definitions(of_plan)
        + "<h3>What differs between runs, beside learning rate and seed</h3>"
        + _table(("size", "arm", "values"), differs)
        + "<h3>What all runs have in common</h3>"
        + _definitions(manifest.shared)
    )


def _definitions(values: dict[str, Any]) -> str:
    pairs = (f"<dt>{escape(name)}</dt><dd><code>{escape(str(value))}</code></dd>" for name, value in values.items())
    return f"<dl>{''.join(pairs)}</dl>"


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
