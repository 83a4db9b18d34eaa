"""From a command line to a typed `Config`, composed with Hydra; a mistyped override is refused in one sentence.

This module uses Hydra's compose API rather than `hydra.main`, because the project owns the run folder, the console and the
exit status. The override grammar is Hydra's (`group=choice key=value`), with two conveniences: a formula or a path needs no
second layer of quotes, and an integer may be written as `1e9`. Keys are defined in `conf/schema.py`; `conf/validate.py` checks
that values fit together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.help import print_help
from conf.keys import FOLDER, choices, keys
from conf.schema import GROUPS, Config
from kernels.common.commands import HELP
from kernels.common.errors import UserError, unknown

Group = typing.TypeVar("Group")
FREE_FORM = ("data.parts", "ffn.parameters", "ffn.per_layer")  # dictionaries with keys chosen by the user
PLAIN_TEXT = (
    "ffn.formula",
    "ffn.from_output",
    "data.path",
    "tokenizer.path",
    "run",
    "runs",
    "data.prepared",
)  # taken verbatim, not parsed by Hydra
LARGEST_FORMULA = 10_000  # characters; the formula parser has a far lower limit, this one bounds Hydra's work
# Keys that do not change what is learned: they neither name a run nor prevent resuming it (conf/validate.py).
NOT_IN_NAME = (
    "run",
    "runs",
    "resume",
    "logger",
    "zero",
    "parallel",
    "micro_batch_size",
    "data.prepared",
    "data.workers",
)


def load(argv: list[str], program: str = "train.py") -> Config:
    """Compose the configuration from `argv`, the overrides without the program's name.

    `--help` prints the keys and exits; `--cfg` prints the composed configuration and exits.

    Raises:
        UserError: an override that is not understood, an unknown group, choice or key, or a value of the wrong type.
    """
    if any(argument in HELP for argument in argv):
        print_help(program)
        raise SystemExit(0)
    print_config = "--cfg" in argv  # Hydra's own spelling is `--cfg job`
    ignored = ("--cfg", "job") if print_config else ()
    overrides = [_prepare(argument, program) for argument in argv if argument not in ignored]
    _refuse_two_lengths(overrides)
    config = _compose(overrides)
    # A length given as an override wins over the preset's, whichever of the two it is.
    typed = {override.partition("=")[0] for override in overrides}
    if "tokens" in typed and config.tokens is not None:
        config.steps = None
    elif "steps" in typed and config.steps is not None:
        config.tokens = None
    if config.run is None:
        config.run = run_name(config, overrides)
    if print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def read_group(group: str, schema: type[Group], arguments: list[str], kind: str) -> tuple[Group, list[str]]:
    """Read a group outside of a run's configuration from `GROUP=NAME GROUP.KEY=VALUE` arguments.

    A dictionary given as a whole replaces that of the choice; `GROUP.KEY.NAME=VALUE` adds an entry to it.

    Args:
        schema: of the group; `name` becomes the name of the choice.
        kind: what a choice of this group is called, such as "plan".

    Returns:
        The group, and all other arguments.

    Raises:
        UserError: no choice is named, or an unknown one; an unknown key, or a value of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    names = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{group}=")]
    if not names:
        raise UserError(f"{group}=NAME is missing: choose a {kind} from {', '.join(choices(group))}")
    if names[-1] not in choices(group):
        raise unknown(kind, names[-1], choices(group))
    overrides = [argument.removeprefix(f"{group}.") for argument in arguments if argument.startswith(f"{group}.")]
    others = [argument for argument in arguments if not argument.startswith((f"{group}=", f"{group}."))]
    types = typing.get_type_hints(schema)
    known = list(types)
    for override in overrides:
        name = re.split(r"[.=]", override, maxsplit=1)[0]
        if name not in known:
            raise unknown(f"key of {group}", name, known)
    try:
        settings = _container(OmegaConf.load(FOLDER / group / f"{names[-1]}.yaml"))
        for override in overrides:
            name, _, text = override.partition("=")
            if types.get(name) in (str, typing.Optional[str]) and text != "null":  # YAML takes 1:00:00 for a number
                settings[name] = text
                continue
            [(name, value)] = _container(OmegaConf.from_dotlist([override])).items()
            adds = "." in override.partition("=")[0] and isinstance(settings.get(name), dict)
            settings[name] = {**settings[name], **value} if adds else value
        config = OmegaConf.merge(OmegaConf.structured(schema), {"name": names[-1], **settings})
        return typing.cast(Group, OmegaConf.to_object(config)), others
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{kind} {names[-1]}: {str(error).splitlines()[0]}") from error


def _container(config: Any) -> dict[str, Any]:
    """Return an OmegaConf mapping as plain dictionaries."""
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(config)
    if not isinstance(content, dict):
        raise ValueError("it holds no keys and values")
    return {str(key): value for key, value in content.items()}


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML, every key resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def from_yaml(path: str | os.PathLike[str]) -> Config:
    """Read back a `config.yaml` that `to_yaml` wrote.

    Raises:
        UserError: the file is missing, is no YAML, or does not fit the schema.
    """
    from omegaconf import OmegaConf

    with _refused(path):
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(Path(path)))
        return typing.cast(Config, OmegaConf.to_object(merged))


