"""`manifest.json`: what the runs of a folder are. Written before the first run starts; runs that do not match are refused.

    hash       of `plan`, `shared` and `arms`
    plan       the keys of the plan
    shared     the values that decide what a run learns and that all runs share
    arms       by size and arm: the values that differ, and `steps`
    cost       by size and arm: the cost of a run, for readers
    hashes     of each single value, to name the one that was changed
    growth     of a plan that has grown: the hash that it began with, its amendments and what had been seen by then, the
               learning rates that were kept, and a hash of these
    provenance of each time that the plan was started: date, commit, machine, versions, command

A run adds its own learning rate and seeds, which are part of its folder's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ablation.looks import Looks
from ablation.metrics import metric_of
from ablation.plan import (
    NAMES,
    RATE_CHOICES,
    RULES_OF_0_2,
    Chosen,
    Plan,
    PlannedRun,
    at_horizon,
    learning_rates,
    plan_of_values,
    planned_looks,
    sizes_of,
    values_of_plan,
)
from ablation.resolve import check_looks, check_reported
from conf.ablation_schema import AblationConfig
from conf.load import flatten
from conf.provenance import provenance
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, explain_os_errors
from kernels.common.json_files import digest, is_count, is_number, is_provenance, read_object

NAME = "manifest.json"
_LIMIT = 1 << 26  # bytes
_COUNTS = ("tokens", "flops_per_token", "ffn_parameters", "saved_bytes_per_token")  # of a cost
_RUN = re.compile(r"(?P<size>[^-]+)-(?P<arm>[^-]+)-lr(?P<lr>[0-9.e+-]+)-seed(?P<seed>[0-9]+)")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A manifest, read and checked."""

    hash: str
    plan: AblationConfig
    shared: dict[str, Any]
    arms: dict[str, dict[str, dict[str, Any]]]  # by size and arm: what differs
    cost: dict[str, dict[str, dict[str, Any]]]
    begun_as: str = ""  # the hash with which the folder began, if its plan has grown since
    chosen: dict[tuple[str, str], Chosen] = dataclasses.field(default_factory=dict)  # by size and arm
    amendments: tuple[dict[str, Any], ...] = ()  # date, added, looks (before), seen; in the order of time
    # Of each start that is readable.
    provenance: tuple[dict[str, Any], ...] = dataclasses.field(default=(), compare=False)

    @property
    def sizes(self) -> list[str]:
        """The sizes of the plan, in its order, without those at shorter horizons."""
        return [size for size in self.arms if size in sizes_of(self.plan)]

    def at_horizons(self, size: str) -> dict[float, str]:
        """Return a size at each of its horizons, by the fraction of its tokens, ascending."""
        return {fraction: at_horizon(size, fraction) for fraction in sorted(self.plan.horizons)}

    @property
    def looks(self) -> Looks:
        """When the verdicts of the plan are made, and what is spent on them."""
        looks = planned_looks(self.plan)
        counts, planned = set(looks.counts), looks.planned
        for amendment in reversed(self.amendments):
            before = amendment["looks"]
            most = max((seeds for arms in amendment["seen"].values() for seeds, _ in arms.values()), default=0)
            if most >= before[0]:  # a verdict had been made
                planned = before[-1]
                counts |= {count for count in before if count <= most}
        return dataclasses.replace(looks, counts=tuple(sorted(counts)), planned=planned)

    def learned(self, size: str, arm: str) -> dict[str, Any]:
        """Return `plan.ResolvedArm.learned`."""
        return self.shared | self.arms[size][arm]

    def learning_rates(self, size: str, arm: str) -> list[float]:
        """Return `plan.Plan.learning_rates`."""
        return learning_rates(self.plan, self.learned(size, arm)["optim.lr"])

    def planned_run(self, name: str) -> PlannedRun | None:
        """Return the run that a folder's name denotes; None if it names no arm of the plan.

        The name has rounded digits. They are replaced by the exact learning rate if the plan has one of that name.
        """
        named = _RUN.fullmatch(name)
        if not named or named["arm"] not in self.arms.get(named["size"], {}):
            return None
        size, arm, seed = named["size"], named["arm"], int(named["seed"])
        stage = "sweep" if seed in self.plan.rate_seeds else "final"
        try:
            rounded = PlannedRun(stage, size, arm, float(named["lr"]), seed)
        except ValueError:
            return None
        exact = (dataclasses.replace(rounded, lr=lr) for lr in self.learning_rates(size, arm))
        return next((planned for planned in exact if planned.name == name), rounded)


