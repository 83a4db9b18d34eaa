"""What articles claim of FFN activations, and what runs say of it: `python -m ablation.claims ablations/glu_variants ...`

    FOLDER ...   of plans; none: the claims alone
    to=FILE.md   write it as Markdown too, with the runs and the hash of the plan behind each verdict

The claims are data, `ablation/claims.yaml`. A test compares a figure of two arms of one plan, seed by seed as in
`ablation/statistics.py`, adjusted for all pairs that it names (Holm). What it says holds, or the opposite does, or a difference
that matters (`by`) is ruled out; else the claim is not settled there. One size is told as one size, never as a rule.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ablation.budget import REFUSE
from ablation.measures import BySeed, by_seed, log_speed_up, log_spread
from ablation.results import Results, Run, read_results
from ablation.statistics import Comparison, Verdict, compare_pairs
from conf.arms import catalogue
from conf.load import flatten
from kernels.common.commands import run_command
from kernels.common.files import atomic_write, say_why
from kernels.common.options import read_positional

DATA = Path(__file__).with_name("claims.yaml")
SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "not settled"
_OPTIONS = {"to": ""}
_STYLES = {SUPPORTED: "green", CONTRADICTED: "red", OPEN: "yellow"}
_ARM_DIFFERS_IN = ("ffn.", "model.d_ff", "optim.lr")  # and in nothing else, if two arms are to be compared

_catalogue = functools.cache(catalogue)


def main(argv: list[str]) -> int:
    options, positional = read_positional(argv, _OPTIONS)
    folders = dict.fromkeys(Path(folder) for folder in positional)
    answers = judge(read_claims(), [read_results(folder) for folder in folders])
    show(answers, Console(file=sys.stdout, highlight=False, markup=False))
    if options["to"]:
        with say_why("write", options["to"]), atomic_write(options["to"]) as file:
            file.write(markdown(answers))
    return 0


# ---------------------------------------------------------------------------------------------------------- the claims


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One comparison of a claim; the keys of claims.yaml."""

    figure: str
    less: dict[str, str | float] = dataclasses.field(default_factory=dict)
    more: dict[str, str | float] = dataclasses.field(default_factory=dict)
    by: float | None = None
    scale: str = "linear"
    within: float = 0.0
    at_least: int = 0

    @property
    def pairs(self) -> dict[str, str | float]:
        """The arms, each with what it is compared with."""
        return self.less or self.more

    @property
    def arms(self) -> list[str]:
        """The arms that it takes."""
        return list(dict.fromkeys(str(a) for pair in self.pairs.items() for a in pair if isinstance(a, str)))

    @property
    def needed(self) -> int:
        """How many of the pairs must hold."""
        return self.at_least or len(self.pairs)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of claims.yaml."""

    claim: str
    literature: str
    sources: list[str]
    test: list[Criterion]
    given: list[Criterion]


def read_claims(path: Path = DATA) -> list[Claim]:
    """Return the claims of a file, in its order."""
    return [
        Claim(**entry | {key: [Criterion(**test) for test in entry.get(key, [])] for key in ("test", "given")})
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


# -------------------------------------------------------------------------------------------------------- what is found


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the runs of a plan say of a claim at one size, or of two where sizes are compared."""

    results: Results
    sizes: tuple[str, ...]
    state: str
    why: str  # it is not settled, or contradicted by no more than a difference that is missing
    details: list[str]  # the numbers
    runs: list[str]

    @property
    def where(self) -> str:
        return " and ".join(self.sizes)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d_model, layers): what makes sizes different, whatever their names."""
        learned = [self.results.manifest.learned(size, self.results.baseline) for size in self.sizes]
        return [(values["model.d_model"], values["model.n_layers"]) for values in learned]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A claim with all that was found on it."""

    claim: Claim
    findings: list[Finding]
    asked: bool  # runs were given

    @property
    def state(self) -> str:
        """All that settle it say the same, or it is not settled."""
        states = {finding.state for finding in self.findings} - {OPEN}
        return states.pop() if len(states) == 1 else OPEN

    @property
    def verdict(self) -> str:
        """The state, at which sizes, and why it is not settled."""
        settled = [finding for finding in self.findings if finding.state != OPEN]
        if not self.asked:
            return f"{OPEN}: no runs given"
        if not self.findings:
            return f"{OPEN}: no plan that was given has {self._needs}"
        if not settled:
            return f"{OPEN}: {_whys(self.findings)}"
        if self.state == OPEN:
            places = (f"{f.state} at {f.where} of {f.results.folder.name}" for f in settled)
            return f"{OPEN}: {', '.join(dict.fromkeys(places))}"
        sizes = list(dict.fromkeys(finding.where for finding in settled))
        several = len({shape for finding in settled for shape in finding.shapes}) > 1
        why = _whys([finding for finding in settled if finding.why])
        return f"{self.state} at {_list(sizes)}{'' if several else ' only'}{': ' if why else ''}{why}"

    @property
    def _needs(self) -> str:
        tests = (*self.claim.given, *self.claim.test)
        if any(test.figure == "spread" for test in tests):
            return "sizes of two widths"
        return f"the arms ({', '.join(dict.fromkeys(arm for test in tests for arm in test.arms))})"


