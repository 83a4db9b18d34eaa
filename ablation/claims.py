"""Show what runs say about published claims on FFN activations: `python -m ablation.claims ablations/glu_variants ...`

    FOLDER ...   of plans; none: print the claims alone
    to=FILE.md   also write Markdown, with the runs and the plan's hash behind each verdict

The claims are data, `ablation/claims.yaml`. A test compares a metric of two arms of one plan, seed by seed as in
`ablation/statistics.py`, with Holm's adjustment over all pairs that it names. A claim is supported where the runs show what it
states, contradicted where they show the opposite or rule out a difference that matters (`by`), and not settled otherwise. A
result at one size is reported for that size, never as a general rule.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jinja2
import yaml
from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ablation.budget import REFUSE
from ablation.measures import NEED_WINDOW, WINDOW, BySeed, by_seed, edge, log_multiplier, log_spread
from ablation.results import Results, Run, read_results
from ablation.statistics import Comparison, Pair, Verdict, compare
from conf.arms import catalogue
from conf.load import flatten
from conf.terminal import SafeConsole
from kernels.common.commands import run_command
from kernels.common.files import atomic_write, explain_os_errors
from kernels.common.options import read_positional
from kernels.common.text import listed

DATA = Path(__file__).with_name("claims.yaml")
SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "not settled"
_OPTIONS = {"to": ""}
_STYLES = {SUPPORTED: "green", CONTRADICTED: "red", OPEN: "yellow"}
_ARM_KEYS = ("ffn.", "model.d_ff", "optim.lr")  # two arms that are compared may differ in these alone

_catalogue = functools.cache(catalogue)


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
class Criterion:
    """One test of a claim. Its fields are the keys of claims.yaml."""

    metric: str
    less: dict[str, str | float] = dataclasses.field(default_factory=dict)
    more: dict[str, str | float] = dataclasses.field(default_factory=dict)
    by: float | None = None
    scale: str = "linear"
    within: float = 0.0
    at_least: int = 0
    # Of `edge`: the arm and the one that it is compared with.
    of: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def pairs(self) -> dict[str, str | float]:
        """The arms, each with the arm or number it is compared with."""
        return self.less or self.more

    @property
    def arms(self) -> list[str]:
        """All arms that it names."""
        pairs = self.of if self.compares_sizes else self.pairs
        return list(dict.fromkeys(str(a) for pair in pairs.items() for a in pair if isinstance(a, str)))

    @property
    def compares_sizes(self) -> bool:
        """Whether it compares the widest size of a plan with the narrowest."""
        return self.metric in ("spread", "edge")

    @property
    def required(self) -> int:
        """The number of pairs that must hold."""
        return self.at_least or len(self.pairs)


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
        premises = [_decide(criterion, results, sizes) for criterion in claim.given]
        tests = [_decide(criterion, results, sizes) for criterion in claim.test]
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
        if all(any(_has(results, size, *pair) for pair in criterion.pairs.items()) for criterion in claim.criteria)
    ]


def _combine(premises: list[_Decision], tests: list[_Decision]) -> tuple[str, str]:
    """Return the state of a claim at a size, and `Evidence.why`."""
    for premise in premises:
        if premise.state != SUPPORTED:
            return OPEN, premise.why or f"its premise does not hold here: {'; '.join(premise.details)}"
    states = {test.state for test in tests}
    if CONTRADICTED in states:
        whys = [test.why for test in tests if test.state == CONTRADICTED]
        return CONTRADICTED, "" if "" in whys else whys[0]
    return (SUPPORTED, "") if states == {SUPPORTED} else (OPEN, next(test.why for test in tests if test.why))


# -------------------------------------------------------------------------------------------------------- one criterion


@dataclasses.dataclass(frozen=True)
class _Decision:
    """The result of one criterion."""

    state: str
    why: str  # as `Evidence.why`
    details: list[str]
    runs: list[str]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A metric of two arms by seed; both empty where the plan lacks these arms, or has no runs of them yet."""

    arm: str
    other: str | float
    own: BySeed
    others: BySeed
    blocked: str  # why it can have no verdict
    runs: list[str]
    regret: float = 0.0  # what both may lose by missing their best learning rates, where the metric is the loss