def write_manifest(plan: Plan, folder: Path, amendment: dict[str, Any] | None = None) -> None:
    """Write the manifest of a plan to its folder.

    Args:
        amendment: what it adds to the plan that the folder has.
    """
    content = _factor_out_shared(plan.content)
    cost = {
        size: {
            name: {
                "tokens": arm.batch.tokens,
                "flops_per_token": arm.flops_per_token,
                "ffn_parameters": arm.width.parameters,
                "saved_bytes_per_token": arm.saved_bytes_per_token,
                "mismatch": arm.width.mismatch,
            }
            for name, arm in arms.items()
        }
        for size, arms in plan.arms.items()
    }
    earlier: list[Any] = []
    amendments: list[dict[str, Any]] = [] if amendment is None else [amendment]
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        before = read_object(folder / NAME, _LIMIT)
        earlier = list(before["provenance"])
        amendments = [*before["growth"]["amendments"], *amendments]
    with explain_os_errors("write to the folder of the plan", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / NAME) as file:
            written_hash, hashes = hashes_of(content)
            document = {"hash": written_hash, **content, "cost": cost, "hashes": hashes}
            if plan.begun_as:
                document["growth"] = _growth(plan, amendments)
            json.dump({**document, "provenance": [*earlier, provenance()]}, file, indent=1)
            file.write("\n")


def _growth(plan: Plan, amendments: list[dict[str, Any]]) -> dict[str, Any]:
    chosen: dict[str, dict[str, Any]] = {}
    for (size, arm), of_arm in plan.chosen.items():
        chosen.setdefault(size, {})[arm] = {"lr": of_arm.lr, "tried": list(of_arm.tried)}
    content = {"begun_as": plan.begun_as, "chosen": chosen, "amendments": amendments}
    return {**content, "hash": digest(content)}


def hashes_of(content: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return `hash` and `hashes` of a manifest whose `plan`, `shared` and `arms` are these."""
    return digest(merge_shared(content)), {name: digest(value, 4) for name, value in _leaves(content)}


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a plan's folder.

    Raises:
        UserError: it is missing or unreadable, or a value in it was changed; the message names the value.
    """
    path = folder / NAME
    try:
        document = read_object(path, _LIMIT)
        content = {part: document[part] for part in ("plan", "shared", "arms")}
        written_hash, cost, hashes = document["hash"], document["cost"], document["hashes"]
        plan_hash, actual = hashes_of(content)
        changed = sorted(name for name in actual.keys() | hashes.keys() if actual.get(name) != hashes.get(name))
        if changed:
            raise UserError(f"{path} was changed after the runs began: {', '.join(changed[:6])}")
        if plan_hash != written_hash:
            raise UserError(f"{path} was changed after the runs began: hash")
        manifest = Manifest(plan_hash, _plan_of(content["plan"]), content["shared"], content["arms"], cost)
        starts = [start for start in document.get("provenance") or [] if is_provenance(start)]
        manifest = dataclasses.replace(manifest, provenance=tuple(starts))
        if "growth" in document:
            manifest = _grown(manifest, document["growth"], path)
        _check_values(manifest)
        return manifest
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {NAME}: it is not a folder of `python -m ablation.run`") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the manifest of a plan: {type(error).__name__}: {error}") from error


def _grown(manifest: Manifest, growth: dict[str, Any], path: Path) -> Manifest:
    """Return a manifest with what its plan grew by.

    Raises:
        UserError: it was changed.
        ValueError, TypeError, LookupError, AttributeError: it is of another form.
    """
    content = {key: growth[key] for key in ("begun_as", "chosen", "amendments")}
    if digest(content) != growth["hash"]:
        raise UserError(f"{path} was changed after the runs began: growth")
    chosen = {}
    for size, arms in growth["chosen"].items():
        for arm, of_arm in arms.items():
            numbers = [of_arm["lr"], *of_arm["tried"]]
            if not all(is_number(number) and 0 < number < math.inf for number in numbers):
                raise ValueError(f"growth.chosen has no learning rate of {arm} at {size}")
            chosen[size, arm] = Chosen(of_arm["lr"], tuple(of_arm["tried"]))
    for amendment in growth["amendments"]:
        seen = [seeds for arms in amendment["seen"].values() for seeds, _ in arms.values()]
        counts = [*amendment["looks"], *seen]
        if not amendment["looks"] or not all(map(is_count, counts)) or not isinstance(amendment["added"], dict):
            raise ValueError("growth.amendments has no numbers of seeds")
        if not isinstance(amendment["date"], str):
            raise ValueError("growth.amendments has no date")
    begun_as = str(growth["begun_as"])
    return dataclasses.replace(manifest, begun_as=begun_as, chosen=chosen, amendments=tuple(growth["amendments"]))