def _whys(findings: list[Finding]) -> str:
    where: dict[str, list[str]] = {}
    for finding in findings:
        where.setdefault(finding.why, []).append(finding.where)
    every = len(where) == 1
    return "; ".join(why if every else f"{why} (at {_list(dict.fromkeys(of))})" for why, of in where.items())


def judge(claims: Iterable[Claim], given: Sequence[Results]) -> list[Answer]:
    """Return what the plans that were given say of each claim."""
    return [
        Answer(claim, [found for results in given for found in _findings(claim, results)], bool(given))
        for claim in claims
    ]


def _findings(claim: Claim, results: Results) -> Iterator[Finding]:
    """Yield what a plan says, at every size that has arms for each of the claim's tests."""
    if any(test.figure == "spread" for test in claim.test):
        width = {s: results.manifest.learned(s, results.baseline)["model.d_model"] for s in results.sizes}
        ends = min(results.sizes, key=width.__getitem__), max(results.sizes, key=width.__getitem__)
        places = [ends] if width[ends[0]] < width[ends[1]] else []
    else:
        tests = (*claim.given, *claim.test)
        places = [
            (s,)
            for s in results.sizes
            if all(any(_has(results, s, *pair) for pair in test.pairs.items()) for test in tests)
        ]
    for sizes in places:
        premises, parts = ([_decide(test, results, sizes) for test in tests] for tests in (claim.given, claim.test))
        details = [line for part in (*premises, *parts) for line in part.details]
        runs = list(dict.fromkeys(run for part in (*premises, *parts) for run in part.runs))
        yield Finding(results, sizes, *_together(premises, parts), details, runs)


def _together(premises: list[_Part], parts: list[_Part]) -> tuple[str, str]:
    """Return the state of a claim at a place, and why it is not settled."""
    for premise in premises:
        if premise.state != SUPPORTED:
            return OPEN, premise.why or f"what it is said of is not so here: {'; '.join(premise.details)}"
    states = {part.state for part in parts}
    if CONTRADICTED in states:
        whys = [part.why for part in parts if part.state == CONTRADICTED]
        return CONTRADICTED, "" if "" in whys else whys[0]
    return (SUPPORTED, "") if states == {SUPPORTED} else (OPEN, next(part.why for part in parts if part.why))


# ------------------------------------------------------------------------------------------------------------- one test


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one test of a claim showed."""

    state: str
    why: str  # as of a finding
    details: list[str]
    runs: list[str]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The figure of two arms by seed; both empty where the plan has no such arms, or no runs of them yet."""

    arm: str
    other: str | float
    own: BySeed
    others: BySeed
    lacking: str  # why it can have no verdict
    runs: list[str]


def _decide(test: Criterion, results: Results, sizes: tuple[str, ...]) -> _Part:
    if test.figure == "ffn_parameters":
        return _accounted(test, results, sizes[0])
    pairs = {arm: _pair(test, results, sizes, arm, other) for arm, other in test.pairs.items()}
    lacking = {arm: pair.lacking for arm, pair in pairs.items()}
    sides = {arm: (p.own, p.others) if test.less else (p.others, p.own) for arm, p in pairs.items()}
    ceiling = results.ceiling(sizes[0]) if test.figure == "final_eval_loss" else math.inf
    effect = _effect(test, results.manifest.plan.smallest_effect)

    def compared(margin: float) -> list[Comparison]:
        return compare_pairs(sides, effect, ceiling, lacking, resamples=0, margin=margin)

    found = compared(-test.within)
    states = {c.arm: _state(c, beyond, effect) for c, beyond in zip(found, compared(effect), strict=True)}
    details = [_detail(test, pairs[c.arm], c) for c in compared(0.0) if c.seeds]
    runs = [run for pair in pairs.values() for run in pair.runs]
    held, failed = (list(states.values()).count(state) for state in (SUPPORTED, CONTRADICTED))
    if held >= test.needed:
        return _Part(SUPPORTED, "", details, runs)
    if failed > len(states) - test.needed:
        worse = any(c.verdict is Verdict.WORSE for c in found)
        return _Part(CONTRADICTED, "" if worse else _ruled_out(test, effect), details, runs)
    unsettled = min((c for c in found if states[c.arm] == OPEN), key=lambda c: not c.seeds)  # one that has runs, if any
    return _Part(OPEN, _why(test, unsettled), details, runs)


