"""A dashboard shows what the folder holds: without a login as a file, with one on W&B, which is faked at its boundary."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import shutil
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ablation.dashboard import COLUMNS, STATISTICS, _cell, build, content_of, main
from ablation.plan import Plan
from ablation.results import read_results
from ablation.verdict import sentences
from conf.load import load
from kernels.common.errors import UserError
from tests.ablation.made import all_planned, losses, make, plan_of
from tests.training.tiny import command
from training.loggers import scalars

pytest.importorskip("wandb_workspaces")
RULE = losses({"gelu": 0.03, "swiglu": -0.05}, noise=0.001)
SECTIONS = ["Verdicts", "Curves by arm", "Telemetry", "Cost"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of("ablation=glu_variants", "ablation.arms=[relu,gelu,swiglu]", "tokens=600000")


def log_out(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(folder / "netrc"))

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path) -> None:
    """A user who never logged in, on a machine without a network."""
    log_out(monkeypatch, tmp_path)


class FakeRun:
    """A W&B run that keeps what it is given."""

    entity = "team"

    def __init__(self, **settings: Any) -> None:
        self.settings, self.logged, self.summary, self.finished = settings, {}, {}, False

    def log(self, values: dict[str, Any]) -> None:
        self.logged |= values

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch) -> types.SimpleNamespace:
    """A W&B that this user is logged in to: `runs`, `views` and `reports` are what it was given."""
    import wandb
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    given = types.SimpleNamespace(runs=[], views=[], reports=[])
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)

    def init(**settings: Any) -> FakeRun:
        given.runs.append(FakeRun(**settings))
        return given.runs[-1]

    def saved(views: list[Any], place: str):
        def save(view: Any) -> types.SimpleNamespace:
            assert given.runs[-1].finished  # the table exists, and with it the project
            views.append(view)
            return types.SimpleNamespace(url=f"https://example.org/{view.entity}/{view.project}/{place}")

        return save

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(ws.Workspace, "save", saved(given.views, "workspace"))
    monkeypatch.setattr(wr.Report, "save", saved(given.reports, "report"))
    return given


def strictly(path: Path) -> dict[str, Any]:
    """Read JSON that has no nan and no infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def sections(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {part["name"]: part["panels"] for part in spec["section"]["panelBankConfig"]["sections"]}


def text_of(node: Any) -> str:
    """Return all text below a block of a report."""
    if isinstance(node, dict):
        own = node.get("text", "") + node.get("content", "")
        return own + text_of(node.get("children", []))
    return "".join(map(text_of, node))


def without_ids(node: Any) -> Any:
    """Drop the names that are made up anew for every panel and set of runs."""
    if isinstance(node, dict):
        return {name: without_ids(value) for name, value in node.items() if name not in ("__id__", "id")}
    return [without_ids(value) for value in node] if isinstance(node, list) else node


@pytest.fixture(scope="module")
def written(whole, tmp_path_factory) -> dict[str, Any]:
    """What the command writes without a login; `printed` is its output."""
    path, printed = tmp_path_factory.mktemp("written") / "d.json", io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        log_out(monkeypatch, path.parent)
        assert main([str(whole), f"to={path}"]) == 0
    return strictly(path) | {"printed": printed.getvalue(), "path": path}


def test_the_table_has_a_row_for_every_arm_with_the_numbers_of_the_comparison(whole, written):
    table = written[STATISTICS]
    assert table["columns"] == list(COLUMNS)
    rows = {row[1]: dict(zip(COLUMNS, row, strict=True)) for row in table["data"]}
    results = read_results(whole)
    assert list(rows) == ["relu", "gelu", "swiglu"]
    assert (rows["relu"]["verdict"], rows["relu"]["seeds"], rows["relu"]["difference"]) == ("baseline", 5, None)
    for found in results.comparisons("nano"):
        row = rows[found.arm]
        same = ("difference", "p", "p_holm", "detectable", "seeds", "diverged", "reason")
        assert {name: row[name] for name in same} == {name: getattr(found, name) for name in same}
        assert (row["verdict"], row["interval_low"], row["interval_high"]) == (found.verdict.value, *found.interval)
        assert row["best_rate"] == results.best_lr("nano", found.arm) == 4e-3
        assert row["mismatch"] == results.manifest.cost["nano"][found.arm]["mismatch"]
        assert row["runs"].split() == [f"nano-{found.arm}-lr0.004-seed{seed}" for seed in range(5)]
    assert {arm: row["verdict"] for arm, row in rows.items()} == {
        "relu": "baseline",
        "gelu": "worse",
        "swiglu": "better",
    }


def test_the_report_begins_with_the_verdict(whole, written):
    blocks = [text for block in written["report"]["spec"]["blocks"] if (text := text_of(block))]
    [verdict] = sentences(read_results(whole))
    assert "better than relu: swiglu by" in verdict
    assert blocks[0] == verdict == written["report"]["description"]
    table = next(text for text in blocks if text.startswith("| arm |"))
    assert [line.split("|")[1:3] for line in table.splitlines()[2:]] == [
        [" relu ", " baseline "], [" gelu ", " worse "], [" swiglu ", " better "],
    ]  # fmt: skip
    assert [text for text in blocks if text in SECTIONS] == SECTIONS


def test_panels_ask_for_what_runs_log_by_arm_and_over_tokens(whole, written):
    [workspace] = written["workspaces"]
    found = sections(workspace["spec"])
    assert list(found) == SECTIONS
    run = next((whole / "runs").iterdir())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = {f"{line['kind']}/{name}" for line in lines for name, _ in scalars(line)}
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    asked = []
    for panel in (panel for name in SECTIONS[1:] for panel in found[name]):
        config = panel["config"]
        assert (config["groupBy"], config["groupAgg"], config["groupArea"]) == ("jobType", "mean", "stddev")
        assert config["limit"] >= 15
        if panel["viewType"] == "Run History Line Plot":
            assert config["xAxis"] == "tokens"
            assert set(config["metrics"]) <= logged
        else:
            assert set(config["metrics"]) <= summary.keys()
        asked += config["metrics"]
    assert {"eval/loss", "train/loss", "train/mfu", "flops_per_token"} <= set(asked)
    assert {name for name in asked if name.startswith("telemetry/dead")} == {
        f"telemetry/dead/layer_{i}" for i in (0, 3)
    }
    layers = {name.split("/")[1] for name in logged if name.startswith("telemetry/")} - {
        "window_tokens",
        "step",
        "tokens",
    }
    assert {name.split("/")[1] for name in asked if name.startswith("telemetry/")} == layers
    assert "run-summary" in json.dumps(found["Verdicts"][1])
    assert json.dumps(STATISTICS) in json.dumps(found["Verdicts"][1])
    assert workspace["spec"]["section"]["settings"]["maxRuns"] >= 16


def runsets(document: dict[str, Any], size: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the sets of runs of a size: of its workspace, and of the grids of the report."""
    yield from document["workspaces"][size]["spec"]["section"]["runSets"]
    grids = [block for block in document["report"]["spec"]["blocks"] if block["type"] == "panel-grid"]
    for grid in grids[3 * size : 3 * size + 3]:
        yield from grid["metadata"]["runSets"]


def chooses(runset: dict[str, Any], group: str, tags: list[str]) -> bool:
    """Return whether a set of runs takes a run, by the filters of its specification."""
    assert runset["filters"]["filterFormat"] == "filterV2"
    assert all(part.get("connector", "AND") == "AND" for part in runset["filters"]["filters"])
    holds = []
    for part in runset["filters"]["filters"]:
        if part["key"] == {"section": "run", "name": "group"}:
            holds.append(part["op"] == "=" and part["value"] == group)
        else:
            assert (part["key"], part["op"]) == ({"section": "run", "name": "tags"}, "IN")
            holds.append(bool(set(part["value"]) & set(tags)))
    return len(holds) > 1 and all(holds)


def test_the_runs_that_are_compared_are_those_that_are_shown(tmp_path, wandb):
    sizes = "ablation.sizes={small: model=nano, deep: model=nano model.n_layers=6}"
    plan = plan_of("ablation=glu_variants", "ablation.arms=[relu,swiglu]", sizes, "tokens=600000", "optim.beta2=0.9")
    other = plan_of("ablation=glu_variants", "ablation.arms=[relu,swiglu]", sizes, "tokens=600000", "optim.beta2=0.8")
    folder = make(plan, tmp_path, RULE)
    assert main([str(folder)]) == 0
    document = strictly(folder / "dashboard.json")
    assert [workspace["name"] for workspace in document["workspaces"]] == ["glu_variants small", "glu_variants deep"]
    assert len(wandb.views) == 2
    loggers = [
        (planned, load(p.overrides(planned, "runs")).logger)
        for p in (plan, other)
        for planned in all_planned(p, RULE)[::7]
    ]
    foreign = {id(logger) for _, logger in loggers[len(loggers) // 2 :]}
    statistics = wandb.runs[0].settings
    for place, size in enumerate(("small", "deep")):
        for runset in runsets(document, place):
            assert [(key["section"], key["name"]) for key in runset["grouping"]] == [("run", "jobType")]
            assert chooses(runset, statistics["group"], statistics["tags"])
            for planned, logger in loggers:
                expected = (planned.size, planned.stage) == (size, "final") and id(logger) not in foreign
                assert chooses(runset, logger.group, logger.tags) == expected
    assert {planned.stage for planned, _ in loggers} == {"sweep", "final"}
    assert {planned.size for planned, _ in loggers} == {"small", "deep"}


def test_without_a_login_it_says_how_to_upload(whole, written):
    upload = "After `wandb login`, upload everything with\n  python -m ablation.dashboard"
    assert f"there is no W&B login on this machine. {upload} {whole}" in written["printed"]
    elsewhere = f"or, on a machine that has only the file, with\n  python -m ablation.dashboard {written['path']}\n"
    assert elsewhere in written["printed"]
    assert "wandb sync" not in written["printed"]


def test_runs_that_trained_offline_are_synced_by_one_line(copy, capsys):
    (copy / "runs" / "nano-gelu-lr0.004-seed2" / "wandb" / "offline-run-20260101_000000-abcd1234").mkdir(parents=True)
    main([str(copy), "project=p q"])
    assert f"\n  wandb sync --project='p q' {copy}/runs/*/wandb/latest-run\n" in capsys.readouterr().out


def test_runs_that_share_a_folder_are_synced_without_their_earlier_sessions(copy, capsys):
    files = copy / "runs" / "wandb"
    for name in ("20260101_000000-aaaa", "20260102_000000-bbbb"):
        (files / f"offline-run-{name}").mkdir(parents=True)
    main([str(copy), "project=p"])
    assert f"\n  wandb sync --project=p {copy}/runs/wandb/offline-run-*\n" in capsys.readouterr().out
    (files / "offline-run-20260103_000000-aaaa").mkdir()  # a resumed run: its newest file holds all of it
    main([str(copy), "project=p"])
    newest = f"{files}/offline-run-20260103_000000-aaaa {files}/offline-run-20260102_000000-bbbb"
    assert f"\n  wandb sync --project=p {newest}\n" in capsys.readouterr().out


def test_with_a_login_the_table_the_workspace_and_the_report_are_saved(plan, copy, wandb, capsys):
    main([str(copy), "project=mine"])
    (run,), (view,), (report,) = wandb.runs, wandb.views, wandb.reports
    expected = {
        "project": "mine", "entity": None, "group": "glu_variants", "job_type": STATISTICS, "mode": "online",
        "id": f"{plan.hash}-{STATISTICS}", "resume": "allow", "tags": [f"plan:{plan.hash}", "size:nano", STATISTICS],
    }  # fmt: skip
    assert expected.items() <= run.settings.items()
    document = strictly(copy / "dashboard.json")
    table = run.logged[STATISTICS]  # a real wandb.Table
    assert (table.columns, table.data) == (document[STATISTICS]["columns"], document[STATISTICS]["data"])
    assert (view.entity, view.project, report.entity, report.project) == ("team", "mine") * 2
    specs = [view._to_model().spec, report._to_model().spec]
    sent = [json.loads(spec.model_dump_json(by_alias=True, exclude_none=True)) for spec in specs]
    assert without_ids(sent) == without_ids([document["workspaces"][0]["spec"], document["report"]["spec"]])
    out = capsys.readouterr().out
    assert "workspace: https://example.org/team/mine/workspace\nreport: https://example.org/team/mine/report\n" in out
    assert "no W&B login" not in out


def test_a_file_uploads_what_the_folder_would(copy, wandb):
    main([str(copy)])
    main([str(copy / "dashboard.json"), "entity=others"])
    assert wandb.runs[1].logged[STATISTICS].data == wandb.runs[0].logged[STATISTICS].data
    for views in (wandb.views, wandb.reports):
        one, two = (without_ids(json.loads(view._to_model().spec.model_dump_json())) for view in views)
        assert one == two
    assert [run.settings["entity"] for run in wandb.runs] == [None, "others"]


def test_missing_and_diverged_runs_are_noted(plan, tmp_path):
    rule = lambda planned: math.nan if (planned.arm, planned.seed) == ("swiglu", 2) else RULE(planned)  # noqa: E731
    folder = make(plan, tmp_path, rule)
    for seed in (1, 2, 3, 4):  # one seed is left: it has no deviation, and no p
        shutil.rmtree(folder / "runs" / f"nano-gelu-lr0.004-seed{seed}")
    main([str(folder)])
    document = strictly(folder / "dashboard.json")
    row = dict(zip(COLUMNS, document[STATISTICS]["data"][1], strict=True))
    assert [row[name] for name in ("seeds", "p", "interval_low", "detectable")] == [1, None, None, None]
    texts = [text_of(block) for block in document["report"]["spec"]["blocks"]]
    assert any("4 run(s) have not started: nano-gelu-lr0.004-seed1, " in text for text in texts)
    assert any("nano-swiglu-lr0.004-seed2 diverged" in text for text in texts)
    assert any("| 5, 1 diverged |" in text for text in texts)


def test_a_plan_that_has_only_begun_has_a_dashboard_too(plan, tmp_path):
    planned_runs = [planned for planned in all_planned(plan, RULE) if planned.stage == "sweep"]
    folder = make(plan, tmp_path, RULE, planned_runs[:2])
    main([str(folder)])
    rows = strictly(folder / "dashboard.json")[STATISTICS]["data"]
    assert [row[COLUMNS.index("verdict")] for row in rows] == ["baseline", *["nothing to compare yet"] * 2]
    make(plan, tmp_path / "none", RULE, [])
    with pytest.raises(UserError, match="no run has started in"):
        main([str(tmp_path / "none" / "glu_variants")])


def test_bad_input_is_one_sentence(whole, tmp_path, monkeypatch):
    garbage = tmp_path / "g.json"
    garbage.write_text('{"content": {"plan": 1}}', encoding="utf-8")
    refused = {
        (): "expected the folder of one plan",
        (str(whole), str(whole)): "expected the folder of one plan",
        (str(whole), "projekt=x"): "unknown option 'projekt': did you mean 'project'",
        (str(tmp_path / "nothing"),): "has no manifest.json",
        (str(whole), f"to={tmp_path}/a/b.json"): "cannot write the dashboard to",
        (str(garbage),): "there is no W&B login on this machine, so nothing was uploaded: run wandb login",
    }
    for words, sentence in refused.items():
        with pytest.raises(UserError, match=sentence):
            main(list(words) or ["project=x"])
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with pytest.raises(UserError, match=r"g\.json was not written by this command: TypeError"):
        main([str(garbage)])


def test_a_server_that_refuses_is_one_sentence_and_the_file_is_there(copy, wandb, monkeypatch):
    def refuse(**_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(UserError, match="the upload to W&B did not complete: ConnectionError: no route"):
        main([str(copy)])
    assert strictly(copy / "dashboard.json")["content"]["plan"] == "glu_variants"
    assert wandb.views == wandb.reports == []


def test_without_the_package_it_says_how_to_install_it(whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UserError, match=r"pip install -c requirements\.lock wandb-workspaces"):
        main([str(whole)])


def test_the_command_prints_help_and_exits_2_on_bad_input(in_process, tmp_path):
    helped = command(sys.executable, "-m", "ablation.dashboard", "--help")
    assert helped.status == 0
    assert "python -m ablation.dashboard ablations/glu_variants" in helped.out
    result = in_process(main, tmp_path)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert result.err.startswith(f"error: {tmp_path} has no manifest.json")


def test_entity_and_project_are_those_of_the_runs(copy):
    path = min((copy / "runs").glob("*/config.yaml"))
    path.write_text(
        path.read_text(encoding="utf-8").replace('"project": null', '"project": "theirs"'), encoding="utf-8"
    )
    assert content_of(read_results(copy)).project == "theirs"


def test_a_name_that_wandb_does_not_take_is_one_sentence(whole):
    content = dataclasses.replace(content_of(read_results(whole)), plan="\U0001f600")
    with pytest.raises(UserError, match="W&B cannot show the plan \U0001f600: "):
        build(content)


def test_a_cell_of_a_table_is_text():
    assert _cell("a|b\n[x](y) <b>*") == r"a\|b \[x\](y) \<b\>\*"
    assert "\x1b" not in _cell("\x1b[2J")
