"""State what a plan showed, in one sentence per size: the first lines of the report, the dashboard and the console.

An arm is called better or worse only where its verdict is. Amounts are mean differences in nats per token over the seeds that
both arms have, largest first. Their intervals, and why an arm has no verdict, are in the tables.
"""

from __future__ import annotations

from ablation.results import Results
from ablation.statistics import Comparison, Verdict
from kernels.common.text import listed


def sentences(results: Results) -> list[str]:
    """Return one sentence per size of a plan, in the plan's order."""
    seeds, baseline = len(results.manifest.plan.seeds), results.baseline
    effect = results.manifest.plan.smallest_effect
    return [_sentence(size, baseline, seeds, effect, results.comparisons(size)) for size in results.sizes]


def _sentence(size: str, baseline: str, planned: int, effect: float, comparisons: list[Comparison]) -> str:
    if not any(c.seeds for c in comparisons):
        return f"At {size}, nothing is known yet: no arm shares a seed with {baseline}."
    most = max(c.seeds for c in comparisons)
    seeds = f"{most} of {planned}" if most < planned else f"{planned}"
    by_verdict = {
        verdict: sorted((c for c in comparisons if c.verdict is verdict), key=lambda c: -abs(c.difference))
        for verdict in Verdict
    }
    clauses = [] if by_verdict[Verdict.BETTER] else [f"no arm is shown to be better than {baseline}"]
    for verdict in (Verdict.BETTER, Verdict.WORSE):
        if by_verdict[verdict]:
            arms = [_by(c, most, effect) for c in by_verdict[verdict]]
            clauses.append(f"{verdict.value} than {baseline}: {listed(arms)}")
    for verdict, label in (
        (Verdict.EQUIVALENT, f"equivalent to {baseline} within {effect:g}"),
        (Verdict.UNDECIDED, "undecided"),
        (Verdict.BLOCKED, "no verdict"),
    ):
        if by_verdict[verdict]:
            arms = [f"{_arm(c, most)}{_diverged(c)}" for c in by_verdict[verdict]]
            reasons = {c.reason for c in by_verdict[verdict]} if verdict is Verdict.BLOCKED else set()
            clauses.append(f"{label}: {listed(arms)}" + (f" ({reasons.pop()})" if len(reasons) == 1 else ""))
    return f"At {size}, over {seeds} seeds, in nats per token: {'; '.join(clauses)}."


def _by(c: Comparison, seeds: int, effect: float) -> str:
    less = f" (less than the {effect:g} asked for)" if abs(c.difference) < effect else ""
    return f"{_arm(c, seeds)} by {abs(c.difference):.4f}{less}{_diverged(c)}"


def _arm(c: Comparison, seeds: int) -> str:
    return c.arm if c.seeds == seeds else f"{c.arm} ({c.seeds} seeds)"


def _diverged(c: Comparison) -> str:
    return f" ({c.diverged} of {c.seeds} seeds diverged)" if c.diverged else ""
