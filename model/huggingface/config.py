"""Translate a config.json of Hugging Face Transformers into our configuration.

A model that this decoder does not support is refused with the key and value that make the difference.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from conf.arms import catalogue
from kernels.common.errors import UserError, unknown
from kernels.formula import FormulaError, parse
from model.huggingface.layout import (
    ACTIVATIONS,
    APERTUS,
    ARCEE,
    CLASSES,
    FORMULA,
    GATED,
    LLAMA,
    QWEN3,
    WITH_QK_NORM,
    NativeActivation,
    TransformersLayout,
    canonical,
    variants,
)

Arm = tuple[str, dict[str, Any]]  # a formula and its parameters

# What Transformers takes for keys that a config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    LLAMA: {"hidden_act": "silu"},
    QWEN3: {"hidden_act": "silu", "head_dim": 128, "num_key_value_heads": 32},
    ARCEE: {"hidden_act": "relu2", "rms_norm_eps": 1e-5},
    APERTUS: {"hidden_act": "xielu", "rms_norm_eps": 1e-5, "rope_theta": 12e6},
    FORMULA: {"rms_norm_eps": 1e-5},
}


class TensorStore(Protocol):
    """The tensors beside a config.json. Some classes store constants of their activation among them."""

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in fp32."""
        ...


@dataclasses.dataclass(frozen=True)
class ImportedConfig:
    """The configuration of an imported decoder."""

    model: dict[str, Any]  # the group `model`
    arms: list[Arm]  # of each layer
    widths: list[int]  # d_ff of each layer
    layout: TransformersLayout
    warning: str = ""

    @property
    def vocab_size(self) -> int:
        """The number of rows of the embedding."""
        return self.model["vocab_size"]


def read_config(content: dict[str, Any], source: Path, stored: TensorStore) -> ImportedConfig:
    """Return the configuration that `content`, the object in `source`/config.json, describes.

    Raises:
        UserError: a key is missing, or its value is not supported.
    """
    path = source / "config.json"
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CLASSES:
        raise unknown(f"model_type in {path}:", str(model_type), CLASSES)
    content = _DEFAULTS[model_type] | content
    _refuse_unsupported(content, path)
    n_layers, n_heads = _count(content, "num_hidden_layers", path), _count(content, "num_attention_heads", path)
    rope = content.get("rope_parameters") or {}
    sizes = {
        "d_model": _count(content, "hidden_size", path),
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": _count(content, "num_key_value_heads", path, n_heads),
        "head_dim": _count(content, "head_dim", path, 0) or None,
        "vocab_size": _count(content, "vocab_size", path),
        "rope_theta": _number({**content, **rope}, "rope_theta", path, 10000.0),
        "norm_eps": _number(content, "rms_norm_eps", path, 1e-6),
        "tie_embeddings": bool(content.get("tie_word_embeddings", False)) and not _has_own_head(stored),
        "qk_norm": model_type in WITH_QK_NORM or bool(content.get("qk_norm", False)),
    }
    if model_type == FORMULA:
        arms, widths = _layers(content, n_layers, path)
        layout = TransformersLayout(FORMULA)
        cap = content.get("final_logit_softcapping") or 0.0
        sizes["logit_softcap"] = _number({"final_logit_softcapping": cap}, "final_logit_softcapping", path, 0.0)
    else:
        layout = _native_layout(model_type, content.get("hidden_act"), path)
        arms = [_native_arm(layout, index, stored) for index in range(n_layers)]
        widths = [_count(content, "intermediate_size", path)] * n_layers
    warning = ""
    if content.get("tie_word_embeddings") and not sizes["tie_embeddings"]:
        warning = (
            f"{path} has tie_word_embeddings=true, and lm_head.weight beside it is another matrix: imported untied"
        )
    return ImportedConfig(sizes | _widths(arms, widths, path), arms, widths, layout, warning)


def key_of(formula: str, parameters: dict[str, Any]) -> tuple:
    """Return a key that is equal for arms that compute the same function of the same learned parameters."""
    parsed = parse(formula, parameters)
    return canonical(parsed.tree, parsed.fixed), parsed.gated, tuple(sorted(parsed.learned.items()))


def choice_of(arm: Arm) -> str:
    """Return the name of an arm in conf/ffn; "" if it has none."""
    wanted = key_of(*arm)
    for name, known in catalogue().items():
        if known["formula"] and key_of(known["formula"], known["parameters"]) == wanted:
            return name
    return ""


