"""What a plan is: its keys, its runs, and their overrides. `resolve.py` makes one from its keys.

For every arm and size, a sweep tries learning rates with seeds that no verdict uses (stage `sweep`); then the plan's seeds run
at the best one (stage `final`). The cost is arms x (rates x sweep seeds + seeds). Runs of one seed share the order of
their data and the initial weights outside the FFN, whatever the arm: both depend on `seed` and `data_seed` alone.

A plan is `conf/ablation/<name>.yaml`, with the keys of `conf/ablation_schema.py`. run.py trains it. A plan that has run may
grow (growth.py): arms, sizes, rates and seeds can be added.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ablation.budget import Width
from ablation.looks import Looks
from conf.ablation_schema import AblationConfig
from conf.group import read_group
from conf.identity import what_is_learned
from conf.overrides import quoted
from conf.schema import Config
from conf.validate import Batch
from kernels.common.json_files import digest
from kernels.common.text import listed

NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
LONGEST_TAG = 64  # characters that W&B accepts
RATE_CHOICES = ("vertex", "best")
# What plans did before they had these keys.
RULES_OF_0_2: dict[str, Any] = {
    "held_out_files": 0, "init_match": "rms", "reserve": 0.0, "looks": None, "until": "complete", "spending": "obrien_fleming",
    "horizons": [1.0], "sweep_at": None, "reported": None,
}  # fmt: skip
SIZES = {"nano": "model=nano"}  # of a plan that names none


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a plan."""

    stage: str  # "sweep" or "final"
    size: str
    arm: str
    lr: float  # peak learning rate
    seed: int

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"{self.size}-{self.arm}-lr{self.lr:.4g}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class ResolvedArm:
    """An arm at one size, resolved."""

    overrides: tuple[str, ...]  # for train.py, without learning rate and seed
    config: Config
    batch: Batch
    width: Width
    flops_per_token: int
    saved_bytes_per_token: int  # that its feed-forward layers keep for backward

    @property
    def flops(self) -> int:
        """FLOPs per run."""
        return self.flops_per_token * self.batch.tokens

    @property
    def learned(self) -> dict[str, Any]:
        """The values that decide what its runs learn, by dotted key, except seeds. `optim.lr` is the unit of `rates`."""
        values = what_is_learned(self.config) | {"model.d_ff": self.width.d_ff, "steps": self.batch.steps}
        return {name: value for name, value in values.items() if name not in ("seed", "data_seed")}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The learning rate at which seeds of an arm ran before its sweep grew. They are not trained again at another."""

    lr: float
    tried: tuple[float, ...]  # by the sweep then


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan, resolved."""

    config: AblationConfig
    arms: dict[str, dict[str, ResolvedArm]]  # by size (at each horizon), then by arm
    warnings: tuple[str, ...]
    begun_as: str = ""  # hash of the plan with which its folder began, if it has grown since
    chosen: Mapping[tuple[str, str], Chosen] = dataclasses.field(default_factory=dict)  # by size and arm

    @property
    def sizes(self) -> list[str]:
        """Its sizes, in its order, without those at shorter horizons."""
        return sizes_of(self.config)

    @property
    def content(self) -> dict[str, Any]:
        """Everything that decides what the runs learn and how they are judged, as JSON would return it."""
        learned = {size: {name: arm.learned for name, arm in arms.items()} for size, arms in self.arms.items()}
        return json.loads(json.dumps({"plan": values_of_plan(self.config), "arms": learned}))

    @property
    def hash(self) -> str:
        """The hash of `content`."""
        return digest(self.content)

    def learning_rates(self, size: str, arm: str) -> list[float]:
        """Return the learning rates that the sweep starts with, ascending."""
        return learning_rates(self.config, self.arms[size][arm].config.optim.lr)

    def sweep_runs(self, size: str, arm: str) -> list[PlannedRun]:
        """Return the runs that the sweep of an arm starts with; none if the plan has a single learning rate.

        Once its learning rate is chosen, these are all of its runs: no sweep extends then.
        """
        rates = self.learning_rates(size, arm)
        if len(rates) < 2 or swept_at(self.config, size) != size:
            return []
        if (size, arm) in self.chosen:
            rates = sorted({*rates, *self.chosen[size, arm].tried})
        return [PlannedRun("sweep", size, arm, lr, seed) for seed in self.config.rate_seeds for lr in rates]

    def final_runs(self, size: str, arm: str, lr: float) -> list[PlannedRun]:
        """Return the runs of an arm that are compared, at the learning rate that the sweep chose."""
        return [PlannedRun("final", size, arm, lr, seed) for seed in self.config.seeds]

    def overrides(self, planned: PlannedRun, runs: str) -> list[str]:
        """Return the overrides that make train.py train a run, in the folder `runs`."""
        arm = self.arms[planned.size][planned.arm]
        tags = [*arm.config.logger.tags, *tags_of(self.begun_as or self.hash, planned.size, planned.stage)]
        return [
            *arm.overrides,
            f"++model.d_ff={arm.width.d_ff}",  # ++: with a d_ff_gated or logger=none of the plan's, no error
            f"optim.lr={planned.lr!r}",
            f"seed={planned.seed}",
            f"data_seed={planned.seed}",
            f"runs={runs}",
            f"run={planned.name}",
            f"++logger.group={quoted(self.config.name)}",
            f"++logger.job_type={quoted(planned.arm)}",
            f"++logger.tags=[{','.join(map(quoted, tags))}]",
        ]

    def count_runs(self) -> int:
        """Return the number of runs, if no sweep extends past an edge."""
        return sum(self._runs_of(*pair) for pair in self.size_arm_pairs())

    def flops(self) -> int:
        """Return the FLOPs of these runs."""
        return sum(self.arms[size][arm].flops * self._runs_of(size, arm) for size, arm in self.size_arm_pairs())

    def transferred(self, size: str, arm: str, lr: float) -> float:
        """Return the learning rate of a size whose sweep ran at another, where it chose `lr`."""
        return transferred(
            lr, *(self.arms[place][arm].config.optim.lr for place in (swept_at(self.config, size), size))
        )

    def _runs_of(self, size: str, arm: str) -> int:
        return len(self.sweep_runs(size, arm)) + len(self.config.seeds)

    def size_arm_pairs(self, horizons: bool = True) -> Iterator[tuple[str, str]]:
        """Yield every (size, arm), at all horizons or at the full length alone."""
        for size in self.arms if horizons else self.sizes:
            for arm in self.arms[size]:
                yield size, arm


