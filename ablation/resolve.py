"""Resolve a plan: check its keys, load the configuration of every arm and size, and match the arms' widths."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ablation.budget import match
from ablation.looks import SPENDINGS
from ablation.metrics import metric_of, refuse_unfit
from ablation.plan import NAMES, RATE_CHOICES, SIZES, Plan, ResolvedArm, at_horizon, sizes_of
from conf.ablation_schema import AblationConfig
from conf.arms import unknown_arm
from conf.effects import deciding_keys
from conf.keys import choices
from conf.load import load, to_dict
from conf.schema import Config
from conf.shape import check_divisibility, shape_of
from conf.validate import holds_text_out, validate
from kernels.common.errors import UserError, suggest, unknown
from kernels.common.json_files import digest
from launch.estimate.counts import ffn_saved_bytes, flops_per_token

StepSeconds = Callable[[str, str, int], float]  # seconds per step of (size, arm, d_ff)

UNTIL = ("complete", "decided")
_SET_BY_THE_PLAN = ("seed", "data_seed", "run", "runs", "resume")


def resolve(config: AblationConfig, overrides: Sequence[str] = (), seconds: StepSeconds | None = None) -> Plan:
    """Check a plan and match its widths.

    Args:
        overrides: of every run, after the plan's own.
        seconds: measured seconds per step of (size, arm, d_ff), for `budget=wallclock`.

    Raises:
        UserError: the plan is invalid; the message names the key.
    """
    config = dataclasses.replace(config, common=[*_split(config.common or [], "common"), *overrides])
    arms = _named(config.arms, "arms")
    sizes = {size: _split(text, f"sizes.{size}") for size, text in _named(config.sizes or SIZES, "sizes").items()}
    _check(config, arms)
    check_reported(config.reported)
    arm_overrides = {arm: _overrides_of_arm(text, arm, config.common) for arm, text in arms.items()}
    resolved: dict[str, dict[str, ResolvedArm]] = {}
    warnings: list[str] = []
    for size, size_overrides in sizes.items():
        of_arms = {arm: (*size_overrides, *own, *config.common) for arm, own in arm_overrides.items()}
        of_arms = {arm: _beside(of_arm, overrides) for arm, of_arm in of_arms.items()}
        of_arms = {arm: (*_rules_of_plan(config, of_arm), *of_arm) for arm, of_arm in of_arms.items()}
        whole, size_warnings = _resolve_size(config, size, of_arms, seconds)
        for fraction in sorted(config.horizons):
            name = at_horizon(size, fraction)
            resolved[name] = whole if fraction == 1 else {arm: _shortened(of, fraction) for arm, of in whole.items()}
        warnings += [f"{size}: {warning}" for warning in size_warnings]
    _refuse_duplicates("the sizes", {size: resolved[size][config.baseline].config for size in sizes})
    return Plan(config, resolved, tuple(warnings))


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
        saved = shape.ffn_sum(ffn_saved_bytes)
        arms[arm] = ResolvedArm(overrides[arm], of_arm, batches[arm], widths[arm], flops, saved)
    return arms, warnings


def _named(value: Any, key: str) -> dict[str, str | list[str]]:
    """Return {name: overrides}. A list of arms of conf/ffn stands for {name: ffn=name}."""
    if key == "arms":
        _refuse_unlisted(key, value)
    if isinstance(value, list) and key == "arms":
        if odd := [name for name in value if not isinstance(name, str)]:
            raise UserError(
                f"ablation.arms: {odd[0]} is no arm of conf/ffn: one of your own is {{mine: ...}}, in a mapping of all"
            )
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


def _beside(own: tuple[str, ...], typed: Sequence[str]) -> tuple[str, ...]:
    """Return overrides that nobody refuses if a typed one has made them pointless, as `eval_every=0` does `eval_tokens`."""
    keys = {_key(override) for override in typed}
    decided = keys | ({"data.held_out_files"} if "data.held_out" in keys else set())  # as `_rules_of_plan` has it
    idle = {override for override in own if not override.startswith("+") and decided & deciding_keys(_key(override))}
    replaced = {override for override in idle if _key(override) in keys and override not in typed}
    return tuple(f"++{o}" if o in idle and o not in typed else o for o in own if o not in replaced)


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
