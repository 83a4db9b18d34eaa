"""Let a plan grow: arms, sizes, learning rates, seeds and looks may be added to a folder whose runs have begun.

Nothing is trained again. Each amendment stands in the manifest, with its time and what had been seen by then: the seeds and the
verdict of every arm. Added arms and sizes join the family whose p-values are adjusted together. Added seeds are paid for
(`looks.py`). Added learning rates and seeds of the sweep measure the optimum better; the seeds of an arm that ran stay where
they ran, and what that misses of the optimum enters their intervals.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation.manifest import NAME, Manifest, merge_shared, read_manifest
from ablation.plan import Chosen, Plan, counts_of_looks, possible_seeds, seeds_text, sizes_of, swept_at, values_of_plan
from ablation.results import Results, read_results
from conf.load import flatten
from kernels.common.errors import UserError
from kernels.common.text import listed

_LISTS = ("seeds", "rates", "rate_seeds", "horizons")
_MAY_CHANGE = ("looks", "until")
_SWEEPS = ("rates", "rate_seeds")
_NAMES = {"sizes": "sizes", "arms": "arms", "seeds": "seeds", "rates": "learning rates", "rate_seeds": "sweep seeds",
          "horizons": "horizons"}  # fmt: skip
# The first two are compared as they were resolved, and the others decide nothing.
_FREE = ("arms", "sizes", "question", "reported")


@dataclasses.dataclass(frozen=True)
class Growth:
    """What a plan has more than its folder, and less."""

    added: dict[str, Any]  # by key: the names and numbers that are new, or [before, now]
    missing: dict[str, list[Any]]  # by key: what the folder's plan has, and this one has not


def growth(plan: Plan, existing: Manifest, folder: Path) -> Growth:
    """Return how a plan differs from that of its folder.

    Raises:
        UserError: it differs in what may not change; the message names where.
    """
    before, now = values_of_plan(existing.plan), values_of_plan(plan.config)
    old = merge_shared({"plan": before, "shared": existing.shared, "arms": existing.arms})["arms"]
    new = plan.content["arms"]
    added: dict[str, Any] = {}
    missing: dict[str, list[Any]] = {}
    _compare(added, missing, "sizes", sizes_of(existing.plan), sizes_of(plan.config))
    arms = [list(dict.fromkeys(arm for of_size in sizes.values() for arm in of_size)) for sizes in (old, new)]
    _compare(added, missing, "arms", *arms)
    for key in _LISTS:
        _compare(added, missing, key, list(getattr(existing.plan, key)), list(getattr(plan.config, key)))
    for key in _MAY_CHANGE:
        if getattr(existing.plan, key) != getattr(plan.config, key):
            added[key] = [getattr(existing.plan, key), getattr(plan.config, key)]
    one, other = (
        {
            **{f"plan.{key}": value for key, value in values.items() if key not in (*_LISTS, *_MAY_CHANGE, *_FREE)},
            **{f"arms.{name}": value for name, value in flatten(_common(these, those)).items()},
        }
        for values, these, those in ((before, old, new), (now, new, old))
    )
    changed = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    if changed:
        raise UserError(
            f"{folder} holds the runs of another plan (it differs in {', '.join(changed[:6])}): "
            "choose another folder, folder=FOLDER"
        )
    return Growth(added, missing)


def _compare(added: dict[str, Any], missing: dict[str, list[Any]], key: str, before: list[Any], now: list[Any]) -> None:
    if more := [each for each in now if each not in before]:
        added[key] = more
    if less := [each for each in before if each not in now]:
        missing[key] = less


def _common(these: Mapping[str, Any], those: Mapping[str, Any]) -> dict[str, Any]:
    """Return what each (size, arm) that both have learns, of these."""
    return {
        size: {arm: values for arm, values in arms.items() if arm in those[size]}
        for size, arms in these.items()
        if size in those
    }


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A plan as it goes on in its folder."""

    plan: Plan
    notes: list[str] = dataclasses.field(default_factory=list)  # what to say about it before it runs
    amendment: dict[str, Any] | None = None  # for the manifest, if the plan adds something
    narrower: bool = False  # the folder's plan has more, and its manifest stays as it is


