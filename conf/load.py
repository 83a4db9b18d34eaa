"""From a command line to a typed `Config`: compose with Hydra, and say in one sentence what is wrong with a mistyped one.

Hydra's compose API is used rather than `hydra.main`, because this project owns the run folder, the console and the exit
status. The override grammar is Hydra's (`group=choice key=value`), with two courtesies: a formula or a path needs no second
layer of quotes, and an integer may be typed as `1e9`. What is not here: the meaning of keys (`conf/schema.py`) and the rules
by which values must fit together (`conf/validate.py`).
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
from kernels.common.errors import UserError, unknown

Group = typing.TypeVar("Group")
FREE_FORM = ("data.parts", "ffn.parameters", "ffn.per_layer")  # dictionaries whose keys are the user's own
PLAIN_TEXT = (
    "ffn.formula",
    "ffn.from_output",
    "data.path",
    "tokenizer.path",
    "run",
    "runs",
    "data.prepared",
)  # taken as typed, not parsed
LARGEST_FORMULA = 10_000  # characters; the parser of formulas refuses far shorter ones, this only bounds Hydra's work
# What does not change what is learned, so it neither names a run nor stops one from going on (conf/validate.py: resumable).
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
    """Compose the configuration that `argv` (overrides, without the program's name) asks for.

    `--help` prints the keys and exits; `--cfg` prints the composed configuration and exits.

    Raises:
        UserError: an override that is not understood, an unknown group, choice or key, or a value of the wrong type.
    """
    if any(word in ("-h", "--help") for word in argv):
        print_help(program)
        raise SystemExit(0)
    show = "--cfg" in argv  # Hydra's own spelling is `--cfg job`
    overrides = [_prepare(word, program) for word in argv if word not in (("--cfg", "job") if show else ())]
    _refuse_two_lengths(overrides)
    config = _compose(overrides)
    # A length that was typed wins over the preset's, whichever of the two that is.
    typed = {override.partition("=")[0] for override in overrides}
    if "tokens" in typed and config.tokens is not None:
        config.steps = None
    elif "steps" in typed and config.steps is not None:
        config.tokens = None
    if config.run is None:
        config.run = run_name(config, overrides)
    if show:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def read_group(group: str, schema: type[Group], words: list[str], called: str) -> tuple[Group, list[str]]:
    """Read a group that is no part of a run's configuration: `GROUP=NAME GROUP.KEY=VALUE` of what was typed.

    A dictionary that is typed whole replaces what the choice says; `GROUP.KEY.NAME=VALUE` adds to it.

    Args:
        schema: of the group; `name` becomes the name of the choice.
        called: the word for a choice of this group, such as "plan".

    Returns:
        The group, and the words that are not of it.

    Raises:
        UserError: no choice is named, or an unknown one; an unknown key, or a value of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    names = [word.partition("=")[2] for word in words if word.startswith(f"{group}=")]
    if not names:
        raise UserError(f"{group}=NAME is missing: choose a {called} from {', '.join(choices(group))}")
    if names[-1] not in choices(group):
        raise unknown(called, names[-1], choices(group))
    typed = [word.removeprefix(f"{group}.") for word in words if word.startswith(f"{group}.")]
    others = [word for word in words if not word.startswith((f"{group}=", f"{group}."))]
    types = typing.get_type_hints(schema)
    known = list(types)
    for word in typed:
        name = re.split(r"[.=]", word, maxsplit=1)[0]
        if name not in known:
            raise unknown(f"key of {group}", name, known)
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.load(FOLDER / group / f"{names[-1]}.yaml"))
        for word in typed:
            name, _, text = word.partition("=")
            if types.get(name) in (str, typing.Optional[str]) and text != "null":  # YAML takes 1:00:00 for a number
                settings[name] = text
                continue
            [(name, value)] = OmegaConf.to_container(OmegaConf.from_dotlist([word])).items()  # type: ignore[union-attr]
            adds = "." in word.partition("=")[0] and isinstance(settings.get(name), dict)
            settings[name] = {**settings[name], **value} if adds else value
        config = OmegaConf.merge(OmegaConf.structured(schema), {"name": names[-1], **settings})
        return OmegaConf.to_object(config), others  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{called} {names[-1]}: {str(error).splitlines()[0]}") from error


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
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))  # type: ignore


