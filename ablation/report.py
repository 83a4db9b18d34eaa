"""Write the report of a plan: `python -m ablation.report ablations/glu_variants`.

    FOLDER         of a plan, as `python -m ablation.run` leaves it; runs may still be in progress
    to=FOLDER      where the report is written; default: `report/` in the plan's folder

Writes report.html (one file that needs no network), results.csv (a line per run), comparisons.csv (a line per arm and size)
and figures/ (SVG and PNG). Every number comes from the files of the runs, which are named beside it. `report.html.jinja` lays
out the page; this module computes what it shows.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ablation.drawing import ReportFigure
from ablation.efficiency import efficiency
from ablation.figures import LOSS_FIGURES, PHENOMENA, draw
from ablation.growth import amendment_lines
from ablation.learning_rates import mean_losses
from ablation.outcomes import ENDED
from ablation.plan import seeds_text
from ablation.results import Results, expected_runs, provenance_lines, read_results
from ablation.statistics import Verdict
from ablation.tables import (
    PageTable,
    TableCell,
    TableRow,
    arms_table,
    baselines_table,
    efficiency_table,
    is_missing,
    multiplier_tables,
    number_cell,
    reported_table,
    row_css,
    scatter_table,
    tests_table,
    text_cell,
    text_table,
)
from ablation.ttest import ALPHA, FEWEST_SEEDS, POWER
from ablation.verdict import sentences
from conf.provenance import summarise
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, explain_os_errors
from kernels.common.options import read_positional
from kernels.common.text import listed, printable


def main(argv: list[str]) -> int:
    options, folders = read_positional(argv, {"to": ""})
    if len(folders) != 1:
        raise UserError("expected the folder of one plan: python -m ablation.report ablations/glu_variants")
    results = read_results(Path(folders[0]))
    to = Path(options["to"] or Path(folders[0]) / "report")
    write_report(results, to)
    for sentence in sentences(results):
        print(printable(sentence))
    for note in results.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    print(f"{to / 'report.html'}  {to / 'results.csv'}  {to / 'comparisons.csv'}  {to / 'figures'}/")
    return 0


def write_report(results: Results, to: Path) -> None:
    """Write all files of a report to a folder. Each file is written atomically."""
    figures = draw(results)
    with explain_os_errors("write the report", to):
        (to / "figures").mkdir(parents=True, exist_ok=True)
        for figure in figures:
            figure.save(to / "figures")
        possible = {*LOSS_FIGURES, *(phenomenon.name for phenomenon in PHENOMENA)}
        for name in possible - {figure.name for figure in figures}:
            for suffix in ("svg", "png"):  # left by an earlier report, which had data for this figure
                (to / "figures" / f"{name}.{suffix}").unlink(missing_ok=True)
        _write_csv(to / "results.csv", [run_row(results, name) for name in results.runs])
        _write_csv(to / "comparisons.csv", [row for size in results.sizes for row in comparison_rows(results, size)])
        with atomic_write(to / "report.html") as file:
            file.write(page(results, figures))


# ------------------------------------------------------------------------------------------------------------------ csv


def run_row(results: Results, name: str) -> dict[str, Any]:
    """Return the line of a run in results.csv."""
    run = results.runs[name]
    planned, summary = run.planned, run.outcome.summary
    copied = ("bits_per_byte", "parameters", "ffn_parameters", "flops_per_token", "tokens", "steps", "wall_seconds")
    return {
        "run": name, "stage": planned.stage, "size": planned.size, "arm": planned.arm, "learning_rate": planned.lr,
        "seed": planned.seed, "state": run.outcome.state, "final_eval_loss": run.outcome.loss,
        **{key: summary.get(key) for key in copied},
        "tokens_per_second": run.tokens_per_second, "memory_gib": run.memory_gib,
        "data_order_hash": summary.get("data_order_hash"), "config_hash": summary.get("config_hash"),
        "plan": results.manifest.plan.name, "plan_hash": results.manifest.hash,
    }  # fmt: skip


def comparison_rows(results: Results, size: str) -> list[dict[str, Any]]:
    """Return the lines of a size's arms in comparisons.csv."""
    rows = []
    costs = efficiency(results, size)
    for c in results.comparisons(size):
        runs = [run.folder.name for run in results.final_runs(size, c.arm)]
        cost, sweep = costs.get(c.arm), results.sweep(size, c.arm)
        rows.append(
            {
                "size": size, "arm": c.arm, "baseline": results.baseline, "verdict": c.verdict.value, "reason": c.reason,
                "seeds": c.seeds, "diverged": c.diverged, "difference": c.difference, "deviation": c.deviation,
                "interval_low": c.interval[0], "interval_high": c.interval[1], "adjusted_low": c.adjusted[0],
                "adjusted_high": c.adjusted[1], "regret": c.regret, "p": c.p, "p_holm": c.p_holm,
                "p_equivalent": c.p_equivalent, "detectable": c.detectable, "seeds_needed": c.needed,
                "deviation_arm": c.scatter.own, "deviation_baseline": c.scatter.base,
                "correlation": c.scatter.correlation, "p_unpaired": c.scatter.p_unpaired,
                "notes": "; ".join(c.scatter.notes), "documents": c.text.scatter.documents if c.text else None,
                "document_error": c.text.scatter.error if c.text else math.nan,
                "text_low": c.text.both[0] if c.text else math.nan, "text_high": c.text.both[1] if c.text else math.nan,
                "p_text_holm": c.text.p_holm if c.text else math.nan, "holds_over_text": c.text.holds if c.text else None,
                "learning_rate": results.best_lr(size, c.arm), "rate_rise": sweep.rise if sweep else math.nan,
                "mismatch": results.manifest.cost[size][c.arm]["mismatch"],
                "loss_at_equal_time": cost.loss_at_equal_time if cost else math.nan,
                "loss_at_equal_memory": cost.loss_at_equal_memory if cost else math.nan,
                "plan_hash": results.manifest.hash, "runs": " ".join(runs),
            }
        )  # fmt: skip
    return rows


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["run"], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _csv_value(value) for key, value in row.items()})


