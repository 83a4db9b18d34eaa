"""`manifest.json`: what the runs of a folder are, written before the first of them begins, and refused when it does not fit.

    hash       of all that follows but `cost` and `hashes`
    plan       the keys of the plan
    shared     the values that decide what a run learns and that all runs have in common
    arms       by size and arm: the values that differ; beside them `steps`
    cost       by size and arm: what a run costs, for people to read
    hashes     of each single value, so that one that was changed can be named

A run adds its own learning rate and seeds, which its folder's name says.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ablation.plan import Plan, PlannedRun, rates_of
from conf.load import flatten
from conf.schema import AblationConfig
from conf.validate import digest
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, say_why

NAME = "manifest.json"
_RUN = re.compile(r"(?P<size>[^-]+)-(?P<arm>[^-]+)-lr(?P<rate>[0-9.e+-]+)-seed(?P<seed>[0-9]+)")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A manifest, read and checked."""

    hash: str
    plan: AblationConfig
    shared: dict[str, Any]
    arms: dict[str, dict[str, dict[str, Any]]]  # by size and arm: what differs
    cost: dict[str, dict[str, dict[str, Any]]]

    def learned(self, size: str, arm: str) -> dict[str, Any]:
        """Return `plan.Arm.learned`."""
        return self.shared | self.arms[size][arm]

    def rates(self, size: str, arm: str) -> list[float]:
        """Return `plan.Plan.rates`."""
        return rates_of(self.plan, self.learned(size, arm)["optim.lr"])

    def planned_run(self, name: str) -> PlannedRun | None:
        """Return which run a folder's name says it is, None if it names no arm; a rate of no plan has the name's digits."""
        named = _RUN.fullmatch(name)
        if not named or named["arm"] not in self.arms.get(named["size"], {}):
            return None
        size, arm, seed = named["size"], named["arm"], int(named["seed"])
        stage = "sweep" if seed == self.plan.rate_seed else "final"
        try:
            told = PlannedRun(stage, size, arm, float(named["rate"]), seed)
        except ValueError:
            return None
        exact = (dataclasses.replace(told, rate=rate) for rate in self.rates(size, arm))
        return next((planned for planned in exact if planned.name == name), told)


def write_manifest(plan: Plan, folder: Path) -> None:
    """Write what the runs of this folder are."""
    content = _factored(plan.content)
    cost = {
        size: {
            arm: {
                "tokens": a.batch.tokens,
                "flops_per_token": a.flops_per_token,
                "ffn_parameters": a.width.parameters,
                "saved_bytes_per_token": a.saved_bytes_per_token,
                "mismatch": a.width.mismatch,
            }
            for arm, a in arms.items()
        }
        for size, arms in plan.arms.items()
    }
    with say_why("write to the folder of the plan", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / NAME) as file:
            hashes = {name: digest(value, 4) for name, value in _leaves(content)}
            json.dump({"hash": plan.hash, **content, "cost": cost, "hashes": hashes}, file, indent=1)
            file.write("\n")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a plan's folder.

    Raises:
        UserError: there is none, it cannot be read, or a value in it was changed; the value is named.
    """
    path = folder / NAME
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        content = {part: written[part] for part in ("plan", "shared", "arms")}
        told, cost, hashes = written["hash"], written["cost"], written["hashes"]
        found = {name: digest(value, 4) for name, value in _leaves(content)}
        changed = sorted(name for name in found.keys() | hashes.keys() if found.get(name) != hashes.get(name))
        if changed:
            raise UserError(f"{path} was changed after the runs began: {', '.join(changed[:6])}")
        if digest(_merged(content)) != told:
            raise UserError(f"{path} was changed after the runs began: hash")
        return Manifest(told, AblationConfig(**content["plan"]), content["shared"], content["arms"], cost)
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {NAME}: it is no folder of `python -m ablation.run`") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no manifest of a plan: {type(error).__name__}: {error}") from error


def check_manifest(plan: Plan, folder: Path) -> None:
    """Refuse a folder that holds another plan's runs.

    Raises:
        UserError: what differs.
    """
    if not (folder / NAME).exists():
        return
    there = read_manifest(folder)
    if there.hash != plan.hash:
        before = _merged({"plan": dataclasses.asdict(there.plan), "shared": there.shared, "arms": there.arms})
        one, other = (dict(_leaves(content)) for content in (before, plan.content))
        changed = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        raise UserError(
            f"{folder} holds the runs of another plan (it differs in {', '.join(changed[:6])}): "
            "choose another one, folder=FOLDER"
        )


def _leaves(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every value of plan, shared and arms."""
    for part, tree in content.items():
        yield from ((f"{part}.{name}", value) for name, value in flatten(tree).items())


def _factored(content: dict[str, Any]) -> dict[str, Any]:
    """Take what all arms of all sizes have in common out of them."""
    every = [values for arms in content["arms"].values() for values in arms.values()]
    shared = {k: v for k, v in every[0].items() if all(k in other and other[k] == v for other in every)}
    arms = {
        size: {arm: {k: v for k, v in values.items() if k not in shared} for arm, values in of_size.items()}
        for size, of_size in content["arms"].items()
    }
    return {"plan": content["plan"], "shared": shared, "arms": arms}


def _merged(content: dict[str, Any]) -> dict[str, Any]:
    """Undo `_factored`."""
    arms = {
        size: {arm: content["shared"] | values for arm, values in of_size.items()}
        for size, of_size in content["arms"].items()
    }
    return {"plan": content["plan"], "arms": arms}