def _accounted(test: Criterion, results: Results, size: str) -> _Part:
    """Decide by the costs in the manifest, which no seed changes."""
    [(arm, other)] = test.pairs.items()
    if strange := _strange(results, size, test.arms):
        return _Part(OPEN, strange, [], [])
    cost = results.manifest.cost[size]
    ratio = cost[arm][test.figure] / cost[str(other)][test.figure]
    widths = " and ".join(str(results.manifest.learned(size, a)["model.d_ff"]) for a in (arm, str(other)))
    detail = f"{test.figure}: {arm} x{ratio:.4f} beside {other}, at d_ff {widths}"
    return _Part(SUPPORTED if ratio > test.by else CONTRADICTED, "", [detail], [])


def _effect(test: Criterion, of_plan: float) -> float:
    """Return the difference that matters, in the unit in which the test is made; 0 where none was said."""
    if test.by is not None:
        return math.log(test.by) if test.scale == "log" else test.by
    of_losses = test.figure == "final_eval_loss" and all(isinstance(other, str) for other in test.pairs.values())
    return of_plan if of_losses and not test.within else 0.0


def _state(found: Comparison, beyond: Comparison, effect: float) -> str:
    if found.verdict is Verdict.BETTER:
        return SUPPORTED
    ruled_out = effect > 0 and beyond.verdict is Verdict.WORSE
    return CONTRADICTED if found.verdict is Verdict.WORSE or ruled_out else OPEN


def _ruled_out(test: Criterion, effect: float) -> str:
    size = f"by a factor of {math.exp(effect):.3g}" if test.scale == "log" else f"of {effect:g}"
    return f"a difference {size} in {test.figure} is ruled out"


def _why(test: Criterion, c: Comparison) -> str:
    who = f"{c.arm} and {test.pairs[c.arm]}" if isinstance(test.pairs[c.arm], str) else c.arm
    if c.verdict is Verdict.BLOCKED:
        return c.reason
    if not c.seeds:
        return f"no seed has {test.figure} of {who}"
    return f"{c.verdict.value}: {test.figure} of {who}, {c.seeds} seed(s)"


def _detail(test: Criterion, pair: _Pair, c: Comparison) -> str:
    """Return a pair's difference, or ratio, or the arm's own value beside a number, with its interval."""
    values = [c.difference, *c.interval] if test.less else [-c.difference, *(-end for end in reversed(c.interval))]
    if test.scale == "log":
        mean, low, high = (f"x{math.exp(value):.3g}" for value in values)
    elif isinstance(pair.other, str):
        mean, low, high = (f"{value:+.3g}" for value in values)
    else:
        mean, low, high = (f"{value + pair.other:.3g}" for value in values)
    interval = "" if math.isnan(values[1]) else f" (95% interval {low} to {high}, {c.seeds} seeds)"
    return f"{test.figure}: {pair.arm} {mean} beside {pair.other}{interval}"


# ------------------------------------------------------------------------------------------------------------ one pair


def _has(results: Results, size: str, arm: str, other: str | float) -> bool:
    arms = results.manifest.arms[size]
    return arm in arms and (other in arms or not isinstance(other, str))


def _pair(test: Criterion, results: Results, sizes: tuple[str, ...], arm: str, other: str | float) -> _Pair:
    if test.figure == "spread":
        narrow, wide = sizes
        lacking = next(filter(None, (_unfit(results, size, []) for size in sizes)), "")
        runs = [run for size in sizes for a in results.arms(size) for run in results.finals(size, a)]
        return _Pair(arm, other, log_spread(results, wide), log_spread(results, narrow), lacking, _names(runs))
    [size] = sizes
    if not _has(results, size, arm, other):
        return _Pair(arm, other, {}, {}, f"the plan has not both {arm} and {other}", [])
    own, log = results.finals(size, arm), test.scale == "log"
    if not isinstance(other, str):
        values, lacking = by_seed(test.figure, own, log), _unfit(results, size, [arm])
        return _Pair(arm, other, values, dict.fromkeys(values, other), lacking, _names(own))
    others, lacking = results.finals(size, other), _unfit(results, size, [arm, other])
    if test.figure == "speed_up":
        values = log_speed_up(own, others)
        return _Pair(arm, other, values, dict.fromkeys(values, 0.0), lacking, _names([*own, *others]))
    return _Pair(
        arm, other, by_seed(test.figure, own, log), by_seed(test.figure, others, log), lacking, _names([*own, *others])
    )