def _csv_value(value: Any) -> Any:
    return "" if is_missing(value) else printable(value) if isinstance(value, str) else value


# ----------------------------------------------------------------------------------------------------------------- page


def page(results: Results, figures: Sequence[ReportFigure]) -> str:
    """Return report.html. Everything but the figures' SVG is escaped by the template engine."""
    by_name = {figure.name: figure for figure in figures}
    losses = [by_name[name] for name in ("scaling", "differences", "curves", "costs") if name in by_name]
    compute_multipliers, rates = multiplier_tables(results), _rates(results)
    phenomena = [figure for figure in figures if figure.name not in LOSS_FIGURES]
    sections = {
        "verdicts": "Arms",
        "losses": "Losses over time and cost" if losses or compute_multipliers else "",
        "rates": "Learning rates" if rates or "learning_rates" in by_name else "",
        "telemetry": "Telemetry" if phenomena else "",
        "cost": "Cost",
        "fairness": "Fairness",
        "open": "Open questions",
        "runs": "Runs",
        "plan": "Plan",
    }
    rendered = _template().render(
        manifest=results.manifest,
        plan=results.manifest.plan,
        metric=results.metric,
        looks=_looks(results),
        begun=_begun(results),
        amendments=amendment_lines(results.manifest),
        sentences=sentences(results),
        provisional=_provisional(results),
        sections={anchor: title for anchor, title in sections.items() if title},
        figures=by_name,
        losses=losses,
        phenomena=phenomena,
        arms=[arms_table(results, size) for size in results.sizes],
        baselines=baselines_table(results),
        reported=reported_table(results),
        tests=[
            table
            for size in results.sizes
            for table in (tests_table(results, size), text_table(results, size), scatter_table(results, size))
            if table is not None
        ],
        multipliers=compute_multipliers,
        efficiencies=[efficiency_table(results, size) for size in results.sizes],
        rates=rates,
        costs=[_cost(results, size) for size in results.sizes],
        fairness=_fairness(results),
        open_questions=_open_questions(results),
        runs=_runs(results),
        provenance=provenance_lines(results),
        plan_keys={k: v for k, v in dataclasses.asdict(results.manifest.plan).items() if v is not None},
        differing=_differing(results),
    )
    return printable(rendered)  # attributes too; what is markup has been escaped


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _looks(results: Results) -> str:
    """Return when verdicts are made, to end a sentence; "" where that is once, after all seeds."""
    looks, planned = results.manifest.looks, len(results.manifest.plan.seeds)
    if looks.counts == (planned,):
        return ""
    how = looks.spending.replace("_", " ").replace("obrien fleming", "O'Brien and Fleming").replace("pocock", "Pocock")
    return f"; verdicts after {listed(looks.counts)} seeds, paid for as by {how}"