def continue_plan(plan: Plan, folder: Path) -> Continuation:
    """Return how a plan goes on in its folder.

    Raises:
        UserError: the folder holds the runs of another plan, or this one adds to it and lacks something of it.
    """
    if not (folder / NAME).exists():
        return Continuation(plan)
    existing = read_manifest(folder)
    if plan.hash == existing.hash:
        return Continuation(dataclasses.replace(plan, begun_as=existing.begun_as, chosen=existing.chosen))
    found = growth(plan, existing, folder)
    plan = dataclasses.replace(plan, begun_as=existing.begun_as or existing.hash, chosen=existing.chosen)
    if sweeps := {key: values for key, values in found.missing.items() if key in _SWEEPS}:
        keys = " and ".join(f"ablation.{key}" for key in sweeps)
        raise UserError(
            f"{folder} has {_text(sweeps)} too, which its learning rates are chosen by: repeat them in {keys}"
        )
    if not found.added:
        notes = [f"{folder} has {_text(found.missing)} too; this command leaves them alone"] if found.missing else []
        return Continuation(plan, notes, narrower=bool(found.missing))
    if found.missing:
        keys = " and ".join(f"ablation.{key}" for key in found.missing)
        raise UserError(
            f"{folder} has {_text(found.missing)}, and a plan can grow but not shrink: repeat them in {keys}"
        )
    results = read_results(folder)
    _refuse_lost_seeds(plan, results)
    if any(key in found.added for key in _SWEEPS):
        plan = dataclasses.replace(plan, chosen={**_chosen(results), **plan.chosen})
    amendment = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "added": found.added,
        "looks": list(counts_of_looks(existing.plan)),
        "seen": seen(results),
    }
    notes = [f"this adds to the plan of {folder}: {_text(found.added)}", *_seen_text(amendment["seen"])]
    return Continuation(plan, notes, amendment)


def _refuse_lost_seeds(plan: Plan, results: Results) -> None:
    """Refuse looks without seeds that `until=decided` has added and trained already."""
    ran = {run.planned.seed for run in results.runs.values() if run.planned.stage == "final"}
    if lost := sorted(ran - set(possible_seeds(plan.config))):
        raise UserError(
            f"{results.folder} has runs of {seeds_text(lost)}, which no look of this command compares: name them in "
            "ablation.seeds, or keep ablation.until and ablation.looks"
        )


def amendment_lines(manifest: Manifest) -> list[str]:
    """Return what was added to a plan, one line per amendment, with what had been seen by then."""
    return [
        f"{amendment['date']}: added {_text(amendment['added'])}; "
        + ("; ".join(_seen_text(amendment["seen"])) or "nothing had been seen")
        for amendment in manifest.amendments
    ]


def seen(results: Results) -> dict[str, dict[str, list[Any]]]:
    """Return, by size and arm, the seeds that had been compared, and the verdict."""
    return {
        size: {c.arm: [c.seeds, c.verdict.value] for c in results.comparisons(size) if c.seeds}
        for size in results.sizes
    }


def _chosen(results: Results) -> dict[tuple[str, str], Chosen]:
    """Return the learning rates of the arms whose compared seeds have begun."""
    found = {}
    for size, arm in results.size_arm_pairs():
        lr = results.best_lr(size, arm)
        own = swept_at(results.manifest.plan, size) == size
        if own and lr is not None and results.runs_of(size, arm, "final"):
            found[size, arm] = Chosen(lr, tuple(sorted(results.sweep_losses(size, arm))))
    return found


def _text(parts: Mapping[str, Sequence[Any]]) -> str:
    texts = []
    for key, values in parts.items():
        if key in _MAY_CHANGE:
            texts.append(f"{key} {values[1]} instead of {values[0]}")
        else:
            what = _NAMES[key] if len(values) > 1 else _NAMES[key].removesuffix("s")
            texts.append(f"the {what} {listed(map(_plain, values))}")
    return ", ".join(texts)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _seen_text(of_sizes: Mapping[str, Mapping[str, Sequence[Any]]]) -> list[str]:
    return [
        f"{size}: seen so far: " + ", ".join(f"{arm} {what} after {seeds} seeds" for arm, (seeds, what) in arms.items())
        for size, arms in of_sizes.items()
        if arms
    ]
