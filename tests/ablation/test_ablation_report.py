"""The report: its numbers are those of the runs, and a browser opens it without requests or errors."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from ablation import report
from ablation.figures import draw, telemetry, verdicts
from ablation.plan import Plan
from ablation.report import main, write_report
from ablation.report import page as whole_page
from ablation.results import read_results
from ablation.sketch import sketch
from kernels.common.text import CONTROL
from tests.ablation.made import all_planned, losses, make, plan_of
from tests.training.tiny import command

SIZES = "ablation.sizes={nano: model=nano, small: model=nano model.d_model=256 model.n_heads=4}"
ARMS = ("relu", "gelu", "silu", "geglu", "swiglu")
ALIKE = (
    "saturated",
    "zeros",
    "gradients",
    "kurtosis",
)  # drawn, but not rendered: so are "dead", "zigzag" and "outliers"
RULE = losses({"gelu": -0.003, "swiglu": -0.05, "geglu": -0.06, "silu": 0.03}, noise=0.003)


class Page(html.parser.HTMLParser):
    """Tables of a page: rows of (text, sorted by), and identifiers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, str | None]]]] = []
        self.ids: list[str] = []
        self.text = ""
        self._cell: list | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = ["", values.get("data-value")]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(tuple(self._cell))
            self._cell = None

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            self._cell[0] += data

    def table(self, *heads: str) -> list[dict[str, tuple[str, str | None]]]:
        """Return the rows of all tables that have these columns."""
        found = []
        for first, *rows in self.tables:
            names = [name for name, _ in first]
            if set(heads) <= set(names):
                found += [dict(zip(names, row, strict=True)) for row in rows]
        return found


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Five arms, two sizes."""
    return plan_of("ablation=glu_variants", f"ablation.arms=[{','.join(ARMS)}]", SIZES, "tokens=600000")


@pytest.fixture(scope="module")
def folder(plan, tmp_path_factory) -> Path:
    made = make(plan, tmp_path_factory.mktemp("made"), RULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda results: [drawn for drawn in draw(results) if drawn.name not in ALIKE])
        write_report(read_results(made), made / "report")
    return made


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report" / "report.html").read_text(encoding="utf-8"))


def last_loss(folder: Path, run: str) -> float:
    lines = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "eval"][-1]


def test_numbers_of_the_page_are_those_of_the_runs(plan, folder, page):
    rows = page.table("run", "final loss")
    assert {row["run"][0] for row in rows} == {planned.name for planned in all_planned(plan, RULE)}
    for row in rows:
        assert float(row["final loss"][0]) == pytest.approx(last_loss(folder, row["run"][0]), abs=1e-6)
    arms = [
        shown | numbers
        for shown, numbers in zip(
            page.table("arm", "verdict", "minus relu, nats"), page.table("arm", "from", "to", "p (Holm)"), strict=True
        )
    ]
    assert len(arms) == 2 * len(ARMS)
    for size, of_size in zip(("nano", "small"), (arms[: len(ARMS)], arms[len(ARMS) :]), strict=True):
        final = {
            arm: [last_loss(folder, f"{size}-{arm}-lr0.004-seed{seed}") for seed in plan.config.seeds]
            for arm in plan.arms[size]
        }
        for row in of_size:
            own, base = final[row["arm"][0]], final["relu"]
            assert float(row["mean loss"][1]) == pytest.approx(sum(own) / 5, abs=1e-6)
            if row["arm"][0] != "relu":
                difference = sum(a - b for a, b in zip(own, base, strict=True)) / 5
                assert float(row["minus relu, nats"][1]) == pytest.approx(difference, abs=1e-6)
                assert float(row["from"][1]) < difference < float(row["to"][1])


def test_the_csv_has_every_run_and_every_comparison(plan, folder, page):
    with open(folder / "report" / "results.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert {row["run"] for row in runs} == {path.name for path in (folder / "runs").iterdir()}
    for row in runs:
        assert float(row["final_eval_loss"]) == pytest.approx(last_loss(folder, row["run"]), abs=1e-6)
        assert row["plan_hash"] == plan.hash
    with open(folder / "report" / "comparisons.csv", newline="") as file:
        comparisons = list(csv.DictReader(file))
    assert [(row["size"], row["arm"]) for row in comparisons] == [
        (size, arm) for size, arms in plan.arms.items() for arm in arms if arm != "relu"
    ]
    assert all(len(row["runs"].split()) == 5 for row in comparisons)
    shown = {row["arm"][1]: row["verdict"][0] for row in page.table("arm", "verdict", "minus relu, nats")[: len(ARMS)]}
    assert {row["arm"]: row["verdict"] for row in comparisons[: len(ARMS) - 1]} == {
        arm: verdict for arm, verdict in shown.items() if arm != "relu"
    }
    assert shown["swiglu"] == "better"
    assert shown["silu"] == "worse"


def test_the_verdict_comes_first_and_the_plan_is_there(plan, folder, page):
    from ablation.verdict import sentences

    before = page.text.split("Arms")[0]
    for sentence in sentences(read_results(folder)):
        assert sentence in before
    assert plan.hash in before
    assert "Provisional" not in page.text
    assert len(page.ids) == len(set(page.ids))


def test_the_first_table_says_what_an_arm_is_and_what_its_numbers_mean(folder, page):
    text = (folder / "report" / "report.html").read_text(encoding="utf-8")
    first = text[text.index('<section id="verdicts">') : text.index("</table>")]
    assert "below 0, left of the line, the arm is better" in first
    assert "h (solid) and its slope (dashed) over x, or over gate where up is 1" in first
    rows = page.table("arm", "h, slope", "verdict")
    assert [row["arm"] for row in rows[:2]] == [("relurelu(x)", "relu"), ("geglugelu(gate) * up", "geglu")]
    assert first.count('<svg class="plot"') == len(ARMS)
    assert len(page.tables[0][0]) <= 7  # it fits a window of 1280 pixels


def test_the_small_plot_is_the_formula():
    drawn = sketch({"ffn.formula": "where(x > 0, x, slope * x)", "ffn.parameters.slope.init": 0.5,
                    "ffn.parameters.slope.share": "layer"})  # fmt: skip
    assert drawn is not None
    h, slope = ([tuple(map(float, point.split(","))) for point in curve.split()] for curve in (drawn.h, drawn.slope))
    # 96 x 72 pixels from -4 to 4 and from -2 to 4: 12 pixels upwards for 1, and 0 at 48 from the top.
    assert (h[0], h[-1], slope[0], slope[-1]) == ((0, 72), (96, 0), (0, 42), (96, 36))
    assert drawn.x_axis == 48
    assert sketch({"ffn.formula": "silu(gate) * up"}) is not None
    assert sketch({"ffn.formula": "x * unknown"}) is None
    assert sketch({}) is None


def test_the_page_is_one_small_file_without_requests(folder):
    path = folder / "report" / "report.html"
    assert path.stat().st_size < 5 * 2**20
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#|data:)", text)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "#1a1b22" not in text.split("</style>")[1]  # figures have the colours of the page


def test_every_figure_is_a_file_too(folder, page):
    figures = {name.removeprefix("figure-") for name in page.ids if re.fullmatch(r"figure-[a-z_]+", name)}
    assert figures >= {
        "verdicts",
        "differences",
        "curves",
        "costs",
        "learning_rates",
        "sizes",
        "dead",
        "zigzag",
        "outliers",
    }
    for kind in ("svg", "png"):
        assert {path.stem for path in (folder / "report" / "figures").glob(f"*.{kind}")} == figures
    assert (folder / "report" / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("page")
def test_a_figure_has_its_title_once_on_the_page_and_in_its_file(folder):
    of_page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    for path in (folder / "report" / "figures").glob("*.svg"):
        [drawing] = re.findall(rf'<figure id="figure-{path.stem}">(.*?)</figure>', of_page, re.S)
        title = html.unescape(re.match("<h3>(.*?)</h3>", drawing)[1])
        words = [
            html.unescape(text) for text in re.findall("<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))
        ]
        assert title in " ".join(words)
        on_page = re.findall("<text[^>]*>([^<]*)</text>", drawing)
        assert title.split()[:4] not in [text.split()[:4] for text in on_page]


def test_lines_of_another_number_of_layers_are_left_out_of_a_figure():
    layers = {"a": [0.1, 0.2], "b": [0.3, 0.4], "damaged": [0.5]}
    runs = [SimpleNamespace(lines_of=lambda _, dead=dead: [{"tokens": 8, "dead": dead}]) for dead in layers.values()]
    tokens, values = telemetry(SimpleNamespace(final_runs=lambda *_: runs), "nano", "relu", "dead")
    assert (tokens.tolist(), values.tolist()) == ([8], [[pytest.approx(0.2), pytest.approx(0.3)]])


def test_open_questions_are_listed(plan, tmp_path):
    rule = lambda planned: math.nan if (planned.arm, planned.seed) == ("swiglu", 2) else RULE(planned)  # noqa: E731
    planned_runs = [planned for planned in all_planned(plan, rule) if planned.name != "nano-gelu-lr0.004-seed4"]
    folder = make(plan, tmp_path, rule, planned_runs, half="nano-silu-lr0.004-seed1")
    text = Page(whole_page(read_results(folder), [])).text
    assert "Provisional: 108 of 110 runs have ended" in text
    assert "1 run(s) have not started: nano-gelu-lr0.004-seed4" in text
    assert "nano-swiglu-lr0.004-seed2 diverged" in text
    assert "nano-silu-lr0.004-seed1: 1 broken line(s) of metrics.jsonl were skipped" in text
    assert "swiglu at nano: undecided: 1 of 5 seeds diverged" in text


def test_marks_that_reverse_a_text_are_written_out(folder):
    results = read_results(folder)
    plan = dataclasses.replace(results.manifest.plan, question="a\u202egnp\x1b[2J\u2066b")
    text = whole_page(dataclasses.replace(results, manifest=dataclasses.replace(results.manifest, plan=plan)), [])
    assert not CONTROL.search(text)
    assert r"a\u202egnp\x1b[2J\u2066b" in text


def test_marks_in_attributes_are_written_out(folder):
    results = read_results(folder)
    size, arm = results.sizes[0], "a\x1b\ud800"
    arms, cost = (
        {size: {**of[size], arm: of[size][results.baseline]}} for of in (results.manifest.arms, results.manifest.cost)
    )
    manifest = dataclasses.replace(results.manifest, arms=arms, cost=cost)
    text = whole_page(dataclasses.replace(results, manifest=manifest), [])
    assert not CONTROL.search(text)
    assert r'data-value="a\x1b\ud800"' in text


def test_the_verdict_of_a_single_arm_has_room(tmp_path):
    results = read_results(make(plan_of("ablation=smoke"), tmp_path, losses({"swiglu": -0.5})))
    [figure] = [figure for figure in draw(results) if figure.name == "verdicts"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where axes collapse
        figure.save(tmp_path)
    assert figure.title == "nano: 1 of 1 arms shown to be better than linear"


def test_text_is_escaped(folder):
    results, question = read_results(folder), 'Does </script><b>"x" & y</b> help?'
    manifest = dataclasses.replace(results.manifest, plan=dataclasses.replace(results.manifest.plan, question=question))
    text = whole_page(dataclasses.replace(results, manifest=manifest), [verdicts(results)])
    assert "<b>" not in text
    assert text.count("</script>") == 1  # of the script that sorts tables
    assert Page(text).text.count(question) == 3  # in the title, the heading and the keys of the plan
    assert text.count("<svg role") == 1  # SVG of figures is not escaped


def test_the_command_of_a_plan_that_has_just_begun(plan, tmp_path):
    folder = make(plan, tmp_path, RULE, [])
    done = command(sys.executable, "-m", "ablation.report", str(folder), f"to={tmp_path / 'here'}")
    assert done.status == 0, done.err
    assert "At nano, nothing is known yet" in done.out
    assert "110 run(s) have not started" not in done.err  # seeds follow the sweeps
    assert "60 run(s) have not started" in done.err
    text = (tmp_path / "here" / "report.html").read_text(encoding="utf-8")
    assert "Provisional: 0 of 60 runs have ended, and seeds follow" in text


def test_runs_that_were_evaluated_at_their_end_alone(tmp_path):
    folder = make(plan_of("ablation=smoke", "ablation.rates=[1]"), tmp_path, RULE)
    to = folder / "report"
    (to / "figures").mkdir(parents=True)
    # Of an earlier report, and somebody's own.
    for name in ("mine.png", "verdicts.svg", "differences.svg", "curves.png", "dead.png"):
        (to / "figures" / name).touch()
    for path in folder.glob("runs/*/metrics.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"train"' in line) + lines[-1])
    write_report(read_results(folder), to)
    page = Page((to / "report.html").read_text(encoding="utf-8"))
    assert {name for name in page.ids if name.startswith("figure-") and name.count("-") == 1} == {
        "figure-verdicts", "figure-costs"
    }  # fmt: skip
    assert {"rates", "telemetry"}.isdisjoint(page.ids)  # no sweep, and no telemetry
    drawn = {f"{name}.{kind}" for name in ("verdicts", "costs") for kind in ("svg", "png")}
    assert {path.name for path in (to / "figures").iterdir()} == {*drawn, "mine.png"}
    costs = {drawn.name: drawn for drawn in draw(read_results(folder))}["costs"].figure.axes[0]
    assert [(len(line.get_xdata()), line.get_marker()) for line in costs.get_lines()] == [(1, "o"), (1, "o")]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["a", "b"], "expected the folder of one plan"),
        (["nowhere"], "has no manifest.json"),
        (["nowhere", "two=2"], "two"),
    ],
)
def test_bad_input_is_one_sentence(words, why, in_process):
    refused = in_process(main, *words)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert why in refused.err


def test_a_browser_shows_it_without_errors_and_sorts_its_tables(folder, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    text = (folder / "report" / "report.html").read_text(encoding="utf-8")
    click = (
        "<script>document.querySelectorAll('th button')[5].click();"
        "document.title = [...document.querySelector('tbody').rows].map(r => r.cells[0].dataset.value).join(' ')</script>"
    )
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", click + "</body>"), encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr  # what the page's policy forbids (any request) would be logged here
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr
    final = {arm: sum(last_loss(folder, f"nano-{arm}-lr0.004-seed{seed}") for seed in range(5)) for arm in ARMS}
    assert title[1].split() == sorted(final, key=final.__getitem__)