def values_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return {dotted key: value} of a `config.yaml` as it was written, in a third of the time of `from_yaml`.

    Raises:
        UserError: the file is missing, or is no YAML of keys and values.
    """
    from omegaconf import OmegaConf

    with _refused(path):
        return flatten(_container(OmegaConf.load(Path(path))))


@contextlib.contextmanager
def _refused(path: str | os.PathLike[str]) -> Iterator[None]:
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{os.fspath(path)} does not exist") from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{os.fspath(path)} does not fit the configuration schema of this version: {reason}") from error


def find_run(name: str, runs: str = "runs") -> Path:
    """Return the folder of a run given by its name or by its path.

    Raises:
        UserError: there is none; the runs that exist are listed.
    """
    for path in (Path(runs) / name, Path(name)):
        if (path / "config.yaml").is_file():
            return path
    known = sorted(path.parent.name for path in Path(runs).glob("*/config.yaml"))
    raise UserError(
        f"there is no run {name!r} in {runs}/: " + (f"choose from {', '.join(known)}" if known else "it has no runs")
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of nested dictionaries."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def run_name(config: Config, overrides: list[str]) -> str:
    """Name a run after its command: model, arm, and all other overrides, so that the same command finds it again.

    Commands that train something else get different names: what the name cannot spell out goes into a hash at its end.
    """
    values = flatten(to_dict(config))
    last_parts = Counter(key.rpartition(".")[2] for key, _, _ in keys())
    parts, hidden = [config.model.name, config.ffn.name], ""
    for key, text in sorted(override.lstrip("+").split("=", 1) for override in _effective(overrides)):
        if key in ("model", "ffn") or any(key == name or key.startswith(name + ".") for name in NOT_IN_NAME):
            continue
        value = text.strip("'") if key in GROUPS else _as_typed(values.get(key, text))
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


def _as_typed(value: Any) -> str:
    """Write a value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _effective(overrides: list[str]) -> list[str]:
    """Return the last override of every key, which is the one that counts."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def _prepare(argument: str, program: str) -> str:
    """Check one override's key against the schema, normalise its value, and return the override for Hydra to parse."""
    if argument.startswith("-"):
        raise UserError(f"unknown option {argument!r}: {program} takes GROUP=CHOICE and key=value; --help lists them")
    key, equals, value = argument.partition("=")
    if not equals:
        raise UserError(
            f"{argument!r} is not an override: write GROUP=CHOICE or key=value ({program} --help lists them)"
        )
    key = key.lstrip("+")
    if key in GROUPS:
        if value not in choices(key):
            raise unknown(key, value, choices(key))
        return f"{key}='{value}'"  # quoted: a bare `zero=1` would reach Hydra as a number
    if any(key == name or key.startswith(name + ".") for name in FREE_FORM):
        return f"++{key}={value}"
    known = {name: kind for name, kind, _ in keys()}
    if key not in known:
        inside = [name for name in known if name.endswith("." + key)]
        if inside:
            raise UserError(f"unknown key {key!r}: did you mean {' or '.join(map(repr, inside))}?")
        siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
        raise unknown("key", key, siblings if siblings and "." in key else [*siblings, *GROUPS])
    if key in PLAIN_TEXT and value[:1] not in ("'", '"', "[") and value not in ("null", ""):
        if len(value) > LARGEST_FORMULA:
            raise UserError(f"{key} has {len(value):,} characters; at most {LARGEST_FORMULA:,} are read")
        value = quoted(value)
    elif (
        known[key] in (int, typing.Optional[int])
        and re.fullmatch(r"[0-9]*\.?[0-9]+[eE]\+?[0-9]{1,2}", value)
        and float(value).is_integer()
    ):
        value = str(int(float(value)))
    return f"{key}={value}"


def quoted(text: str) -> str:
    """Quote a text so that Hydra reads it back unchanged, whatever it contains: `'1e5'` stays a text."""
    # In Hydra's quotes a backslash is itself, unless it stands before a quote.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


def _refuse_two_lengths(overrides: list[str]) -> None:
    typed = {override.partition("=")[0] for override in overrides}
    if {"steps", "tokens"} <= typed:
        raise UserError("both steps and tokens were given: set the length of the run with one of them")


def _compose(overrides: list[str]) -> Config:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parser = OverridesParser.create()
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException as error:
            raise UserError(f"cannot parse {override!r}: a bracket, quote or comma is misplaced") from error
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(FOLDER), version_base="1.3"):
            composed = compose("config", overrides)
        return typing.cast(Config, OmegaConf.to_object(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    """Reduce Hydra's nested, multi-line error to the key, the value and what was expected."""
    text = f"{error}\n{error.__cause__ or ''}"
    if several := re.search(r"Ambiguous value for argument '(.*?)'", text):
        return f"{several.group(1)} has several values but takes one; a list is written [one,two]"
    value = re.search(r"Value '(.*?)'", text)
    where = re.search(r"full_key: (\S+)", text)
    kinds = {"to Integer": "a whole number", "to Float": "a number", "valid bool": "true or false"}
    expected = next((kind for mark, kind in kinds.items() if mark in text), None)
    if value and where and expected:
        return f"{where.group(1)}={value.group(1)}: expected {expected}"
    return " ".join(str(error.__cause__ or error).split())