def _decide(criterion: Criterion, results: Results, sizes: tuple[str, ...]) -> _Decision:
    if criterion.metric == "ffn_parameters":
        return _decide_by_cost(criterion, results, sizes[0])
    pairs = {arm: _pair(criterion, results, sizes, arm, other) for arm, other in criterion.pairs.items()}
    ceiling = results.ceiling(sizes[0]) if criterion.metric == "final_eval_loss" else math.inf
    effect = _effect(criterion, results.manifest.plan.smallest_effect)
    sides = {arm: (p.own, p.others) if criterion.less else (p.others, p.own) for arm, p in pairs.items()}
    tested = [Pair(arm, *sides[arm], ceiling, pair.blocked, pair.regret) for arm, pair in pairs.items()]

    def compare_with(margin: float) -> list[Comparison]:
        return compare(tested, effect, margin)

    comparisons = compare_with(-criterion.within)
    states = {c.arm: _state(c, at, effect) for c, at in zip(comparisons, compare_with(effect), strict=True)}
    details = [_detail(criterion, pairs[c.arm], c) for c in compare_with(0.0) if c.seeds]
    runs = [run for pair in pairs.values() for run in pair.runs]
    held, failed = (list(states.values()).count(state) for state in (SUPPORTED, CONTRADICTED))
    if held >= criterion.required:
        return _Decision(SUPPORTED, "", details, runs)
    if failed > len(states) - criterion.required:
        worse = any(c.verdict is Verdict.WORSE for c in comparisons)
        return _Decision(CONTRADICTED, "" if worse else _ruled_out(criterion, effect), details, runs)
    unsettled = [c for c in comparisons if states[c.arm] == OPEN]
    first = min(unsettled, key=lambda c: not c.seeds)  # one that has runs, if any
    return _Decision(OPEN, _why(criterion, first), details, runs)


def _decide_by_cost(criterion: Criterion, results: Results, size: str) -> _Decision:
    """Decide by the costs in the manifest, which depend on no seed."""
    [(arm, other)] = criterion.pairs.items()
    assert criterion.by is not None  # claims.yaml gives it for metrics of the manifest
    if renamed := _not_of_catalogue(results, size, criterion.arms):
        return _Decision(OPEN, renamed, [], [])
    cost = results.manifest.cost[size]
    ratio = cost[arm][criterion.metric] / cost[str(other)][criterion.metric]
    widths = " and ".join(str(results.manifest.learned(size, a)["model.d_ff"]) for a in (arm, str(other)))
    detail = f"{criterion.metric}: {arm} x{ratio:.4f} relative to {other}, at d_ff {widths}"
    return _Decision(SUPPORTED if ratio > criterion.by else CONTRADICTED, "", [detail], [])


def _effect(criterion: Criterion, plan_effect: float) -> float:
    """Return the difference that matters, in the unit in which the test is made; 0 where none is given."""
    if criterion.by is not None:
        return math.log(criterion.by) if criterion.scale == "log" else criterion.by
    compares_losses = criterion.metric == "final_eval_loss" and all(
        isinstance(o, str) for o in criterion.pairs.values()
    )
    return plan_effect if compares_losses and not criterion.within else 0.0


def _state(comparison: Comparison, at_effect: Comparison, effect: float) -> str:
    if comparison.verdict is Verdict.BETTER:
        return SUPPORTED
    ruled_out = effect > 0 and at_effect.verdict is Verdict.WORSE
    return CONTRADICTED if comparison.verdict is Verdict.WORSE or ruled_out else OPEN


def _ruled_out(criterion: Criterion, effect: float) -> str:
    size = f"by a factor of {math.exp(effect):.3g}" if criterion.scale == "log" else f"of {effect:g}"
    return f"a difference {size} in {criterion.metric} is ruled out"


def _why(criterion: Criterion, c: Comparison) -> str:
    other = criterion.pairs[c.arm]
    arms = f"{c.arm} and {other}" if isinstance(other, str) else c.arm
    if c.verdict is Verdict.BLOCKED:
        return c.reason
    if not c.seeds and criterion.metric in NEED_WINDOW:
        return f"not seen: activity was sampled over fewer than {WINDOW:,} tokens (telemetry_every, telemetry_window)"
    if not c.seeds:
        return f"no seed has {criterion.metric} of {arms}"
    return f"{c.verdict.value}: {criterion.metric} of {arms}, {c.seeds} seed(s)"


def _detail(criterion: Criterion, pair: _Pair, c: Comparison) -> str:
    """Return a pair's difference or ratio, or the arm's own value where it is compared with a number, and its interval."""
    low, high = c.interval
    values = [c.difference, low, high] if criterion.less else [-c.difference, -high, -low]
    if criterion.scale == "log":
        texts = [f"x{math.exp(value):.3g}" for value in values]
    elif isinstance(pair.other, str):
        texts = [f"{value:+.3g}" for value in values]
    else:
        texts = [f"{value + pair.other:.3g}" for value in values]
    interval = "" if math.isnan(low) else f" (95% interval {texts[1]} to {texts[2]}, {c.seeds} seeds)"
    return f"{criterion.metric}: {pair.arm} {texts[0]} relative to {pair.other}{interval}"


