"""Show what runs say about published claims on FFN activations: `python -m ablation.claims ablations/glu_variants ...`

    FOLDER ...   of plans; none: print the claims alone
    to=FILE.md   also write Markdown, with the runs and the plan's hash behind each verdict

The claims are data, `ablation/claims.yaml`. A test compares a metric of two arms of one plan (`ablation/criteria.py`). A claim
is supported where the runs show what it states, contradicted where they show the opposite or rule out a difference that matters
(`by`), and not settled otherwise. A result at one size is reported for that size, never as a general rule.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jinja2
import yaml
from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ablation.criteria import CONTRADICTED, OPEN, SUPPORTED, Criterion, CriterionResult, decide, has_arms
from ablation.results import Results, read_results
from conf.terminal import SafeConsole
from kernels.common.commands import run_command
from kernels.common.files import atomic_write, explain_os_errors
from kernels.common.options import read_positional
from kernels.common.text import listed

DATA = Path(__file__).with_name("claims.yaml")
_OPTIONS = {"to": ""}
_STYLES = {SUPPORTED: "green", CONTRADICTED: "red", OPEN: "yellow"}


def main(argv: list[str]) -> int:
    options, positional = read_positional(argv, _OPTIONS)
    folders = dict.fromkeys(Path(folder) for folder in positional)
    answers = judge(read_claims(), [read_results(folder) for folder in folders])
    show(answers, SafeConsole(file=sys.stdout, highlight=False, markup=False))
    if options["to"]:
        with explain_os_errors("write", options["to"]), atomic_write(options["to"]) as file:
            file.write(markdown(answers))
    return 0


# ---------------------------------------------------------------------------------------------------------- the claims


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of claims.yaml."""

    claim: str
    literature: str
    sources: list[str]
    test: list[Criterion]
    given: list[Criterion]
    untestable: str = ""  # why runs of this project cannot decide it

    @property
    def criteria(self) -> list[Criterion]:
        """The premise and the tests."""
        return [*self.given, *self.test]


def read_claims(path: Path = DATA) -> list[Claim]:
    """Return the claims of a file, in its order."""
    return [
        Claim(**entry | {key: [Criterion(**test) for test in entry.get(key, [])] for key in ("test", "given")})
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


# -------------------------------------------------------------------------------------------------------- the findings


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The result of a plan's runs on a claim at one size, or at two where sizes are compared."""

    results: Results
    sizes: tuple[str, ...]
    state: str
    why: str  # why the claim is unsettled, or contradicted only because the effect it needs was ruled out
    details: list[str]  # the numbers
    runs: list[str]

    @property
    def where(self) -> str:
        """The sizes, as text."""
        return " and ".join(self.sizes)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d_model, layers) of the sizes. Sizes of equal shape count as one, whatever their names."""
        learned = [self.results.manifest.learned(size, self.results.baseline) for size in self.sizes]
        return [(values["model.d_model"], values["model.n_layers"]) for values in learned]

    @property
    def summary(self) -> str:
        """The state with its size, folder, plan and hash."""
        manifest = self.results.manifest
        why = f" ({self.why})" if self.why else ""
        return f"{self.where} of {self.results.folder}, plan {manifest.plan.name} {manifest.hash}: {self.state}{why}"


@dataclasses.dataclass(frozen=True)
class Answer:
    """A claim with all findings on it."""

    claim: Claim
    findings: list[Evidence]
    plans_given: bool

    @property
    def state(self) -> str:
        """The state that all settled findings share; not settled if they disagree or there are none."""
        states = {finding.state for finding in self.findings} - {OPEN}
        return states.pop() if len(states) == 1 else OPEN

    @property
    def verdict(self) -> str:
        """The state with the sizes it holds at, and the reason where it is not settled."""
        settled = [finding for finding in self.findings if finding.state != OPEN]
        if self.claim.untestable:
            return f"{OPEN}: {self.claim.untestable}"
        if not self.plans_given:
            return f"{OPEN}: no plans given"
        if not self.findings:
            return f"{OPEN}: none of the plans has {self._requirement}"
        if not settled:
            return f"{OPEN}: {_reasons(self.findings)}"
        if self.state == OPEN:
            places = (f"{f.state} at {f.where} of {f.results.folder.name}" for f in settled)
            return f"{OPEN}: {', '.join(dict.fromkeys(places))}"
        sizes = list(dict.fromkeys(finding.where for finding in settled))
        several = len({shape for finding in settled for shape in finding.shapes}) > 1
        why = _reasons([finding for finding in settled if finding.why])
        return f"{self.state} at {listed(sizes)}{'' if several else ' only'}{': ' if why else ''}{why}"

    @property
    def _requirement(self) -> str:
        if any(criterion.compares_sizes for criterion in self.claim.criteria):
            return "sizes of two widths"
        arms = dict.fromkeys(arm for criterion in self.claim.criteria for arm in criterion.arms)
        return f"the arms ({', '.join(arms)})"


def _reasons(findings: list[Evidence]) -> str:
    where: dict[str, list[str]] = {}
    for finding in findings:
        where.setdefault(finding.why, []).append(finding.where)
    if len(where) == 1:
        return next(iter(where))
    return "; ".join(f"{why} (at {listed(dict.fromkeys(sizes))})" for why, sizes in where.items())


def judge(claims: Iterable[Claim], plans: Sequence[Results]) -> list[Answer]:
    """Return what the plans' runs show about each claim."""
    return [
        Answer(claim, [finding for results in plans for finding in _findings(claim, results)], bool(plans))
        for claim in claims
    ]


