"""A plan, read and resolved: which runs answer its question, at which widths, and what they cost.

Of every arm and size, learning rates are tried with a seed that no verdict rests on (`sweep`); then the plan's seeds run at the
best rate (`final`). So the cost is arms x (rates + seeds), not their product. Runs of one seed share the order of their data
and the initial weights outside the FFN, whatever the arm: both follow from `seed` and `data_seed` alone.

A plan is `conf/ablation/<name>.yaml`, keys of `conf.schema.AblationConfig`. What is not here: running it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ablation.budget import Width, match
from conf.keys import choices
from conf.load import load, quoted, read_group, to_dict
from conf.schema import AblationConfig, Config
from conf.validate import Batch, digest, validate, what_is_learned
from kernels.common.errors import UserError, suggest, unknown
from launch.estimate.counts import check_divisibility, ffn_saved_bytes, flops_per_token, shape_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
LONGEST_TAG = 64  # characters that W&B takes
_SET_BY_THE_PLAN = ("seed", "data_seed", "run", "runs", "resume")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a plan."""

    stage: str  # "sweep" or "final"
    size: str
    arm: str
    rate: float  # peak learning rate
    seed: int

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"{self.size}-{self.arm}-lr{self.rate:.4g}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm at a size, resolved."""

    words: tuple[str, ...]  # for train.py, without rate and seed
    config: Config
    batch: Batch
    width: Width
    flops_per_token: int
    saved_bytes_per_token: int  # that its feed-forward layers keep for backward

    @property
    def flops(self) -> int:
        """Of one run."""
        return self.flops_per_token * self.batch.tokens

    @property
    def learned(self) -> dict[str, Any]:
        """What decides what its runs learn, by dotted key, but for the seeds; `optim.lr` is what the rates are times of."""
        values = what_is_learned(self.config) | {"model.d_ff": self.width.d_ff, "steps": self.batch.steps}
        return {name: value for name, value in values.items() if name not in ("seed", "data_seed")}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan, resolved."""

    config: AblationConfig
    arms: dict[str, dict[str, Arm]]  # by size, then by arm
    warnings: tuple[str, ...]

    @property
    def content(self) -> dict[str, Any]:
        """All that decides what the runs learn and how they are judged, as JSON would give it back."""
        learned = {size: {arm: a.learned for arm, a in arms.items()} for size, arms in self.arms.items()}
        return json.loads(json.dumps({"plan": dataclasses.asdict(self.config), "arms": learned}))

    @property
    def hash(self) -> str:
        """The hash of `content`."""
        return digest(self.content)

    def rates(self, size: str, arm: str) -> list[float]:
        """Return the learning rates that the sweep begins with, ascending."""
        return rates_of(self.config, self.arms[size][arm].config.optim.lr)

    def sweep(self, size: str, arm: str) -> list[PlannedRun]:
        """Return the runs that the sweep of an arm begins with; none when the plan has one rate."""
        rates = self.rates(size, arm)
        return [PlannedRun("sweep", size, arm, rate, self.config.rate_seed) for rate in rates] if len(rates) > 1 else []

    def final(self, size: str, arm: str, rate: float) -> list[PlannedRun]:
        """Return the runs of an arm that are compared, at the rate that the sweep found."""
        return [PlannedRun("final", size, arm, rate, seed) for seed in self.config.seeds]

    def words(self, planned: PlannedRun, runs: str) -> list[str]:
        """Return the command line of a run, for train.py."""
        arm = self.arms[planned.size][planned.arm]
        seeds = [f"seed={planned.seed}", f"data_seed={planned.seed}"]
        tags = [*arm.config.logger.tags, *tags_of(self.hash, planned.size, planned.stage)]
        labels = {
            "group": quoted(self.config.name), "job_type": quoted(planned.arm), "tags": f"[{','.join(map(quoted, tags))}]",
        }  # fmt: skip
        return [
            *arm.words, f"model.d_ff={arm.width.d_ff}", f"optim.lr={planned.rate!r}", *seeds, f"runs={runs}",
            f"run={planned.name}",
            *(f"logger.{name}={value}" for name, value in labels.items()),
        ]  # fmt: skip

    def runs(self) -> int:
        """Return how many runs it takes, if no sweep goes on past an edge."""
        return sum(len(self.sweep(*place)) + len(self.config.seeds) for place in self.places())

    def flops(self) -> int:
        """Return the FLOPs of these runs."""
        return sum(
            self.arms[size][arm].flops * (len(self.sweep(size, arm)) + len(self.config.seeds))
            for size, arm in self.places()
        )

    def places(self) -> Iterator[tuple[str, str]]:
        """Yield every (size, arm)."""
        for size, arms in self.arms.items():
            for arm in arms:
                yield size, arm


def tags_of(plan_hash: str, size: str, stage: str) -> list[str]:
    """Return the tags by which W&B finds runs of this plan, of a size of it, and of a stage."""
    return [_tag(f"plan:{plan_hash}"), _tag(f"size:{size}"), _tag(f"stage:{stage}")]


def _tag(text: str) -> str:
    return text if len(text) <= LONGEST_TAG else f"{text[: LONGEST_TAG - 9]}:{digest(text, 4)}"


def rates_of(config: AblationConfig, lr: float) -> list[float]:
    """Return the learning rates that a sweep begins with, ascending, of an arm whose own is `lr`."""
    return [_rounded(lr * factor) for factor in sorted(config.rates)]


def next_rate(tried: list[float], edge: str) -> float:
    """Return the rate by which a sweep goes on past its "lowest" or "highest", in the step that it has there."""
    tried = sorted(tried)
    if edge == "lowest":
        return _rounded(tried[0] * tried[0] / tried[1])
    return _rounded(tried[-1] * tried[-1] / tried[-2])


def read_plan(words: list[str]) -> tuple[AblationConfig, list[str]]:
    """Read `ablation=NAME ablation.KEY=VALUE` and overrides of every run; return the plan, and what else was typed.

    Options that are not Hydra's (`yes=true`) are the caller's to take away first.

    Raises:
        UserError: no plan is named, or an unknown one; an unknown key, or a value of the wrong type.
    """
    return read_group("ablation", AblationConfig, words, "plan")


def resolve(config: AblationConfig, others: list[str] = (), seconds: Any = None) -> Plan:
    """Check a plan and match its widths.

    Args:
        others: overrides of every run, after the plan's own.
        seconds: of a step of (size, arm, d_ff), measured, for `budget=wallclock`.

    Raises:
        UserError: what is wrong with it.
    """
    config = dataclasses.replace(config, common=[*config.common, *others])
    arms = _named(config.arms, "arms")
    sizes = {
        size: _split(words, f"sizes.{size}")
        for size, words in _named(config.sizes or {"nano": "model=nano"}, "sizes").items()
    }
    _check(config, arms)
    of_arms = {arm: _of_arm(words, arm, config.common) for arm, words in arms.items()}
    resolved: dict[str, dict[str, Arm]] = {}
    warnings: list[str] = []
    for size, of_size in sizes.items():
        words = {arm: (*of_size, *of_arm, *config.common) for arm, of_arm in of_arms.items()}
        configs = {arm: _load(of_arm, arm, size) for arm, of_arm in words.items()}
        _check_apart(f"{size}: the arms", configs)
        batches = {arm: validate(c, c.parallel.tensor * c.parallel.context) for arm, c in configs.items()}
        base = configs[config.baseline]
        measured = (lambda arm, d_ff, size=size: seconds(size, arm, d_ff)) if seconds is not None else None
        tokens = batches[config.baseline].micro_batch * base.sequence_length
        settings = {"tensor": base.parallel.tensor, "tile": config.tile, "allowed": config.allowed_mismatch}
        with _said_of(size):
            widths, off = match(configs, config.baseline, config.budget, tokens=tokens, seconds=measured, **settings)
        warnings += [f"{size}: {sentence}" for sentence in off]
        resolved[size] = {}
        for arm, of_arm in configs.items():
            shape = shape_of(
                dataclasses.replace(of_arm, model=dataclasses.replace(of_arm.model, d_ff=widths[arm].d_ff))
            )
            with _said_of(f"{arm} at {size}"):
                check_divisibility(shape, of_arm.parallel)
            flops = sum(flops_per_token(shape, of_arm.sequence_length).values())
            saved = sum(map(ffn_saved_bytes, shape.ffn))
            resolved[size][arm] = Arm(words[arm], of_arm, batches[arm], widths[arm], flops, saved)
    _check_apart("the sizes", {size: of_size[config.baseline].config for size, of_size in resolved.items()})
    return Plan(config, resolved, tuple(warnings))


def _named(value: Any, key: str) -> dict[str, str | list[str]]:
    """Return {name: overrides}; a list of arms of conf/ffn is short for {name: ffn=name}."""
    if isinstance(value, list) and key == "arms":
        doubled = {name for name in value if value.count(name) > 1}
        if doubled:
            raise UserError(f"ablation.arms names {', '.join(sorted(map(str, doubled)))} twice")
        value = {name: f"ffn={name}" for name in value}
        for name in value:
            if name not in choices("ffn"):
                raise unknown("arm", str(name), choices("ffn"))
    if not isinstance(value, dict) or not value:
        raise UserError(f"ablation.{key} must map names to overrides, such as {{mine: ffn=relu}}")
    for name in value:
        if not _NAME.fullmatch(str(name)):
            raise UserError(f"ablation.{key}: {name!r} must be letters, digits, _ and . to name a folder")
    return {str(name): words for name, words in value.items()}


def _split(words: Any, key: str) -> tuple[str, ...]:
    if isinstance(words, str):
        try:
            words = shlex.split(words)
        except ValueError as error:
            raise UserError(f"ablation.{key}: {words!r} is no list of overrides: {error}") from error
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"ablation.{key} must be overrides, as they are typed for train.py")
    return tuple(words)


def _of_arm(words: Any, arm: str, common: Sequence[str]) -> tuple[str, ...]:
    found = _split(words, f"arms.{arm}")
    replaced = {_key(word): word for word in common}
    for word in found:
        if word.startswith("model.d_ff"):
            raise UserError(f"{word} of {arm}: widths follow from the budget; the baseline's is set by a size")
        if _key(word) in replaced:
            raise UserError(f"{replaced[_key(word)]} of every run would replace {word} of {arm}: change ablation.arms")
    return found


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _check_apart(what: str, configs: Mapping[str, Config]) -> None:
    """Refuse two names for one thing: nothing would be compared."""
    found: dict[str, str] = {}
    for name, config in configs.items():
        other = found.setdefault(digest(to_dict(config)), name)
        if other != name:
            raise UserError(f"{what} {other} and {name} differ in nothing")


def _load(words: tuple[str, ...], arm: str, size: str) -> Config:
    for word in words:
        if _key(word) in _SET_BY_THE_PLAN:
            raise UserError(f"{word} of {arm} at {size} is the plan's to set: ablation.seeds, and folder=FOLDER")
    with _said_of(f"{arm} at {size}"):
        return load(list(words))


@contextlib.contextmanager
def _said_of(what: str) -> Iterator[None]:
    """Put before a complaint of what it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _check(config: AblationConfig, arms: Mapping[str, Any]) -> None:
    if not config.baseline:
        raise UserError(f"the plan {config.name} has no baseline: ablation.baseline=ARM, one of {', '.join(arms)}")
    if config.baseline not in arms:
        near = suggest(config.baseline, arms)
        raise UserError(f"the baseline {config.baseline!r} is no arm of the plan: {near}there are {', '.join(arms)}")
    if len(arms) < 2:
        raise UserError("a plan compares two arms at least: ablation.arms=[relu,swiglu]")
    if not _whole_numbers(config.seeds) or len(set(config.seeds)) != len(config.seeds):
        raise UserError(f"ablation.seeds={config.seeds} must be different whole numbers")
    if len(config.seeds) < 2:
        raise UserError("one seed cannot be told from luck: ablation.seeds takes 2 at least, and a verdict 3")
    if config.rate_seed in config.seeds:
        raise UserError(
            f"ablation.rate_seed={config.rate_seed} is one of ablation.seeds: the sweep needs a seed of its own"
        )
    rates = config.rates
    if (
        not isinstance(rates, list)
        or not rates
        or not all(_is_rate(rate) for rate in rates)
        or len(set(rates)) < len(rates)
    ):
        raise UserError(f"ablation.rates={rates} must be different numbers above 0, times the size's optim.lr")
    if config.metric != "final_eval_loss":
        raise unknown("metric", config.metric, ["final_eval_loss"])
    if not 0 < config.smallest_effect < math.inf:
        raise UserError(f"ablation.smallest_effect={config.smallest_effect} must be nats a token, above 0")


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _rounded(rate: float) -> float:
    """Cut a rate to 6 digits, so that its name and its value say the same."""
    return float(f"{rate:.6g}")
