"""Show a plan on Weights & Biases: `python -m ablation.dashboard ablations/glu_variants`.

    FOLDER           of the plan, or a file that this command wrote
    entity=NAME      team or user; default: that of the runs
    project=NAME     default: that of the runs
    to=FILE          the file to write; default: FOLDER/dashboard.json

Logs the statistics as a table, and creates a workspace per size and one report: verdicts, curves by arm with bands over the
seeds, telemetry, cost. Everything is written to a file first. Without a login it stops there; after `wandb login` the same
command uploads it, and so does the command with the file, on another machine. Every upload creates new views and updates the
table.

The curves are those of the runs that W&B has. Runs that trained offline are uploaded by the `wandb sync` line that is printed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

from ablation.plan import tags_of
from ablation.results import Results, read_results
from ablation.verdict import by_size, headline
from conf.load import from_yaml
from conf.login import wandb_mode, wandb_project
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, explain_os_errors
from kernels.common.options import read_positional
from kernels.common.text import printable

NAME = "dashboard.json"
STATISTICS = "statistics"  # name of the table, and job type of the run that logs it
COLUMNS = (
    "size", "arm", "verdict", "reason", "difference", "interval_low", "interval_high", "p", "p_holm", "detectable",
    "seeds", "diverged", "best_rate", "mismatch", "runs",
)  # fmt: skip
_OPTIONS = {"entity": "", "project": "", "to": ""}
_NO_METRICS = ("kind", "step", "tokens", "window_tokens")  # keys of a telemetry line
_FULL_WIDTH = 24  # of a panel, in columns of W&B's grid


def main(argv: list[str]) -> int:
    options, positional = read_positional(argv, _OPTIONS)
    if len(positional) != 1:
        raise UserError("expected the folder of one plan: python -m ablation.dashboard ablations/NAME")
    _import_workspaces()
    target = {name: options[name] for name in ("entity", "project") if options[name]}
    online, path = wandb_mode() == "online", Path(positional[0])
    if path.is_file():
        if not online:
            raise UserError("there is no W&B login on this machine, so nothing was uploaded: run wandb login")
        upload(dataclasses.replace(read_content(path), **target))
        return 0
    results = read_results(path)
    content = dataclasses.replace(content_of(results), **target)
    file = Path(options["to"] or path / NAME)
    write(content, file)
    print(f"{file} holds the workspaces, the report and the table of {content.plan}")
    if sync := sync_command(results, target):
        print(f"runs that trained offline are uploaded by\n  {sync}")
    if online:
        upload(content)
    else:
        again = shlex.join(["python", "-m", "ablation.dashboard", *argv])
        elsewhere = shlex.join(["python", "-m", "ablation.dashboard", str(file)])
        print(f"there is no W&B login on this machine. After `wandb login`, upload everything with\n  {again}")
        print(f"or, on a machine that has only the file, with\n  {elsewhere}")
    return 0


# ---------------------------------------------------------------------------------------------------------- the content


@dataclasses.dataclass(frozen=True)
class Content:
    """Everything that the workspaces, the report and the table are made from, stored in a file as JSON."""

    plan: str
    hash: str
    question: str
    baseline: str
    entity: str  # "": the user's default in W&B
    project: str
    headline: list[str]  # what holds at every size, where there are several
    sentences: dict[str, str]  # by size: the verdict
    rows: list[list[Any]]  # of `COLUMNS`, a row per arm and size; None where there is no number
    notes: list[str]  # on what is missing, unfinished or cut short
    telemetry: dict[str, int]  # by metric: the number of layers; 0 for a metric of the whole model


def content_of(results: Results) -> Content:
    """Return the content of a dashboard for a plan's folder.

    Raises:
        UserError: no run has started.
    """
    if not results.runs:
        raise UserError(f"no run has started in {results.folder}: python -m ablation.run trains the plan")
    plan = results.manifest.plan
    logger = from_yaml(next(iter(results.runs.values())).folder / "config.yaml").logger
    telemetry = {
        name: len(value) if isinstance(value, list) else 0
        for run in results.runs.values()
        for line in run.lines_of("telemetry")[:1]
        for name, value in line.items()
        if name not in _NO_METRICS
    }
    rows = [_row(results, size, arm) for size in results.sizes for arm in results.arms(size)]
    return Content(
        plan=printable(plan.name),
        hash=printable(results.manifest.begun_as or results.manifest.hash),
        question=printable(plan.question),
        baseline=plan.baseline,
        entity=logger.entity or "",
        project=wandb_project(logger.project),
        headline=[printable(sentence) for sentence in headline(results)],
        sentences={size: printable(sentence) for size, sentence in by_size(results).items()},
        rows=rows,
        notes=list(map(printable, results.notes)),
        telemetry=telemetry,
    )


def _row(results: Results, size: str, arm: str) -> list[Any]:
    """Return the row of an arm. Differences, intervals and detectable differences are in nats per token."""
    finals = results.final_runs(size, arm)
    comparison = next((c for c in results.comparisons(size) if c.arm == arm), None)
    values: dict[str, Any] = {
        "size": size,
        "arm": arm,
        "verdict": "baseline" if arm == results.baseline else "nothing to compare yet",
        "reason": "",
        "seeds": len(finals),
        "diverged": sum(not math.isfinite(run.outcome.loss) for run in finals),
        "best_rate": results.best_lr(size, arm),
        "mismatch": results.manifest.cost[size][arm]["mismatch"],
        "runs": " ".join(run.folder.name for run in finals),
    }
    if comparison is not None:
        values |= dataclasses.asdict(comparison) | {"verdict": comparison.verdict.value}
        values["interval_low"], values["interval_high"] = comparison.interval
    return [_json_number(values.get(name)) for name in COLUMNS]


def _json_number(value: Any) -> Any:
    """Return None for nan and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(content: Content, path: Path) -> None:
    """Write the content, and what W&B will receive: the specifications of the workspaces and of the report."""
    workspaces, report = build(content)
    models = [workspace._to_model() for workspace in workspaces]
    model = report._to_model()
    document = {
        "content": dataclasses.asdict(content),
        "workspaces": [{"name": m.display_name, "spec": _spec(m)} for m in models],
        "report": {"title": model.display_name, "description": model.description, "spec": _spec(model)},
        STATISTICS: {"columns": list(COLUMNS), "data": content.rows},
    }
    with explain_os_errors("write the dashboard to", path), atomic_write(path) as file:
        json.dump(document, file, indent=1, allow_nan=False)
        file.write("\n")


