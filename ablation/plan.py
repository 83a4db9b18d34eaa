"""Read a plan and resolve it: which runs answer its question, at which widths, and what they cost.

For every arm and size, a sweep tries learning rates with seeds that no verdict uses (stage `sweep`); then the plan's seeds run
at the best one (stage `final`). The cost is arms x (rates x sweep seeds + seeds). Runs of one seed share the order of
their data and the initial weights outside the FFN, whatever the arm: both depend on `seed` and `data_seed` alone.

A plan is `conf/ablation/<name>.yaml`, with the keys of `conf.schema.AblationConfig`. run.py trains it. A plan that has run may
grow (growth.py): arms, sizes, rates and seeds can be added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ablation.budget import Width, match
from ablation.looks import SPENDINGS
from ablation.metrics import metric_of, refuse_unfit
from conf.arms import unknown_arm
from conf.keys import choices
from conf.load import load, read_group, to_dict
from conf.overrides import quoted
from conf.schema import AblationConfig, Config
from conf.validate import Batch, digest, holds_text_out, validate, what_is_learned
from kernels.common.errors import UserError, suggest, unknown
from kernels.common.text import listed
from launch.estimate.counts import check_divisibility, ffn_saved_bytes, flops_per_token, shape_of

StepSeconds = Callable[[str, str, int], float]  # seconds per step of (size, arm, d_ff)

NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
LONGEST_TAG = 64  # characters that W&B accepts
RATE_CHOICES = ("vertex", "best")
# What plans did before they had these keys.
RULES_OF_0_2: dict[str, Any] = {
    "held_out_files": 0, "init_match": "rms", "reserve": 0.0, "looks": None, "until": "complete", "spending": "obrien_fleming",
    "horizons": [1.0], "sweep_at": None, "reported": None,
}  # fmt: skip
SIZES = {"nano": "model=nano"}  # of a plan that names none
UNTIL = ("complete", "decided")
_SET_BY_THE_PLAN = ("seed", "data_seed", "run", "runs", "resume")


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


# ------------------------------------------------------------------------------------------------------------ resolving


def resolve(config: AblationConfig, overrides: Sequence[str] = (), seconds: StepSeconds | None = None) -> Plan:
    """Check a plan and match its widths.

    Args:
        overrides: of every run, after the plan's own.
        seconds: measured seconds per step of (size, arm, d_ff), for `budget=wallclock`.

    Raises:
        UserError: the plan is invalid; the message names the key.
    """
    config = dataclasses.replace(config, common=[*config.common, *overrides])
    arms = _named(config.arms, "arms")
    sizes = {size: _split(text, f"sizes.{size}") for size, text in _named(config.sizes or SIZES, "sizes").items()}
    _check(config, arms)
    check_reported(config.reported)
    arm_overrides = {arm: _overrides_of_arm(text, arm, config.common) for arm, text in arms.items()}
    resolved: dict[str, dict[str, ResolvedArm]] = {}
    warnings: list[str] = []
    for size, size_overrides in sizes.items():
        of_arms = {arm: (*size_overrides, *own, *config.common) for arm, own in arm_overrides.items()}
        of_arms = {arm: (*_rules_of_plan(config, of_arm), *of_arm) for arm, of_arm in of_arms.items()}
        whole, size_warnings = _resolve_size(config, size, of_arms, seconds)
        for fraction in sorted(config.horizons):
            name = at_horizon(size, fraction)
            resolved[name] = whole if fraction == 1 else {arm: _shortened(of, fraction) for arm, of in whole.items()}
        warnings += [f"{size}: {warning}" for warning in size_warnings]
    _refuse_duplicates("the sizes", {size: resolved[size][config.baseline].config for size in sizes})
    return Plan(config, resolved, tuple(warnings))


def swept_at(config: AblationConfig, size: str) -> str:
    """Return the size, at the same horizon, whose sweep chooses the learning rates of a size."""
    if config.sweep_at is None:
        return size
    fractions = (f for f in config.horizons if size in [at_horizon(each, f) for each in sizes_of(config)])
    return at_horizon(config.sweep_at, next(fractions))


def at_horizon(size: str, fraction: float) -> str:
    """Return the name of a size whose runs see a fraction of its tokens."""
    return size if fraction == 1 else f"{size}_x{fraction:g}"


def _shortened(arm: ResolvedArm, fraction: float) -> ResolvedArm:
    """Return an arm whose runs see a fraction of the tokens, rounded to whole steps, with a schedule of their own."""
    steps = max(1, round(fraction * arm.batch.steps))
    batch = dataclasses.replace(arm.batch, steps=steps)
    key = "tokens" if any(_key(override) == "tokens" for override in arm.overrides) else "steps"
    overrides = (*arm.overrides, f"++{key}={getattr(batch, key)}")
    return dataclasses.replace(arm, overrides=overrides, config=load(list(overrides)), batch=batch)


def _resolve_size(
    config: AblationConfig, size: str, overrides: Mapping[str, tuple[str, ...]], seconds: StepSeconds | None
) -> tuple[dict[str, ResolvedArm], list[str]]:
    """Return the arms of a size, and warnings about their widths."""
    configs = {arm: _load(of_arm, arm, size) for arm, of_arm in overrides.items()}
    _refuse_duplicates(f"{size}: the arms", configs)
    batches = {arm: validate(c, c.parallel.tensor * c.parallel.context) for arm, c in configs.items()}
    base = configs[config.baseline]
    with _errors_prefixed(size):
        widths, warnings = match(
            configs,
            config.baseline,
            config.budget,
            tensor=base.parallel.tensor,
            tile=config.tile,
            tokens=batches[config.baseline].micro_batch * base.sequence_length,
            seconds=None if seconds is None else lambda arm, d_ff: seconds(size, arm, d_ff),
            allowed=config.allowed_mismatch,
        )
    arms = {}
    for arm, of_arm in configs.items():
        shape = shape_of(dataclasses.replace(of_arm, model=dataclasses.replace(of_arm.model, d_ff=widths[arm].d_ff)))
        with _errors_prefixed(f"{arm} at {size}"):
            check_divisibility(shape, of_arm.parallel)
        flops = sum(flops_per_token(shape, of_arm.sequence_length).values())
        saved = sum(map(ffn_saved_bytes, shape.ffn))
        arms[arm] = ResolvedArm(overrides[arm], of_arm, batches[arm], widths[arm], flops, saved)
    return arms, warnings


def _named(value: Any, key: str) -> dict[str, str | list[str]]:
    """Return {name: overrides}. A list of arms of conf/ffn stands for {name: ffn=name}."""
    if key == "arms":
        _refuse_unlisted(key, value)
    if isinstance(value, list) and key == "arms":
        duplicates = {name for name in value if value.count(name) > 1}
        if duplicates:
            raise UserError(f"ablation.arms lists {', '.join(sorted(map(str, duplicates)))} twice")
        value = {name: f"ffn={name}" for name in value}
        for name in value:
            if name not in choices("ffn"):
                raise unknown_arm(
                    str(name), f"ablation.arms={{mine: \"ffn=custom ffn.formula='{name}'\", relu: ffn=relu}}"
                )
    if not isinstance(value, dict) or not value:
        example = "mine: ffn=relu" if key == "arms" else "small: model=nano"
        raise UserError(f"ablation.{key} must map names to overrides, such as {{{example}}}")
    for name in value:
        if not NAMES.fullmatch(str(name)):
            raise UserError(
                f"ablation.{key}: {name!r} must consist of letters, digits, _ and ., since it names a folder"
            )
    return {str(name): overrides for name, overrides in value.items()}


def _split(overrides: Any, key: str) -> tuple[str, ...]:
    if isinstance(overrides, str):
        try:
            overrides = shlex.split(overrides)
        except ValueError as error:
            raise UserError(f"ablation.{key}: {overrides!r} is not a list of overrides: {error}") from error
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise UserError(f"ablation.{key} must be overrides, written as for train.py")
    return tuple(overrides)


def _overrides_of_arm(text: Any, arm: str, common: Sequence[str]) -> tuple[str, ...]:
    if isinstance(text, str) and not re.match(r"\+*[\w.]+=(?!=)", text.strip()):  # the name of an arm, or a formula
        if text not in choices("ffn"):
            raise unknown_arm(text, f"ablation.arms={{{arm}: \"ffn=custom ffn.formula='{text}'\"}}")
        text = f"ffn={text}"
    overrides = _split(text, f"arms.{arm}")
    common_keys = {_key(override): override for override in common}
    for override in overrides:
        if override.startswith("model.d_ff"):
            raise UserError(
                f"{override} of {arm}: the budget decides the widths of the arms; a size may set the baseline's"
            )
        if _key(override) in common_keys:
            raise UserError(
                f"{common_keys[_key(override)]} of every run would replace {override} of {arm}: change ablation.arms"
            )
    return overrides


def _rules_of_plan(config: AblationConfig, overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides that follow from the plan's own keys, where none of `overrides` decides the same."""
    typed, rules = {_key(override) for override in overrides}, []
    if config.held_out_files and not typed & {"data.held_out", "data.held_out_files"}:
        rules.append(f"data.held_out_files={config.held_out_files}")
    if config.init_match != "std" and not typed & {"ffn.init_scale", "ffn.init_match"}:
        rules.append(f"ffn.init_match={config.init_match}")
    return tuple(rules)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _refuse_duplicates(what: str, configs: Mapping[str, Config]) -> None:
    """Refuse two names for the same configuration: their comparison would be empty."""
    names: dict[str, str] = {}
    for name, config in configs.items():
        first = names.setdefault(digest(to_dict(config)), name)
        if first != name:
            raise UserError(f"{what} {first} and {name} are identical")