def sizes_of(config: AblationConfig) -> list[str]:
    """Return the sizes of a plan, in its order."""
    return list(map(str, config.sizes or SIZES))


def tags_of(plan_hash: str, size: str, stage: str) -> list[str]:
    """Return the W&B tags of a run: its plan, size and stage."""
    return [_tag(f"plan:{plan_hash}"), _tag(f"size:{size}"), _tag(f"stage:{stage}")]


def _tag(text: str) -> str:
    return text if len(text) <= LONGEST_TAG else f"{text[: LONGEST_TAG - 9]}:{digest(text, 4)}"


def learning_rates(config: AblationConfig, lr: float) -> list[float]:
    """Return the learning rates that a sweep starts with, ascending, for an arm whose configured one is `lr`."""
    return [_rounded(lr * factor) for factor in sorted(config.rates)]


def counts_of_looks(config: AblationConfig) -> tuple[int, ...]:
    """Return the numbers of seeds after which verdicts of a plan are made, ascending."""
    if config.looks is not None:
        return tuple(config.looks)
    first = len(config.seeds)
    return tuple(range(first, 2 * first + 1)) if config.until == "decided" else (first,)


def planned_looks(config: AblationConfig) -> Looks:
    """Return when the verdicts of a plan are made, as long as it does not grow."""
    counts = counts_of_looks(config)
    return Looks(tuple(possible_seeds(config)), counts, counts[-1], config.reserve, config.spending)


def possible_seeds(config: AblationConfig) -> list[int]:
    """Return the seeds that may be compared: those of a plan, then those that `until=decided` may add."""
    seeds = list(config.seeds)
    if config.until == "decided":
        free = (seed for seed in itertools.count(max(seeds) + 1) if seed not in config.rate_seeds)
        seeds += itertools.islice(free, max(0, counts_of_looks(config)[-1] - len(seeds)))
    return seeds


def transferred(lr: float, there: float, here: float) -> float:
    """Return the learning rate chosen where the configured one is `there`, for a size where it is `here`."""
    return _rounded(lr * here / there, 4)


def seeds_text(seeds: Sequence[int]) -> str:
    """Return seeds as text: "seed 0", "seeds 0, 1 and 2"."""
    return f"seed{'s' if len(seeds) > 1 else ''} {listed(seeds)}"


def values_of_plan(config: AblationConfig) -> dict[str, Any]:
    """Return the keys of a plan as its manifest has them.

    Up to version 0.2 every sweep had one seed, the best of its learning rates was chosen, a fraction of the documents was held
    out, arms began with one root mean square, and verdicts were made once, with the whole error probability. Plans like these
    are written as they were, so that their hash is the same.
    """
    values = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key not in RULES_OF_0_2 or value != RULES_OF_0_2[key]
    }
    if config.rate_choice == "best" and len(config.rate_seeds) == 1:
        del values["rate_choice"]
        values["rate_seed"] = values.pop("rate_seeds")[0]
    return values


def plan_of_values(values: Mapping[str, Any]) -> AblationConfig:
    """Undo `values_of_plan`.

    Raises:
        TypeError: there are other keys.
    """
    values = RULES_OF_0_2 | dict(values)
    if "rate_seed" in values:
        values |= {"rate_seeds": [values.pop("rate_seed")], "rate_choice": "best"}
    return AblationConfig(**values)


def read_plan(arguments: list[str]) -> tuple[AblationConfig, list[str]]:
    """Read `ablation=NAME ablation.KEY=VALUE` from a command line; return the plan, and the other overrides.

    The caller removes its own options (`yes=true`) before.

    Raises:
        UserError: no plan is named or it is unknown, an unknown key, or a value of the wrong type.
    """
    return read_group("ablation", AblationConfig, arguments, "plan")


def swept_at(config: AblationConfig, size: str) -> str:
    """Return the size, at the same horizon, whose sweep chooses the learning rates of a size."""
    if config.sweep_at is None:
        return size
    fractions = (f for f in config.horizons if size in [at_horizon(each, f) for each in sizes_of(config)])
    return at_horizon(config.sweep_at, next(fractions))


def at_horizon(size: str, fraction: float) -> str:
    """Return the name of a size whose runs see a fraction of its tokens."""
    return size if fraction == 1 else f"{size}_x{fraction:g}"


def _rounded(lr: float, digits: int = 6) -> float:
    """Round a learning rate, so that its name and its value agree."""
    return float(f"{lr:.{digits}g}")