def values_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return {dotted key: value} of a `config.yaml`, as it was written: a third of `from_yaml`'s time.

    Raises:
        UserError: the file is missing, or is no YAML of keys and values.
    """
    from omegaconf import OmegaConf

    with _refused(path):
        return flatten(dict(OmegaConf.to_container(OmegaConf.load(path))))  # type: ignore[arg-type]


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
        raise UserError(f"{os.fspath(path)} is not a configuration of this version: {reason}") from error


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
        f"there is no run {name!r} in {runs}/: " + (f"there are {', '.join(known)}" if known else "it is empty")
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
    """Name a run after its command: model, arm, and what else was overridden, so that the same command finds it again.

    Commands that train something else have different names: what a word of the name cannot show is in a hash at its end.
    """
    values = flatten(to_dict(config))
    last_parts = Counter(key.rpartition(".")[2] for key, _, _ in keys())
    words, hidden = [config.model.name, config.ffn.name], ""
    for key, typed in sorted(override.lstrip("+").split("=", 1) for override in _last_of_each(overrides)):
        if key in ("model", "ffn") or any(key == name or key.startswith(name + ".") for name in NOT_IN_NAME):
            continue
        value = typed.strip("'") if key in GROUPS else _shown(values.get(key, typed))
        word = value if type(values.get(key)) in (int, float) else re.sub(r"[^A-Za-z0-9.]+", "_", value).strip("_")
        if word != value:
            hidden += f"{key}={value}\n"
        last = key.rpartition(".")[2]
        words.append(word if key in GROUPS else (last if last_parts[last] == 1 else key) + word)
    if hidden:
        words.append(hashlib.sha256(hidden.encode()).hexdigest()[:8])
    name = "-".join(words)
    if len(name) > 80:  # keep folder names short, and still distinct
        name = f"{name[:70]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _shown(value: Any) -> str:
    """Write a value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _last_of_each(overrides: list[str]) -> list[str]:
    """Of overrides of one key, the last counts."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def _prepare(word: str, program: str) -> str:
    """Check one override's key against the schema and normalise its value; return what Hydra is to parse."""
    if word.startswith("-"):
        raise UserError(f"unknown option {word!r}: {program} takes GROUP=CHOICE and key=value; --help lists them")
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"{word!r} is not an override: write GROUP=CHOICE or key=value ({program} --help lists them)")
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
    """Return a text as Hydra reads it back unchanged, whatever is in it: `'1e5'` stays a text."""
    # In Hydra's quotes a backslash is itself, unless it stands before a quote.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


def _refuse_two_lengths(overrides: list[str]) -> None:
    typed = {override.partition("=")[0] for override in overrides}
    if {"steps", "tokens"} <= typed:
        raise UserError("both steps and tokens were given: say how long to train with one of them")


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
            raise UserError(
                f"cannot read {override!r}: a bracket, a quote or a comma is not where it should be"
            ) from error
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(FOLDER), version_base="1.3"):
            composed = compose("config", overrides)
        return OmegaConf.to_object(composed)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    """Boil Hydra's nested, many-line complaint down to the key, the value and what was expected."""
    text = f"{error}\n{error.__cause__ or ''}"
    if several := re.search(r"Ambiguous value for argument '(.*?)'", text):
        return f"{several.group(1)} gives several values where one is taken; a list is written [one,two]"
    value = re.search(r"Value '(.*?)'", text)
    where = re.search(r"full_key: (\S+)", text)
    kinds = {"to Integer": "a whole number", "to Float": "a number", "valid bool": "true or false"}
    expected = next((words for mark, words in kinds.items() if mark in text), None)
    if value and where and expected:
        return f"{where.group(1)}={value.group(1)}: expected {expected}"
    return " ".join(str(error.__cause__ or error).split())