def _begun(results: Results) -> str:
    """Return when, where and by which command the plan was begun; "" if that is not known."""
    first = next(iter(results.manifest.provenance), None)
    return f"{first['command']}; begun at {summarise(first)}" if first and first.get("command") else ""


def _provisional(results: Results) -> str:
    """Return which runs a report is still waiting for; "" if all have ended."""
    known_runs = {planned.name for planned in expected_runs(results)} | results.runs.keys()
    ended = sum(run.outcome.state in ENDED for run in results.runs.values())
    sweeps_complete = all(results.best_lr(size, arm) for size, arm in results.size_arm_pairs())
    if ended == len(known_runs) and sweeps_complete:
        return ""
    more = "" if sweeps_complete else ", and seeds follow where a sweep is not complete"
    return f"Provisional: {ended} of {len(known_runs)} runs have ended{more}. The results may change as the others end."


def _rates(results: Results) -> PageTable | None:
    heads = ("size", "arm", "learning rate", "loss there", "rise at a factor of 2", "regret", "tried", "at an edge")
    rows, plan = [], results.manifest.plan
    regrets = {size: results.regrets(size) for size in results.places}
    for size, arm in results.size_arm_pairs():
        sweep = results.sweep(size, arm)
        if sweep is not None:
            tried = [
                f"{lr:g}" + ("" if math.isfinite(loss) else " (diverged)")
                for lr, loss in mean_losses(results.sweep_losses(size, arm)).items()
            ]
            numbers = [number_cell(sweep.best_lr, "g"), number_cell(sweep.loss), number_cell(sweep.rise)]
            texts = [text_cell(", ".join(tried)), text_cell(f"the {sweep.edge}" if sweep.edge else "no")]
            regret = number_cell(regrets[size][arm])
            rows.append(TableRow([text_cell(size), text_cell(arm), *numbers, regret, *texts]))
    if not rows:
        return None
    chosen = "the vertex of a parabola through the sweep" if plan.rate_choice == "vertex" else "the best of those tried"
    caption = f"The sweep, with {seeds_text(plan.rate_seeds)}, which no verdict uses; the learning rate is {chosen}."
    note = (
        "Rise: nats lost at half or twice the best learning rate. Regret: what the arm may lose by missing its best one (root "
        "mean square, nats), which is part of the standard error of its differences."
    )
    return PageTable(heads, rows, caption, note)


def _cost(results: Results, size: str) -> PageTable:
    costs = efficiency(results, size)
    heads = (
        "arm",
        "tokens/s",
        "memory, GiB",
        "FLOPs per token",
        "saved for backward, bytes per token",
        "tokens per run",
    )
    rows = []
    for arm in results.arms(size):
        planned, measured = results.manifest.cost[size][arm], costs.get(arm)
        cells = [
            text_cell(arm),
            number_cell(measured.tokens_per_second if measured else math.nan, ",.0f"),
            number_cell(measured.memory_gib if measured else math.nan, ".2f"),
            *(number_cell(planned[key], ",d") for key in ("flops_per_token", "saved_bytes_per_token", "tokens")),
        ]
        rows.append(TableRow(cells, row_css(results, arm)))
    return PageTable(heads, rows, f"{size}: speed is the median over the compared runs, on the machine as it was then")


