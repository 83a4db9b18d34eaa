"""`manifest.json`: what the runs of a folder are. Written before the first run starts; runs that do not match are refused.

    hash       of everything below except `cost`, `hashes` and `provenance`
    plan       the keys of the plan
    shared     the values that decide what a run learns and that all runs share
    arms       by size and arm: the values that differ, and `steps`
    cost       by size and arm: the cost of a run, for readers
    hashes     of each single value, to name the one that was changed
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

from ablation.plan import (
    NAMES,
    RATE_CHOICES,
    RULES_OF_0_2,
    Plan,
    PlannedRun,
    learning_rates,
    plan_of_values,
    values_of_plan,
)
from conf.load import flatten
from conf.provenance import provenance
from conf.schema import AblationConfig
from conf.validate import digest
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, explain_os_errors
from kernels.common.json_files import is_count, is_number, read_object

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


def write_manifest(plan: Plan, folder: Path) -> None:
    """Write the manifest of a plan to its folder."""
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
    earlier = []
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        earlier = list(json.loads((folder / NAME).read_text(encoding="utf-8"))["provenance"])
    with explain_os_errors("write to the folder of the plan", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / NAME) as file:
            written_hash, hashes = hashes_of(content)
            document = {"hash": written_hash, **content, "cost": cost, "hashes": hashes}
            json.dump({**document, "provenance": [*earlier, provenance()]}, file, indent=1)
            file.write("\n")


def hashes_of(content: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return `hash` and `hashes` of a manifest whose `plan`, `shared` and `arms` are these."""
    return digest(_merge_shared(content)), {name: digest(value, 4) for name, value in _leaves(content)}


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
        _check_values(manifest)
        return manifest
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {NAME}: it is not a folder of `python -m ablation.run`") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the manifest of a plan: {type(error).__name__}: {error}") from error


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
    if not plan.rates or not all(is_number(rate) and 0 < rate < math.inf for rate in plan.rates):
        raise ValueError("plan.rates are no learning rates")
    return plan


def _check_values(manifest: Manifest) -> None:
    """Check the values that status, report and dashboard compute with.

    Raises:
        ValueError: one of them cannot be.
    """
    if not manifest.arms:
        raise ValueError("there are no sizes")
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
    for key, value in RULES_OF_0_2.items():
        if getattr(existing, key) == value and not typed(key):
            config = dataclasses.replace(config, **{key: value})
    return config


def check_manifest(plan: Plan, folder: Path) -> None:
    """Refuse a folder that holds the runs of another plan.

    Raises:
        UserError: the plans differ; the message names where.
    """
    if not (folder / NAME).exists():
        return
    existing = read_manifest(folder)
    if existing.hash != plan.hash:
        before = _merge_shared(
            {"plan": values_of_plan(existing.plan), "shared": existing.shared, "arms": existing.arms}
        )
        one, other = (dict(_leaves(content)) for content in (before, plan.content))
        changed = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        if changed == ["plan.question"]:  # which decides nothing
            return
        raise UserError(
            f"{folder} holds the runs of another plan (it differs in {', '.join(changed[:6])}): "
            "choose another folder, folder=FOLDER"
        )


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


def _merge_shared(content: dict[str, Any]) -> dict[str, Any]:
    """Undo `_factor_out_shared`."""
    arms = {
        size: {arm: content["shared"] | values for arm, values in of_size.items()}
        for size, of_size in content["arms"].items()
    }
    return {"plan": content["plan"], "arms": arms}
