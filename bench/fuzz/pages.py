"""The campaign `html`: what names, formulas and notes hold stays text, on a page, in the dashboard and on a terminal.

Figures are left out: they show names of arms and sizes alone, and `read_manifest` refuses those with other characters than a
folder's.
"""

from __future__ import annotations

import dataclasses
import html.parser
import io
import random
from pathlib import Path
from typing import Any, NamedTuple

from ablation.dashboard import build, content_of
from ablation.dashboard import markdown as dashboard_table
from ablation.report import page
from ablation.results import Results, read_results
from ablation.status import Watcher, show
from bench.fuzz.campaign import Campaign
from bench.fuzz.metrics import begin
from bench.fuzz.sound import write_plan
from conf.terminal import SafeConsole
from kernels.common.errors import UserError
from kernels.common.text import CONTROL, printable

_PARTS = ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</td>", "</title>", "</style>", "<!--", "-->", "]]>",
          '"', "'", "` onload=x", '" onmouseover="x', "' x='", "&lt;", "&amp;", "&#60;b&#62;", "&", "<", ">", "<svg/onload=x>",
          "javascript:x", "{{ 7 * 7 }}", "{% raw %}", "{#", "\x00", "\x1b[2J", "\x1b]0;x\x07", "\x9b1m", "\x7f", "\u202e",
          "\u2028", "\ud800", "\r", "\n", "\t", "|", "\\", "`x`", "*b*", "[a](javascript:x)", "~", "$x_$", "[bold]x[/]", "{0}",
          "%s", "é", "漢", "a", "swiglu", " ", "-", "\ufeff", "<%", "<?php", "<a href=//x>", "</script>")  # fmt: skip
_FIELDS = (
    "arm",
    "size",
    "question",
    "name",
    "formula",
    "note",
    "commit",
    "host",
    "device",
    "version",
    "order",
    "hash",
    "key",
)


class Names(NamedTuple):
    """What an input puts in the place of harmless names."""

    texts: dict[str, str]


def campaign(_: str, folder: Path) -> Campaign:
    """Return the campaign; the plan that is shown is written to an empty folder."""
    path = write_plan(folder / "plans")[1]
    results, grid = read_results(path), _grid(path)
    known = _Elements(page(results, []))

    def make(draw: random.Random) -> Names:
        fields = draw.sample(_FIELDS, draw.choice((1, 2, len(_FIELDS))))
        return Names({field: _text(draw) for field in fields})

    def read(names: Names) -> None:
        changed = _renamed(results, names.texts)
        _check_page(page(changed, []), known, names.texts)
        console = SafeConsole(file=io.StringIO(), highlight=False, markup=False, width=100)
        console.print(
            *show(dataclasses.replace(grid, manifest=changed.manifest, runs=_renamed_states(grid, changed)), 100)
        )
        shown: Any = console.file
        _refuse_control(shown.getvalue())
        _check_dashboard(changed)

    read(Names({}))  # loads what the dashboard needs
    return Campaign(make, read, (UserError,), begin)


def _grid(path: Path) -> Any:
    """Return the state of a plan's runs, without asking SLURM."""
    watcher = Watcher(path)
    watcher._queried_slurm = float("inf")
    return watcher.snapshot()


def _text(draw: random.Random) -> str:
    return "".join(draw.choice(_PARTS) for _ in range(draw.choice((1, 1, 2, 3, 8))))