# ------------------------------------------------------------------------------------------------------------ one pair


def _has(results: Results, size: str, arm: str, other: str | float) -> bool:
    arms = results.manifest.arms[size]
    return arm in arms and (other in arms or not isinstance(other, str))


def _pair(criterion: Criterion, results: Results, sizes: tuple[str, ...], arm: str, other: str | float) -> _Pair:
    if criterion.metric == "spread":
        narrow, wide = sizes
        blocked = next(filter(None, (_blocked(results, size, []) for size in sizes)), "")
        runs = [run for size in sizes for a in results.arms(size) for run in results.final_runs(size, a)]
        return _Pair(arm, other, log_spread(results, wide), log_spread(results, narrow), blocked, _names(runs))
    if criterion.metric == "edge":
        narrow, wide = sizes
        arms = [arm for pair in criterion.of.items() for arm in pair]
        blocked = next(filter(None, (_blocked(results, size, arms) for size in sizes)), "")
        runs = [run for size in sizes for a in arms for run in results.final_runs(size, a)]
        own, others = (edge(results, size, arms[0], arms[1]) for size in (wide, narrow))
        regret = math.hypot(*(results.known_regrets(size).get(a, 0.0) for size in sizes for a in arms))
        return _Pair(arm, other, own, others, blocked, _names(runs), regret)
    [size] = sizes
    if not _has(results, size, arm, other):
        return _Pair(arm, other, {}, {}, f"the plan does not have both {arm} and {other}", [])
    own, log = results.final_runs(size, arm), criterion.scale == "log"
    if not isinstance(other, str):
        values, blocked = by_seed(criterion.metric, own, log), _blocked(results, size, [arm])
        return _Pair(arm, other, values, dict.fromkeys(values, other), blocked, _names(own))
    others, blocked = results.final_runs(size, other), _blocked(results, size, [arm, other])
    names = _names([*own, *others])
    if criterion.metric == "multiplier":
        if len(results.manifest.plan.horizons) < 2:
            blocked = blocked or "the plan has one horizon (ablation.horizons)"
        values = log_multiplier(results, size, arm, other)
        return _Pair(arm, other, values, dict.fromkeys(values, 0.0), blocked, names)
    values, regret = by_seed(criterion.metric, own, log), 0.0
    if criterion.metric == "final_eval_loss":
        regrets = results.known_regrets(size)
        regret = math.hypot(regrets.get(arm, 0.0), regrets.get(other, 0.0))
    return _Pair(arm, other, values, by_seed(criterion.metric, others, log), blocked, names, regret)


def _not_of_catalogue(results: Results, size: str, arms: list[str]) -> str:
    """Return which of these arms differs from the one of that name in conf/ffn, or ""."""
    for arm in arms:
        entry = _catalogue()[arm]
        stored = {key: entry[key] for key in ("formula", "parameters", "init_scale")} | {"per_layer": {}}
        learned = results.manifest.learned(size, arm)
        if any(learned.get(name) != value for name, value in flatten(stored, "ffn.").items()):
            return f"blocked: {arm} is not the arm of that name in conf/ffn"
    return ""


def _names(runs: Iterable[Run]) -> list[str]:
    return [run.folder.name for run in runs]


def _blocked(results: Results, size: str, arms: list[str]) -> str:
    """Return why these arms, or all arms of the plan if none is named, cannot be compared for a claim, or ""."""
    learned = {arm: results.manifest.learned(size, arm) for arm in arms or results.arms(size)}
    blocked, cost = results.blocked(size), results.manifest.cost[size]
    for arm in learned:
        if arm in blocked:
            return f"blocked: {arm}: {blocked[arm]}"
        if abs(cost[arm]["mismatch"]) > REFUSE:  # in a plan that matches no budget
            return f"blocked: {arm} has {cost[arm]['mismatch']:+.1%} parameters in its feed-forward layers"
    if renamed := _not_of_catalogue(results, size, arms):
        return renamed
    for name in sorted(set().union(*learned.values())):
        if not name.startswith(_ARM_KEYS) and len({repr(values.get(name)) for values in learned.values()}) > 1:
            return f"blocked: {listed(learned)} differ in {name}"
    return ""


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
