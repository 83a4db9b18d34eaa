"""What a plan showed, a sentence for every size: what the report, the dashboard and the console begin with.

An arm is called better or worse only where its verdict says so; the others are told with the reason for which nothing is said
of them. Differences are in nats a token, over the seeds that both arms have.
"""

from __future__ import annotations

from collections.abc import Iterable

from ablation.results import Results
from ablation.statistics import Comparison, Verdict


def sentences(results: Results) -> list[str]:
    """Return one sentence for every size of a plan, in the plan's order."""
    seeds, baseline = len(results.manifest.plan.seeds), results.baseline
    return [_sentence(size, baseline, seeds, results.comparisons(size)) for size in results.sizes]


def _sentence(size: str, baseline: str, planned: int, comparisons: list[Comparison]) -> str:
    if not any(c.seeds for c in comparisons):
        return f"At {size}, nothing is known yet: no arm has a seed that {baseline} has too."
    counts = {c.seeds for c in comparisons}
    same = len(counts) == 1
    seeds = _seeds(*counts, planned) if same else f"up to {_seeds(max(counts), planned)}"
    names = {c.arm: c.arm if same else f"{c.arm} ({_seeds(c.seeds, planned)})" for c in comparisons}
    of = {verdict: [c for c in comparisons if c.verdict is verdict] for verdict in Verdict}
    clauses = [] if of[Verdict.BETTER] else [f"no arm is shown to be better than {baseline}"]
    for verdict in (Verdict.BETTER, Verdict.WORSE):
        by_how_much = [f"{names[c.arm]} is {verdict.value} than {baseline} by {_amount(c)}" for c in of[verdict]]
        clauses += by_how_much
    for verdict, said in (
        (Verdict.NO_DIFFERENCE, f"not told apart from {baseline}"),
        (Verdict.UNDERPOWERED, "underpowered"),
        (Verdict.BLOCKED, "without a verdict"),
    ):
        for reason in dict.fromkeys(c.reason for c in of[verdict]):
            arms = [names[c.arm] for c in of[verdict] if c.reason == reason]
            clauses.append(f"{_list(arms)} {'is' if len(arms) == 1 else 'are each'} {said} ({reason})")
    return f"At {size}, over {seeds}: {'; '.join(clauses)}."


def _amount(c: Comparison) -> str:
    low, high = sorted(map(abs, c.interval))
    told = [f"95% interval {low:.3g} to {high:.3g}", *([c.reason] if c.reason else [])]
    return f"{abs(c.difference):.3g} nats a token ({'; '.join(told)})"


def _seeds(count: int, planned: int) -> str:
    part = f"{count} of {planned}" if count < planned else f"{count}"
    return f"{part} seed{'' if planned == 1 else 's'}"


def _list(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
