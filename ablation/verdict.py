"""State what a plan showed, over all sizes and at each: the first lines of the report, the dashboard and the console.

An arm is called better or worse only where its verdict is. Amounts are mean differences in the metric's unit over the seeds
that both arms have, largest first. Their intervals, and why an arm has no verdict, are in the tables. A second sentence says
whether the verdicts hold for other held-out text, and a third which arms predict it no better than a bigram model.
"""

from __future__ import annotations

from ablation.results import Results
from ablation.statistics import Comparison, Verdict, at_every_size
from kernels.common.text import listed


def sentences(results: Results) -> list[str]:
    """Return what holds at every size of a plan, if it has several, then what was found at each, in the plan's order."""
    return [*headline(results), *by_size(results).values()]


def by_size(results: Results) -> dict[str, str]:
    """Return what was found at each size, in the plan's order."""
    seeds, baseline = len(results.manifest.plan.seeds), results.baseline
    effect, unit = results.manifest.plan.smallest_effect, results.metric.unit
    return {
        size: _sentence(size, baseline, seeds, effect, unit, results.comparisons(size)) + _below_bigram(results, size)
        for size in results.sizes
    }


def headline(results: Results) -> list[str]:
    """Return what holds at every size, as one sentence; none where there is one size, or one without a comparison."""
    of_sizes = [results.comparisons(size) for size in results.sizes]
    if len(of_sizes) < 2 or not all(any(c.seeds for c in comparisons) for comparisons in of_sizes):
        return []
    found = at_every_size(of_sizes)
    clauses = []
    for verdict in (Verdict.BETTER, Verdict.WORSE):
        arms = [arm for arm, of_arm in found.items() if of_arm is verdict]
        clauses += [f"{verdict.value} than {results.baseline}: {listed(arms)}"] if arms else []
    if not clauses:
        return [f"No arm is shown to be better, or worse, than {results.baseline} at every size."]
    return [f"At every size, {'; '.join(clauses)}."]


def _below_bigram(results: Results, size: str) -> str:
    """Return which arms do not beat a bigram model, as a sentence after a space; "" if all do, or that is not known."""
    arms = results.beaten_by_bigram(size)
    if not arms:
        return ""
    loss = results.baselines(size)["bigram"]
    which = (
        "No arm beats"
        if len(arms) == len(results.arms(size))
        else f"{listed(arms)} do{'es' * (len(arms) == 1)} not beat"
    )
    return f" {which} a bigram model of as many tokens ({loss:.3f})."


def _sentence(size: str, baseline: str, planned: int, effect: float, unit: str, comparisons: list[Comparison]) -> str:
    if not any(c.seeds for c in comparisons):
        return f"At {size}, nothing is known yet: no arm shares a seed with {baseline}."
    most = max(c.seeds for c in comparisons)
    seeds = f"{most} of {planned}" if most < planned else f"{most}"
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
            group = by_verdict[verdict]
            of_all = verdict is Verdict.BLOCKED or all(c.withheld for c in group)
            reasons = {c.reason for c in group} if of_all else set()
            clauses.append(f"{label}: {listed(arms)}" + (f" ({reasons.pop()})" if len(reasons) == 1 else ""))
    return f"At {size}, over {seeds} seeds, in {unit}: {'; '.join(clauses)}.{_over_text(comparisons)}"


def _over_text(comparisons: list[Comparison]) -> str:
    """Return over what the verdicts hold, as a sentence after a space; "" where there are none, or it is not known."""
    decided = [c for c in comparisons if c.decided and c.text]
    scatters = [c.text.scatter for c in decided if c.text]
    if not scatters:
        return ""
    most = max(scatters, key=lambda scatter: scatter.documents)
    on_this_text = [c.arm for c in decided if c.text and not c.text.holds]
    if len(on_this_text) == len(decided):
        return f" This is shown for these {most.documents} held-out {most.unit} only, not for other text."
    but = f", except for {listed(on_this_text)}" if on_this_text else ""
    return f" This holds for other text of its kind too (over {most.documents} {most.unit}){but}."


def _by(c: Comparison, seeds: int, effect: float) -> str:
    less = f" (less than the {effect:g} asked for)" if abs(c.difference) < effect else ""
    return f"{_arm(c, seeds)} by {abs(c.difference):.4f}{less}{_diverged(c)}"


def _arm(c: Comparison, seeds: int) -> str:
    return c.arm if c.seeds == seeds else f"{c.arm} ({c.seeds} seeds)"


def _diverged(c: Comparison) -> str:
    return f" ({c.diverged} of {c.seeds} seeds diverged)" if c.diverged else ""
