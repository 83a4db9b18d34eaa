"""From a command line to a typed `Config`, composed with Hydra; a mistyped override is refused in one sentence.

This module uses Hydra's compose API rather than `hydra.main`, because the project owns the run folder, the console and the
exit status. `run=NAME` of a run that has started composes over that run's config.yaml. Keys are defined in `conf/schema.py`;
`conf/overrides.py` reads overrides, `conf/effects.py` refuses those without effect, `conf/validate.py` checks that values fit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import os
import re
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.effects import refuse_ignored, refuse_ignored_of_parts, refuse_mislabelled
from conf.help import print_help
from conf.keys import FOLDER, choice_of, choices, keys
from conf.overrides import FREE_FORM, TEXT_LISTS, Override, as_typed, count_of, parse, read_override, within
from conf.schema import GROUPS, Config
from conf.yaml_files import read_yaml, without_interpolation, write_yaml
from kernels.common.commands import HELP
from kernels.common.errors import UserError
from kernels.common.text import secrets_of

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Keys that do not change what is learned: they neither name a run nor prevent resuming it (conf/identity.py).
NOT_IN_NAME = (
    "run",
    "runs",
    "resume",
    "resume_from",
    "resume_optimizer",
    "guard",
    "logger",
    "zero",
    "parallel",
    "micro_batch_size",
    "data.prepared",
    "data.workers",
    "data.max_epochs",
    "watchdog",
    "profile",
)

# Keys of one command: a run that goes on does not repeat them unless they are typed again.
_OF_COMMAND = ("runs", "run", "resume", "resume_from", "resume_optimizer")


def load(argv: list[str], program: str = "train.py") -> Config:
    """Compose the configuration from `argv`, the overrides without the program's name.

    With `run=NAME` of a run that has started, they are set over the run's config.yaml. `--help` prints the keys and exits;
    `--cfg` prints the composed configuration and exits.

    Raises:
        UserError: an override that is not understood, an unknown group, choice or key, a value of the wrong type, or a key that
            has no effect under the chosen options.
    """
    if any(argument in HELP for argument in argv):
        default = _compose([])
        print_help(program, flatten(to_dict(default)), _choices_of(default))
        raise SystemExit(0)
    print_config = "--cfg" in argv  # Hydra's own spelling is `--cfg job`
    ignored = ("--cfg", "job") if print_config else ()
    overrides = [read_override(argument) for argument in argv if argument not in ignored]
    typed = {override.key for override in overrides}
    composed = _compose(overrides)
    if {"steps", "tokens"} <= typed and None not in (composed.steps, composed.tokens):
        raise UserError("both steps and tokens were given: set the length of the run with one of them")
    stored = _started(composed) if "run" in typed else None
    config = _over(stored, overrides) if stored else composed
    # A length given as an override wins over the preset's, whichever of the two it is.
    if "tokens" in typed and config.tokens is not None:
        config.steps = None
    elif "steps" in typed and config.steps is not None:
        config.tokens = None
    _refuse_without_effect(overrides, config, stored)
    _refuse_secrets(config)
    if config.run is None:
        config.run = run_name(config, overrides)
    if print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _refuse_secrets(config: Config) -> None:
    """Refuse the value of a secret variable of the environment: a configuration goes into logs, reports and W&B."""
    secrets = secrets_of()
    for key, value in flatten(to_dict(config)).items() if secrets else ():
        text = str(value)
        for name, secret in secrets.items():
            if secret in text:
                raise UserError(f"{key} holds the value of {name}, and everybody can read a run's configuration")


def _started(config: Config) -> Config | None:
    """Return the configuration of the run in the run folder that `config` names; None where no run has started there."""
    folder = Path(config.runs) / str(config.run)
    # A name that no folder can have is refused later, and so is a config.yaml that cannot be read.
    with contextlib.suppress(OSError, ValueError, UserError):
        if config.resume and (folder / "config.yaml").is_file() and has_trained(folder):
            return from_yaml(folder / "config.yaml")
    return None


def has_trained(folder: Path) -> bool:
    """Return whether a run folder holds a run: a command that failed before its first step leaves no more than config.yaml."""
    files = ("metrics.jsonl", "summary.json", "run_id")
    return any(os.path.lexists(folder / name) for name in files) or any((folder / "checkpoints").glob("step_*"))


def _over(stored: Config, overrides: list[Override]) -> Config:
    """Return a run's configuration with overrides set over it. A group replaces its keys, unless it is the run's choice."""
    chosen = _choices_of(stored)
    preset = [Override("model", f"'{chosen['model']}'")] if chosen["model"] in choices("model") else []
    composed = _compose([*preset, *overrides])
    changed = [o for o in overrides if o.key not in GROUPS or o.value.strip("'") != chosen[o.key]]
    if any(override.key == "model" for override in changed):
        return composed  # a preset is a whole recipe
    values, typed = to_dict(stored), to_dict(composed)
    for override in changed:
        *path, name = override.key.split(".")
        target, source = values, typed
        for part in path:
            target, source = target.setdefault(part, {}), source[part]
        target[name] = source[name]
    values |= {key: typed[key] for key in _OF_COMMAND}
    return _from_dict(values)


def _choices_of(config: Config) -> dict[str, str]:
    """Return {group: choice} of a configuration, as far as its values tell."""
    tree = to_dict(config)
    return {group: choice_of(group, tree[group]) for group in GROUPS}


def _refuse_without_effect(overrides: list[Override], config: Config, stored: Config | None) -> None:
    refuse_ignored(overrides, flatten(to_dict(config)))
    if any(within(override.key, ("data.parts",)) for override in overrides):
        refuse_ignored_of_parts(config.data.parts)
    if any(override.key.endswith(".name") for override in overrides):
        chosen = {override.key: override.value.strip("'") for override in overrides if override.key in GROUPS}
        refuse_mislabelled(overrides, _choices_of(stored or _compose([])) | chosen)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML, every key resolved."""
    return write_yaml(to_dict(config))