def _fairness(results: Results) -> PageTable:
    heads = ("size", "arm", "formula", "d_ff", "FFN parameters", "mismatch", "data and initial weights")
    rows = []
    for size, arm in results.size_arm_pairs():
        learned, cost = results.manifest.learned(size, arm), results.manifest.cost[size][arm]
        cells = [
            text_cell(size),
            text_cell(arm),
            TableCell(str(learned.get("ffn.formula")), css="text", code=True),
            number_cell(learned["model.d_ff"], "d"),
            number_cell(cost["ffn_parameters"], ",d"),
            TableCell(f"{cost['mismatch']:+.2%}", repr(cost["mismatch"])),
            text_cell("the same for a seed" if results.runs else "–"),
        ]
        rows.append(TableRow(cells, row_css(results, arm)))
    return PageTable(heads, rows)


def _open_questions(results: Results) -> list[str]:
    items = []
    for size in results.sizes:
        for c in results.comparisons(size):
            if c.verdict in (Verdict.UNDECIDED, Verdict.BLOCKED, Verdict.EQUIVALENT):
                items.append(f"{c.arm} at {size}: {c.verdict.value}: {c.reason}")
            items += [f"{c.arm} at {size}: {note}" for note in c.scatter.notes]
    items += results.notes
    if not results.metric.of_text:
        items.append(
            "Learning rates were chosen by the held-out loss; what missing the best one costs is not known for "
            f"{results.metric.name} and in no interval"
        )
    if results.manifest.plan.sweep_at:
        items.append(
            f"All sizes run at the learning rates of the sweep at {results.manifest.plan.sweep_at} (ablation.sweep_at). "
            "How far the best ones move with size is in no interval (python -m ablation.transfer measures it)"
        )
    if len(results.manifest.plan.horizons) == 1:
        items.append("One horizon: the plan did not test how much compute a difference is worth (ablation.horizons)")
    if len(results.sizes) == 1:
        items.append("One size: the plan did not test whether any of this holds at another size")
    return [
        *items,
        f"A verdict needs {FEWEST_SEEDS} seeds. p-values are of paired t-tests, adjusted as in Holm 1979 over all arms and "
        f"sizes: the probability of even one false “better” or “worse” stays below {ALPHA:.0%}, and so does that of even "
        f"one false “equivalent”. A “detectable” difference would be found with a probability of {POWER:.0%}",
        "Evaluations within a run may use a part of the held-out text (eval_tokens), and the curves show those. Final losses "
        "use all of it, so a curve need not end at the final loss",
        "Losses at equal time are read off curves within runs, whose learning rate is still decaying. They compare arms, and "
        "no verdict rests on them. To compare at equal time, run a plan with ablation.budget=wallclock",
        "The runs say nothing about longer training, other data or other recipes than those of the plan",
    ]


def _runs(results: Results) -> PageTable:
    heads = (
        "run",
        "stage",
        "size",
        "arm",
        "learning rate",
        "seed",
        "state",
        "final loss",
        "bits per byte",
        "data order",
    )
    rows = []
    for name, run in results.runs.items():
        planned, summary = run.planned, run.outcome.summary
        cells = [
            TableCell(name, name, "text", code=True),
            text_cell(planned.stage),
            text_cell(planned.size),
            text_cell(planned.arm),
            number_cell(planned.lr, "g"),
            number_cell(planned.seed, "d"),
            text_cell(run.outcome.state),
            number_cell(run.outcome.loss, ".6f"),
            number_cell(summary.get("bits_per_byte"), ".4f"),
            text_cell(summary.get("data_order_hash") or "–"),
        ]
        rows.append(TableRow(cells))
    caption = "Folders in runs/ of the plan's folder; each has config.yaml, metrics.jsonl and summary.json"
    return PageTable(heads, rows, caption)


def _differing(results: Results) -> PageTable:
    """Return the values that differ between arms."""
    rows = []
    for size, arms in results.manifest.arms.items():
        for arm, values in arms.items():
            listed = ", ".join(f"{key}={value}" for key, value in values.items())
            rows.append(TableRow([text_cell(size), text_cell(arm), TableCell(listed, css="why")]))
    return PageTable(("size", "arm", "values"), rows)


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