def _strange(results: Results, size: str, arms: list[str]) -> str:
    """Return which of these arms is another one than its name says, or ""."""
    for arm in arms:
        stored = {key: _catalogue()[arm][key] for key in ("formula", "parameters", "init_scale")} | {"per_layer": {}}
        learned = results.manifest.learned(size, arm)
        if any(learned.get(name) != value for name, value in flatten(stored, "ffn.").items()):
            return f"blocked: {arm} is not the arm of that name in conf/ffn"
    return ""


def _names(runs: Iterable[Run]) -> list[str]:
    return [run.folder.name for run in runs]


def _unfit(results: Results, size: str, arms: list[str]) -> str:
    """Return why these arms, all of the plan if none is named, cannot be compared for a claim, or ""."""
    learned = {arm: results.manifest.learned(size, arm) for arm in arms or results.arms(size)}
    blocked, cost = results.blocked(size), results.manifest.cost[size]
    for arm in learned:
        if arm in blocked:
            return f"blocked: {arm}: {blocked[arm]}"
        if abs(cost[arm]["mismatch"]) > REFUSE:  # of a plan that matches none
            return f"blocked: {arm} has {cost[arm]['mismatch']:+.1%} parameters in its feed-forward layers"
    if strange := _strange(results, size, arms):
        return strange
    for name in sorted(set().union(*learned.values())):
        if not name.startswith(_ARM_DIFFERS_IN) and len({repr(of_arm.get(name)) for of_arm in learned.values()}) > 1:
            return f"blocked: {_list(learned)} differ in {name}"
    return ""


# ------------------------------------------------------------------------------------------------------- how it is told


def show(answers: list[Answer], console: Console) -> None:
    """Print the claims as a table, and below it the numbers behind each verdict."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_lines=True, pad_edge=False)
    for head, ratio in (("claim", 3), ("what the literature says", 4), ("here", 4)):
        table.add_column(head, ratio=ratio)
    for answer in answers:
        claim = answer.claim
        table.add_row(claim.claim, claim.literature, Text(answer.verdict, style=_STYLES[answer.state]))
    console.print(table)
    for answer in answers:
        if answer.findings:
            console.print(f"\n{answer.claim.claim}", style="bold")
        for finding in answer.findings:
            for depth, line in ((2, _place(finding)), *((4, detail) for detail in finding.details)):
                console.print(Padding(line, (0, 0, 0, depth)))


def markdown(answers: list[Answer]) -> str:
    """Return the claims as a table, and the numbers, runs and plans behind each verdict."""
    lines = ["# What runs say of claims on FFN activations", "", "| claim | what the literature says | here |"]
    lines += ["|---|---|---|"]
    for answer in answers:
        cells = (answer.claim.claim, answer.claim.literature, answer.verdict)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    for answer in answers:
        lines += ["", f"## {answer.claim.claim}", "", f"Here: {answer.verdict}."]
        lines += ["", f"Literature: {'; '.join(answer.claim.sources)}."] if answer.claim.sources else []
        lines += [""] if answer.findings else []
        for finding in answer.findings:
            lines += [f"- {_place(finding)}", *(f"  - {line}" for line in finding.details)]
            lines += [f"  - runs: {', '.join(f'`{name}`' for name in _together_by_seed(finding.runs))}"] * bool(
                finding.runs
            )
    return "\n".join(lines) + "\n"


def _place(finding: Finding) -> str:
    manifest = finding.results.manifest
    why = f" ({finding.why})" if finding.why else ""
    return (
        f"{finding.where} of {finding.results.folder}, plan {manifest.plan.name} {manifest.hash}: {finding.state}{why}"
    )


def _together_by_seed(runs: list[str]) -> list[str]:
    """Return the names of runs, those that differ in the seed alone as one: nano-relu-lr0.004-seed{0,1,2}."""
    seeds: dict[str, list[str]] = {}
    for name in runs:
        stem, _, seed = name.rpartition("seed")
        seeds.setdefault(stem, []).append(seed)
    return [f"{stem}seed{{{','.join(of_stem)}}}" for stem, of_stem in seeds.items()]


def _list(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


if __name__ == "__main__":
    run_command(main, __doc__)