def from_yaml(path: str | os.PathLike[str]) -> Config:
    """Read back a `config.yaml` that `to_yaml` wrote.

    Raises:
        UserError: the file is missing, is no YAML, or does not fit the schema.
    """
    with _refused(path):
        return _from_dict(read_yaml(path))


def _from_dict(values: Any) -> Config:
    """Return the configuration that `to_dict` wrote; keys that it leaves out have the schema's defaults."""
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(_schema(), without_interpolation(values))
    return _with_text_keys(typing.cast(Config, OmegaConf.to_object(merged)))


def _with_text_keys(config: Config) -> Config:
    """Write the keys of the user's own dictionaries as text: the layer in `ffn.per_layer={0: relu2}` is typed as a number."""
    ffn, data = config.ffn, config.data
    ffn.parameters, ffn.per_layer, data.parts = map(_text_keys, (ffn.parameters, ffn.per_layer, data.parts))
    return config


def _text_keys(value: Any) -> Any:
    return {str(key): _text_keys(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def values_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return {dotted key: value} of a `config.yaml` as it was written, in a third of the time of `from_yaml`.

    Raises:
        UserError: the file is missing, or is no YAML of keys and values.
    """
    with _refused(path):
        return flatten(read_yaml(path))


@contextlib.contextmanager
def _refused(path: str | os.PathLike[str]) -> Iterator[None]:
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{os.fspath(path)} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read {os.fspath(path)}: {error.strerror}") from error
    except (OmegaConfBaseException, YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"{os.fspath(path)} does not fit the configuration schema of this version: {reason}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0]


def find_run(name: str, runs: str = "runs") -> Path:
    """Return the folder of a run given by its name or by its path.

    Raises:
        UserError: there is none; the runs that have a checkpoint are listed.
    """
    for path in (Path(runs) / name, Path(name)):
        if (path / "config.yaml").is_file():
            return path
    known = sorted({path.parents[1].name for path in Path(runs).glob("*/checkpoints/step_*")})
    raise UserError(
        f"there is no run {name!r} in {runs}/"
        + (f": choose from {', '.join(known)}" if known else ", nor any other with a checkpoint")
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of nested dictionaries."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def run_name(config: Config, overrides: list[Override]) -> str:
    """Name a run after its command: model, arm, and all other overrides, so that the same command finds it again.

    Commands that train something else get different names: what the name cannot spell out goes into a hash at its end.
    """
    values = flatten(to_dict(config))
    last_parts = Counter(key.rpartition(".")[2] for key, _, _ in keys())
    parts, hidden = [config.model.name, config.ffn.name], ""
    effective = {override.key: override.value for override in overrides}  # the last override of a key counts
    for key, text in sorted(effective.items()):
        if key in ("model", "ffn") or within(key, NOT_IN_NAME):
            continue
        value = text.strip("'") if key in GROUPS else as_typed(values.get(key, text))
        part = value if type(values.get(key)) in (int, float) else re.sub(r"[^A-Za-z0-9.]+", "_", value).strip("_")
        if part != value:
            hidden += f"{key}={value}\n"
        last = key.rpartition(".")[2]
        parts.append(part if key in GROUPS else (last if last_parts[last] == 1 else key) + part)
    if hidden:
        parts.append(hashlib.sha256(hidden.encode()).hexdigest()[:8])
    name = "-".join(parts)
    if len(name) > 80:  # keep folder names short, and still distinct
        name = f"{name[:70]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _compose(overrides: list[Override]) -> Config:
    return copy.deepcopy(_composed(tuple(overrides)))


@functools.lru_cache(maxsize=64)
def _composed(overrides: tuple[Override, ...]) -> Config:
    """Compose with Hydra, then set the values of keys, as Hydra does."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parsed = [(override, parse(str(override))) for override in overrides]
    for override, hydras in parsed:
        if hydras.is_sweep_override():
            typed = f"{override.key}={override.typed}"
            raise UserError(f"{typed} has several values but takes one; a list is written [one,two]; --multirun sweeps")
    try:
        composed = _with_choices([override for override in overrides if override.key in GROUPS])
        for override, hydras in parsed:
            if override.key not in GROUPS:
                free = within(override.key, FREE_FORM)
                OmegaConf.update(composed, override.key, hydras.value(), merge=True, force_add=free)
        return _with_text_keys(typing.cast(Config, OmegaConf.to_object(composed)))
    except (HydraException, OmegaConfBaseException, OverflowError) as error:
        raise UserError(_sentence(error)) from error


def _with_choices(overrides: list[Override]) -> DictConfig:
    """Return the schema with the choices of groups set, for the caller to change.

    Hydra takes a fifth of a second for it. The arms of a plan share all groups but `ffn`, in which no other group sets a key:
    their files are merged into one composition.
    """
    from omegaconf import OmegaConf

    arm = next((override.value.strip("'") for override in reversed(overrides) if override.key == "ffn"), None)
    composed = copy.deepcopy(
        _composed_by_hydra(tuple(str(override) for override in overrides if override.key != "ffn"))
    )
    if arm is not None:
        path = FOLDER / "ffn" / f"{arm}.yaml"
        with _refused(path):
            composed.ffn = OmegaConf.merge(_schema().ffn, OmegaConf.create(read_yaml(path)))
    return composed


@functools.lru_cache(maxsize=64)
def _composed_by_hydra(overrides: tuple[str, ...]) -> DictConfig:
    from hydra import compose, initialize_config_dir

    _store_schema()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        return compose("config", list(overrides))


def typed(schema: type[Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of keys of a schema in the schema's types.

    Args:
        where: the dotted key of the dictionary that holds them, for the error.

    Raises:
        UserError: a value is of another type.
    """
    from omegaconf import OmegaConf, ValidationError

    found = OmegaConf.structured(schema)
    kinds = {name: kind for name, kind, _ in keys(schema)}
    for key, value in values.items():
        count = count_of(kinds[key], value)
        try:
            found[key] = value if count is None else count
        except ValidationError as error:
            raise UserError(f"{where}.{_sentence(error)}") from error
    result = OmegaConf.to_object(found)
    return {key: getattr(result, key) for key in values}


@functools.cache
def _store_schema() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


@functools.cache
def _schema() -> Any:
    """Return the schema's defaults as OmegaConf's; merging copies them."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(Config)


def _sentence(error: Exception) -> str:
    """Reduce Hydra's nested, multi-line error to the key, the value and what was expected."""
    text = f"{error}\n{error.__cause__ or ''}"
    value = re.search(r"Value '(.*?)'(?= of type| is not|$)", text)
    where = re.search(r"full_key: (\S+)", text)
    kinds = {"to Integer": "a whole number", "to Float": "a number", "valid bool": "true or false"}
    expected = next((kind for mark, kind in kinds.items() if mark in text), None)
    if where and isinstance(error, OverflowError):
        return f"{where.group(1)}: the number is too large"
    if value and where and expected:
        return f"{where.group(1)}={value.group(1)}: expected {expected}"
    if where and "is not Optional" in text:
        return f"{where.group(1)}=null: expected a value"
    if where and "Cannot merge DictConfig with ListConfig" in text:
        kind = "a list of texts, [one,two]" if where.group(1) in TEXT_LISTS else "a dictionary, {name: value}"
        return f"{where.group(1)}: expected {kind}"
    return " ".join(str(error.__cause__ or error).split())