def _has_own_head(stored: TensorStore) -> bool:
    """Return whether an output projection is stored that is not the embedding."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    return {head, embedding} <= stored.names() and not stored.tensor(head).equal(stored.tensor(embedding))


def _refuse_unsupported(content: dict[str, Any], path: Path) -> None:
    """Raise a UserError if the model has positions, biases or weights that this decoder does not support."""
    if content["model_type"] == APERTUS and not (content.get("rope_parameters") or content.get("rope_scaling")):
        content = content | {"rope_parameters": {"rope_type": "llama3"}}  # what Transformers then takes
    for key in ("rope_parameters", "rope_scaling"):
        rope = content.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{path} has {key}={rope!r}: only an object with rope_type is supported")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{path} has {key} of type {kind!r}: only plain rotary positions (default) are supported")
    rotary_factor = {**content, **(content.get("rope_parameters") or {})}.get("partial_rotary_factor", 1.0)
    if rotary_factor != 1.0:
        raise UserError(
            f"{path} has partial_rotary_factor={rotary_factor}: only 1.0 (all channels of a head) is supported"
        )
    for key in ("attention_bias", "mlp_bias"):
        if content.get(key):
            raise UserError(f"{path} has {key}={content[key]}: biases are not supported (false)")
    layer_types = content.get("layer_types") or []
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
        raise UserError(f"{path} has layer_types={layer_types!r}: expected a list of names")
    kinds = {"sliding_attention"} if content.get("use_sliding_window") else set(layer_types)
    if kinds - {"full_attention"}:
        raise UserError(f"{path} has layers of {min(kinds - {'full_attention'})}: only full_attention is supported")
    if content.get("quantization_config"):
        raise UserError(f"{path} has a quantization_config: only plain weights (fp32, fp16, bf16) are supported")


def _count(content: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = content.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise UserError(f"{path} has no {key}")
    if type(value) is not int or value < 1:
        raise UserError(f"{path} has {key}={value!r}: expected a whole number above 0")
    return value


def _number(content: dict[str, Any], key: str, path: Path, default: float) -> float:
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{path} has {key}={value!r}: expected a number")
    return float(value)


def _native_layout(model_type: str, hidden_act: Any, path: Path) -> TransformersLayout:
    if not isinstance(hidden_act, str) or hidden_act not in ACTIVATIONS:
        raise unknown(f"hidden_act in {path}:", str(hidden_act), ACTIVATIONS)
    native = ACTIVATIONS[hidden_act]
    stored = {name: theirs for name, (theirs, _) in native.learned.items()}
    return TransformersLayout(model_type, hidden_act, stored, native.fixed)


def _native_arm(layout: TransformersLayout, index: int, stored: TensorStore) -> Arm:
    buffers = dict(layout.buffers)
    for name in buffers:
        tensor = f"model.layers.{index}.mlp.act_fn.{name}"
        if tensor in stored.names():
            number = float(stored.tensor(tensor))
            # A stored constant that was rounded to fp32 stands for the exact one.
            buffers[name] = number if abs(number - buffers[name]) > 1e-6 * abs(buffers[name]) else buffers[name]
    native = next(
        each for each in reversed(variants(layout.hidden_act)) if all(buffers[n] == v for n, v in each.absent.items())
    )
    parameters = native.parameters | {name: buffers[name] for name in native.fixed}
    if layout.model_type not in GATED:
        return native.formula, parameters
    return f"{_of_gate(native)} * up", parameters


def _of_gate(native: NativeActivation) -> str:
    """Return an activation's formula of x as a formula of gate, in brackets unless it can be a factor without them."""
    tree = parse(native.formula, native.parameters).tree
    text = re.sub(r"\bx\b", "gate", native.formula)
    return text if tree.kind in ("call", "symbol", "**") else f"({text})"


def _layers(content: dict[str, Any], n_layers: int, path: Path) -> tuple[list[Arm], list[int]]:
    layers = content.get("ffn")
    if not isinstance(layers, list) or len(layers) != n_layers or not all(isinstance(each, dict) for each in layers):
        raise UserError(f"{path} needs in ffn a list of {n_layers} layers, each with formula, parameters and d_ff")
    arms, widths = [], []
    for index, layer in enumerate(layers):
        formula, parameters = layer.get("formula"), layer.get("parameters") or {}
        try:
            if not isinstance(formula, str) or not isinstance(parameters, dict):
                raise UserError(f"{path} has no formula in ffn[{index}], or parameters that are not an object")
            parse(formula, parameters)
        except FormulaError as error:
            raise UserError(f"{path} has an invalid formula in ffn[{index}]: {error}") from error
        arms.append((formula, parameters))
        widths.append(_count(layer, "d_ff", path))
    return arms, widths


def _widths(arms: list[Arm], widths: list[int], path: Path) -> dict[str, int | None]:
    """Return the keys of the group `model` that give every layer its width."""
    if len(set(widths)) == 1:
        return {"d_ff": widths[0]}
    gated = [parse(*arm).gated for arm in arms]
    wide = [width for width, has_gate in zip(widths, gated, strict=True) if has_gate]
    base = wide[0] if wide else 0
    if any(width != (base if has_gate else base * 3 // 2) for width, has_gate in zip(widths, gated, strict=True)):
        raise UserError(
            f"{path} has layers of the widths {', '.join(map(str, widths))}: they must be equal, or 3/2 as wide where ungated"
        )
    return {"d_ff": None, "d_ff_gated": base}