def _plan_of(values: dict[str, Any]) -> AblationConfig:
    """Return the plan of a manifest.

    Raises:
        ValueError, TypeError: a value is of another type.
    """
    plan = plan_of_values(values)
    values = dataclasses.asdict(plan)
    for field in dataclasses.fields(AblationConfig):
        value, default = values[field.name], field.default
        if isinstance(default, (int, float)) and not is_number(value):
            raise ValueError(f"plan.{field.name} is no number")
        if isinstance(default, str) and not isinstance(value, str):
            raise ValueError(f"plan.{field.name} is no text")
    counts = (plan.rate_extensions, *plan.rate_seeds, *plan.seeds)
    if not plan.seeds or not plan.rate_seeds or not all(map(is_count, counts)):
        raise ValueError("plan.seeds or plan.rate_seeds are no seeds")
    if plan.rate_choice not in RATE_CHOICES:
        raise ValueError("plan.rate_choice is unknown")
    check_looks(plan)
    check_reported(plan.reported)
    metric_of(plan.metric)
    if not plan.horizons or not all(is_number(fraction) and 0 < fraction <= 1 for fraction in plan.horizons):
        raise ValueError("plan.horizons are no fractions")
    if plan.sweep_at is not None and plan.sweep_at not in sizes_of(plan):
        raise ValueError("plan.sweep_at is no size")
    if not plan.rates or not all(is_number(rate) and 0 < rate < math.inf for rate in plan.rates):
        raise ValueError("plan.rates are no learning rates")
    return plan


def _check_values(manifest: Manifest) -> None:
    """Check the values that status, report and dashboard compute with.

    Raises:
        ValueError: one of them cannot be.
    """
    places = {name for size in manifest.sizes for name in manifest.at_horizons(size).values()}
    if not places or places != manifest.arms.keys():
        raise ValueError("its sizes are others than its plan's")
    for size, arms in manifest.arms.items():
        if manifest.plan.baseline not in arms:
            raise ValueError(f"{size} has no baseline")
        for arm in arms:
            if not NAMES.fullmatch(size) or not NAMES.fullmatch(arm):
                raise ValueError(f"{size} and {arm} name no folder")
            learned, cost = manifest.learned(size, arm), manifest.cost[size][arm]
            counts = [learned["steps"], learned["model.d_ff"], *(cost[key] for key in _COUNTS)]
            if not all(is_count(count) and count for count in counts):
                raise ValueError(f"{arm} at {size} has impossible numbers of steps, tokens or parameters")
            rate, mismatch = learned["optim.lr"], cost["mismatch"]
            if not is_number(rate) or not 0 < rate < math.inf or not is_number(mismatch) or not math.isfinite(mismatch):
                raise ValueError(f"{arm} at {size} has an impossible learning rate or mismatch")


def keep_earlier_rules(config: AblationConfig, arguments: Sequence[str], folder: Path) -> AblationConfig:
    """Return a plan with the rules of its folder, if version 0.2 began it and no argument sets others."""

    def typed(*keys: str) -> bool:
        return any(argument.startswith(f"ablation.{key}=") for argument in arguments for key in keys)

    if not (folder / NAME).exists():
        return config
    existing = read_manifest(folder).plan
    if "rate_seed" in values_of_plan(existing) and not typed("rate_seeds", "rate_choice"):
        config = dataclasses.replace(config, rate_seeds=existing.rate_seeds, rate_choice=existing.rate_choice)
    for key in ("held_out_files", "init_match", "reserve"):
        if getattr(existing, key) == RULES_OF_0_2[key] and not typed(key):
            config = dataclasses.replace(config, **{key: RULES_OF_0_2[key]})
    return config


def _leaves(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every value of plan, shared and arms."""
    for part, tree in content.items():
        yield from ((f"{part}.{name}", value) for name, value in flatten(tree).items())


def _factor_out_shared(content: dict[str, Any]) -> dict[str, Any]:
    """Move the values that all arms of all sizes have in common to `shared`."""
    every = [values for arms in content["arms"].values() for values in arms.values()]
    shared = {k: v for k, v in every[0].items() if all(k in other and other[k] == v for other in every)}
    arms = {
        size: {arm: {k: v for k, v in values.items() if k not in shared} for arm, values in of_size.items()}
        for size, of_size in content["arms"].items()
    }
    return {"plan": content["plan"], "shared": shared, "arms": arms}


def merge_shared(content: dict[str, Any]) -> dict[str, Any]:
    """Undo `_factor_out_shared`."""
    arms = {
        size: {arm: content["shared"] | values for arm, values in of_size.items()}
        for size, of_size in content["arms"].items()
    }
    return {"plan": content["plan"], "arms": arms}