def _spec(model: Any) -> Any:
    return json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))


def read_content(path: Path) -> Content:
    """Read the content that `write` wrote.

    Raises:
        UserError: the file is something else.
    """
    try:
        return Content(**json.loads(path.read_text(encoding="utf-8"))["content"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by this command: {type(error).__name__}: {error}") from error


def sync_command(results: Results, target: dict[str, str]) -> str:
    """Return the command that uploads the runs that trained offline; "" if there are none."""
    runs, paths = shlex.quote(str(results.folder / "runs")), []
    if any(list((run.folder / "wandb").glob("offline-run-*")) for run in results.runs.values()):
        paths.append(f"{runs}/*/wandb/latest-run")  # runs that have a folder each
    sessions = sorted((results.folder / "runs" / "wandb").glob("offline-run-*"))  # by date
    newest = {path.name.rpartition("-")[2]: path for path in sessions}  # by id; it holds the whole run
    if len(newest) == len(sessions) and sessions:
        paths.append(f"{runs}/wandb/offline-run-*")
    else:
        paths.extend(shlex.quote(str(path)) for path in newest.values())
    options = [f"--{name}={shlex.quote(value)}" for name, value in target.items()]
    return " ".join(["wandb sync", *options, *paths]) if paths else ""


# ----------------------------------------------------------------------------------------------------------- the layout


def build(content: Content) -> tuple[list[Any], Any]:
    """Return a workspace per size, and the report, without using the network.

    Raises:
        UserError: W&B does not take one of the names.
    """
    ws, wr = _import_workspaces()
    try:
        return _build(content, ws, wr)
    except ValueError as error:  # of pydantic, which checks names
        reason = " ".join(str(error).splitlines()[1:3])
        raise UserError(f"W&B cannot show the plan {content.plan}: {reason}") from error


def _build(content: Content, ws: Any, wr: Any) -> tuple[list[Any], Any]:
    workspaces = [_workspace(content, size, ws, wr) for size in content.sentences]
    sentences = [*content.headline, *content.sentences.values()]
    blocks: list[Any] = [wr.P(sentence) for sentence in sentences]
    blocks.append(wr.P(f"Plan {content.plan} ({content.hash}): {content.question}"))
    if content.notes:
        blocks.append(wr.UnorderedList(items=content.notes))
    for size in content.sentences:
        runset = {"filters": _filters(content, size, ws), "groupby": ["JobType"]}
        blocks += [wr.H1(size), wr.H2("Verdicts"), wr.MarkdownBlock(markdown(content, size))]
        for title, panels in _panels(content, size, wr).items():
            blocks += [wr.H2(title), wr.PanelGrid(runsets=[wr.Runset(name=size, **runset)], panels=panels)]
    report = wr.Report(
        entity=content.entity,
        project=content.project,
        title=f"{content.plan}: {content.question}"[:128],
        description=" ".join(sentences),
        blocks=blocks,
        width="fluid",
    )
    return workspaces, report


def _workspace(content: Content, size: str, ws: Any, wr: Any) -> Any:
    verdicts = [
        wr.MarkdownPanel(
            markdown=f"{content.sentences[size]}\n\n{markdown(content, size)}", layout=wr.Layout(w=_FULL_WIDTH, h=8)
        ),
        wr.WeavePanelSummaryTable(table_name=STATISTICS, layout=wr.Layout(w=_FULL_WIDTH, h=10)),
    ]
    sections = {"Verdicts": verdicts, **_panels(content, size, wr)}
    return ws.Workspace(
        entity=content.entity,
        project=content.project,
        name=f"{content.plan} {size}",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=_most_runs(content, size)),
        runset_settings=ws.RunsetSettings(
            filters=_filters(content, size, ws),
            groupby=[ws.Metric("JobType")],
            pinned_columns=["summary:final_eval_loss", "summary:bits_per_byte"],
        ),
    )


def _filters(content: Content, size: str, ws: Any) -> list[Any]:
    """Return filters for the runs that are compared, and the one that logged the table."""
    plan, size_tag, final = tags_of(content.hash, size, "final")
    tagged = [ws.Tags().isin([plan]), ws.Tags().isin([size_tag]), ws.Tags().isin([final, STATISTICS])]
    return [ws.Metric("Group") == content.plan, *tagged]


def _most_runs(content: Content, size: str) -> int:
    """Return how many runs a panel has to show to leave none out."""
    return max(10, 1 + sum(row["seeds"] for row in _rows_of(content, size)))


def _panels(content: Content, size: str, wr: Any) -> dict[str, list[Any]]:
    """Return the panels by section. Lines are means over the seeds of an arm, bands their standard deviation."""
    grouped = {"groupby": "JobType", "groupby_aggfunc": "mean", "max_runs_to_show": _most_runs(content, size)}

    def line(title: str, *names: str, **more: Any) -> Any:
        return wr.LinePlot(title=title, x="tokens", y=list(names), groupby_rangefunc="stddev", **grouped, **more)

    def bar(title: str, name: str) -> Any:
        return wr.BarPlot(title=title, metrics=[name], groupby_rangefunc="stddev", **grouped)

    curves = [
        line("held-out loss, nats per token", "eval/loss"),
        line(
            "training loss, nats per token",
            "train/loss",
            smoothing_type="exponentialTimeWeighted",
            smoothing_factor=0.9,
        ),
        line("held-out bits per byte", "eval/bits_per_byte"),
        line("gradient norm", "train/grad_norm", log_y=True),
    ]
    telemetry = []
    for name, layers in content.telemetry.items():
        if layers:
            ends = (0, layers - 1) if layers > 1 else (0,)
            telemetry.append(line(f"{name}, first and last layer", *(f"telemetry/{name}/layer_{i}" for i in ends)))
        else:
            telemetry.append(line(name, f"telemetry/{name}"))
    cost = [
        line("tokens per second", "train/tokens_per_second"),
        line("model FLOPs utilisation", "train/mfu"),
        line("memory, GiB", "train/memory_gib"),
        bar("FLOPs per token", "flops_per_token"),
        bar("FFN parameters", "ffn_parameters"),
        bar("wall-clock seconds per run", "wall_seconds"),
    ]
    return {"Curves by arm": curves, "Telemetry": telemetry, "Cost": cost}


def _rows_of(content: Content, size: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [dict(zip(COLUMNS, row, strict=True)) for row in content.rows]
    return [row for row in rows if row["size"] == size]


def markdown(content: Content, size: str) -> str:
    """Return the verdicts of a size as a table."""
    heads = (
        "arm",
        "verdict",
        f"difference to {content.baseline}, nats per token",
        "95% interval",
        "p, Holm",
        "seeds",
        "reason",
    )
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in _rows_of(content, size):
        interval = f"{_formatted(row['interval_low'], '+.4f')} to {_formatted(row['interval_high'], '+.4f')}"
        cells = (
            row["arm"],
            row["verdict"],
            _formatted(row["difference"], "+.4f"),
            interval if row["interval_low"] is not None else "",
            _formatted(row["p_holm"], ".2g"),
            f"{row['seeds']}" + (f", {row['diverged']} diverged" if row["diverged"] else ""),
            row["reason"],
        )
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table, where none of it is markup."""
    return re.sub(r"([\\`*\[\]<>|~$])", r"\\\1", printable(" ".join(text.split())))


def _formatted(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# ------------------------------------------------------------------------------------------------------------- W&B itself


def _import_workspaces() -> tuple[Any, Any]:
    """Return the modules for workspaces and for reports.

    Raises:
        UserError: they are not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError(
            "a dashboard needs the package wandb-workspaces: .venv/bin/pip install -c requirements.lock wandb-workspaces"
        ) from error
    return ws, wr


def upload(content: Content) -> None:
    """Log the table, save the workspaces and the report, and print their addresses.

    Raises:
        UserError: W&B refused, or it cannot be reached.
    """
    import wandb

    try:
        with tempfile.TemporaryDirectory() as scratch:
            content = dataclasses.replace(content, entity=_log_table(content, wandb, scratch))
        workspaces, report = build(content)
        for workspace in workspaces:
            print(f"workspace: {workspace.save().url}")
        print(f"report: {report.save().url}")
    except Exception as error:
        raise UserError(f"the upload to W&B did not complete: {type(error).__name__}: {error}") from error


def _log_table(content: Content, wandb: Any, scratch: str) -> str:
    """Log the statistics, always to the same run of a plan; return the entity of that run."""
    tags = {tag for size in content.sentences for tag in tags_of(content.hash, size, "final")[:2]}
    run = wandb.init(
        id=f"{content.hash}-{STATISTICS}",
        resume="allow",
        mode="online",
        dir=scratch,
        entity=content.entity or None,
        project=content.project,
        group=content.plan,
        job_type=STATISTICS,
        name=f"{content.plan} {STATISTICS}",
        tags=[*sorted(tags), STATISTICS],
        config={"plan": content.plan, "hash": content.hash, "baseline": content.baseline},
        settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
    )
    run.log({STATISTICS: wandb.Table(columns=list(COLUMNS), data=content.rows)})
    run.summary["verdict"] = " ".join([*content.headline, *content.sentences.values()])
    run.finish()
    return run.entity


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