def _renamed(results: Results, texts: dict[str, str]) -> Results:
    """Return results in which names and texts are others; the last of two arms or sizes is renamed."""
    manifest = results.manifest
    size = results.sizes[-1]
    baseline = results.baseline
    arm = next(arm for arm in manifest.arms[size] if arm != baseline)
    names = {arm: texts.get("arm", arm), size: texts.get("size", size)}

    def rename(tree: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {names[s]: {names.get(a, a): values for a, values in of_size.items()} for s, of_size in tree.items()}

    arms = rename(manifest.arms)
    other = arms[names[size]][names[arm]]
    arms[names[size]][names[arm]] = other | {"ffn.formula": texts.get("formula", other["ffn.formula"])}
    plan = dataclasses.replace(manifest.plan, question=texts.get("question", "?"), name=texts.get("name", "small"))
    shared = manifest.shared | ({texts["key"]: texts["key"]} if "key" in texts else {})
    changed = dataclasses.replace(
        manifest, plan=plan, arms=arms, cost=rename(manifest.cost), shared=shared, hash=texts.get("hash", manifest.hash)
    )
    provenance: dict[str, Any] = {
        "commit": texts.get("commit"),
        "host": texts.get("host"),
        "device": texts.get("device"),
    }
    provenance["versions"] = {texts.get("version", "torch"): texts.get("version", "2")}
    runs = {}
    for run in results.runs.values():
        planned = dataclasses.replace(run.planned, size=names[size], arm=names.get(run.planned.arm, run.planned.arm))
        summary = run.outcome.summary | {"provenance": provenance, "data_order_hash": texts.get("order", "0")}
        outcome = dataclasses.replace(run.outcome, summary=summary)
        runs[planned.name] = dataclasses.replace(run, planned=planned, outcome=outcome)
    return Results(results.folder, changed, runs, (texts.get("note", "a note"),))


def _renamed_states(grid: Any, results: Results) -> list[Any]:
    planned = [run.planned for run in results.runs.values()]
    return [dataclasses.replace(state, planned=each) for state, each in zip(grid.runs, planned, strict=False)]


class _Elements(html.parser.HTMLParser):
    """The elements and attributes of a page, its text, and what may not be on it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.kinds: set[tuple[str, str]] = set()
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds |= {(tag, ""), *((tag, name) for name, _ in attrs)}
        self._open.append(tag)
        if tag == "a" and not dict(attrs).get("href", "").startswith("#"):  # type: ignore[union-attr]
            raise AssertionError(f"a link leads to {dict(attrs).get('href')}")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        (self.scripts if self._open and self._open[-1] in ("script", "style") else self.texts).append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:40]}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data[:40]}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data[:40]}")


def _check_page(text: str, known: _Elements, given: dict[str, str]) -> None:
    """Check that a page has no element, attribute or script that the harmless one has not, and shows the given texts."""
    text.encode()
    _refuse_control(text)
    found = _Elements(text)
    if strange := sorted(found.kinds - known.kinds):
        raise AssertionError(f"elements or attributes that a harmless page has not: {strange}")
    if not set(found.scripts) <= set(known.scripts):
        raise AssertionError("another script or style")
    shown = " ".join("".join(found.texts).split())
    for field, value in given.items():
        value = value[:12] if field == "commit" else value  # of which a part is enough
        if " ".join(printable(value).split()) not in shown:
            raise AssertionError(f"{field} is not on the page")


def _check_dashboard(results: Results) -> None:
    """Check that a table of the dashboard, in Markdown, is a table of text alone once it is rendered, and has no other cell."""
    from markdown_it import MarkdownIt

    content = content_of(results)
    build(content)
    for size in results.sizes:
        table = dashboard_table(content, size)
        _refuse_control(table)
        rendered = _Elements(MarkdownIt("commonmark", {"html": True}).enable("table").render(table))
        allowed = {"table", "thead", "tbody", "tr", "th", "td"}
        if strange := {tag for tag, _ in rendered.kinds} - allowed:
            raise AssertionError(f"elements in the dashboard's table: {sorted(strange)}")
        rows = len(table.splitlines()) - 1
        if rows != 1 + len(results.arms(size)):
            raise AssertionError("the dashboard's table has another number of rows")


def _refuse_control(text: str) -> None:
    if found := CONTROL.search(text):
        raise AssertionError(f"a control character: {found[0]!r}")
