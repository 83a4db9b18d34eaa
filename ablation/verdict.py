"""What a plan showed, a sentence for every size: what the report, the dashboard and the console begin with.

An arm is called better or worse only where its verdict says so. Amounts are mean differences in nats a token over the seeds
that both arms have, the largest first; their intervals, and why an arm has no verdict, stand in the tables.
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
    seeds = f"{max(counts)} of {planned}" if max(counts) < planned else f"{planned}"
    of = {
        verdict: sorted((c for c in comparisons if c.verdict is verdict), key=lambda c: -abs(c.difference))
        for verdict in Verdict
    }
    clauses = [] if of[Verdict.BETTER] else [f"no arm is shown to be better than {baseline}"]
    for verdict in (Verdict.BETTER, Verdict.WORSE):
        if of[verdict]:
            arms = [f"{_told(c, max(counts))} by {abs(c.difference):.4f}{_diverged(c)}" for c in of[verdict]]
            clauses.append(f"{verdict.value} than {baseline}: {_list(arms)}")
    for verdict, said in (
        (Verdict.NO_DIFFERENCE, f"no difference to {baseline} shown"),
        (Verdict.UNDERPOWERED, "too few seeds to tell"),
        (Verdict.BLOCKED, "without a verdict"),
    ):
        if of[verdict]:
            arms = [f"{_told(c, max(counts))}{_diverged(c)}" for c in of[verdict]]
            why = {c.reason for c in of[verdict]} if verdict is Verdict.BLOCKED else set()
            clauses.append(f"{said}: {_list(arms)}" + (f" ({why.pop()})" if len(why) == 1 else ""))
    return f"At {size}, over {seeds} seeds, in nats a token: {'; '.join(clauses)}."


def _told(c: Comparison, seeds: int) -> str:
    return c.arm if c.seeds == seeds else f"{c.arm} ({c.seeds} seeds)"


def _diverged(c: Comparison) -> str:
    return f" ({c.diverged} of {c.seeds} seeds diverged)" if c.diverged else ""


def _list(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
