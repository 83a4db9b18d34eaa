"""The arm of each layer: `ffn`, modified for some layers by `ffn.per_layer`."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from conf.keys import FOLDER, choices
from conf.schema import Config, FFNConfig, ModelConfig
from conf.yaml_files import read_yaml
from kernels.common.errors import UserError, unknown
from kernels.formula import Formula, FormulaError, parse

_OF_AN_ARM = ("name", "formula", "parameters", "init_scale", "from_output")  # the keys of conf/ffn/<arm>.yaml
MOST_LAYERS = 10_000  # a list of every layer's arm is made
_CHANGEABLE = ("arm", "formula", "parameters", "from_output", "init_scale", "save")


@dataclasses.dataclass(frozen=True)
class Arm:
    """The arm of a layer: its keys, as config.yaml holds them, and its formula, parsed."""

    config: FFNConfig
    formula: Formula


def layer_arms(config: Config) -> list[Arm]:
    """Return the arm of every layer. Layers that have one arm share one `Arm`, whose formula is parsed once.

    `ffn.per_layer` maps layers (3, last, layers_4_7) to the name of an arm of conf/ffn, or to the keys that differ:
    {arm: ..., formula: ..., parameters: {...}, init_scale: ..., save: ...}.

    Raises:
        UserError: a layer that does not exist or is named twice, an unknown arm or key, or a formula that is refused.
    """
    if not config.ffn.formula:
        raise UserError("ffn=custom needs its formula: add ffn.formula='x*sigmoid(1.702*x)', or one of gate and up")
    if config.model.n_layers > MOST_LAYERS:
        raise UserError(f"model.n_layers={config.model.n_layers}: at most {MOST_LAYERS:,} layers are built")
    base = dataclasses.replace(config.ffn, per_layer={})
    changed = _changed_layers(config, base)
    arms: dict[str, Arm] = {}  # by the key of ffn.per_layer, or "" where nothing is changed
    by_layer = []
    for index in range(config.model.n_layers):
        key, ffn = changed.get(index, ("", base))
        if key not in arms:
            arms[key] = Arm(ffn, _parsed(ffn, "ffn.formula" if ffn == base else f"the arm of layer {index}"))
        by_layer.append(arms[key])
    return by_layer


def width_of(formula: Formula, model: ModelConfig) -> int:
    """Return d_ff of a layer with this formula."""
    return model.d_ff or default_d_ff(model.d_ff_gated, formula)


def default_d_ff(d_ff_gated: int, formula: Formula) -> int:
    """Return the width at which an arm has the FFN parameters of a gated one: 3/2 of it with 2 matrices instead of 3."""
    return d_ff_gated if formula.gated else d_ff_gated * 3 // 2


def check_groups(formula: Formula, d_ff: int, tensor: int, name: str) -> None:
    """Refuse groups of channels that do not divide a layer's width, or that its tensor ranks do not share evenly.

    Args:
        name: of the arm, for the error.

    Raises:
        UserError: it names the parameter, and the numbers of groups that would do.
    """
    for symbol, parameter in formula.learned.items():
        if parameter.share == "group" and (parameter.groups % tensor or d_ff % parameter.groups):
            fitting = [groups for groups in range(tensor, d_ff + 1, tensor) if d_ff % groups == 0]
            over = f" over parallel.tensor={tensor} ranks" if tensor > 1 else ""
            raise UserError(
                f"ffn.parameters.{symbol}.groups={parameter.groups} does not divide the d_ff={d_ff} of ffn={name} into equal "
                f"blocks{over}: {', '.join(map(str, fitting)) or 'no number'} would do"
            )


def _changed_layers(config: Config, base: FFNConfig) -> dict[int, tuple[str, FFNConfig]]:
    """Return {layer: (its key in ffn.per_layer, its arm)} of the layers that `ffn.per_layer` changes."""
    changed: dict[int, tuple[str, FFNConfig]] = {}
    if not isinstance(config.ffn.per_layer, dict):
        raise UserError(
            f"ffn.per_layer={config.ffn.per_layer!r} must map layers to arms, such as ffn.per_layer.0=relu2"
        )
    for layers, change in config.ffn.per_layer.items():
        key = str(layers)
        for index in _layers(key, config.model.n_layers):
            if index in changed:
                raise UserError(f"ffn.per_layer names layer {index} twice: {changed[index][0]} and {key}")
            changed[index] = key, _changed(base, change, f"ffn.per_layer.{key}")
    return changed


def _parsed(ffn: FFNConfig, key: str) -> Formula:
    if not isinstance(ffn.parameters, dict):
        raise UserError(f"ffn.parameters={ffn.parameters!r} must map names to numbers, or to {{init: 0.25}}")
    try:
        return parse(ffn.formula, ffn.parameters, ffn.from_output)
    except FormulaError as error:
        raise UserError(f"{key} is refused: {error}") from error


def _layers(text: str, count: int) -> range:
    match = re.fullmatch(r"([0-9]+|last)", text) or re.fullmatch(r"layers_([0-9]+)_([0-9]+|last)", text)
    if not match:
        raise UserError(
            f"ffn.per_layer.{text}: a layer is a number (0 is the first), last, or a range such as layers_4_7"
        )
    first, last = (count - 1 if layer == "last" else int(layer) for layer in (match[1], match[match.lastindex or 1]))
    if not first <= last < count:
        raise UserError(f"ffn.per_layer.{text}: the model has layers 0 to {count - 1}")
    return range(first, last + 1)


def _changed(base: FFNConfig, change: Any, key: str) -> FFNConfig:
    if isinstance(change, str):
        change = {"arm": change}
    if not isinstance(change, dict) or not change:
        raise UserError(
            f"{key}={change!r} must be the name of an arm, or the keys that differ: {{parameters: {{...}}}}"
        )
    for name in change:
        if name not in _CHANGEABLE:
            raise unknown(f"key of {key}", str(name), list(_CHANGEABLE))
    change = dict(change)
    if "arm" in change:
        base = dataclasses.replace(base, **_arm(str(change.pop("arm")), key))
    if "formula" in change:
        base = dataclasses.replace(base, name="custom", parameters={}, from_output="")
    if isinstance(change.get("parameters"), dict):
        change["parameters"] = {**base.parameters, **change["parameters"]}
    return dataclasses.replace(base, **change)


def catalogue() -> dict[str, dict[str, Any]]:
    """Return the keys of every arm in conf/ffn by its name, with defaults for those its file leaves out."""
    return {name: _stored(name) for name in choices("ffn")}


def unknown_arm(name: str, as_formula: str, kind: str = "arm") -> UserError:
    """Return the error for a name that no arm of conf/ffn has.

    Args:
        as_formula: what to type where the name turns out to be a formula.
        kind: what the name is one of.
    """
    if re.search(r"[()*+/<>^]|\b(x|gate|up)\b", name):
        return UserError(f"{name!r} is a formula, not the name of an arm: write {as_formula}")
    return unknown(kind, name, choices("ffn"))


def _arm(name: str, key: str = "ffn.per_layer") -> dict[str, Any]:
    if name not in choices("ffn"):
        raise unknown_arm(name, f"{key}.formula='{name}'")
    return _stored(name)


def _stored(name: str) -> dict[str, Any]:
    stored = read_yaml(FOLDER / "ffn" / f"{name}.yaml")
    return {
        "parameters": {},
        "init_scale": None,
        "from_output": "",
        **{key: stored[key] for key in _OF_AN_ARM if key in stored},
    }