def _load(overrides: tuple[str, ...], arm: str, size: str) -> Config:
    for override in overrides:
        if _key(override) in _SET_BY_THE_PLAN:
            raise UserError(f"{override} of {arm} at {size} is set by the plan: use ablation.seeds, and folder=FOLDER")
    with _errors_prefixed(f"{arm} at {size}"):
        config = load(list(overrides))
        if not holds_text_out(config.data):
            raise UserError("data.held_out=0 leaves no held-out text, by whose loss arms are compared: set it above 0")
        return config


@contextlib.contextmanager
def _errors_prefixed(what: str) -> Iterator[None]:
    """Prefix the message of a UserError with what it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _check(config: AblationConfig, arms: Mapping[str, Any]) -> None:
    if not config.baseline:
        raise UserError(f"the plan {config.name} has no baseline: ablation.baseline=ARM, one of {', '.join(arms)}")
    if config.baseline not in arms:
        hint = suggest(config.baseline, arms)
        raise UserError(
            f"the baseline {config.baseline!r} is not an arm of the plan: {hint}the arms are {', '.join(arms)}"
        )
    if len(arms) < 2:
        raise UserError("a plan compares at least two arms: ablation.arms=[relu,swiglu]")
    if isinstance(config.seeds, int):
        listed = ",".join(map(str, range(max(2, min(config.seeds, 9)))))
        raise UserError(f"ablation.seeds={config.seeds} is one number: list the seeds, as ablation.seeds=[{listed}]")
    _refuse_unlisted("seeds", config.seeds)
    _refuse_unlisted("rates", config.rates)
    if not _whole_numbers(config.seeds) or len(set(config.seeds)) != len(config.seeds):
        raise UserError(f"ablation.seeds={config.seeds} must be distinct whole numbers")
    if len(config.seeds) < 2:
        raise UserError("one seed cannot be told from luck: ablation.seeds needs at least 2, and a verdict 3")
    _refuse_unlisted("rate_seeds", config.rate_seeds)
    if not _whole_numbers(config.rate_seeds) or len(set(config.rate_seeds)) != len(config.rate_seeds):
        raise UserError(f"ablation.rate_seeds={config.rate_seeds} must be distinct whole numbers")
    if not config.rate_seeds:
        raise UserError(
            "ablation.rate_seeds is empty: a sweep needs at least one seed, and two show how far it scatters"
        )
    if shared := set(config.rate_seeds) & set(config.seeds):
        raise UserError(f"ablation.rate_seeds and ablation.seeds share {min(shared)}: the sweep needs seeds of its own")
    _refuse_unlisted("horizons", config.horizons)
    horizons = config.horizons
    if not isinstance(horizons, list) or not all(map(_is_factor, horizons)) or len(set(horizons)) < len(horizons):
        raise UserError(f"ablation.horizons={horizons} must be distinct fractions of the tokens")
    if not horizons or max(horizons) != 1:
        raise UserError(f"ablation.horizons={horizons} must end with 1, the tokens of the plan's sizes")
    if config.sweep_at is not None and config.sweep_at not in sizes_of(config):
        raise unknown("ablation.sweep_at", config.sweep_at, sizes_of(config))
    if config.rate_choice not in RATE_CHOICES:
        raise unknown("ablation.rate_choice", config.rate_choice, RATE_CHOICES)
    rates = config.rates
    if not isinstance(rates, list) or not rates or not all(map(_is_factor, rates)) or len(set(rates)) < len(rates):
        raise UserError(f"ablation.rates={rates} must be distinct numbers above 0, factors of the size's optim.lr")
    refuse_unfit(metric_of(config.metric), config.smallest_effect)
    check_looks(config)
    if config.init_match not in ("std", "rms"):
        raise unknown("ablation.init_match", config.init_match, ("std", "rms"))
    if config.held_out_files < 0:
        raise UserError(f"ablation.held_out_files={config.held_out_files} must be a number of documents, from 0 on")


def check_looks(config: AblationConfig) -> None:
    """Check when the verdicts of a plan are made.

    Raises:
        UserError: it is impossible; the message names the key.
    """
    looks = config.looks
    if looks is not None:
        _refuse_unlisted("looks", looks)
        if not _whole_numbers(looks) or not looks or sorted(set(looks)) != looks or looks[0] < 2:
            raise UserError(f"ablation.looks={looks} must be numbers of seeds, ascending, from 2 on")
        if config.until == "complete" and looks[0] > len(config.seeds):
            raise UserError(
                f"ablation.looks={looks} begins after {looks[0]} seeds, and the plan has {len(config.seeds)}: no verdict would "
                "be made"
            )
    if config.until not in UNTIL:
        raise unknown("ablation.until", config.until, UNTIL)
    if config.spending not in SPENDINGS:
        raise unknown("ablation.spending", config.spending, SPENDINGS)
    if not 0 <= config.reserve < 1:
        raise UserError(f"ablation.reserve={config.reserve} must be a fraction, from 0 to below 1")


def check_reported(reported: Any) -> None:
    """Check what a plan says that others found.

    Raises:
        UserError: it is of another form.
    """
    if reported is None:
        return
    form = "{source: ..., unit: ..., values: {arm: number}, note: ...}"
    texts = ("source", "unit", "note")
    if not isinstance(reported, dict) or not reported.keys() <= {*texts, "values"} or not reported.get("source"):
        raise UserError(f"ablation.reported must be {form}, with a source")
    values = reported.get("values") or {}
    if not isinstance(values, dict) or not all(
        isinstance(v, (int, float)) and math.isfinite(v) for v in values.values()
    ):
        raise UserError(f"ablation.reported must be {form}, and its values numbers")
    if not all(isinstance(reported.get(key, ""), str) for key in texts):
        raise UserError(f"ablation.reported must be {form}, and {', '.join(texts)} texts")


def _refuse_unlisted(key: str, value: Any) -> None:
    if isinstance(value, (str, int, float)):
        raise UserError(f"ablation.{key}={value} is no list: write ablation.{key}=[{value}]")


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def _is_factor(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _rounded(lr: float, digits: int = 6) -> float:
    """Round a learning rate, so that its name and its value agree."""
    return float(f"{lr:.{digits}g}")