def _findings(claim: Claim, results: Results) -> Iterator[Evidence]:
    """Yield a finding for every size of a plan that has a pair of arms for each criterion."""
    if claim.untestable:
        return
    for sizes in _testable_sizes(claim, results):
        premises = [decide(criterion, results, sizes) for criterion in claim.given]
        tests = [decide(criterion, results, sizes) for criterion in claim.test]
        state, why = _combine(premises, tests)
        decisions = [*premises, *tests]
        details = [line for decision in decisions for line in decision.details]
        runs = list(dict.fromkeys(run for decision in decisions for run in decision.runs))
        yield Evidence(results, sizes, state, why, details, runs)


def _testable_sizes(claim: Claim, results: Results) -> list[tuple[str, ...]]:
    if any(criterion.compares_sizes for criterion in claim.test):
        arms = {arm for criterion in claim.test for arm in criterion.arms if criterion.of}
        if not all(arms <= results.manifest.arms[size].keys() for size in results.sizes):
            return []
        width = {s: results.manifest.learned(s, results.baseline)["model.d_model"] for s in results.sizes}
        ends = min(results.sizes, key=width.__getitem__), max(results.sizes, key=width.__getitem__)
        return [ends] if width[ends[0]] < width[ends[1]] else []
    return [
        (size,)
        for size in results.sizes
        if all(any(has_arms(results, size, *pair) for pair in criterion.pairs.items()) for criterion in claim.criteria)
    ]


def _combine(premises: list[CriterionResult], tests: list[CriterionResult]) -> tuple[str, str]:
    """Return the state of a claim at a size, and `Evidence.why`."""
    for premise in premises:
        if premise.state != SUPPORTED:
            return OPEN, premise.why or f"its premise does not hold here: {'; '.join(premise.details)}"
    states = {test.state for test in tests}
    if CONTRADICTED in states:
        whys = [test.why for test in tests if test.state == CONTRADICTED]
        return CONTRADICTED, "" if "" in whys else whys[0]
    return (SUPPORTED, "") if states == {SUPPORTED} else (OPEN, next(test.why for test in tests if test.why))


# ----------------------------------------------------------------------------------------------------------- rendering


def show(answers: list[Answer], console: SafeConsole) -> None:
    """Print the claims as a table, and below it the numbers behind each verdict."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_lines=True, pad_edge=False)
    for head, ratio in (("claim", 3), ("in the literature", 4), ("here", 4)):
        table.add_column(head, ratio=ratio)
    for answer in answers:
        claim = answer.claim
        table.add_row(claim.claim, claim.literature, Text(answer.verdict, style=_STYLES[answer.state]))
    console.print(table)
    for answer in answers:
        if answer.findings:
            console.print(f"\n{answer.claim.claim}", style="bold")
        for finding in answer.findings:
            console.print(Padding(finding.summary, (0, 0, 0, 2)))
            for detail in finding.details:
                console.print(Padding(detail, (0, 0, 0, 4)))


def markdown(answers: list[Answer]) -> str:
    """Return the claims as Markdown: a table, and the numbers, runs and plans behind each verdict."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=False, undefined=jinja2.StrictUndefined)  # not HTML
    environment.filters |= {"in_cell": lambda text: text.replace("|", "/"), "merge_seeds": _merge_seeds}
    return environment.get_template("claims.md.jinja").render(answers=answers)


def _merge_seeds(runs: list[str]) -> list[str]:
    """Return the names of runs, those that differ only in the seed as one: nano-relu-lr0.004-seed{0,1,2}."""
    seeds: dict[str, list[str]] = {}
    for name in runs:
        stem, _, seed = name.rpartition("seed")
        seeds.setdefault(stem, []).append(seed)
    return [f"{stem}seed{{{','.join(of_stem)}}}" for stem, of_stem in seeds.items()]


if __name__ == "__main__":
    run_command(main, __doc__)
